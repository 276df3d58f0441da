"""The Python frames of a stack that waits, walked where no collection can end it meanwhile."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from types import FrameType


class _NoCollection:
    """Keeps the garbage collector from running, on any thread, for a few microseconds.

    On CPython 3.11, `frame.f_back` allocates. A collection in the middle of that can close a generator whose block is
    open, and so end the very run whose frames are walked; `f_back` then reads a frame that is gone (SIGSEGV).
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finalizer may come here again, on the same thread
        self._depth = 0
        self._was_on = False

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._was_on = gc.isenabled()
                gc.disable()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if not self._depth and self._was_on:
                gc.enable()


_NO_COLLECTION = _NoCollection()


def frames_from(innermost: Callable[[], FrameType | None]) -> list[FrameType]:
    """The frames of a stack that waits, innermost first."""
    frames = []
    with _NO_COLLECTION:
        frame = innermost()
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
    return frames
