"""The inputs of several invokes -> those of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nnsight.errors import InputError
from nnsight.models.accepts import Accepts
from nnsight.models.inputs import FILL, PROMPTS, add_positions, check_can_go_on

_TOKENS = frozenset({*FILL, *PROMPTS})
_ANSWERS = frozenset({"decoder_input_ids", "decoder_attention_mask"})  # tokens of a decoder


def together(
    invokes: Sequence[dict[str, Any]], takes: Accepts, own_positions: bool, *, generating: bool
) -> tuple[dict[str, Any], list[int]]:
    """The keyword arguments for one forward pass on the prompts of all invokes, in their order.

    Args:
        invokes: What `prepare` made of each.
        takes: What the model can be given.
        own_positions: Whether `position_ids` were given, rather than counted.
        generating: Whether the inputs are `generate`'s.

    Returns:
        The arguments, rows padded to one width, and how many rows each invoke has.

    Raises:
        InputError: They have no common form.
    """
    counts = [_rows(fields).shape[0] for fields in invokes]
    if len(invokes) == 1:
        return invokes[0], counts
    widths = [_rows(fields).shape[1] for fields in invokes]
    check_can_go_on(widths, takes.side, generating, takes)
    kinds = {name for fields in invokes for name in PROMPTS & fields.keys()}
    if len(kinds) > 1:
        raise InputError("Some invokes are given ids and others embeddings, which can't be one batch.")
    whole: dict[str, Any] = {}
    for name in dict.fromkeys(name for fields in invokes for name in fields):
        values = [fields.get(name) for fields in invokes]
        if name == "position_ids" and not own_positions:
            continue
        if name in _TOKENS | takes.names | _ANSWERS and any(isinstance(value, Tensor) for value in values):
            tensors = [_given(name, value, one) for value, one in zip(values, invokes, strict=True)]
            whole[name] = _joined(name, tensors, counts, widths, takes)
        else:
            whole[name] = _agreed(name, values, invokes)
    if "attention_mask" in takes.names and "attention_mask" not in whole and len({*widths}) > 1:
        masks = [_given("attention_mask", None, fields) for fields in invokes]
        whole["attention_mask"] = _joined("attention_mask", masks, counts, widths, takes)
    begun = [fields["decoder_input_ids"].shape[1] for fields in invokes if "decoder_input_ids" in fields]
    if "decoder_attention_mask" in takes.names and "decoder_attention_mask" not in whole and len({*begun}) > 1:
        masks = [_given("decoder_attention_mask", None, fields) for fields in invokes]
        whole["decoder_attention_mask"] = _joined("decoder_attention_mask", masks, counts, widths, takes)
    if takes.wants_positions and not generating and not own_positions:
        add_positions(whole, takes.first_position)
    return whole, counts


def _rows(fields: dict[str, Any]) -> Tensor:
    found = [fields[name] for name in ("input_ids", "inputs_embeds") if name in fields]
    rows: Tensor = next(value for value in (*found, *fields.values()) if isinstance(value, Tensor))
    return rows


def _given(name: str, value: Any, fields: dict[str, Any]) -> Tensor | None:
    """A field of one invoke, or what it would be where others have it."""
    rows = _rows(fields)
    shape, device = rows.shape[:2], rows.device
    if isinstance(value, Tensor):
        return value
    if name == "attention_mask":
        return torch.ones(shape, dtype=torch.int64, device=device)
    if name == "decoder_attention_mask":
        begun = fields["decoder_input_ids"]
        return torch.ones(begun.shape[:2], dtype=torch.int64, device=begun.device)
    if name == "position_ids":
        return torch.arange(shape[1], device=device).expand(shape)
    return torch.full(shape, FILL[name], device=device) if name in FILL else None


def _joined(name: str, values: list[Tensor | None], counts: list[int], widths: list[int], takes: Accepts) -> Tensor:
    tensors = [value for value in values if value is not None]
    if len(tensors) < len(values):
        raise InputError(f"{len(tensors)} of {len(values)} invokes have `{name}`, and in one batch all rows need it.")
    if any(tensor.ndim == 0 or len(tensor) != count for tensor, count in zip(tensors, counts, strict=True)):
        raise InputError(f"`{name}` doesn't have a row for each prompt, so that the invokes can't be one batch.")
    if name in _TOKENS | _ANSWERS and all(tensor.ndim > 1 for tensor in tensors):
        fill = FILL.get(name, takes.pad if name in ("input_ids", "decoder_input_ids") else 0)
        longest = max(tensor.shape[1] for tensor in tensors)
        side = "right" if name == "labels" and [t.shape[1] for t in tensors] != widths else takes.side
        tensors = [_padded(tensor, longest, side, fill) for tensor in tensors]
        if name == "labels" and side == "left":  # what stands before a prompt's first token does not predict it
            for tensor, width in zip(tensors, widths, strict=True):
                tensor[:, longest - width] = fill if width < longest else tensor[:, 0]
    if len({tensor.shape[1:] for tensor in tensors}) > 1:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        raise InputError(f"`{name}` of these invokes can't be one batch: the shapes are {shapes}.")
    return torch.cat([tensor.to(tensors[0].device) for tensor in tensors])


def _padded(tensor: Tensor, width: int, side: str, fill: int) -> Tensor:
    """Filled up on one side of axis 1, [row, token, ...]."""
    missing = width - tensor.shape[1]
    gap = (missing, 0) if side == "left" else (0, missing)
    return pad(tensor, (0, 0) * (tensor.ndim - 2) + gap, value=fill) if missing else tensor


def _agreed(name: str, values: list[Any], invokes: Sequence[dict[str, Any]]) -> Any:
    """An option, which holds for the whole batch."""
    given = [value for value, fields in zip(values, invokes, strict=True) if name in fields]
    if name in ("past_key_values", "cache_params"):
        raise InputError(f"`{name}` is of one prompt's run, and the invokes of a trace are one batch.")
    if not all(_same(value, given[0]) for value in given[1:]):
        raise InputError(
            f"`{name}` holds for the whole batch, and the invokes give several.",
            they_gave=", ".join(map(repr, given)),
            instead=f"{name}=... to the trace itself, for all of them",
        )
    return given[0]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    return one is other or bool(one == other)
