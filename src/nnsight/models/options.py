"""Options for loading that nobody has a use for: told when the model is made, not by the first run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from nnsight.core.spelling import nearest
from nnsight.errors import InputError
from nnsight.models.hub import LOOKUP
from nnsight.models.quantised import NAMES

_ABSENT = {
    "interleaver": "A block runs where it stands, so there is nothing to choose.",
}


def check_options(given: Mapping[str, Any], ours: Iterable[str], config: PreTrainedConfig) -> None:
    """Raises InputError for the first option that is neither ours, nor transformers', nor a field of the config.

    Args:
        given: The options that are left when the config has taken what is its.
        ours: The names of our own.
        config: The model's.
    """
    known = {*ours, *_of_loading(), *config.to_dict(), *(config.attribute_map or {})}
    for name in given:
        if name in known:
            continue
        raise InputError(
            f"`{name}` is no option of loading, and no field of this {type(config).__name__}.",
            you_gave=f"{name}={given[name]!r}"[:200],
            because=_ABSENT.get(name),
            nearest=nearest(name, sorted(one for one in known if not one.startswith("_"))),
        )


def check_dtype(dtype: Any) -> None:
    """Raises InputError for what is no type of torch's."""
    if dtype is None or isinstance(dtype, (torch.dtype, Mapping)) or dtype == "auto":
        return
    if isinstance(dtype, str) and isinstance(getattr(torch, dtype.removeprefix("torch."), None), torch.dtype):
        return
    raise InputError(
        f"{dtype!r} is no dtype.",
        instead=f'torch.bfloat16, "float16", or "auto" for the one the weights are stored in; {_named()}',
    )


def _named() -> str:
    return "quantised: " + ", ".join(repr(name) for name in sorted(NAMES))


def check_tokenizer_options(given: Mapping[str, Any], tokenizer: Any) -> None:
    """Raises InputError for the first option that a tokenizer has kept to itself: it takes any, and ignores most."""
    known = {*_of_tokenizers(), *takes(type(tokenizer).__init__)}
    for name in given:
        if name in known or hasattr(tokenizer, name):
            continue
        raise InputError(
            f"`{name}` is no option of this {type(tokenizer).__name__}.",
            you_gave=f"tokenizer_kwargs={{{name!r}: {given[name]!r}}}"[:200],
            nearest=nearest(name, sorted(known)),
        )


@cache
def _of_loading() -> frozenset[str]:
    return frozenset({*takes(transformers.PreTrainedModel.from_pretrained), *LOOKUP, "proxies", "low_cpu_mem_usage"})


@cache
def _of_tokenizers() -> frozenset[str]:
    base = transformers.PreTrainedTokenizerBase
    calls = (transformers.AutoTokenizer.from_pretrained, base.from_pretrained, base.__init__)
    return frozenset({*LOOKUP, *(name for call in calls for name in takes(call))})


def takes(call: Callable[..., Any]) -> set[str]:
    """The names of a function's parameters, and those that it looks up in its `**kwargs`: they are in its constants."""
    function = inspect.unwrap(getattr(call, "__func__", call))
    code: Any = getattr(function, "__code__", None)
    if code is None:
        return set()
    named = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]) - {"self", "cls", "args", "kwargs"}
    return named | {one for one in code.co_consts if isinstance(one, str) and one.isidentifier()}
