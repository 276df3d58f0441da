"""The batch in the inputs of any module: on which axis its rows are, how many, and several batches as one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten

from nnsight.block.cuts import Batch
from nnsight.core.history import user_place
from nnsight.core.measuring import EITHER_WAY
from nnsight.core.specs import describe_inputs, shape_of, show_shape, specs_in
from nnsight.errors import InputError, RowError

_LISTS = (nn.TransformerEncoder, nn.TransformerDecoder)
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class RowAxis(NamedTuple):
    """Where the rows of a module's inputs are, and how many axes its first input has at least when it has rows."""

    axis: int
    least: int


def axis_of(module: nn.Module, given: int | None) -> RowAxis:
    """The axis of a module's inputs that has the rows.

    Args:
        given: What the user says of the whole model; a module of torch's that says it itself comes first.
    """
    if isinstance(module, _LISTS):
        module = module.layers[0]
    if isinstance(module, _LAYERS):
        module = module.self_attn
    if isinstance(module, (*EITHER_WAY, nn.Transformer)):  # without a batch: [token, width]
        return RowAxis(0 if module.batch_first else 1, 3)
    return RowAxis(given or 0, (given or 0) + 1)


def check_axis(axis: Any) -> None:
    if axis is not None and (not isinstance(axis, int) or isinstance(axis, bool) or axis < 0):
        raise InputError(f"`batch_axis` is the number of an axis, from 0 on, and not {axis!r}.")


def plain_batch(args: tuple[Any, ...], kwargs: dict[str, Any], at: RowAxis) -> Batch:
    """The rows of any module's inputs: those of one axis of its first tensor."""
    first = next((spec for _, spec in specs_in(describe_inputs(args, kwargs))), None)
    if any(isinstance(value, PackedSequence) for value in (*args[:1], *kwargs.values())):
        what = "a packed sequence has all rows of a time step one after the other"
    elif first is None:
        what = "its inputs have no tensor"
    elif not first.shape:
        what = "its first input is a single number, with no axes"
    elif len(first.shape) < at.least:
        what = f"its first input is {show_shape(first)}, and one with rows has {at.least} axes"
    else:
        return Batch(first.shape[at.axis], axis=at.axis)
    raise RowError(f"This run has no rows: {what}.", you_wrote=user_place().source)


def axis_in(shape: torch.Size, count: int, axis: int) -> int | None:
    """On which axis of one input the rows are, where there are `count` on `axis` of the first; None: it has none."""
    if len(shape) > axis and shape[axis] == count:
        return axis
    return 0 if shape and shape[0] == count else None


def together(
    given: list[tuple[tuple[Any, ...], dict[str, Any]]], label: str, at: RowAxis
) -> tuple[tuple[Any, ...], dict[str, Any], list[int]]:
    """The inputs of several calls of a module as those of one, with their rows one after the other.

    Args:
        given: `(args, kwargs)` of each; tensors have their rows on that axis, else on the first one, and what is no
            tensor is the same.
        label: The module, for errors.
        at: Where the rows are.

    Returns:
        `(args, kwargs)` of the whole, and how many rows each call has.

    Raises:
        InputError: The inputs have no common form.
    """
    if len(given) == 1:
        return *given[0], [1]
    counts = [plain_batch(*one, at).count for one in given]
    flat, forms = zip(*[tree_flatten(one) for one in given], strict=True)
    if any(form != forms[0] for form in forms):
        raise InputError(f"The invokes of `{label}` can't be one batch: they don't have the same inputs.")
    whole = [_joined(values, counts, label, at.axis) for values in zip(*flat, strict=True)]
    args, kwargs = tree_unflatten(whole, forms[0])
    return args, kwargs, counts


def _joined(values: tuple[Any, ...], counts: list[int], label: str, axis: int) -> Any:
    if not any(isinstance(value, Tensor) for value in values) and all(value == values[0] for value in values):
        return values[0]
    if all(isinstance(value, Tensor) for value in values):
        axes = {axis_in(value.shape, count, axis) for value, count in zip(values, counts, strict=True)}
        at = axes.pop()
        if not axes and at is not None and len({_beside(value, at) for value in values}) == 1:
            return torch.cat(values, at)
    shown = ", ".join(show_shape(shape_of(v)) if isinstance(v, Tensor) else repr(v)[:40] for v in values)
    raise InputError(f"The invokes of `{label}` can't be one batch: their inputs are {shown}.")


def _beside(value: Tensor, at: int) -> Any:
    """What tensors have in common that can be one along an axis."""
    return value.shape[:at], value.shape[at + 1 :], value.dtype, value.device
