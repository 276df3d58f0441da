"""What the user typed -> the keyword arguments of the model's forward.

A prompt (prompts.py has its forms) may stand alone, or with keywords of the forward (`labels=`, `attention_mask=` ...)
and options of the tokenizer beside it; or keywords say it all (`input_ids=`, `inputs_embeds=`). Rows of unequal length
are padded, and where a model counts positions it is told to count a row's own tokens only. Nothing else is added that a
plain call of tokenizer and model wouldn't have, but for a mask of ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from nnsight.errors import InputError
from nnsight.models.accepts import OPTIONS, Accepts, check_ids, check_length, check_names
from nnsight.models.prompts import check_no_options, holds_ints, is_int, read, short

# Fields with one entry a token, which may be typed as lists, and what stands where padding is.
FILL = {"attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0, "position_ids": 0, "labels": -100}

# Fields that a run can start from.
PROMPTS = frozenset({"input_ids", "inputs_embeds"})

# What the decoder of a model that has an encoder too can begin with.
_BEGINNINGS = frozenset({"decoder_input_ids", "decoder_inputs_embeds", "labels", "encoder_outputs"})


def prepare(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], takes: Accepts, tokenizer: Any, *, generating: bool = False
) -> dict[str, Any]:
    """The keyword arguments for one forward pass, or for `generate`.

    Args:
        args: What was given by position: one prompt, or nothing where keywords say it all.
        kwargs: Keywords of the forward, options of the tokenizer, and options of `generate` when `generating`.
        takes: What the model can be given.
        tokenizer: Reads strings and conversations; None where there is none.
        generating: Leave keywords that aren't known to `generate`, and positions too: it counts them from the mask.

    Returns:
        `input_ids` and `attention_mask`, [prompt, token], int64, or `inputs_embeds` as given, and the other keywords. A
        tensor stays on the device where it was given; what is made here is on the ids' device.

    Raises:
        InputError: Nothing was given, or something that can't be an input of this model.
    """
    options, given = _split(kwargs, generating)
    if not generating:
        check_names(given, takes)
    fields = _positional(args, options, tokenizer, takes)
    _check_given_once(fields, given)
    fields.update(given)
    if fields.get("decoder_input_ids") is not None:
        fields = {**_begun(fields.pop("decoder_input_ids"), takes, generating), **fields}
    if takes.must_begin and not generating and _BEGINNINGS.isdisjoint(fields):
        raise _needs_beginning(takes)
    labels = {"labels": _one_a_prompt(fields.pop("labels"))} if takes.labels == "prompts" and "labels" in fields else {}
    if "input_ids" in fields:
        return _with_ids(fields, options, takes, generating) | labels
    if "inputs_embeds" in fields or takes.main in fields:
        return {name: _field(name, value, takes.side) for name, value in fields.items()} | labels
    forms = '"The Eiffel Tower is in the city of", a list of strings, token ids, or input_ids=...'
    raise InputError(
        f"There is no input: {takes.model} needs a prompt to run on.",
        write=forms if takes.main == "input_ids" else f"{takes.main}=...",
    )


def on_meta(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """The first input that is on `meta`, where a tensor has no numbers."""
    named = [item for one in args for item in (one.items() if isinstance(one, Mapping) else [("", one)])]
    found = (name for name, value in (*named, *kwargs.items()) if isinstance(value, Tensor) and value.is_meta)
    name = next(found, None)
    return name if name is None else f"`{name}`" if name else "The input"


def _needs_beginning(takes: Accepts) -> InputError:
    return InputError(
        f"{takes.model} reads with one half and answers with the other: a forward pass has to be told both.",
        write="decoder_input_ids=[[...]], the answer so far, one row a prompt; or labels=...",
        to_answer="model.generate(...)",
    )


def _one_a_prompt(labels: Any) -> Any:
    """Labels with one entry a prompt, as a tensor; a single one too."""
    if isinstance(labels, (int, float)):
        labels = [labels]
    return torch.as_tensor(labels) if isinstance(labels, (list, tuple, np.ndarray)) else labels


def _split(kwargs: Mapping[str, Any], generating: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the tokenizer, and the rest. `max_length` is generation's, unless truncation or padding needs it."""
    options = {name: value for name, value in kwargs.items() if name in OPTIONS}
    if not (options.get("truncation") or options.get("padding") == "max_length"):
        length = options.pop("max_length", None)
        if length is not None and not generating:
            raise InputError(
                "`max_length` alone changes nothing in one forward pass.",
                you_gave=f"max_length={length}",
                to_shorten=f"truncation=True, max_length={length}",
                to_go_on=f"model.generate(..., max_length={length})",
            )
    given = {name: value for name, value in kwargs.items() if name not in options and not _is_absent(name, value)}
    return options, given


