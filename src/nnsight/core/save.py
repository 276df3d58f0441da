"""`.save()`: accepted for compatibility. In a live block variables are variables, so it only returns its object.

It is mounted when the first trace opens, on tensors and on the builtin types that existing programs call it on, never
on `object` (that breaks pydantic and anyio), and stays: thousands of mounts slow a class for good on CPython 3.13.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections import UserDict, UserList, UserString
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_BUILTINS = (list, dict, tuple, set, int, float, bool, str)
# When IPython first completes a name, it asks `UserString` for all that `str` has; its kin go with it.
_STAND_INS: tuple[Any, ...] = (UserList, UserDict, UserString)
is_mounted = False


def save(value: T) -> T:
    """Returns `value`. What a block binds is still there after it; nothing is lost without this."""
    return value


def mount() -> None:
    """Gives tensors and the builtin containers and numbers a `.save()`, once a process."""
    global is_mounted
    if is_mounted:
        return
    is_mounted = True
    if not hasattr(torch.Tensor, "save"):
        torch.Tensor.save = _save  # type: ignore[attr-defined]
    for stand_in in _STAND_INS:
        if not hasattr(stand_in, "save"):
            stand_in.save = _save
    for builtin in (*_BUILTINS, *_of_numpy()):
        if "save" not in builtin.__dict__:
            # A builtin's own dict, behind the read-only view that Python shows.
            own: dict[str, Any] = gc.get_referents(builtin.__dict__)[0]
            own["save"] = _save
            ctypes.pythonapi.PyType_Modified(ctypes.py_object(builtin))


def _of_numpy() -> tuple[Any, ...]:
    """What `tensor.numpy()` gives, where there is NumPy; torch has imported it then."""
    numpy = sys.modules.get("numpy")
    return () if numpy is None else (numpy.ndarray, numpy.generic)


def _save(self: T) -> T:
    """Returns the object itself: what a block binds is still there after it."""
    return self
