"""What one expert of a mixture adds, taken out of the sum and put back into it.

It is computed again from what the experts were given, by the module itself and on the expert's own tokens alone. What
is assigned takes its place: the model goes on with the sum that it has, and the difference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnsight.anatomy.checked import check_shape, check_tensor
from nnsight.anatomy.mlps.inside import Mixture
from nnsight.anatomy.parts import module_at, placed, standing
from nnsight.block.rows import RowRun
from nnsight.core.escape import let_escape
from nnsight.core.history import user_place
from nnsight.core.run import Run
from nnsight.core.state import Visit
from nnsight.errors import WriteError
from nnsight.views import Views

if TYPE_CHECKING:
    from nnsight.node import Node


@dataclass
class Had:
    """What one expert adds where a run stands, and the tensor that was handed out for it.

    Attributes:
        replaced: What was put inside it, by the names.
        inner: What was handed out of its inside.
        is_changed: Whether something was put in the place of what it adds.
    """

    adds: Tensor
    view: Tensor | None = None
    replaced: dict[str, Tensor] = field(default_factory=dict)
    inner: dict[str, Tensor] = field(default_factory=dict)
    is_changed: bool = False


class _Maker:
    """What views.py asks for: how a change in place comes back into the sum."""

    kind = "output"

    def __init__(self, mixture: Mixture, number: int, name: str) -> None:
        self.mixture, self.number, self.name = mixture, number, f"{name}.output"

    def pick(self, node: Node, visit: Visit) -> tuple[()]:
        return ()  # other experts' changes of the same sum are none of this one's

    def write_back(self, node: Node, view: Tensor, _: Any) -> None:
        had = kept(node)[key_of(node, self.mixture, self.number)]
        check_current(self.name, view, had.view)
        add(node, self.mixture, view - had.adds)
        had.adds, had.is_changed = view.clone(), True


def check_current(name: str, view: Tensor, handed: Tensor | None) -> None:
    """Raises WriteError for a change in place of what was handed out before another change of the same expert."""
    if view is not handed:
        raise WriteError(
            f"`{name}` was changed in place, and is of before another change of this expert.",
            instead=f"ask for `{name}` again behind that",
        )


def read_output(root: Node, mixture: Mixture, number: int, name: str) -> Tensor:
    node = module_at(root, mixture.path)
    run, visit = at_output(node)
    if visit.port is None:  # of a call of the block's own, which is over
        return adds(node, run, mixture, number, visit)
    had = had_of(node, run, mixture, number, visit)
    if had.view is None:
        had.view = had.adds.clone()
        if had.view.requires_grad and torch.is_grad_enabled() and visit.versions is None:
            lead_through(node, run, mixture, had.view, had.adds)
        Views.of(run).add(_Maker(mixture, number, name), node, (), had.view)
    return had.view


def write_output(root: Node, mixture: Mixture, number: int, name: str, value: Any) -> None:
    check_tensor(value)
    node = module_at(root, mixture.path)
    run, visit = at_output(node)
    if visit.port is None:
        raise WriteError(f"`{name}.output` is of a call that is over.", you_wrote=user_place().source)
    had = had_of(node, run, mixture, number, visit)
    if value is had.view:  # passes untouched; a change in place is written back as such
        return
    check_shape(f"{name}.output", had.adds, value)
    add(node, mixture, value - had.adds)
    had.adds, had.view, had.is_changed = value.clone(), None, True


def at_output(node: Node) -> tuple[Run | RowRun, Visit]:
    run = node._run()
    try:
        return run, run.read(node._module, "output")
    except AttributeError as error:
        let_escape(error)
        raise


def had_of(node: Node, run: Run | RowRun, mixture: Mixture, number: int, visit: Visit) -> Had:
    every, key = kept(node), key_of(node, mixture, number)
    if key not in every:
        every[key] = Had(adds(node, run, mixture, number, visit))
    had: Had = every[key]
    return had


def kept(node: Node) -> dict[Any, Any]:
    return Views.of(node._run()).kept


def key_of(node: Node, mixture: Mixture, number: int) -> Any:
    return "expert", mixture.path, number, node._run().index


def adds(node: Node, run: Run | RowRun, mixture: Mixture, number: int, visit: Visit) -> Tensor:
    if mixture.is_stacked:
        return as_added(run, mixture, visit, standing(run, mixture.out, visit.output).clone())
    made = mixture.alone(node, inputs_of(node, run, visit), number)
    return as_added(run, mixture, visit, made)


def inputs_of(node: Node, run: Run | RowRun, visit: Visit) -> Any:
    """What the experts' module is given, `(args, kwargs)`: of a row, its own part."""
    return (visit if visit.port is None else run.here(node._module, "input")).value("input")


def as_added(run: Run | RowRun, mixture: Mixture, visit: Visit, made: Tensor) -> Tensor:
    """What an expert makes, times its weight, as it is added, [prompt, token, model]."""
    total = standing(run, mixture.out, visit.output)
    made = made.reshape(total.shape).to(total.dtype)
    return made if mixture.factor == 1 else made * mixture.factor


def add(node: Node, mixture: Mixture, more: Tensor) -> None:
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


def lead_through(node: Node, run: Run | RowRun, mixture: Mixture, view: Tensor, adds: Tensor) -> None:
    """Has the model go on with the same sum, made of `view` in the place of `adds`: so that has a gradient."""
    part, output = mixture.out, run.here(node._module, "output").output
    led = _Through.apply(standing(run, part, output), view, adds, mixture.factor)
    run.put(node._module, "output", placed(part, output, led))
