"""A carried block at run time: a run turned around. The block is the coroutine, and the model drives it.

In a live trace, the block stands where the user wrote it, and resumes the model. A carried block has no place there: it
runs on a second stack, which the model resumes. When a port of the block's fires, control passes to the block with the
value, and comes back when the block waits for its next port, or ends. To what asks for values, it is a run like any
other.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch
from greenlet import getcurrent
from torch import nn

from nnsight.core import recompute
from nnsight.core.ahead import check_used
from nnsight.core.context import put
from nnsight.core.frames import frames_from
from nnsight.core.history import PACKAGE, Place, add_note, user_place
from nnsight.core.hooks import Hold
from nnsight.core.late import Tail
from nnsight.core.modes import Modes, Snapshot, functorch_level, read_modes
from nnsight.core.opened import OPEN
from nnsight.core.owner import this_thread
from nnsight.core.ports import Port, put_first
from nnsight.core.run import Run
from nnsight.core.spliced import Had, SplicedCall, call_around
from nnsight.core.standin import is_left_out
from nnsight.core.state import RunState, Unwind, Visit
from nnsight.core.switch import Link, Stack
from nnsight.core.tree import Attached, Tree
from nnsight.errors import BlockError

_top_saved_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class Reins(Link):
    """How the model's side passes control to a carried block. Made on the stack that the model runs on."""

    __slots__ = ("_drive",)

    def __init__(self, drive: Callable[[], None]) -> None:
        self.model, self._drive = weakref.ref(getcurrent()), drive

    def pause(self) -> None:
        self._drive()

    def drop(self) -> None:
        """Breaks the cycle of block and reins, so that both are freed by reference counting."""
        self._drive = _nothing


def _nothing() -> None:
    return None


def state_here(drive: Callable[[], None] = _nothing) -> RunState:
    """A state for ports that listen to what the current stack calls."""
    state = RunState(functorch_level(), torch._C._current_graph_task_id())
    state.link = Reins(drive)
    return state


