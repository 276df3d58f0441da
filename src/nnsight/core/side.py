"""The other side of a switch: which stack a body runs on, and what of torch's state is kept apart for it."""

from __future__ import annotations

from contextvars import Context
from functools import partial

from nnsight.core.config import CONFIG
from nnsight.core.modes import Modes, SharedModes
from nnsight.core.owner import this_thread
from nnsight.core.switch import SHOWS_CPP_STACKS, Body, GreenletStack, OwnStack, Stack, ThreadStack


def modes_here() -> Modes | SharedModes:
    """What keeps the modes of the two sides apart, for the switch that is in use; both begin with those here."""
    kind = CONFIG.switch  # "auto" is a greenlet, but where torch walks the whole stack
    return SharedModes() if kind == "thread" or (SHOWS_CPP_STACKS and kind == "auto") else Modes()


def stack_for(body: Body, modes: Modes | SharedModes, context: Context, *, pauses: bool) -> Stack:
    """A second stack for `body`; the stack of whoever resumes it where it will not pause."""
    if isinstance(modes, SharedModes):
        return ThreadStack(partial(_begin_thread, modes, body), context, modes.pause)
    return (GreenletStack if pauses else OwnStack)(body, context)


def _begin_thread(modes: SharedModes, body: Body, _: None) -> None:
    this_thread()
    modes.start()
    body(None)
    modes.pause()
