"""Weights that accelerate brought in for a call which never ended."""

from __future__ import annotations

from types import FrameType
from typing import Any


def entered_modules(frame: FrameType | None) -> list[Any]:
    """The modules with an accelerate hook whose forward is on this stack, innermost first."""
    modules = []
    while frame is not None:
        module = frame.f_locals.get("module") if frame.f_code.co_name == "new_forward" else None
        if hasattr(module, "_hf_hook"):
            modules.append(module)
        frame = frame.f_back
    return modules


def put_back(modules: list[Any]) -> None:
    """Offloads again what was brought in for calls that were unwound."""
    for module in modules:
        module._hf_hook.post_forward(module, None)