def _is_absent(name: str, value: Any) -> bool:
    """None for a tensor means that it isn't given; for an option of `generate` it may mean something."""
    return value is None and (name in FILL or name in PROMPTS)


def _positional(args: tuple[Any, ...], options: dict[str, Any], tokenizer: Any, takes: Accepts) -> dict[str, Any]:
    """The fields of the prompt that was given by position; none, where none was."""
    if len(args) > 1:
        given = ", ".join(map(short, args))
        if is_int(args[1]) and not is_int(args[0]):
            raise InputError(
                "A run takes one prompt by position, and all else by name.",
                you_gave=given,
                write=f"{short(args[0])}, max_new_tokens={args[1]}, in model.generate(...)",
            )
        raise InputError(
            f"A run takes one prompt, and {len(args)} were given by position; a batch of prompts is a list.",
            you_gave=given,
            write=f"[{given}]",
        )
    if args and "input_ids" not in takes.names and tokenizer is not None and not isinstance(args[0], Mapping):
        raise InputError(
            f"{takes.model} reads `{takes.main}`, and this is no such thing.",
            you_gave=short(args[0]),
            write='model.feature_extractor(sound, sampling_rate=..., return_tensors="pt"), in the place of the sound'
            if takes.main == "input_features"
            else f"{takes.main}=...",
        )
    if args:
        return read(args[0], options, tokenizer, takes)
    check_no_options(options, "There is no text to tokenize")
    return {}


def _check_given_once(fields: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    again = sorted(PROMPTS & given.keys())
    if again and (len(again) > 1 or fields):
        first = "by position" if fields else f"as `{again[0]}=`"
        raise InputError(f"There are two prompts: one {first}, and one as `{again[-1]}=`.", write="one of the two")


def _with_ids(fields: dict[str, Any], options: Mapping[str, Any], takes: Accepts, generating: bool) -> dict[str, Any]:
    """Pads what has one entry a token, and adds the mask, and the positions where padding would shift them."""
    if takes.chooses and getattr(fields["input_ids"], "ndim", 0) == 3:
        ids = _of_choices(fields["input_ids"])
        check_ids(ids, takes)
        return {**fields, "input_ids": ids}
    rows = _rows("input_ids", fields.pop("input_ids"))
    lengths = [rows.shape[1]] * rows.shape[0] if isinstance(rows, Tensor) else [len(row) for row in rows]
    _check_not_empty(lengths)
    side = options.get("padding_side", takes.side)
    longest = max(lengths)
    check_can_go_on(lengths, side, generating, takes)
    width = max(longest, options.get("max_length", 0)) if options.get("padding") == "max_length" else longest
    ids = _stacked(rows, width, side, takes.pad)
    check_ids(ids, takes)
    check_length(longest, takes, fields)
    tokens = {name: _field(name, value, side, width, lengths) for name, value in fields.items()}
    _check_shapes(ids, tokens, takes)
    padded = min(lengths) < width
    masked = padded or "attention_mask" in tokens
    if "attention_mask" in takes.names and "attention_mask" not in tokens:
        _add_mask(tokens, ids, lengths, side, padded)
    if masked and takes.wants_positions and not generating and "position_ids" not in tokens:
        add_positions(tokens, takes.first_position)
    return {"input_ids": ids, **tokens}


def _add_mask(tokens: dict[str, Any], ids: Tensor, lengths: list[int], side: str, padded: bool) -> None:
    """Ones for tokens, zeros for padding. After a filled cache, a mask would have to cover what that holds, too."""
    if _cached(tokens.get("past_key_values")):
        if padded:
            raise InputError(
                "Prompts of unequal length can't be padded behind a filled cache.",
                you_gave=f"past_key_values=..., and rows of {', '.join(map(str, lengths))} tokens",
                write="attention_mask=... over the cache and the new tokens",
            )
        return
    ones = [ids.new_ones(length) for length in lengths]
    tokens["attention_mask"] = _stacked(ones, ids.shape[1], side, 0) if padded else torch.ones_like(ids)


def _cached(cache: Any) -> int:
    """How many tokens a cache holds."""
    return 0 if cache is None else int(cache.get_seq_length())


def add_positions(tokens: dict[str, Any], first: int) -> None:
    """Positions that count from each row's first token, where the mask hides something in front of it.

    Only what stands in front: a token hidden in the middle keeps its place. The first token has the position `first`.
    """
    mask = tokens.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask[:, 0].all()):
        return
    in_front = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    past = _cached(tokens.get("past_key_values"))
    counted = torch.arange(mask.shape[1], device=mask.device) - in_front
    tokens["position_ids"] = (counted.clamp(min=0) + first)[:, past:]


