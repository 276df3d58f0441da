"""The runs of one thread: who may be resumed now, and who must be ended when the thread ends.

A run belongs to the thread that opened it. One that is dropped elsewhere waits here for its own thread; one that is still
paused when its thread ends is ended then.

Some C++ callers of Python keep a stack of their own per thread (pybind11's life support, the autograd engine). Two runs
paused beneath such callers must go on in the reverse order of their pauses, or the process ends with SIGABRT. Such runs are
*pinned*; whether one is, is only found out, by walking its frames, when the order is not last in, first out.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .run import Run


class Owner:
    """What one thread knows of its runs."""

    __slots__ = ("_paused", "_waiting", "runs", "thread")

    def __init__(self) -> None:
        self.thread = threading.current_thread().name
        self.runs: dict[int, weakref.ref[Run]] = {}
        self._paused: list[weakref.ref[Run]] = []
        self._waiting: deque[Run] = deque()

    def paused(self, run: weakref.ref[Run]) -> None:
        self._paused.append(run)

    def obstacle(self, run: weakref.ref[Run]) -> Run | None:
        """The later run because of which this one may not go on now, if there is one. Otherwise notes that it goes on."""
        paused = self._paused
        if not paused or paused[-1] is run:
            if paused:
                paused.pop()
            return None
        if run not in paused:
            return None  # not started
        later = [other for reference in paused[paused.index(run) + 1 :] if (other := reference()) is not None]
        this = run()
        if this is not None and _is_pinned(this.stack.frame()):
            for other in later:
                if _is_pinned(other.stack.frame()):
                    return other
        paused.remove(run)
        return None

    def end_later(self, run: Run) -> None:
        """Keeps a dropped run until this thread can end it."""
        self._waiting.append(run)

    def end_waiting(self) -> None:
        """Ends the dropped runs that can be ended now; called where this thread passes anyway."""
        for _ in range(len(self._waiting)):
            self._waiting.popleft().drop()


class _Sentinel:
    """Lives exactly as long as its thread."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def __del__(self) -> None:
        if sys.is_finalizing():
            return
        self._owner.end_waiting()
        for reference in list(self._owner.runs.values())[::-1]:
            if (run := reference()) is not None:
                run.drop()


_local: Any = threading.local()


def this_thread() -> Owner:
    try:
        owner: Owner = _local.owner
    except AttributeError:
        owner = _local.owner = Owner()
        _local.sentinel = _Sentinel(owner)
    return owner


def _is_pinned(frame: FrameType | None) -> bool:
    """Whether a paused model stands beneath a C++ caller that keeps a stack per thread, as its Python frames tell."""
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("__torch_dispatch__", "_engine_run_backward") or code.co_filename == _OPS_FILE:
            return True
        if any(isinstance(value, _SCRIPTS) for value in _callables(frame)):
            return True
        frame = frame.f_back
    return False


def _callables(frame: FrameType) -> list[Any]:
    """What the names in a frame's code stand for: a TorchScript function among them may be what it is calling."""
    names = (*frame.f_code.co_names, *frame.f_code.co_varnames, *frame.f_code.co_freevars)
    return [frame.f_locals.get(name, frame.f_globals.get(name)) for name in names]


_OPS_FILE = sys.modules["torch._ops"].__file__
_SCRIPTS = (torch.jit.ScriptFunction, torch.jit.ScriptModule)
