"""The second stack that a model runs on: the only lines that pass control between a block and its model.

A `Stack` runs a function that can pause in the middle of any call, however deep. The block's side calls `resume()`; the
model's side calls `link.pause()`. There are two kinds with one meaning: a greenlet, and a thread of its own, which is
slower and needs no care of C++ stacks (DESIGN.md, the switch).

What a paused stack holds decides what can be freed, so it only ever holds the `Link`, never the `Stack`: a run that is
dropped in the middle is then freed by reference counting.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import Context
from functools import cache, partial
from types import FrameType
from typing import Any, ClassVar

from greenlet import getcurrent, greenlet

from nnsight.core.cpp_warnings import OUTERMOST, Handler, set_warning_handler, warning_handler
from nnsight.core.frames import frames_from
from nnsight.errors import OtherThreadError, RunOrderError

Body = Callable[[None], None]
SHOWS_CPP_STACKS = os.environ.get("TORCH_SHOW_CPP_STACKTRACES", "0") not in ("", "0")  # torch, too, looks once
_FRAMES_WANTED = 73  # torch walks up to 64 C frames when an operation fails; a few more for the walker's own


def _nobody() -> None:
    return None


class Link(ABC):
    """What both sides of a stack share. `model` is a weak reference to the greenlet that the model runs in."""

    __slots__ = ("model",)
    model: Callable[[], greenlet | None]

    def __init__(self) -> None:
        self.model = _nobody

    def is_here(self) -> bool:
        """Whether this very line runs on the model's side."""
        return self.model() is getcurrent()

    @abstractmethod
    def pause(self) -> None:
        """Called on the model's side: passes control to the block, and returns when the block resumes."""


class Stack(ABC):
    """A second stack, not started.

    `body` must catch whatever is raised in it: nothing may leave a stack but by returning.
    """

    __slots__ = ("link",)
    link: Link
    shares_thread: ClassVar[bool]  # with the block, so that what C++ keeps per thread sees both sides

    @abstractmethod
    def resume(self) -> None:
        """Called on the block's side: starts or continues the body until it pauses or returns."""

    def frames(self) -> list[FrameType]:
        """The Python frames of a paused body, innermost first."""
        return frames_from(self._innermost)

    @abstractmethod
    def _innermost(self) -> FrameType | None: ...


class OwnLink(Link):
    """For a body that runs on the stack of whoever resumes it."""

    __slots__ = ()

    def pause(self) -> None:
        raise AssertionError("a model on the block's own stack can't pause")


NOT_STARTED = OwnLink()


class OwnStack(Stack):
    """No second stack: the body runs to its end where it is resumed, and can't pause."""

    __slots__ = ("_body", "_context")
    shares_thread = True

    def __init__(self, body: Body, context: Context) -> None:
        self._body, self._context, self.link = body, context, OwnLink()

    def resume(self) -> None:
        self.link.model = weakref.ref(getcurrent())
        self._context.run(self._body, None)

    def _innermost(self) -> None:
        return None


class GreenletLink(Link):
    """While the model runs, `user` is who resumed it, and `pause` is that one's `switch`, with no call in between."""

    __slots__ = ("ended", "pause", "user")
    pause: Callable[[], Any]
    user: greenlet | None

    def __init__(self, model: Callable[[], greenlet | None]) -> None:
        self.model, self.user, self.ended = model, None, False


Job = tuple[Body, GreenletLink, Context]


class _Worker:
    """A greenlet that runs one body after another.

    A new one for each would cost more than all else in a short trace, above all the memory of its Python frames, which
    CPython asks of the system and gives back.
    """

    __slots__ = ("greenlet", "jobs")

    def __init__(self, main: greenlet, *, once: bool) -> None:
        self.jobs: list[Job] = []
        work = partial(_work, self.jobs, main, 0 if once else _room())
        self.greenlet = greenlet(partial(ladder, work, rungs()), main)


def _work(jobs: list[Job], main: greenlet, room: int, _: None) -> None:
    """What a worker does. It must not hold the worker, which would never be freed then."""
    while True:
        body, link, _context = jobs.pop()
        body(None)
        del body, _context
        link.ended = True
        # It has to go to whoever resumed it last, and holds that one meanwhile: only the main greenlet outlives all.
        if not room or link.user is not main or _is_watched():
            _end_in(link.user)
            return
        del link
        main.switch()
        # Woken from further down the C stack than where it began, it doesn't work: that part of the block's stack is
        # moved away while this runs, with what C++ keeps there and points to.
        if main._stack_saved > room:  # type: ignore[attr-defined]
            _end_in(main)
            return