class Call:
    """A call that a carried block has the model's side make, under the block's modes."""

    __slots__ = ("_call", "_error", "_modes", "_output", "_spliced")

    def __init__(self, call: Callable[[], Any], modes: Snapshot, spliced: SplicedCall) -> None:
        self._call, self._modes, self._spliced = call, modes, spliced
        self._error: BaseException | None = None
        self._output: Any = None

    def make(self) -> None:
        """On the model's side. What the call raises is kept for the block, its end by the model's unwinding too."""
        modes = Modes()
        modes.other = self._modes
        modes.to_model(read_modes())
        try:
            with self._spliced.going_on():
                self._output = self._call()
        except BaseException as error:  # noqa: BLE001  raised again in the block
            self._error = error
        finally:
            modes.to_block(read_modes(), ended=False)

    def returned(self) -> Any:
        """On the block's side: what the call returned, or raised."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._output
        finally:
            del error  # this frame is in its traceback


class Carried(Run):
    """One execution of a carried block, during one call of a module, made and driven on the model's side.

    Args:
        tree: The tree that the block's values are asked of.
        module: The module whose call it is.
        body: The block.
        rank: Its place among the blocks that wait at the same port, lowest first; a live block comes last.
        called: What the call looks like, for the twin that explains a wait which nothing served.
        carrier: The path of the module that carries the block, which is above `module` in a call of a part.
        records: Whether a graph was recorded where the model was called.
        caller: What called it, beyond which no frame is the model's.
    """

    __slots__ = (
        "_call",
        "_caller",
        "_closing",
        "_driver",
        "_had",
        "_inner",
        "_tails",
        "can_skip",
        "carrier",
        "raised",
        "waited_for",
        "waits_for",
    )

    def __init__(
        self,
        tree: Tree,
        module: nn.Module,
        body: Callable[[], Any],
        rank: int,
        called: Any,
        *,
        carrier: str,
        records: bool,
        caller: CodeType | None,
    ) -> None:
        super().__init__(tree, module, self._run_block, (body,), {})
        self._caller, self.carrier = caller, carrier
        self._modes.turned = True
        self.records = records
        self._inner = self.state  # the block's own: whether it has ended, and how
        self._inner.is_left = True  # what is said of a call's inputs is said of the module's
        self.state = state_here(self._drive)  # the ports'
        self.state.step, self.state.rank, self.state.called = 0, rank, called
        self._hold = Hold(self.state)
        self._closing: Unwind | None = None
        self._call: Call | None = None  # what the block has the model's side call
        self._driver: FrameType | None = None  # where the model waits for the block
        self._tails: list[Tail] = []
        self._had = Had()
        self.raised: BaseException | None = None  # into the model, which may have caught it
        self.waits_for: nn.Module | None = None
        self.waited_for: list[nn.Module] = []  # what it has waited for, in order

    # On the model's side.

    def start(self, port: Port, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Visit:
        """Runs the block up to its first wait; at first it stands at the module's input."""
        self._hold_on_itself()
        return self.state.arrive(port, args, kwargs, left_out=is_left_out(port))

    def close(self) -> None:
        """Called when the call has returned: what the block still waits for is an error at its line."""
        self.state.ended = True
        self._drive()

    def drop(self) -> None:
        """Ends the block where it stands; its `finally` blocks run."""
        if self._inner.ended:
            return
        self.state.ended, self._closing = True, Unwind()
        self._inner.unwinding = self._closing
        self._drive()

    def call_ended(self) -> None:
        """Called when the module's call is over, however: what the block left among its hooks is taken away."""
        while self._tails:
            self._tails.pop().disarm()

    @property
    def has_ended(self) -> bool:
        return self._inner.ended

    @property
    def skipped(self) -> list[nn.Module]:
        """What was skipped in this call, of all that is above what the block has waited for."""
        return self._hold.skipped

    def _drive(self) -> None:
        """Passes control to the block, and comes back when it waits or ends; raises what it raised."""
        if self._inner.ended:
            return
        stack = self._stack or self._new_stack(pauses=True)
        self._driver = sys._getframe()
        if self.state.visit is not None and self._may_be_recomputed():
            recompute.note_versions(self.state, self.frames())
        self._modes.to_model(read_modes())  # the other side, which here is the block's
        try:
            stack.resume()
            while (call := self._call) is not None:
                self._call = None
                call.make()
                stack.resume()
        except BaseException:  # as in `Execution._switch`
            if not stack.frames():
                self._inner.ended = True
            raise
        finally:
            self._driver = None  # a cycle
            try:
                self._modes.to_block(read_modes(), ended=self._inner.ended)
            except BaseException:
                self._modes.to_block(read_modes(), ended=self._inner.ended)
                raise
            finally:
                if self._inner.ended:
                    self._let_go()
        if self._inner.error is not None:
            self._raise()

    def _let_go(self) -> None:
        assert isinstance(self.state.link, Reins)
        self.state.link.drop()
        self.state.visit = None
        self._ended("finished")

    def _may_be_recomputed(self) -> bool:
        return _top_saved_hooks(False) is not None or (self.records and not torch.is_grad_enabled())

    def frames(self) -> list[FrameType]:
        """Where the model is while the block runs, innermost frame first, up to what called it with its edits."""
        frames = frames_from(lambda: self._driver)
        callers = [at for at, frame in enumerate(frames) if frame.f_code is self._caller]
        return frames[: callers[0]] if callers else frames

    def _new_stack(self, *, pauses: bool) -> Stack:
        reins = self.state.link
        stack = super()._new_stack(pauses=pauses)
        self._inner.link, self.state.link = stack.link, reins
        return stack

    def _raise(self) -> None:
        error, self._inner.error = self._inner.error, None
        assert error is not None
        traceback = from_user(error.__traceback__)
        if traceback is not None:
            add_note(error, f"In an edit: {Place(traceback.tb_frame.f_code, traceback.tb_lineno).quoted}")
        self.raised = error
        try:
            raise error.with_traceback(traceback)
        finally:
            del error, traceback

    # On the block's side.

    def _run_block(self, body: Callable[[], Any]) -> None:
        self._owner = this_thread()
        family = self.tree.family
        others = [other for other in OPEN.get() if (run := other()) is not None and run.outer.family is not family]
        put(OPEN, (*others, self.reference))
        self.is_open = True
        try:
            body()
            check_used(self)
            if self.state.visit is not None and self._closing is None:
                self.settle()
                self._check_in_place(self.state.visit)
        finally:
            self.is_open = False

    def _resume(self, until: Port | None = None) -> None:
        """Lets the model run on until it comes to a port."""
        assert until is not None
        if self._closing is not None:
            raise self._closing
        self.settle()
        if self.state.visit is not None and self.state.visit.versions is not None:
            self._check_in_place(self.state.visit)
        self._check_transform("read the value before the transform")
        self.waits_for = until.module
        self.waited_for.append(until.module.place[0] if isinstance(until.module, Attached) else until.module)
        try:
            until.arm()
            put_first(until)
            tail = Tail(until)
            self._tails.append(tail)
            tail.arm()
            self._inner.link.pause()
        finally:
            try:
                until.disarm()
            except BaseException:
                until.disarm()
                raise
        tail.port_fired()
        if self._closing is not None:
            raise self._closing

    def read(self, module: nn.Module, kind: str, at: int | None = None) -> Visit:
        visit = super().read(module, kind, at)
        named, value = self.named(module), visit.value(kind)
        if visit.port is None:
            self._had.note_recorded(named, kind, value)
        else:
            self._had.note(call_around(self.state.link), named, kind, value)
        return visit

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Has the model's side call the module, where all who wait for it, or for what is inside, are served."""
        if self._closing is not None:  # in a `finally`
            return super().record(module, args, kwargs)
        self.tree.called_by_edits.add(module)
        had, named = self._had, self.named(module)
        if (visit := self.state.visit) is not None and visit.port is not None:
            had.note_visit(call_around(self.state.link), self.named(visit.port.module), visit)
        spliced = had.passed_on(named, args, kwargs)
        call = self._call = Call(partial(super().record, module, args, kwargs), read_modes(), spliced)
        self._inner.link.pause()
        if self._closing is not None:
            raise self._closing
        output = call.returned()
        had.note(spliced, named, "output", output)
        return output

    def finish(self, *, is_left: bool = False) -> Any:
        raise BlockError(
            "An edit has no result: it runs while the model does.",
            you_wrote=user_place().source,
            instead="the model's own output: edited.output",
        )

    def stop(self, outcome: str) -> BaseException | None:
        raise BlockError("An edit can't stop the model.", you_wrote=user_place().source)


def from_user(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame on that isn't the library's."""
    while traceback is not None and traceback.tb_frame.f_code.co_filename.startswith(PACKAGE):
        traceback = traceback.tb_next
    return traceback
