"""A tiny random model of the same architecture as a large one, for finding out by arithmetic how the large one is built."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from nnsight.anatomy.leaves import configs, rewrite
from nnsight.anatomy.shrink import Shrink

__all__ = ["tiny_config", "tiny_model"]


def tiny_config(config: PreTrainedConfig, *, n_layers: int | None = None, least: int = 8) -> PreTrainedConfig:
    small = copy.deepcopy(config)
    rewrite(small, Shrink(small, least))
    return small


def tiny_model(config: PreTrainedConfig, auto: Any = AutoModelForCausalLM, *, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        model = built(tiny_config(config), auto).eval()
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5 if parameter.dim() < 2 else 0.0, 0.2, generator=draw)
    return model


def built(config: PreTrainedConfig, auto: Any) -> nn.Module:
    """A model of a config; of the part inside that its class is made for, where that isn't the whole (MusicGen's `decoder`)."""
    mapping = getattr(auto, "_model_mapping", {})
    made = mapping[type(config)] if type(config) in mapping else None
    if made is not None and not isinstance(config, made.config_class):
        inner = next((one for one in configs(config) if isinstance(one, made.config_class)), config)
        return made._from_config(inner, dtype=torch.float32)
    return auto.from_config(config, dtype=torch.float32)
