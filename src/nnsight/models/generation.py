"""How many steps transformers' `generate` will take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nnsight.block.steps import Plan


def plan(module: nn.Module, kwargs: Mapping[str, Any]) -> Plan:
    """What `max_new_tokens` or `max_length` allows, and what may end the generation before."""
    option = _Options(module, kwargs)
    count, least = option("max_new_tokens"), option("min_new_tokens")
    ids = kwargs.get("input_ids")
    if count is None and option("max_length") is not None and isinstance(ids, Tensor) and not _encodes(module):
        count = max(int(option("max_length")) - ids.shape[-1], 0)
    if count is None:
        return Plan()
    for name in ("stopping_criteria", "stop_strings", "max_time", "assistant_model", "prompt_lookup_num_tokens"):
        if option(name) is not None:
            return Plan(int(count), f"`{name}` may change how many there are")
    if option("eos_token_id") is not None and (least is None or least < count):
        return Plan(int(count), "the end-of-text token may come sooner")
    return Plan(int(count))


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
