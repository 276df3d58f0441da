"""torch's own `MultiheadAttention`, whose inside is one function to whoever watches functions: opened for these."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from torch.nn import functional
from torch.overrides import TorchFunctionMode

_WHOLE: Any = functional.multi_head_attention_forward


def is_whole(function: Any) -> bool:
    """Whether a mode is shown all of attention, with its four matrices, as one function."""
    return function is _WHOLE


def opened(mode: TorchFunctionMode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls it so that the mode is shown the functions that it calls: torch's own code, less its question for modes."""
    known = {**vars(functional), "has_torch_function": lambda _: False}
    inside = FunctionType(_WHOLE.__code__, known, _WHOLE.__name__, _WHOLE.__defaults__)
    inside.__kwdefaults__ = _WHOLE.__kwdefaults__
    with mode:
        return inside(*args, **kwargs)
