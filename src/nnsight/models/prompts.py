"""The forms in which a prompt can be typed, and what each becomes: fields for the model, not yet padded.

    a prompt                                        read by
    "text", ["text", ...]                           the tokenizer, all rows in one call
    [{"role": ..., "content": ...}, ...]            the tokenizer's chat template; also a list of conversations
    {"input_ids": ...}, a tokenizer's encoding      nobody: these are fields already
    [1, 2], [[1, 2], [3]], tensor, array            nobody: these are the ids

A list is told by its first entry, and all its rows are of one kind.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnsight.core.spelling import quoted
from nnsight.errors import InputError
from nnsight.models.accepts import CHAT_OPTIONS, TEXT_OPTIONS, Accepts, check_names

# Fields that a tokenizer adds for its own users; dropped where the forward doesn't take them.
_TOKENIZER_ONLY = frozenset({"token_type_ids", "special_tokens_mask", "offset_mapping", "length"})
# Options that are carried out here, after reading: a tokenizer may have no pad token, and its own side stays as it is.
PADDING = frozenset({"padding", "padding_side", "return_tensors"})
_CHAT = (TEXT_OPTIONS | CHAT_OPTIONS) - {"add_special_tokens", "split_special_tokens"}


def read(prompt: Any, options: Mapping[str, Any], tokenizer: Any, takes: Accepts) -> dict[str, Any]:
    """Finds the form of a prompt, and reads it with that form's reader.

    Args:
        prompt: What was given by position.
        options: Options of the tokenizer, from the same call.
        tokenizer: None where there is none.
        takes: What the model can be given.

    Returns:
        `input_ids` as rows of any length, and what else the tokenizer or the user put beside them.

    Raises:
        InputError: The prompt has none of the forms, or its form can't be read here.
    """
    if isinstance(prompt, (list, tuple)) and not prompt:
        raise InputError(
            "The list of prompts is empty: there is nothing to run on.",
            you_gave=repr(prompt),
            write='["one prompt", "another"]',
        )
    for is_form, reader in _FORMS:
        if is_form(prompt):
            return reader(prompt, options, tokenizer, takes)
    raise InputError(
        f"This {type(prompt).__name__} can't be read as a prompt.",
        you_gave=short(prompt),
        write="a string, token ids, chat messages, a tokenizer's encoding, or a list of strings, ids or conversations",
    )


def _is_text(prompt: Any) -> bool:
    return isinstance(prompt, str) or (_is_list(prompt) and isinstance(prompt[0], str))


def _is_chat(prompt: Any) -> bool:
    return is_conversation(prompt) or (_is_list(prompt) and is_conversation(prompt[0]))


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is one chat: a list of messages, each with a role and a content."""
    return _is_list(prompt) and isinstance(prompt[0], Mapping) and {"role", "content"} <= prompt[0].keys()


def _is_fields(prompt: Any) -> bool:
    return isinstance(prompt, Mapping)


def _is_ids(prompt: Any) -> bool:
    if isinstance(prompt, np.ndarray) and prompt.dtype.kind in "OSU":
        raise InputError("An array of strings isn't read as prompts.", you_gave=short(prompt), write="prompts.tolist()")
    if isinstance(prompt, (Tensor, np.ndarray)):
        return True
    return _is_list(prompt) and (is_int(prompt[0]) or isinstance(prompt[0], (list, tuple, Tensor, np.ndarray)))


def _is_list(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0


def is_int(value: Any) -> bool:
    """Whether a value can be one token's id."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 0 and holds_ints(torch.as_tensor(value))
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def holds_ints(tensor: Tensor) -> bool:
    """Whether a tensor's type can hold ids."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)


def _read_text(prompt: Any, options: Mapping[str, Any], tokenizer: Any, takes: Accepts) -> dict[str, Any]:
    rows = [prompt] if isinstance(prompt, str) else list(prompt)
    _check_one_kind(rows, "a string", lambda row: isinstance(row, str))
    _check_tokenizer(tokenizer, takes, rows[0])
    _check_options(options, TEXT_OPTIONS, "text")
    return _unmasked(tokenizer(rows, verbose=False, **_unpadded(options)), takes)


def _read_chat(prompt: Any, options: Mapping[str, Any], tokenizer: Any, takes: Accepts) -> dict[str, Any]:
    conversations = [prompt] if is_conversation(prompt) else list(prompt)
    _check_one_kind(conversations, "a conversation", is_conversation)
    _check_tokenizer(tokenizer, takes, prompt)
    if not (options.get("chat_template") or getattr(tokenizer, "chat_template", None)):
        raise InputError(
            f"These are chat messages, and the tokenizer of this {takes.model} has no chat template for them.",
            you_gave=short(prompt),
            write='the text itself, or chat_template="..." beside the messages',
        )
    _check_options(options, _CHAT, "chat messages")
    asked = {"add_generation_prompt": not options.get("continue_final_message"), **_unpadded(options)}
    return _unmasked(tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=True, **asked), takes)


