"""The runs of one thread: who may be resumed now, and who must be ended when the thread ends.

A run belongs to the thread that opened it. One that is dropped elsewhere waits here for its own thread; one that is
still paused when its thread ends is ended then.

Some C++ callers of Python keep a stack of their own per thread (pybind11's life support, the autograd engine). Two
runs paused beneath such callers must go on in the reverse order of their pauses, or the process ends with SIGABRT.
Such runs are *pinned*; whether one is, is only found out, by walking its frames, when the order is not last in, first
out.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from nnsight.errors import RunOrderError


class Owned(Protocol):
    """What a thread owns: the execution of a model, or a backward pass."""

    @property
    def reference(self) -> weakref.ref[Any]: ...
    @property
    def state(self) -> Any: ...
    @property
    def tree(self) -> Any: ...
    @property
    def shares_thread(self) -> bool: ...
    def frames(self) -> list[FrameType]: ...
    def drop(self) -> None: ...
    def give_up(self) -> None: ...


class Owner:
    """What one thread knows of its runs."""

    __slots__ = ("__weakref__", "heard_by", "ident", "name", "over", "paused", "runs", "waiting")

    def __init__(self) -> None:
        with _lock:
            _owners.add(self)
        self.name, self.ident = threading.current_thread().name, threading.get_ident()
        self.runs: dict[int, weakref.ref[Owned]] = {}
        self.paused: list[weakref.ref[Owned]] = []  # in the order of their pauses
        self.waiting: deque[Owned] = deque()
        # What else is told of a call of autograd's that pauses: weak references to functions that take its number.
        self.heard_by: dict[int, weakref.WeakMethod[Callable[[int], None]]] = {}
        self.over = False  # the thread has ended, and its number may be another's by now

    def is_here(self) -> bool:
        """Whether this line runs on the thread. Its thread-local state may be gone already, when it ends."""
        return threading.get_ident() == self.ident and not self.over

    def let_go_on(self, run: Owned) -> None:
        """Notes that a run is about to start or to go on, or says why it may not now."""
        reference, paused = run.reference, self.paused
        if paused[-1] is reference:
            paused.pop()
        others = [other for waiting in paused if (other := waiting()) is not None and other is not run]
        if not others:
            paused.clear()
            return
        _check_state(run, others)
        if reference in paused:
            later = [waiting() for waiting in paused[paused.index(reference) + 1 :]]
            _check_order(run, [other for other in later if other is not None])
            paused.remove(reference)

    def end_later(self, run: Owned) -> None:
        """Keeps a dropped run until this thread can end it."""
        self.waiting.append(run)
        if self.over:
            self._give_up()

    def end_waiting(self) -> None:
        """Ends the dropped runs that can be ended now; called where this thread passes anyway."""
        for _ in range(len(self.waiting)):
            self.waiting.popleft().drop()

    def close(self) -> None:
        """Ends all runs, at the thread's own end; what another thread drops at this very moment is given up."""
        self.end_waiting()
        for reference in list(self.runs.values())[::-1]:
            if (run := reference()) is not None:
                run.drop()
        self.over = True
        self._give_up()

    def _give_up(self) -> None:
        while self.waiting:
            with suppress(IndexError):  # another thread was quicker
                self.waiting.popleft().give_up()


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()
_lock = threading.Lock()


def runs_of_all_threads() -> list[tuple[Owner, Owned]]:
    """The runs and backward passes that have begun and not ended, with the thread of each."""
    with _lock:
        owners = list(_owners)
    runs = [(owner, reference()) for owner in owners for reference in list(owner.runs.values())]
    return [(owner, run) for owner, run in runs if run is not None]


class _Sentinel:
    """Lives exactly as long as its thread."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._owner.close()


_local: Any = threading.local()


def this_thread() -> Owner:
    try:
        owner: Owner = _local.owner
    except AttributeError:
        owner = _local.owner = Owner()
        _local.sentinel = _Sentinel(owner)
    return owner


def has_runs() -> bool:
    """Whether this thread has ever had a run of its own, or runs a model for one."""
    return hasattr(_local, "owner")


def _check_order(run: Owned, later: list[Owned]) -> None:
    """Of two runs that are pinned, only the later one may go on."""
    if not _is_pinned(run):
        return
    for other in later:
        if _is_pinned(other):
            raise RunOrderError(
                f"{run} and {other} are both paused beneath C++ code, which allows only the later one to go on.",
                instead='end the later block first, or set `nnsight.CONFIG.switch = "thread"` before you open them',
            )


def _check_state(run: Owned, others: list[Owned]) -> None:
    """A model that is paused while its modules are changed for one call can't be run by another one meanwhile."""
    for other in others:
        if other.tree.root is run.tree.root and (what := _amid(other)):
            raise RunOrderError(
                f"{other} is paused in a call for which {what}, so that {run} of the same model can't run meanwhile.",
                instead="end the other block first, or trace a copy of the model",
            )


def _amid(run: Owned) -> str | None:
    """What goes on around a paused run, if that forbids another; its frames are walked once where it stands."""
    visit = getattr(run.state, "visit", None)
    if visit is None:
        return _changed_meanwhile(run.frames())
    if not hasattr(visit, "amid"):
        visit.amid = _changed_meanwhile(run.frames())
    found: str | None = visit.amid
    return found


def _changed_meanwhile(frames: list[FrameType]) -> str | None:
    for frame in frames:
        code = frame.f_code
        if code.co_filename.endswith(_STATELESS):
            return "`functional_call` has exchanged its parameters"
        if code.co_name == "new_forward" and _offloads(frame.f_locals.get("module")):
            return "accelerate has brought in its offloaded weights"
    return None


def _offloads(module: Any) -> bool:
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", [hook]))


def _is_pinned(run: Owned) -> bool:
    """Whether a paused model stands beneath a C++ caller that keeps a stack per thread, as its Python frames tell."""
    for frame in run.frames() if run.shares_thread else ():
        code = frame.f_code
        if code.co_name in ("__torch_dispatch__", "_engine_run_backward") or code.co_filename == _OPS_FILE:
            return True
        if any(isinstance(value, _SCRIPTS) for value in _callables(frame)):
            return True
    return False


def _callables(frame: FrameType) -> Iterator[Any]:
    """What the names in a frame's code can stand for: a TorchScript function among them may be what it is calling."""
    code, found = frame.f_code, frame.f_locals
    yield from found.values()
    if code in _CALLS:  # torch's own call of a module, two frames of three: what it calls is in a local
        return
    names, around = frozenset(code.co_names), frame.f_globals
    yield from map(around.get, names & around.keys())
    for value in found.values():
        if own := getattr(value, "__dict__", None):
            yield from map(own.get, names & own.keys())
            if children := own.get("_modules"):
                yield from map(children.get, names & children.keys())


_CALLS = {torch.nn.Module._call_impl.__code__, torch.nn.Module._wrapped_call_impl.__code__}
_OPS_FILE = sys.modules["torch._ops"].__file__
_STATELESS = str(Path("torch", "nn", "utils", "stateless.py"))
_SCRIPTS = (torch.jit.ScriptFunction, torch.jit.ScriptModule)
