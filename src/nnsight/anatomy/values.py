"""Reading and assigning a part of what passes a module's port: the residual stream in a layer's tuple, scaled or not.

Where the value is the very tensor that passes, it is handed out as it is. Where it is made of that, by a scale or a
sum, or where the model adds to that tensor itself afterwards or gives it to others too, a copy is handed out. What a
block changes in it in place is written back before the model goes on (views.py), and where there is a graph, the copy
is in it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nnsight.anatomy.checked import check_shape, check_tensor
from nnsight.anatomy.layout import Part, Piece, inside, with_inside
from nnsight.block.rows import RowRun, whole_of
from nnsight.core.escape import let_escape
from nnsight.core.history import user_place
from nnsight.core.specs import specs_in
from nnsight.core.state import Visit
from nnsight.core.values import is_fake
from nnsight.errors import WriteError
from nnsight.views import Views

if TYPE_CHECKING:
    from nnsight.core.run import Run
    from nnsight.node import Node


def module_at(root: Node, path: str) -> Node:
    """A module of the model, in the run that `root` belongs to.

    Raises:
        UnknownNameError: Another module stands there than the layout was found with, or above it.
    """
    try:
        return root._at(_names(path)) if path else root
    except AttributeError as error:
        let_escape(error)
        raise


@lru_cache(maxsize=65536)
def _names(path: str) -> tuple[str, ...]:
    return tuple(path.split("."))


def read(root: Node, part: Part) -> Tensor:
    """A part's value, as it is added to the residual stream or stands in it."""
    node = module_at(root, part.path)
    try:
        if not _passes(part):
            return _copy(node, _made_for(root, node, part))
        if not part.flat:
            value: Tensor = inside(node.output if part.port == "output" else node.inputs, part.at)
            return copied_where_closed(node, node._module, part, value)
        return handed(node, node._module, part, node._run().read(node._module, part.port))
    except AttributeError as error:  # the model's own
        let_escape(error)
        raise


def write(root: Node, part: Part, value: Any) -> None:
    """Has the model go on with another value there."""
    check_tensor(value)
    node = module_at(root, part.path)
    if _passes(part):
        _assign(node, part, value)
    else:
        made = _made_for(root, node, part)
        if not any(value is had for had in _had(node, made)):  # what was read passes untouched
            _assign(node, part, _divided(part, value, made.factor))


def factor_of(root: Node, part: Part) -> Any:
    """What a part is multiplied by on its way into the stream: a number, or one for each channel, [model]."""
    if part.by is None:
        return part.scale
    path, _, name = part.by.rpartition(".")
    vector: Tensor = getattr(module_at(root, path), name).detach()  # the model multiplies by it itself
    return vector if part.scale == 1 else vector * part.scale


def _divided(part: Part, value: Tensor, factor: Any) -> Tensor:
    """What has to pass for this to be what is added.

    Raises:
        WriteError: The model multiplies a channel by 0, in which something else is to be added.
    """
    if not isinstance(factor, Tensor) or is_fake(factor) or is_fake(value):
        return value / factor
    lost = factor == 0
    if bool((value.detach() != 0)[..., lost].any()):
        raise WriteError(
            f"The model multiplies {int(lost.sum())} channels of this by 0, in `{part.by}`: a write there is lost.",
            you_wrote=user_place().source,
            instead="0 in these channels, or the stream itself, layer.output",
        )
    return torch.where(lost, value.new_zeros(()), value / factor)


def _passes(part: Part) -> bool:
    """Whether it is the very tensor that passes, or a view of it that others can have views beside."""
    return (
        part.scale == 1 and part.by is None and not (part.changes or part.shared) and not isinstance(part.piece, Piece)
    )


_VIEWS = ("Slice", "Select", "View", "Transpose", "Permute", "Unsqueeze", "Squeeze", "Unflatten")  # of one tensor


def is_one_of_several(value: Tensor) -> bool:
    """Whether a function returned it beside other views of one tensor: torch lets nobody change such a one in place."""
    made_by = value.grad_fn
    while made_by is not None and made_by.name().startswith(_VIEWS):
        made_by = made_by.next_functions[0][0]
    return made_by is not None and made_by.name().startswith(("Split", "Unbind"))


def handed(node: Node, module: nn.Module, part: Part, visit: Visit) -> Tensor:
    """A view of what passes: where there is a graph, and it is of all, the model goes on with that."""
    run, kind = node._run(), part.port
    whole = visit.value(kind)
    value = standing(run, part, whole)
    if visit.port is None or visit.versions is not None or part.piece is not None:
        return value
    if not (value.requires_grad and torch.is_grad_enabled()):
        return value
    if isinstance(run, RowRun):
        return _handed_of_row(node, run, module, part, value)
    visit.replace(kind, placed(part, whole, value))
    return value


