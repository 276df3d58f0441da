"""Weights that accelerate keeps elsewhere, and brings in for a call: which may never end, or not have begun."""

from __future__ import annotations

from types import FrameType
from typing import Any

import torch
from torch import nn


def entered_modules(frames: list[FrameType]) -> list[Any]:
    """The modules with an accelerate hook whose forward is on this stack, innermost first."""
    modules = [frame.f_locals.get("module") for frame in frames if frame.f_code.co_name == "new_forward"]
    return [module for module in modules if hasattr(module, "_hf_hook")]


def put_back(modules: list[Any]) -> None:
    """Offloads again what was brought in for calls that were unwound."""
    for module in modules:
        module._hf_hook.post_forward(module, None)


def brought_in(module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a weight that is offloaded now, with its values, where its module runs; else the tensor itself."""
    hook = vars(module).get("_hf_hook")
    for one in getattr(hook, "hooks", [hook]):
        weights = getattr(one, "weights_map", None)
        if weights is not None and name in weights:
            return weights[name].to(one.execution_device)
    return tensor
