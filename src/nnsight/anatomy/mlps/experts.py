"""One expert of a mixture: what it adds, read and assigned.

The experts of a layer are computed together, and summed. What one of them adds is computed again from what it was
given, by the module itself and on its own tokens alone. What is assigned takes its place in the sum: the model goes on
with the sum that it has, and the difference. The sum that nobody changes stays as it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor

from nnsight.anatomy.layout import Part, Slab
from nnsight.anatomy.mlps.inside import Mixture
from nnsight.anatomy.values import (
    check_shape,
    check_tensor,
    module_at,
    placed,
    read,
    read_sum,
    standing,
    write,
    write_sum,
)
from nnsight.block.rows import RowRun
from nnsight.core.escape import let_escape, raise_escaped
from nnsight.core.history import user_place
from nnsight.core.run import Run
from nnsight.core.state import Visit
from nnsight.errors import UnknownIndexError, UnknownNameError, WriteError
from nnsight.views import Views

if TYPE_CHECKING:
    from nnsight.node import Node


class Experts:
    """The experts of one layer, by their numbers."""

    __slots__ = ("_index", "_mixture", "_root")

    def __init__(self, root: Node, mixture: Mixture, index: int) -> None:
        self._root, self._mixture, self._index = root, mixture, index

    def __len__(self) -> int:
        return self._mixture.count(self._root._module)

    def __getitem__(self, number: SupportsIndex) -> Expert:
        count = len(self)
        try:
            number = index(number)  # a number in `chosen` is a tensor
        except TypeError:
            raise TypeError(f"an expert is asked for by its number, `experts[3]`, not by {number!r}") from None
        if not -count <= number < count:
            raise UnknownIndexError(
                f"Layer {self._index} has no expert {number}.",
                you_wrote=user_place().source,
                it_has=f"{count} experts: 0 to {count - 1}",
            )
        return Expert(self._root, self._mixture, number % count, self._index)

    def __setitem__(self, number: Any, value: Any) -> None:
        raise WriteError(
            f"An expert of layer {self._index} is not a value that can be assigned.",
            you_wrote=user_place().source,
            instead=f"mlp.experts[{number!r}].output = ...",
        )

    def __iter__(self) -> Iterator[Expert]:
        return map(self.__getitem__, range(len(self)))

    def __getattr__(self, name: str) -> Any:
        raise _unknown(name, "mlp.experts", "mlp.experts[3].output, or mlp.output, which is the sum")

    def __repr__(self) -> str:
        return f"layer {self._index}.mlp.experts: {len(self)}, computed together in `{self._mixture.path}`"


class Expert:
    """One expert of a layer.

    Attributes:
        number: The first is 0.
    """

    __slots__ = ("_index", "_mixture", "_root", "number")

    def __init__(self, root: Node, mixture: Mixture, number: int, index: int) -> None:
        self._root, self._mixture, self.number, self._index = root, mixture, number, index

    @property
    def output(self) -> Tensor:
        """What this expert adds, [prompt, token, model]: times its weight, and 0 for tokens that don't go to it.

        Together with those of the other experts, and `shared.output` where there is one, it is what the MLP adds; where
        a norm stands behind that, what the norm is given. Computed for this, mostly: the model computes the sum alone.
        """
        if self._mixture.is_stacked:
            return read(self._root, self._part())
        return _read(self._root, self._mixture, self.number, repr(self))

    @output.setter
    def output(self, value: Any) -> None:
        if self._mixture.is_stacked:
            write(self._root, self._part(), value)
        else:
            _write(self._root, self._mixture, self.number, repr(self), value)

    def _part(self) -> Part:
        """Where it is, in a mixture whose module returns what each expert makes."""
        mixture = self._mixture
        slab = Slab(self.number, mixture.count(self._root._module))
        return replace(mixture.out, flat=True, piece=slab, scale=mixture.factor)

    def __getattr__(self, name: str) -> Any:
        raise_escaped()  # an AttributeError of the model's, which came out of the property
        raise _unknown(name, "mlp.experts[...]", ".output, what the expert adds")

    def __repr__(self) -> str:
        return f"layers[{self._index}].mlp.experts[{self.number}]"


class Shared:
    """What a layer's MLP adds beside its experts that are chosen: a shared expert, mostly."""

    __slots__ = ("_index", "_parts", "_root")

    def __init__(self, root: Node, parts: tuple[Part, ...], index: int) -> None:
        self._root, self._parts, self._index = root, parts, index

    @property
    def output(self) -> Tensor:
        """What is added, [prompt, token, model]: the rest of the sum, where no module returns it as it is added."""
        return read_sum(self._root, self._parts)

    @output.setter
    def output(self, value: Any) -> None:
        write_sum(self._root, self._parts, value)

    def __getattr__(self, name: str) -> Any:
        raise_escaped()
        raise _unknown(name, "mlp.shared", ".output, what is added beside the chosen experts")

    def __repr__(self) -> str:
        return f"layers[{self._index}].mlp.shared: {' + '.join(map(str, self._parts))}"


