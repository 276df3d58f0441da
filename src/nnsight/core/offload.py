"""Weights that accelerate brought in for a call which never ended."""

from __future__ import annotations

from types import FrameType
from typing import Any


def entered_modules(frames: list[FrameType]) -> list[Any]:
    """The modules with an accelerate hook whose forward is on this stack, innermost first."""
    modules = [frame.f_locals.get("module") for frame in frames if frame.f_code.co_name == "new_forward"]
    return [module for module in modules if hasattr(module, "_hf_hook")]


def put_back(modules: list[Any]) -> None:
    """Offloads again what was brought in for calls that were unwound."""
    for module in modules:
        module._hf_hook.post_forward(module, None)