def _handed_of_row(node: Node, run: RowRun, module: nn.Module, part: Part, value: Tensor) -> Tensor:
    """The same of a row: the batch is made anew of it, so what is changed in it in place is written back."""
    kind, views = part.port, Views.of(run)
    maker = views.kept.setdefault(("copy", part, module), _Made(part, module=module))
    own = run.here(module, kind).value(kind)
    if had := views.find(maker, run, inside(own, part.at)):
        known: Tensor = had[0]
        return known
    run.put(module, kind, placed(part, own, value))
    views.add(maker, node, maker.pick(node, run.here(module, kind)), value)
    return value


def read_sum(root: Node, parts: tuple[Part, ...]) -> Tensor:
    """The sum of several parts, in the order in which the model makes them."""
    if len(parts) == 1:
        return read(root, parts[0])
    node = module_at(root, parts[-1].path)
    try:
        made, earlier = _sum_of(root, node, parts)
        copied = _copy(node, made)
        _keep(node, parts, made, earlier)
        return copied
    except AttributeError as error:
        let_escape(error)
        raise


def write_sum(root: Node, parts: tuple[Part, ...], value: Any) -> None:
    """Has the last of several parts be such that they add up to this."""
    if len(parts) == 1:
        write(root, parts[0], value)
        return
    check_tensor(value)
    node = module_at(root, parts[-1].path)
    made, earlier = _sum_of(root, node, parts)
    rest: Any = made.rest
    if not any(value is had for had in _had(node, made)):
        check_shape(f"{node._label}.{parts[-1].port}", rest, value)
        _assign(node, parts[-1], _divided(parts[-1], value - rest, made.factor))
    _keep(node, parts, made, earlier)


_Earlier = list[tuple[Part, nn.Module, Visit]]  # the parts before the last, and where their values passed


def _sum_of(root: Node, node: Node, parts: tuple[Part, ...]) -> tuple[_Made, _Earlier]:
    """How the sum is made at its last part's module, `node`.

    What came before is known there, where the run stands at it already: the rows of a batch are asked one by one.
    """
    run, kept = node._run(), _kept(node)
    if (parts, run.index) in kept:
        return kept[parts, run.index]
    if parts in kept:
        earlier: _Earlier = kept[parts]
        values = [_of_earlier(root, run, *one) for one in earlier]
    else:
        earlier, values = [], []
        for part in parts[:-1]:
            values.append(read(root, part))
            visit = whole_of(run).state.visit
            assert visit is not None
            earlier.append((part, module_at(root, part.path)._module, visit))
    return _Made(parts[-1], sum(values[1:], values[0]), factor=factor_of(root, parts[-1])), earlier


def _of_earlier(root: Node, run: Run | RowRun, part: Part, module: nn.Module, visit: Visit) -> Tensor:
    output = visit.output
    if isinstance(run, RowRun):
        output = run.rows.shares(module, visit).take(visit, "output", run.index)
    value = standing(run, part, output)
    return value if part.scale == 1 and part.by is None else value * factor_of(root, part)


def _keep(node: Node, parts: tuple[Part, ...], made: _Made, earlier: _Earlier) -> None:
    run, kept = node._run(), _kept(node)
    kept[parts], kept[parts, run.index] = earlier, (made, earlier)


def _kept(node: Node) -> dict[Any, Any]:
    """What was noted of the views that were had where the run stands; nothing where that isn't this module."""
    run = node._run()
    visit = whole_of(run).state.visit
    here = visit is not None and visit.port is not None and visit.port.module is whole_of(run).own(node._module)
    return Views.of(run).kept if here else {}


class _Made:
    """How a value is made of what passes a port, and back. What views.py asks for.

    Args:
        part: Which part of the port's value.
        rest: What is added to it.
        module: Where it passes, if that isn't the node's own module: a site inside one, say.
        factor: What it is multiplied by, where that is more than the part's scale.
    """

    def __init__(
        self, part: Part, rest: Tensor | None = None, module: nn.Module | None = None, factor: Any = None
    ) -> None:
        self.name, self.kind, self.part, self.rest, self.module = str(part), part.port, part, rest, module
        self.factor = part.scale if factor is None else factor
        self._is_same = part.scale == 1 and part.by is None and rest is None

    def where(self, node: Node) -> nn.Module:
        return node._module if self.module is None else self.module

    def pick(self, node: Node, visit: Visit) -> Tensor:
        found: Tensor = inside(visit.value(self.kind), self.part.at)
        return found

    def make(self, value: Tensor) -> Tensor:
        made = value.clone() if self._is_same else value * self.factor
        return made if self.rest is None else made + self.rest

    def write_back(self, node: Node, view: Tensor, _: Tensor) -> None:
        added = view if self.rest is None else view - self.rest
        _assign(node, self.part, _divided(self.part, added, self.factor), self.module)


@lru_cache(maxsize=4096)
def _made_of(part: Part) -> _Made:
    return _Made(part)


def _made_for(root: Node, node: Node, part: Part) -> _Made:
    """The same for one run, whose own parameter it may be multiplied by."""
    if part.by is None:
        return _made_of(part)
    node._run().read(node._module, part.port)
    made: _Made = _kept(node).setdefault(("by", part), _Made(part, factor=factor_of(root, part)))
    return made


