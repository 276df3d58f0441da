"""Reading and assigning a part of what passes a port: the residual stream in a tuple, what is scaled, sums of parts."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nnsight.anatomy.checked import check_shape, check_tensor
from nnsight.anatomy.handed import Made, copied_where_closed, copy_of, handed, is_copy, was_handed
from nnsight.anatomy.layout import Part, Piece, inside
from nnsight.anatomy.parts import assign, divided, factor_of, module_at, standing
from nnsight.block.rows import RowRun, whole_of
from nnsight.core.escape import let_escape
from nnsight.core.state import Visit
from nnsight.views import Views

if TYPE_CHECKING:
    from nnsight.core.run import Run
    from nnsight.node import Node


def read(root: Node, part: Part) -> Tensor:
    """A part's value, as it is added to the residual stream or stands in it."""
    node = module_at(root, part.path)
    try:
        if not _passes(part):
            return copy_of(node, _made_for(root, node, part))
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
        if not (part.flat and was_handed(node, part, value)):
            assign(node, part, value)
    else:
        made = _made_for(root, node, part)
        if not is_copy(node, made, value):  # what was read passes untouched
            assign(node, part, divided(part, value, made.factor))


def read_sum(root: Node, parts: tuple[Part, ...]) -> Tensor:
    """The sum of several parts, in the order in which the model makes them."""
    if len(parts) == 1:
        return read(root, parts[0])
    node = module_at(root, parts[-1].path)
    try:
        made, earlier = _sum_of(root, node, parts)
        copied = copy_of(node, made)
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
    if not is_copy(node, made, value):
        check_shape(f"{node._label}.{parts[-1].port}", rest, value)
        assign(node, parts[-1], divided(parts[-1], value - rest, made.factor))
    _keep(node, parts, made, earlier)


_Earlier = list[tuple[Part, nn.Module, Visit]]  # the parts before the last, and where their values passed


def _sum_of(root: Node, node: Node, parts: tuple[Part, ...]) -> tuple[Made, _Earlier]:
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
    return Made(parts[-1], sum(values[1:], values[0]), factor=factor_of(root, parts[-1])), earlier


def _of_earlier(root: Node, run: Run | RowRun, part: Part, module: nn.Module, visit: Visit) -> Tensor:
    output = visit.output
    if isinstance(run, RowRun):
        output = run.rows.shares(module, visit).take(visit, "output", run.index)
    value = standing(run, part, output)
    return value if part.scale == 1 and part.by is None else value * factor_of(root, part)


def _keep(node: Node, parts: tuple[Part, ...], made: Made, earlier: _Earlier) -> None:
    run, kept = node._run(), _kept(node)
    kept[parts], kept[parts, run.index] = earlier, (made, earlier)


def _kept(node: Node) -> dict[Any, Any]:
    """What was noted of the views that were had where the run stands; nothing where that isn't this module."""
    run = node._run()
    visit = whole_of(run).state.visit
    here = visit is not None and visit.port is not None and visit.port.module is whole_of(run).own(node._module)
    return Views.of(run).kept if here else {}


def _passes(part: Part) -> bool:
    """Whether it is the very tensor that passes, or a view of it that others can have views beside."""
    return (
        part.scale == 1 and part.by is None and not (part.changes or part.shared) and not isinstance(part.piece, Piece)
    )


@lru_cache(maxsize=4096)
def _made_of(part: Part) -> Made:
    return Made(part)


def _made_for(root: Node, node: Node, part: Part) -> Made:
    """The same for one run, whose own parameter it may be multiplied by."""
    if part.by is None:
        return _made_of(part)
    node._run().read(node._module, part.port)
    made: Made = _kept(node).setdefault(("by", part), Made(part, factor=factor_of(root, part)))
    return made