def _end_in(user: greenlet | None) -> None:
    """Has this stack, which is about to return, do so to whoever resumed it.

    A model that waits for eventlet is given its hub for a parent.
    """
    here = getcurrent()
    if user is not None and here.parent is not user:
        here.parent = user


@cache
def _room() -> int:
    """How many bytes of the waker's stack are moved away where a worker is woken from just where it began.

    They are greenlet's own; a few more are the interpreter's that calls it.
    """
    here, moved = getcurrent(), list[int]()

    def probe() -> None:
        here.switch()
        moved.append(here._stack_saved)  # type: ignore[attr-defined]

    probing = greenlet(probe)
    for _ in range(2):
        probing.switch()
    return moved[0] + 200


def _is_watched() -> bool:
    """Whether a debugger, a profiler or coverage is on: what they see of a greenlet is settled when it begins."""
    return sys.gettrace() is not None or sys.getprofile() is not None


def _is_deep(frames: int = 100) -> bool:
    """Whether many calls are open here: they would count as the worker's own, whoever it works for."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frames:
        frame, frames = frame.f_back, frames - 1
    return frame is not None


class _Idle(threading.local):
    def __init__(self) -> None:
        self.workers: list[_Worker] = []


_idle = _Idle()
_MOST_IDLE = 4  # lockstep needs a few; each keeps some 30 kB


class GreenletStack(Stack):
    """A stack that shares its thread with the block."""

    __slots__ = ("_idle", "_main", "_warnings", "_worker")
    link: GreenletLink
    shares_thread = True

    def __init__(self, body: Body, context: Context) -> None:
        here = getcurrent()
        self._main, self._idle = here if here.parent is None else _main_greenlet(here), _idle.workers
        if self._idle and here is self._main and not _is_watched():
            worker = self._idle.pop()
        else:
            worker = _Worker(self._main, once=_is_deep())
        self._worker: _Worker | None = worker
        self.link = GreenletLink(weakref.ref(worker.greenlet))
        self._warnings: Handler = OUTERMOST  # the body's own; that of whoever resumes it is in force meanwhile
        worker.jobs.append((body, self.link, context))
        worker.greenlet.gr_context = context  # a new greenlet's is empty

    def resume(self) -> None:
        # Whoever resumes is the one to come back to, which need not be who opened the run. Both references are given up
        # after: a nested run would otherwise keep the outer model's stack alive.
        worker, user = self._worker, getcurrent()
        assert worker is not None
        link, users = self.link, warning_handler()
        if users != self._warnings:
            set_warning_handler(self._warnings)
        try:
            if user is self._main:  # which is the parent already
                link.user, link.pause = user, user.switch
                worker.greenlet.switch()
                if worker.jobs:
                    worker = self._replace(worker)
                    worker.greenlet.switch()
            else:
                _adopt(worker.greenlet, user)
                link.user, link.pause = user, user.switch
                worker.greenlet.switch()
                worker.greenlet.parent = self._main
        finally:
            self._warnings = warning_handler()
            if self._warnings != users:
                set_warning_handler(users)
        link.user, link.pause = None, _nobody
        if link.ended:
            self._dismiss(worker)

    def _replace(self, refused: _Worker) -> _Worker:
        self._worker = worker = _Worker(self._main, once=_is_deep())
        job = refused.jobs.pop()
        worker.jobs.append(job)
        worker.greenlet.gr_context = job[-1]
        self.link.model = weakref.ref(worker.greenlet)
        return worker

    def _dismiss(self, worker: _Worker) -> None:
        self._worker, self.link.model = None, _nobody
        if len(self._idle) < _MOST_IDLE and not worker.greenlet.dead:
            worker.greenlet.gr_context = None
            self._idle.append(worker)

    def _innermost(self) -> FrameType | None:
        return None if self._worker is None else self._worker.greenlet.gr_frame


def _adopt(stack: greenlet, user: greenlet) -> None:
    try:
        stack.parent = user
    except ValueError:  # a cycle
        raise RunOrderError(
            "This line runs inside the model that it asks for a value, and which waits for it to end.",
            instead="ask the model that the edit is given, not the tracer of the run around it",
        ) from None


class ThreadLink(Link):
    """Two locks, each held but for the moment in which it wakes its side.

    `leaves` is called on the model's thread, where it is about to pause.
    """

    __slots__ = ("back", "done", "frame", "go", "leaves", "opener", "paused")
    opener: greenlet | None  # the main one of the thread that started the model's, until that is seen to be another
    frame: FrameType | None  # where the model is paused; `sys._current_frames` can deadlock with a collection

    def __init__(self, leaves: Callable[[], None]) -> None:
        super().__init__()
        self.leaves = leaves
        self.go, self.back = threading.Lock(), threading.Lock()
        self.go.acquire()
        self.back.acquire()
        self.paused = self.done = False
        self.frame = self.opener = None

    def pause(self) -> None:
        self.leaves()
        self.frame = sys._getframe()
        self.wake_block()
        self.go.acquire()
        self.frame = None

    def wake_block(self) -> None:
        self.paused = True  # before the lock: whoever sees the lock free may rely on it
        self.back.release()

    def wake_model(self) -> None:
        self.paused = False
        self.go.release()


class ThreadStack(Stack):
    """A stack that is a thread, of which one side only ever runs."""

    __slots__ = ("_thread",)
    link: ThreadLink
    shares_thread = False

    def __init__(self, body: Body, context: Context, leaves: Callable[[], None]) -> None:
        self.link = ThreadLink(leaves)
        run = partial(context.run, _run_in_thread, body, self.link)
        self._thread = threading.Thread(target=run, name="nnsight-model", daemon=True)

    def resume(self) -> None:
        if self._thread.ident is None:
            self.link.opener = _main_greenlet(getcurrent())
            self._thread.start()
        elif not self._thread.is_alive():
            raise OtherThreadError(
                "The model is paused on a thread of its own, which a process that was forked meanwhile doesn't have.",
                instead="a trace that is opened in the new process",
            )
        self.link.wake_model()
        self._wait_for_model()
        if self.link.opener is not None:
            raise OtherThreadError(
                "The model can't have a thread of its own: gevent or eventlet has put greenlets in their place.",
                instead='nnsight.CONFIG.switch = "greenlet"',
            )
        if self.link.done and _thread_is_alive():
            self._thread.join(timeout=1)  # it may need a lock that this thread holds, where the collector came here

    def _wait_for_model(self) -> None:
        """Waits until the model pauses or ends; a Ctrl-C meanwhile goes to the model, whose turn it is."""
        while True:
            try:
                self.link.back.acquire()
                return
            except KeyboardInterrupt:
                if self.link.paused:
                    self.link.back.acquire(timeout=1)  # the interrupt came just before this was done, or just after
                    raise
                ident = ctypes.c_ulong(self._thread.ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(KeyboardInterrupt))

    def _innermost(self) -> FrameType | None:
        return self.link.frame


def _thread_is_alive() -> bool:
    """Whether this thread isn't at its very end, where `join` would take it for a foreign one."""
    return any(thread.ident == threading.get_ident() for thread in threading.enumerate())