def _field(name: str, value: Any, side: str, width: int = 0, lengths: Sequence[int] = ()) -> Any:
    """A keyword's value, as a tensor of rows where the keyword has one entry a token; else as it is.

    Lists are padded as the ids are if they have the ids' lengths, and never to make a length fit that doesn't.
    """
    if isinstance(value, np.ndarray):
        value = torch.as_tensor(value)
    if name not in FILL or not isinstance(value, (Tensor, list, tuple)):
        return value
    if isinstance(value, Tensor):
        return value[None] if value.ndim == 1 else value
    rows = _rows(name, value)
    own = [len(row) for row in rows]
    return _stacked(rows, width if own == list(lengths) else max(own), side, FILL[name])


def _begun(given: Any, takes: Accepts, generating: bool) -> dict[str, Any]:
    """What a decoder begins with, [prompt, token]: shorter rows are filled up behind, where it never looks."""
    name = "decoder_input_ids"
    if isinstance(given, str) or (isinstance(given, (list, tuple)) and any(isinstance(row, str) for row in given)):
        raise InputError(
            "What a decoder begins with are ids, its start token first; text isn't read there.",
            you_gave=f"{name}={short(given)}",
            write=f"{name}=[[start, *model.tokenizer(text, add_special_tokens=False).input_ids]]",
            start="model.config.decoder_start_token_id",
        )
    if not isinstance(given, (list, tuple, np.ndarray, Tensor)):
        return {name: given}
    rows = _rows(name, given)
    lengths = [len(row) for row in rows]
    if len({*lengths}) < 2:
        return {name: _stacked(rows, lengths[0], "right", takes.pad)}
    if generating:
        raise InputError(
            f"The rows of `{name}` have different lengths, and a generation would go on from the padding.",
            you_gave=", ".join(map(str, lengths)),
            write="one generate a prompt",
        )
    begun = {name: _stacked(rows, max(lengths), "right", takes.pad)}
    if "decoder_attention_mask" in takes.names:
        ones = [torch.ones(length, dtype=torch.int64) for length in lengths]
        begun["decoder_attention_mask"] = _stacked(ones, max(lengths), "right", 0)
    return begun


