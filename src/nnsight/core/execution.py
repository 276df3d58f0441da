"""One execution of a model as a coroutine: begun, resumed, ended.

An execution is not started, paused at a port, or ended; it ends in one of four ways: finished, stopped, failed in the
model, failed in the block. Afterwards nothing of it is left on the model.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from types import CodeType, FrameType
from typing import Any, ClassVar

import torch
from torch import nn

from nnsight.core import compiled, failed, offload, recompute
from nnsight.core.counter import StepCounter
from nnsight.core.history import History, add_note
from nnsight.core.hooks import Hold
from nnsight.core.modes import functorch_level, in_transform, read_modes
from nnsight.core.owner import this_thread
from nnsight.core.ports import Port
from nnsight.core.recording import Recording
from nnsight.core.side import modes_here, stack_for
from nnsight.core.specs import describe_inputs
from nnsight.core.state import RunState, Unwind, Visit
from nnsight.core.switch import Stack
from nnsight.core.tree import Tree
from nnsight.errors import OtherThreadError, RunOrderError, TransformError

_graph_task, _is_grad_enabled = torch._C._current_graph_task_id, torch.is_grad_enabled

UNHEARD = (torch.jit.ScriptModule, nn.DataParallel)  # they call no hooks of what is inside, or those of copies


class Execution:
    """What drives a model, and takes away what was put on it. What a block asks of it is in `Run` (run.py).

    Args:
        tree: The tree that the module stands in.
        module: The module that is traced.
        call: What to run: the module, or one of its methods.
        args, kwargs: What it is called with.
        steps: What makes the counter of its steps, if it has any.
        saw: Is shown the inputs of each step.
    """

    __slots__ = (
        "__weakref__", "_body", "_context", "_eager", "_entered", "_hold", "_modes", "_owner", "_stack", "counter",
        "history", "module", "outcome", "recording", "records", "reference", "state", "tree",
    )  # fmt: skip

    def __init__(
        self,
        tree: Tree,
        module: nn.Module,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        steps: Callable[..., StepCounter] | None,
        saw: Callable[..., None] | None,
    ) -> None:
        self.outcome = "open"  # until all that was put on the model for it is taken away
        self._entered = self._eager = False
        self.tree, self.module = tree, module
        self.history = History()
        self.recording: Recording | None = None
        state = self.state = RunState(functorch_level() if in_transform() else None, _graph_task())
        state.given = call, args, kwargs
        self._hold = Hold(state)
        self.counter = steps(module, state, saw) if steps else None
        self.reference: weakref.ref[Any] = weakref.ref(self)
        self._owner = this_thread()
        self._body = partial(_forward, state)
        self._context = copy_context()
        self._modes = modes_here()
        self.records = _is_grad_enabled()  # whether a graph is recorded, but where the model says otherwise
        self._stack: Stack | None = None  # until it starts

    def _new_stack(self, *, pauses: bool) -> Stack:
        """A second stack for the model; the block's own where it will not pause, since nobody asks for a value."""
        stack = stack_for(self._body, self._modes, self._context, pauses=pauses)
        self._stack, self.state.link = stack, stack.link
        return stack

    # It goes on, and pauses.

    def _resume(self, until: Port | None = None) -> None:
        """Runs the model until it comes to a port, or to its end; raises what it raised."""
        state = self.state
        if in_transform() or state.functorch_level is not None:
            self._check_transform()
        if self.history.seen:  # `settle`, a call less
            self.history.note_changes()
        if (visit := state.visit) is not None:
            if visit.views is not None:
                self.settle()
            if visit.shares is not None:
                visit.shares.settle(visit)
            del visit  # while the model goes on, nothing of where it stood is kept from here
        if until is None:
            state.waiting = False
            self._switch()
        else:
            state.waiting = True
            if self._hold.skipped:
                self._hold.skipped = []
            try:
                until.arm()
                self._switch()
            finally:
                try:
                    until.disarm()
                except BaseException:  # a Ctrl-C, which can come between any two calls
                    until.disarm()
                    raise
        if state.error is not None:
            self._raise()

    def _check_transform(
        self, instead: str = "read the value before the transform, or open the trace inside it"
    ) -> None:
        if functorch_level() != self.state.functorch_level:
            raise TransformError(
                "A model can't go on inside `vmap`, `func.grad` or another transform of torch.func.", instead=instead
            )

    def settle(self, *, stays: bool = False) -> None:
        """Notes what was changed in place, and writes back what was changed in a copy.

        Before the model goes on, and, where it `stays`, before the block asks again.
        """
        if self.history.seen:
            self.history.note_changes(stays=stays)
        if (visit := self.state.visit) is not None:
            if visit.views is not None:
                if visit.shares is not None:
                    visit.shares.write_out(visit, self.history)
                visit.views.settle()
            if stays and visit.shares is not None:
                visit.shares.bring_together(visit, self.history)

    def _switch(self) -> None:
        """Passes control to the model, and comes back when it pauses or ends."""
        state, modes, paused = self.state, self._modes, self._owner.paused
        if state.visit is not None and state.visit.versions is not None and state.unwinding is None:
            self._check_in_place(state.visit)
        if paused:
            if len(paused) == 1 and paused[0] is self.reference:
                paused.clear()
            else:
                self._owner.let_go_on(self)
        stack = self._stack or self._begin()
        if (block := read_modes()) != modes.other or modes.block_guard is not None:  # most often there is nothing to do
            modes.to_model(block)
        try:
            stack.resume()
        except BaseException:  # what the model raises doesn't come this way, but a Ctrl-C between the sides does
            if not stack.frames():
                state.ended = True
            raise
        finally:
            try:
                if (model := read_modes()) != modes.other or modes.model_guard is not None:
                    modes.to_block(model, ended=state.ended)
            except BaseException:  # written out four times: it could come at the call of a function, too
                modes.to_block(read_modes(), ended=state.ended)
                raise
            finally:
                if state.ended:
                    self._ended("finished" if state.error is None else "failed in the model")
                else:
                    paused.append(self.reference)
        as_in_checkpoint = not model.grad or model.saved_hooks or not modes.sees_both
        if as_in_checkpoint and self.records and self.counter is None and state.visit is not None:
            recompute.note_versions(state, self.frames())

    def _check_in_place(self, visit: Visit) -> None:
        recompute.check_in_place(visit, self.tree.name_of, self.history)

    def _begin(self) -> Stack:
        """Starts the model. Where nobody waits, it runs to its end at once: on the block's stack, and not held."""
        pauses = self.state.waiting or self.state.until_step is not None
        if pauses and self.module not in self._hold.modules:
            self._hold_on_itself()
        return self._new_stack(pauses=pauses)

    def _raise(self) -> None:
        error, self.state.error = self.state.error, None
        assert error is not None
        if note := failed.blame(self.tree, [access for access in self.history if access.verb != "read"]):
            add_note(error, note)
        if note := failed.without_weights(self.module, error):
            add_note(error, note)
        try:
            raise error.with_traceback(failed.without_plumbing(error.__traceback__))
        finally:
            del error  # this frame is in its traceback

    raises: ClassVar[CodeType] = _raise.__code__  # of the frame behind which those of the model begin

    def _ended(self, outcome: str) -> None:
        self.state.given, self.state.ended = None, True
        hold = self._hold
        if hold.modules or hold.undo:
            hold.release()
        if self.counter:
            self.counter.disarm()
        if self.recording is not None:
            self.recording.close()
        if self._eager:
            compiled.allow_compiled()
            self._eager = False
        self._owner.runs.pop(id(self), None)
        self.outcome = outcome

    # It ends early.

    def stop(self, outcome: str) -> BaseException | None:
        """Ends the model where it stands; its `finally` blocks run. Returns an error that it raised meanwhile."""
        state = self.state
        if state.ended or self._stack is None:
            self.put_away(outcome)
            return None
        self._check_thread()
        if outcome == "stopped":
            self.settle()
        elif self.history.seen:
            self.history.note_changes()
        if self.recording is not None and state.visit is not None:
            if state.visit.shares is not None:
                state.visit.shares.write_out(state.visit)
            self.recording.arrived(state.visit)
        offloaded = offload.entered_modules(self.frames())
        unwinding = state.unwinding = Unwind()
        try:
            self._switch()
        except RunOrderError:
            state.unwinding = None
            raise
        offload.put_back(offloaded)
        late, state.error = state.error, None
        state.unwinding = unwinding.__traceback__ = None
        self.outcome = outcome
        return late

    def drop(self) -> None:
        """Ends a run that nobody can leave any more: as soon as its own thread, and the order of runs, allow it.

        At the end of the process no second stack goes on: whatever is paused then, in a generator say, stays so.
        """
        if sys.is_finalizing():
            return
        try:
            self.stop("dropped")
        except (OtherThreadError, RunOrderError):
            self._owner.end_later(self)

    def give_up(self) -> None:
        """Takes away what was put on the model; to unwind that is too late, since the run's own thread has ended."""
        if not self.state.ended:
            self._ended("dropped")

    def put_away(self, outcome: str = "dropped") -> None:
        """Takes off the model what is still there of a run that has ended, or has not begun."""
        if self.outcome == "open":
            self._ended(outcome)

    def __del__(self) -> None:
        try:
            if self._entered and self.outcome == "open":
                self.drop()
        except AttributeError:  # a Ctrl-C came before it was made
            if hasattr(self, "_entered"):
                raise

    # What is known of it.

    @property
    def generates(self) -> bool:
        """Whether the module runs again and again, a step each time."""
        return self.counter is not None

    @property
    def shares_thread(self) -> bool:
        """Whether the model stands on the block's thread, so that what C++ keeps for each thread sees both."""
        return self._stack is not None and self._stack.shares_thread

    def frames(self) -> list[FrameType]:
        """Where the model is paused, innermost frame first."""
        return [] if self._stack is None else self._stack.frames()

    def _check_thread(self) -> None:
        if not self._owner.is_here():
            raise OtherThreadError(
                f"This run was opened on thread {self._owner.name!r}, and only that thread may ask it for values.",
                instead="read the value in the block's own thread and hand it over, or open a trace in this thread",
            )

    # What was put on the model for it.

    def until_end(self, undo: Callable[[], None]) -> None:
        """Has `undo` called when the run ends: it takes away what was put on the model for it."""
        self._check_thread()
        self._hold.undo.append(undo)

    def _hold_on_itself(self) -> None:
        """Not one that calls no hooks inside it: who asks for what is there is told so (`Run._check_heard`)."""
        if not isinstance(self.module, UNHEARD):
            self._hold_on(self.module)

    def _hold_on(self, module: nn.Module) -> None:
        self._hold.on(module)
        if not self._eager and compiled.is_compiled(module):
            self._run_eagerly()

    def _run_eagerly(self) -> None:
        self._eager = True
        compiled.force_eager()

    def __reduce__(self) -> Any:
        raise TypeError("a run, and what belongs to its trace, can't be copied or pickled; values can")

    def __repr__(self) -> str:
        last = f", last asked at {self.history.last.place}" if self.history else ""
        return f"<run of {type(self.module).__name__}, {self.outcome}{last}>"


def _forward(state: RunState, _: None) -> None:
    """What runs on the model's stack. Nothing is ever raised out of it."""
    assert state.given is not None
    call, args, kwargs = state.given
    try:
        state.result = call(*args, **kwargs)
        if state.called is None and not state.is_left:
            state.called = describe_inputs(args, kwargs)
    except BaseException as error:  # noqa: BLE001  what the model raises is raised again on the block's side
        recompute.close_checkpoints(error)
        if error is not state.unwinding:
            state.error = error
    state.given, state.ended = None, True