def _run_in_thread(body: Body, link: ThreadLink) -> None:
    link.go.acquire()
    link.model = weakref.ref(getcurrent())
    try:
        if link.opener is not _main_greenlet(getcurrent()):
            link.opener = None
            body(None)
    finally:
        link.done = True
        link.wake_block()


def _main_greenlet(current: greenlet) -> greenlet:
    while current.parent is not None:
        current = current.parent
    return current


def ladder(call: Body, rungs: int) -> None:
    """Runs `call` at the top of many C frames that belong to the current greenlet's own slice of the C stack.

    A failing torch operation walks up to 64 C frames. Were the model called directly, the walk would leave the model's
    slice and read what the block left behind there, which ends the process (SIGSEGV).
    """
    climb: Any = map(call, (None,))
    for _rung in range(rungs):
        climb = map(next, (climb,))
    next(climb)


@cache
def rungs() -> int:
    """How many rungs give more than 72 C frames, counted once a process with libc's `backtrace` where there is one."""
    try:
        backtrace = ctypes.CDLL(None).backtrace
    except (AttributeError, OSError, TypeError):
        return 40
    buffer = (ctypes.c_void_p * 512)()
    counts: list[int] = []

    def count(_: None) -> None:
        counts.append(backtrace(buffer, 512))

    for probe in (0, 16):
        ladder(count, probe)
    each = (counts[1] - counts[0]) / 16
    return max(28, int(_FRAMES_WANTED / each) + 1) if each >= 1 else 40
