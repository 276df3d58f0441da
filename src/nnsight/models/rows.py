"""The prompts of a batch: how many, where each one's own tokens stand, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from nnsight.block.cuts import Batch

_TOKEN_INPUTS = frozenset(
    {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", "labels"}
)
_OWN_STATE = frozenset({"past_key_values", "cache_params", "cache_position"})


def batch_of(
    inputs: Mapping[str, Any], tokenizer: Any, no_tokenizer: str, module: nn.Module, *, generating: bool
) -> Batch:
    """The prompts in the keyword arguments of a model's forward, or of its `generate`.

    Args:
        inputs: As `prepare` makes them.
        tokenizer: Says what a token is as text; None where there is none.
        no_tokenizer: Why there is none.
        module: The model.
        generating: Whether the inputs are `generate`'s.
    """
    ids = inputs.get("input_ids")
    rows = inputs.get("inputs_embeds") if ids is None else ids
    if rows is None:
        return _without_tokens(inputs, module, generating)
    count, width = rows.shape[:2]
    spans = _spans(inputs.get("attention_mask"), count, width)
    translates = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    answers, answer_width = _answers(inputs) if translates and not generating else (None, 0)
    tokens: Callable[[int], list[str]] | str
    if ids is None:
        tokens = "the prompts were given as embeddings"
    elif tokenizer is None:
        tokens = no_tokenizer or "there is no tokenizer"
    else:
        tokens = partial(_tokens, tokenizer, ids, spans)
    return Batch(
        count,
        width,
        spans,
        tokens,
        _TOKEN_INPUTS - {"labels"} | {"last_hidden_state"} if translates else _TOKEN_INPUTS,
        _OWN_STATE if generating else frozenset(),
        _returned(inputs, module) if generating else 1,
        returns_prompts=ids is not None and not translates,
        goes_on=not translates,
        answers=answers,
        answer_width=answer_width,
        answer_inputs=_ANSWERS,
        recurs_over_padding=getattr(getattr(module, "config", None), "model_type", None) == "rwkv",
    )


def _without_tokens(inputs: Mapping[str, Any], module: nn.Module, generating: bool) -> Batch:
    """Images or sound: one an entry of the first axis."""
    first = next(value for value in inputs.values() if isinstance(value, Tensor) and value.ndim)
    return Batch(
        first.shape[0],
        token_inputs=_TOKEN_INPUTS,  # all inputs have rows, then
        own_state=_OWN_STATE if generating else frozenset(),
        returned=_returned(inputs, module) if generating else 1,
        returns_prompts=False,
    )


_ANSWERS = frozenset({"decoder_input_ids", "decoder_attention_mask", "labels"})


def _answers(inputs: Mapping[str, Any]) -> tuple[list[int] | None, int]:
    """The own tokens of each row of a decoder, and the width of these rows; None where none is filled up."""
    mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
    if not isinstance(mask, Tensor) and "decoder_input_ids" not in inputs and isinstance(labels, Tensor):
        mask = labels != -100
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None, 0
    counts = [int(row.nonzero().max()) + 1 if bool(row.any()) else mask.shape[1] for row in mask]
    return (None, 0) if min(counts) == mask.shape[1] else (counts, mask.shape[1])


def _spans(mask: Any, count: int, width: int) -> list[tuple[int, int]]:
    """From the first token that the mask shows to the last: a token hidden in the middle keeps its place."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return [(0, width)] * count
    shown = [row.nonzero()[:, 0].tolist() for row in mask[:, -width:].cpu()]
    return [(row[0], row[-1] + 1) if row else (0, width) for row in shown]


def _tokens(tokenizer: Any, ids: Tensor, spans: list[tuple[int, int]], index: int) -> list[str]:
    start, stop = spans[index]
    return [tokenizer.decode([token]) for token in ids[index, start:stop].tolist()]


def _returned(inputs: Mapping[str, Any], module: nn.Module) -> int:
    """How many sequences `generate` returns for a prompt."""
    for holder in (inputs.get("generation_config"), getattr(module, "generation_config", None)):
        if (asked := inputs.get("num_return_sequences") or getattr(holder, "num_return_sequences", None)) is not None:
            return int(asked)
    return 1