def _read_fields(prompt: Any, options: Mapping[str, Any], tokenizer: Any, takes: Accepts) -> dict[str, Any]:
    check_no_options(options, "Tokenized inputs don't go through the tokenizer again")
    fields = _kept(prompt, takes)
    check_names(fields, takes)
    if not fields.keys() & {"input_ids", "inputs_embeds", takes.main}:
        raise InputError(
            "This dict of inputs has neither `input_ids` nor `inputs_embeds`.",
            it_has=quoted(prompt) or "nothing",
            write='{"input_ids": [[...]]}, or what model.tokenizer(...) returns',
        )
    return fields


def _read_ids(prompt: Any, options: Mapping[str, Any], tokenizer: Any, takes: Accepts) -> dict[str, Any]:
    check_no_options(options, "Ids don't go through the tokenizer")
    return {"input_ids": prompt}


# From the most particular form to the least: a conversation is a list too.
_Reader = Callable[[Any, Mapping[str, Any], Any, Accepts], dict[str, Any]]
_FORMS: list[tuple[Callable[[Any], bool], _Reader]] = [
    (_is_text, _read_text),
    (_is_chat, _read_chat),
    (_is_fields, _read_fields),
    (_is_ids, _read_ids),
]


def _kept(encoding: Mapping[str, Any], takes: Accepts) -> dict[str, Any]:
    """An encoding without what only the tokenizer's own users want."""
    drop = _TOKENIZER_ONLY - takes.names
    return {name: value for name, value in encoding.items() if name not in drop}


def _unmasked(encoding: Mapping[str, Any], takes: Accepts) -> dict[str, Any]:
    """A fresh encoding: nothing is padded yet, so that its mask says nothing."""
    return {name: value for name, value in _kept(encoding, takes).items() if name != "attention_mask"}


def _unpadded(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in PADDING}


def _check_one_kind(rows: Sequence[Any], kind: str, is_kind: Callable[[Any], bool]) -> None:
    odd = next((i for i, row in enumerate(rows) if not is_kind(row)), None)
    if odd is not None:
        raise InputError(
            f"The prompts of a list are all of one kind: the first is {kind}, and number {odd + 1} isn't.",
            you_gave=short(rows[odd]),
        )


def _check_tokenizer(tokenizer: Any, takes: Accepts, prompt: Any) -> None:
    if tokenizer is None:
        raise InputError(
            "There is no tokenizer to turn text into ids.",
            you_gave=short(prompt),
            because=takes.no_tokenizer,
            write="LanguageModel(..., tokenizer=tokenizer), or ids instead of text"
            if takes.main == "input_ids"
            else f"{takes.main}=...",
        )


def _check_options(options: Mapping[str, Any], known: frozenset[str], what: str) -> None:
    for name in sorted(options.keys() - known - PADDING):
        raise InputError(f"`{name}` has no meaning for {what}.", you_gave=f"{name}={short(options[name])}")


def check_no_options(options: Mapping[str, Any], why: str) -> None:
    """Raises InputError for an option of the tokenizer's where the tokenizer isn't asked."""
    for name in sorted(options.keys() - PADDING - {"max_length"}):
        raise InputError(f"{why}: `{name}` would do nothing.", you_gave=f"{name}={short(options[name])}")


def short(value: Any) -> str:
    """A value in a few words, for a message."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{str(value.dtype).removeprefix('torch.')} {type(value).__name__} of shape {list(value.shape)}"
    return reprlib.repr(value)
