"""Where a part of what passes a module's port stands, and another in its place: scaled, flat, a piece of it."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nnsight.anatomy.checked import check_shape
from nnsight.anatomy.layout import Part, inside, with_inside
from nnsight.block.rows import RowRun
from nnsight.core.escape import let_escape
from nnsight.core.history import user_place
from nnsight.core.specs import specs_in
from nnsight.core.values import is_fake
from nnsight.errors import WriteError

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


def standing(run: Run | RowRun, part: Part, whole: Any) -> Tensor:
    """The part of a port's value, [prompt, token, model]: the tensor itself, or a view of it."""
    return shaped(run, part, inside(whole, part.at))


def shaped(run: Run | RowRun, part: Part, value: Tensor) -> Tensor:
    """The same, of the tensor that it is in."""
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


def assign(node: Node, part: Part, value: Tensor, module: nn.Module | None = None) -> None:
    """Has the model go on with another part of what passes the node's module, or this one: a write of the block's."""
    run, module = node._run(), node._module if module is None else module

    def replaced(whole: Any, new: Tensor) -> Any:
        check_shape(f"{node._label}.{part.port}", standing(run, part, whole), new, run)
        return placed(part, whole, new)

    if part.port == "input":
        run.write_inputs(module, lambda visit: replaced(visit.value("input"), value))
    else:
        run.write_output(module, value, lambda visit, new: replaced(visit.output, new))


def factor_of(root: Node, part: Part) -> Any:
    """What a part is multiplied by on its way into the stream: a number, or a parameter, [model] or []."""
    if part.by is None:
        return part.scale
    path, _, name = part.by.rpartition(".")
    own: Tensor = getattr(module_at(root, path), name).detach()  # the model multiplies by it itself
    if own.numel() == 1:
        own = own.reshape(())
    return own if part.scale == 1 else own * part.scale


def divided(part: Part, value: Tensor, factor: Any) -> Tensor:
    """What has to pass for this to be what is added.

    Raises:
        WriteError: The model multiplies a channel by 0, in which something else is to be added.
    """
    if not isinstance(factor, Tensor) or is_fake(factor) or is_fake(value):
        return value / factor
    lost = (factor == 0).expand(value.shape[-1])
    if bool((value.detach() != 0)[..., lost].any()):
        raise WriteError(
            f"The model multiplies {int(lost.sum())} channels of this by 0, in `{part.by}`: a write there is lost.",
            you_wrote=user_place().source,
            instead="0 in these channels, or the stream itself, layer.output",
        )
    return torch.where(lost, value.new_zeros(()), value / factor)
