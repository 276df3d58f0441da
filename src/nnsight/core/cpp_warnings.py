"""Who hears the warnings that torch's C++ gives: a pointer per thread, into the C stack.

Most functions of torch's that Python calls set it to a place in their own frame, and set it back when they return.
Where a stack is exchanged in between, as in the hooks of a backward pass, it would point to where another stack is by
now, or stay for good what it was in a call that has returned: a warning of C++ then ends the process (SIGSEGV).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

Handler = int | None


def _functions() -> tuple[Callable[[], Handler], Callable[[Handler], None]]:
    """What reads it and what sets it; where this build of torch doesn't show them, two functions that do nothing."""
    try:
        library = ctypes.PyDLL(torch._C.__file__)
        get: Any = library._ZN3c1012WarningUtils19get_warning_handlerEv
        put: Any = library._ZN3c1012WarningUtils19set_warning_handlerEPNS_14WarningHandlerE
    except (AttributeError, OSError, TypeError):
        return lambda: None, lambda _: None
    get.argtypes, get.restype = [], ctypes.c_void_p
    put.argtypes, put.restype = [ctypes.c_void_p], None
    return get, put


warning_handler, set_warning_handler = _functions()


def _outermost() -> Handler:
    here = warning_handler()
    set_warning_handler(None)  # which torch takes for the one that a thread begins with
    outermost = warning_handler()
    set_warning_handler(here)
    return outermost


OUTERMOST = _outermost()
