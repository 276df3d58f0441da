"""A tiny random model of the same architecture as a large one, for finding out by arithmetic how the large one is built."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from nnsight.anatomy.leaves import rewrite
from nnsight.anatomy.shrink import Shrink

__all__ = ["tiny_config", "tiny_ids", "tiny_model"]


def tiny_config(config: PreTrainedConfig, *, n_layers: int | None = None, least: int = 8) -> PreTrainedConfig:
    small = copy.deepcopy(config)
    rewrite(small, Shrink(small, least))
    return small


def tiny_model(config: PreTrainedConfig, auto: Any = AutoModelForCausalLM, *, seed: int = 0) -> nn.Module:
    small = tiny_config(config)
    with torch.random.fork_rng(devices=[]):
        model = auto.from_config(small, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5 if parameter.dim() < 2 else 0.0, 0.2, generator=draw)
    return model


def tiny_ids(model: nn.Module, *, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
    ids = torch.randint(8, 60, (2, 7), generator=torch.Generator().manual_seed(seed))
    return ids, {}