def _rows(name: str, value: Any) -> list[Tensor] | Tensor:
    """Rows of integers, each of its own length, or a tensor of them; one row for a flat list or a 1-D tensor."""
    if isinstance(value, (Tensor, np.ndarray)):
        return _rows_of_tensor(name, torch.as_tensor(value))
    if not isinstance(value, (list, tuple)):
        raise InputError(f"`{name}` can't be a {type(value).__name__}.", you_gave=f"{name}={short(value)}")
    if all(map(is_int, value)):
        return [torch.tensor([int(entry) for entry in value], dtype=torch.int64)]
    rows = [_rows(name, row) for row in value if isinstance(row, (list, tuple, Tensor, np.ndarray))]
    if len(rows) < len(value) or any(len(row) != 1 for row in rows):
        raise InputError(
            f"`{name}` is a list of integers, or a list of such lists, one a prompt.",
            you_gave=short(value),
        )
    return [row[0] for row in rows]


def _of_choices(value: Any) -> Tensor:
    """Ids of several choices for each prompt, [prompt, choice, token], padded and masked by who made them."""
    return _rows_of_tensor("input_ids", torch.as_tensor(value).flatten(0, 1)).reshape(value.shape)


def _rows_of_tensor(name: str, tensor: Tensor) -> Tensor:
    if not holds_ints(tensor):
        raise InputError(
            f"`{name}` holds integers, and this is a {short(tensor)}.",
            you_gave=f"{name}={short(tensor)}",
            write="inputs_embeds=... for embeddings, or .long() for ids in the wrong type",
        )
    if tensor.ndim not in (1, 2):
        raise InputError(
            f"`{name}` has the shape [token] or [prompt, token], and this has {tensor.ndim} dimensions.",
            you_gave=short(tensor),
        )
    return (tensor if tensor.ndim == 2 else tensor[None]).long()


def _stacked(rows: Sequence[Tensor] | Tensor, width: int, side: str, fill: int) -> Tensor:
    """Rows of unequal length, as one new tensor [prompt, width], filled up on one side."""
    if isinstance(rows, Tensor) and rows.shape[1] == width:
        return rows.clone()  # a block may write into it, and the rows are the user's
    if all(len(row) == width for row in rows):
        return torch.stack(list(rows))
    gaps = [(width - len(row), 0) if side == "left" else (0, width - len(row)) for row in rows]
    return torch.stack([pad(row, gap, value=fill) for row, gap in zip(rows, gaps, strict=True)])


def _check_not_empty(lengths: Sequence[int]) -> None:
    if lengths and 0 not in lengths:
        return
    which = "The prompt" if len(lengths) < 2 else f"Prompt {lengths.index(0) + 1} of {len(lengths)}"
    raise InputError(
        f"{which} is empty: it has zero tokens, and a model needs one to start from.",
        write="text, or model.tokenizer.bos_token for a start without words",
    )


def check_can_go_on(lengths: Sequence[int], side: str, generating: bool, takes: Accepts) -> None:
    """Raises InputError where padding would stand behind a row's last token, from which generation goes on."""
    if generating and side == "right" and not takes.translates and len(set(lengths)) > 1:
        raise InputError(
            f"{takes.model} can't generate for prompts of unequal length at once: it would go on from the padding.",
            you_gave=f"rows of {', '.join(map(str, lengths))} tokens",
            write="one generate a prompt",
        )


def _check_shapes(ids: Tensor, tokens: Mapping[str, Any], takes: Accepts) -> None:
    begun = tokens.get("decoder_input_ids")
    if isinstance(begun, Tensor) and len(begun) != len(ids):
        raise InputError(
            "`decoder_input_ids` has one row a prompt.", prompts=str(len(ids)), decoder_input_ids=str(list(begun.shape))
        )
    for name in ("token_type_ids", "labels") if takes.labels == "tokens" else ("token_type_ids",):
        value = tokens.get(name)
        if isinstance(value, Tensor) and value.shape != ids.shape:
            raise InputError(
                f"`{name}` has one entry a token: the shape of the ids, padding included.",
                ids=str(list(ids.shape)),
                **{name: str(list(value.shape))},
            )
