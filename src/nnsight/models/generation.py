"""How many steps transformers' `generate` will take, and what each call of the model is to it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteriaList

from nnsight.block.steps import Plan
from nnsight.core.several import Call


def plan(module: nn.Module, kwargs: Mapping[str, Any]) -> Plan:
    """What `max_new_tokens` or `max_length` allows, and what may end the generation before."""
    option = _Options(module, kwargs)
    if (uncounted := _uncounted(module, option)) is not None:
        return Plan(uncounted=uncounted)
    ids = kwargs.get("input_ids")
    width = ids.shape[-1] if isinstance(ids, Tensor) and not _encodes(module) else None
    count, least = (_new_tokens(option, end, width) for end in ("max", "min"))
    kind = call_kind if _has_several(module, option) else None
    guessing = [name for name in _GUESSING if option(name) is not None]
    if count is None:
        return Plan(kind=kind, guesses=bool(guessing))
    if guessing:
        unless = f"with `{guessing[0]}` a step may bring several tokens"
        return Plan(count, unless, kind=kind, guesses=True, instead="")
    for name in ("stopping_criteria", "stop_strings", "max_time"):
        if option(name) is not None:
            return Plan(count, f"`{name}` may change how many there are", kind=kind)
    if option("eos_token_id") is not None and (least is None or least < count):
        return Plan(count, "the end-of-text token may come sooner", kind=kind)
    return Plan(count, kind=kind)


def _new_tokens(option: _Options, end: str, width: int | None) -> int | None:
    """The most ("max"), or the least, tokens that are generated, as far as the options say; `width`: of the prompts."""
    if option(f"{end}_new_tokens") is not None:
        return int(option(f"{end}_new_tokens"))
    if option(f"{end}_length") is None or width is None:
        return None
    return max(int(option(f"{end}_length")) - width, 0)


def _uncounted(module: nn.Module, option: _Options) -> tuple[str, str] | None:
    """Where it can't be told which calls of the model are steps: why, and what to give instead."""
    if asked := [name for name in _UNTOLD if option(name)]:
        return (
            f"With `{asked[0]}`, a call of the model is no step: {_UNTOLD[asked[0]]}.",
            f"generate without `{asked[0]}`",
        )
    guessing = [name for name in _GUESSING if option(name) is not None]
    if guessing and _is_guided(module, option):
        return (
            f"With guidance and `{guessing[0]}`, a call of the model is no step: {_OWN_GUESSES}.",
            f"generate without `{guessing[0]}`",
        )
    assistant = option("assistant_model")
    if isinstance(assistant, nn.Module) and not set(assistant.modules()).isdisjoint(module.modules()):
        return (
            f"With this `assistant_model`, a call of the model is no step: {_OWN_GUESSES}.",
            "an assistant that shares no modules with the model",
        )
    return None


_OWN_GUESSES = "the same modules make the guesses, in calls between those that read them"
_UNTOLD = {
    "assistant_early_exit": _OWN_GUESSES,
    "custom_generate": "nothing says how often it calls the model",
    "speculation_type": _OWN_GUESSES,
    "use_mtp": _OWN_GUESSES,
}
_GUESSING = ("assistant_model", "prompt_lookup_num_tokens")


def _has_several(module: nn.Module, option: _Options) -> bool:
    """Whether a step may be several calls of the model, or one that has several new tokens."""
    asked = (*_GUESSING, *_USERS_OWN, "prefill_chunk_size")
    return _is_guided(module, option) or any(option(name) is not None for name in asked)


def _is_guided(module: nn.Module, option: _Options) -> bool:
    """Whether the model is called, too, for the logits processors."""
    if option("guidance_scale") not in (None, 1):
        return True
    return any(getattr(processor, "model", None) is module for processor in option("logits_processor") or ())


def guides_itself(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether guidance is done by a `generate` of the model's own: with each prompt twice in one call, say."""
    option = _Options(module, kwargs)
    return option("guidance_scale") not in (None, 1) and getattr(type(module), "generate", None) is not _GENERATE


_GENERATE = GenerationMixin.generate


def call_kind() -> Call:
    """What the call of the model that begins just now, on this stack, is to `generate`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "generate":
        if frame.f_code in _PROCESSES:
            return Call.ASIDE
        if frame.f_code.co_name == "_prefill":
            return Call.CHUNK
        frame = frame.f_back
    return Call.STEP


# Through which each processor, and each criterion, is called.
_PROCESSES = (LogitsProcessorList.__call__.__code__, StoppingCriteriaList.__call__.__code__)
_USERS_OWN = ("logits_processor", "prefix_allowed_tokens_fn", "stopping_criteria")  # which may call the model, too


def samples(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether the tokens are drawn at random."""
    return bool(_Options(module, kwargs)("do_sample"))


class _Options:
    """An option of `generate`: given as a keyword, else in the config that was given, else in the model's."""

    def __init__(self, module: nn.Module, kwargs: Mapping[str, Any]) -> None:
        self._kwargs = kwargs
        self._configs = [kwargs.get("generation_config"), getattr(module, "generation_config", None)]

    def __call__(self, name: str) -> Any:
        if name in self._kwargs:
            return self._kwargs[name]
        found = (getattr(config, name, None) for config in self._configs)
        return next((value for value in found if value is not None), None)


def _encodes(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
