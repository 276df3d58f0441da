"""What a block is handed for a part of what passes a port: the tensor itself, a view of it, or a copy.

A copy is handed out where the value is made of what passes, by a scale or a sum, or where the model adds to that tensor
itself afterwards or gives it to others too. What a block changes in it in place is written back before the model goes
on (views.py), and where there is a graph, the copy is in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nnsight.anatomy.layout import Part, inside
from nnsight.anatomy.parts import assign, divided, placed, shaped, standing
from nnsight.block.rows import RowRun, whole_of
from nnsight.core.state import Visit
from nnsight.views import Views

if TYPE_CHECKING:
    from nnsight.core.run import Run
    from nnsight.node import Node


class Made:
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
        assign(node, self.part, divided(self.part, added, self.factor), self.module)


def copy_of(node: Node, made: Made) -> Tensor:
    """What is made of what passes there: the same copy each time, while nothing else has changed."""
    run = node._run()
    visit = run.read(made.where(node), made.kind)
    value = made.pick(node, visit)
    if visit.port is None:  # of a call of the block's own, which is over
        return made.make(shaped(run, made.part, value))
    views = Views.of(run)
    had = views.find(made, run, value)
    if had:
        return had[0]
    copied = made.make(shaped(run, made.part, value))
    if copied.requires_grad and torch.is_grad_enabled():
        value = _led_through(node, made, run, value, copied)
    views.add(made, node, value, copied)
    return copied


def is_copy(node: Node, made: Made, value: Any) -> bool:
    """Whether this is the copy that was handed out where the run stands, if nothing has changed since."""
    run = node._run()
    visit = run.read(node._module, made.kind)
    had = [] if visit.port is None else Views.of(run).find(made, run, made.pick(node, visit))
    return any(value is one for one in had)


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


def _led_through(node: Node, made: Made, run: Run | RowRun, value: Tensor, copied: Tensor) -> Tensor:
    """Has the model go on with the same value, made of the copy: so the copy has a gradient. What stands there then."""
    module, kind = made.where(node), made.kind
    if whole_of(run).here(module, kind).versions is not None:  # computed again in the backward pass, without the copy
        return value
    led = _Through.apply(copied, shaped(run, made.part, value), made.rest, made.factor)
    run.put(module, kind, placed(made.part, run.here(module, kind).value(kind), led))
    return made.pick(node, run.here(module, kind))


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
    maker = views.kept.setdefault(("copy", part, module), Made(part, module=module))
    own = run.here(module, kind).value(kind)
    if had := views.find(maker, run, inside(own, part.at)):
        known: Tensor = had[0]
        return known
    run.put(module, kind, placed(part, own, value))
    views.add(maker, node, maker.pick(node, run.here(module, kind)), value)
    return value


def was_handed(node: Node, part: Part, value: Tensor) -> bool:
    """Whether this is what was handed of a part without an axis of its own for prompts, and stands there still.

    Then there is nothing to write, and what changes in it later counts.
    """
    module, kind, run = node._module, part.port, node._run()
    visit = run.read(module, kind)
    if visit.port is None or visit.port.kind != kind:
        return False
    stands = inside(run.here(module, kind).value(kind), part.at)
    if isinstance(run, RowRun):
        views = Views.of(run)
        made = views.kept.get(("copy", part, module))
        if made is not None and any(value is one for one in views.find(made, run, stands)):
            return True
    return value.ndim == stands.ndim + 1 and _is_alias(value.flatten(0, 1), stands)


def _is_alias(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of one, of the same numbers in the same order."""
    base = other if other._base is None else other._base
    where = [(tensor.storage_offset(), tensor.shape, tensor.stride()) for tensor in (one, other)]
    return one._base is base and where[0] == where[1]


_VIEWS = ("Slice", "Select", "View", "Transpose", "Permute", "Unsqueeze", "Squeeze", "Unflatten")  # of one tensor


def is_one_of_several(value: Tensor) -> bool:
    """Whether a function returned it beside other views of one tensor: torch lets nobody change such a one in place."""
    made_by = value.grad_fn
    while made_by is not None and made_by.name().startswith(_VIEWS):
        made_by = made_by.next_functions[0][0]
    return made_by is not None and made_by.name().startswith(("Split", "Unbind"))


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
    made = views.kept.setdefault(("copy", part, site), Made(part, module=site))
    # Where a copy was handed out before, what the model goes on with is made of that.
    return copy_of(node, made) if is_one_of_several(value) or views.has(made, run) else value