def _unknown(name: str, of: str, instead: str) -> Exception:
    if name.startswith("__"):
        return AttributeError(name)
    return UnknownNameError(f"`{of}` has no `{name}`.", you_wrote=user_place().source, instead=instead)


@dataclass
class _Had:
    """What one expert adds where a run stands, and the tensor that was handed out for it."""

    adds: Tensor
    view: Tensor | None = None


class _Maker:
    """What views.py asks for: how a change in place comes back into the sum."""

    kind = "output"

    def __init__(self, mixture: Mixture, number: int, name: str) -> None:
        self.mixture, self.number, self.name = mixture, number, f"{name}.output"

    def pick(self, node: Node, visit: Visit) -> tuple[()]:
        return ()  # other experts' changes of the same sum are none of this one's

    def write_back(self, node: Node, view: Tensor, _: Any) -> None:
        had = _kept(node)[_key(node, self.mixture, self.number)]
        _add(node, self.mixture, view - had.adds)
        had.adds = view.clone()


def _read(root: Node, mixture: Mixture, number: int, name: str) -> Tensor:
    node = module_at(root, mixture.path)
    run, visit = _at_output(node)
    if visit.port is None:  # of a call of the block's own, which is over
        return _adds(node, run, mixture, number, visit)
    had = _had(node, run, mixture, number, visit)
    if had.view is None:
        had.view = had.adds.clone()
        if had.view.requires_grad and torch.is_grad_enabled() and visit.versions is None:
            _lead_through(node, run, mixture, had)
        Views.of(run).add(_Maker(mixture, number, name), node, (), had.view)
    return had.view


def _write(root: Node, mixture: Mixture, number: int, name: str, value: Any) -> None:
    check_tensor(value)
    node = module_at(root, mixture.path)
    run, visit = _at_output(node)
    if visit.port is None:
        raise WriteError(f"`{name}.output` is of a call that is over.", you_wrote=user_place().source)
    had = _had(node, run, mixture, number, visit)
    if value is had.view:  # passes untouched; a change in place is written back as such
        return
    check_shape(f"{name}.output", had.adds, value)
    _add(node, mixture, value - had.adds)
    had.adds, had.view = value.clone(), None


def _at_output(node: Node) -> tuple[Run | RowRun, Visit]:
    run = node._run()
    try:
        return run, run.read(node._module, "output")
    except AttributeError as error:
        let_escape(error)
        raise


def _had(node: Node, run: Run | RowRun, mixture: Mixture, number: int, visit: Visit) -> _Had:
    kept, key = _kept(node), _key(node, mixture, number)
    if key not in kept:
        kept[key] = _Had(_adds(node, run, mixture, number, visit))
    had: _Had = kept[key]
    return had


def _kept(node: Node) -> dict[Any, Any]:
    return Views.of(node._run()).kept


def _key(node: Node, mixture: Mixture, number: int) -> Any:
    run = node._run()
    return "expert", mixture.path, number, run.index if isinstance(run, RowRun) else None


def _adds(node: Node, run: Run | RowRun, mixture: Mixture, number: int, visit: Visit) -> Tensor:
    inputs: Any = visit.args, visit.kwargs
    if isinstance(run, RowRun) and visit.port is not None:
        whole = run.whole.state.visit
        assert whole is not None
        inputs = run.rows.shares(node._module, whole).take(whole, "input", run.index)
    made = mixture.alone(node, inputs, number)
    total = standing(run, mixture.out, visit.output)
    made = made.reshape(total.shape).to(total.dtype)
    return made if mixture.factor == 1 else made * mixture.factor


def _add(node: Node, mixture: Mixture, more: Tensor) -> None:
    """Has the model go on with a sum to which something was added."""
    run, part = node._run(), mixture.out
    more = more if mixture.factor == 1 else more / mixture.factor

    def with_more(visit: Visit, more: Tensor) -> Any:
        return placed(part, visit.output, standing(run, part, visit.output) + more)

    run.write_output(node._module, more, with_more)


class _Through(torch.autograd.Function):
    """The sum as it is, bit for bit, whose gradient passes through what was handed out for one expert."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, view: Tensor, adds: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        of_one = grad / ctx.factor
        return grad, of_one, -of_one, None


def _lead_through(node: Node, run: Run | RowRun, mixture: Mixture, had: _Had) -> None:
    """Has the model go on with the same sum, made of what is handed out: so that has a gradient."""
    part, module = mixture.out, node._module
    whole = run.whole if isinstance(run, RowRun) else run
    visit = whole.state.visit
    assert visit is not None

    def led(output: Any) -> Any:
        return placed(part, output, _Through.apply(standing(run, part, output), had.view, had.adds, mixture.factor))

    if isinstance(run, RowRun):
        own = led(run.part(module, "output", visit).output)
        visit.output = run.rows.shares(module, visit).put(visit, "output", run.index, own)
    else:
        visit.output = led(visit.output)
    visit.changed = True
