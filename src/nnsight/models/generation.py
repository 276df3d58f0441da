"""How many steps transformers' `generate` will take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nnsight.block.steps import Plan
from nnsight.errors import InputError


def plan(module: nn.Module, kwargs: Mapping[str, Any]) -> Plan:
    """What `max_new_tokens` or `max_length` allows, and what may end the generation before."""
    option = _Options(module, kwargs)
    if (uncounted := _uncounted(module, option)) is not None:
        return Plan(uncounted=uncounted)
    ids = kwargs.get("input_ids")
    width = ids.shape[-1] if isinstance(ids, Tensor) and not _encodes(module) else None
    count, least = (_new_tokens(option, end, width) for end in ("max", "min"))
    if count is None:
        return Plan()
    for name in ("stopping_criteria", "stop_strings", "max_time"):
        if option(name) is not None:
            return Plan(count, f"`{name}` may change how many there are")
    if option("eos_token_id") is not None and (least is None or least < count):
        return Plan(count, "the end-of-text token may come sooner")
    return Plan(count)


def _new_tokens(option: _Options, end: str, width: int | None) -> int | None:
    """The most ("max"), or the least, tokens that are generated, as far as the options say; `width`: of the prompts."""
    if option(f"{end}_new_tokens") is not None:
        return int(option(f"{end}_new_tokens"))
    if option(f"{end}_length") is None or width is None:
        return None
    return max(int(option(f"{end}_length")) - width, 0)


def _uncounted(module: nn.Module, option: _Options) -> tuple[str, str] | None:
    """Where `generate` doesn't call the model once for each token: why, and what to give instead."""
    asked = {name for name in _UNEVEN if option(name) is not None}
    if option("guidance_scale") == 1:
        asked.discard("guidance_scale")
    if asked:
        name = min(asked)
        return f"With `{name}`, a call of the model is no step: {_UNEVEN[name]}.", f"generate without `{name}`"
    if any(getattr(processor, "model", None) is module for processor in option("logits_processor") or ()):
        return (
            "With a logits processor that calls the model itself, a call of the model is no step.",
            "generate without it",
        )
    return None


_CANDIDATES = "one call reads several tokens that were guessed, and those that don't hold are taken back"
_UNEVEN = {
    "assistant_early_exit": _CANDIDATES,
    "assistant_model": _CANDIDATES,
    "custom_generate": "nothing says how often it calls the model",
    "guidance_scale": "for each token, the model is called a second time, for the negative prompt",
    "prefill_chunk_size": "the prompt is read in several calls",
    "prompt_lookup_num_tokens": _CANDIDATES,
}


def check_traceable(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raises where already the first call of the model isn't that of the whole prompt."""
    if _Options(module, kwargs)("prefill_chunk_size") is not None:
        raise InputError(
            "With `prefill_chunk_size`, the prompt is read in several calls, and no value in a trace is the prompt's.",
            instead="generate without `prefill_chunk_size`, or with prefill_chunk_size=None",
        )


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