def copied_where_closed(node: Node, site: nn.Module, part: Part, value: Tensor) -> Tensor:
    """What passes a site inside a module; a copy that is written back, where torch lets nobody change it in place."""
    run = node._run()
    visit = whole_of(run).state.visit
    if visit is None or visit.port is None or visit.versions is not None:
        return value
    if not isinstance(run, RowRun):
        if is_one_of_several(value):
            with torch.enable_grad():
                value = value.clone()
            visit.replace(part.port, placed(part, visit.value(part.port), value))
        return value
    if not is_one_of_several(value) and visit.views is None:
        return value
    views = Views.of(run)
    made = views.kept.setdefault(("copy", part, site), _Made(part, module=site))
    # Where a copy was handed out before, what the model goes on with is made of that.
    return _copy(node, made) if is_one_of_several(value) or views.has(made, run) else value


def _copy(node: Node, made: _Made) -> Tensor:
    run = node._run()
    visit = run.read(made.where(node), made.kind)
    value = made.pick(node, visit)
    if visit.port is None:  # of a call of the block's own, which is over
        return made.make(_shaped(run, made.part, value))
    views = Views.of(run)
    had = views.find(made, run, value)
    if had:
        return had[0]
    copied = made.make(_shaped(run, made.part, value))
    if copied.requires_grad and torch.is_grad_enabled():
        value = _led_through(node, made, run, value, copied)
    views.add(made, node, value, copied)
    return copied


def _had(node: Node, made: _Made) -> list[Any]:
    """The copy that was handed out where the run stands, if nothing has changed since."""
    run = node._run()
    visit = run.read(node._module, made.kind)
    return [] if visit.port is None else Views.of(run).find(made, run, made.pick(node, visit))


class _Through(torch.autograd.Function):
    """The value that the model made, bit for bit, whose gradient passes through the copy that was made of it."""

    @staticmethod
    def forward(ctx: Any, copied: Tensor, value: Tensor, rest: Tensor | None, scale: Any) -> Tensor:
        if isinstance(scale, Tensor):  # by 0, whatever passes is lost: so is its gradient
            scale = scale.masked_fill(scale == 0, torch.inf)
        ctx.scale, ctx.has_rest = scale, rest is not None
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        of_copy = grad / ctx.scale
        return of_copy, None, -of_copy if ctx.has_rest else None, None


def _led_through(node: Node, made: _Made, run: Run | RowRun, value: Tensor, copied: Tensor) -> Tensor:
    """Has the model go on with the same value, made of the copy: so the copy has a gradient. What stands there then."""
    module, kind = made.where(node), made.kind
    if whole_of(run).here(module, kind).versions is not None:  # computed again in the backward pass, without the copy
        return value
    led = _Through.apply(copied, _shaped(run, made.part, value), made.rest, made.factor)
    run.put(module, kind, placed(made.part, run.here(module, kind).value(kind), led))
    return made.pick(node, run.here(module, kind))


def _assign(node: Node, part: Part, value: Tensor, module: nn.Module | None = None) -> None:
    run, module = node._run(), node._module if module is None else module

    def replaced(whole: Any, new: Tensor) -> Any:
        check_shape(f"{node._label}.{part.port}", standing(run, part, whole), new, run)
        return placed(part, whole, new)

    if part.port == "input":
        run.write_inputs(module, lambda visit: replaced(visit.value("input"), value))
    else:
        run.write_output(module, value, lambda visit, new: replaced(visit.output, new))


def standing(run: Run | RowRun, part: Part, whole: Any) -> Tensor:
    """The part of a port's value, [prompt, token, model]: the tensor itself, or a view of it."""
    return _shaped(run, part, inside(whole, part.at))


def _shaped(run: Run | RowRun, part: Part, value: Tensor) -> Tensor:
    if part.piece is not None:
        value = part.piece.of(value)
    if not part.flat:
        return value
    if isinstance(run, RowRun):
        own = run.rows.batch.part(run.index)
        count = own.stop - own.start
    else:
        count = _prompts(run.called or run.state.first_call)
    return value.reshape(count, -1, value.shape[-1])


def _prompts(called: Any) -> int:
    """How many prompts a call of the model has: where tokens are named, as many as those; else as the first array."""
    specs = [(path, spec.shape) for path, spec in specs_in(called)]
    named = (shape for path, shape in specs if path[-1] in ("input_ids", "inputs_embeds"))
    first = next((shape for _, shape in specs if len(shape) > 1), specs[0][1])
    return next(named, first)[0]


def placed(part: Part, whole: Any, value: Tensor) -> Any:
    """A port's value with another part."""
    value = value.flatten(0, 1) if part.flat else value
    if part.piece is not None:
        with_piece = inside(whole, part.at).clone()
        part.piece.of(with_piece)[...] = value
        value = with_piece
    return with_inside(whole, part.at, value)
