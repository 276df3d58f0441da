"""A run: one execution of a model as a coroutine that a block drives.

A run is not started, paused at a port, or ended; it ends in one of four ways: finished, stopped, failed in the model,
failed in the block. Afterwards nothing of it is left on the model.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from contextvars import copy_context
from functools import partial
from threading import get_ident
from types import FrameType
from typing import Any

import torch
from torch import nn

from nnsight.core import ahead, compiled, missed, offload, recompute, several
from nnsight.core.history import History, add_note, user_place
from nnsight.core.modes import functorch_level, in_transform, read_modes
from nnsight.core.no_value import no_value_in
from nnsight.core.opened import add_open
from nnsight.core.owner import this_thread
from nnsight.core.ports import Hold, Input, Output, Port, Recorder, StandIn, StepCounter, forward_is_property
from nnsight.core.recording import Log, Narrow, Recording
from nnsight.core.side import modes_here, stack_for
from nnsight.core.specs import Inputs, describe_inputs
from nnsight.core.state import RunState, Unwind, Visit
from nnsight.core.switch import Stack
from nnsight.core.tree import Attached, Tree
from nnsight.core.turns import Turn, Turns
from nnsight.core.values import holds_fakes
from nnsight.errors import (
    FakeValueError,
    ModelError,
    OtherThreadError,
    RunOrderError,
    TransformError,
    WriteError,
)

_graph_task, _is_grad_enabled = torch._C._current_graph_task_id, torch.is_grad_enabled
_UNHEARD = (torch.jit.ScriptModule, nn.DataParallel)  # they call no hooks of what is inside, or those of copies


class Run:
    """One execution of `call(*args, **kwargs)`, which runs `module`.

    Args:
        tree: The tree that the module stands in.
        module: The module that is traced.
        call: What to run: the module, or one of its methods.
        steps: Whether `call` runs the module again and again (`generate`): each call of the module is a step then. Or
            what makes the counter, where the steps are calls of something inside.
        saw: Is shown the inputs of each step.
        seen: Tells where in its prompt each token of a step is, if anything does.
    """

    __slots__ = (
        "__weakref__", "_body", "_context", "_eager", "_entered", "_hold", "_modes", "_owner", "_stack",
        "_stands_in", "_steps", "ahead", "history", "is_open", "module", "outcome", "outer", "plan", "recorded",
        "recording", "records", "reference", "seen", "state", "tree", "turns",
    )  # fmt: skip

    def __init__(
        self,
        tree: Tree,
        module: nn.Module,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        steps: bool | Callable[..., StepCounter] = False,
        saw: Callable[..., None] | None = None,
        seen: Any = None,
    ) -> None:
        self.outcome = "open"  # until all that was put on the model for it is taken away
        self.is_open = self._entered = False
        self.tree, self.module, self.seen = tree, module, seen
        self.outer = tree  # whose Envoys ask this run: of another tree in a scan
        self.plan: Any = None  # how many steps it will have, where a trace began it
        self.history = History()
        self.recorded: dict[nn.Module, Visit] = {}
        self.recording: Recording | None = None
        self.ahead: ahead.Ahead = {}
        self.turns: Turns | None = None  # where calls of a module are asked for by their numbers
        self._eager = self._stands_in = False
        state = self.state = RunState(functorch_level() if in_transform() else None, _graph_task())
        state.given = call, args, kwargs
        self._hold = Hold(state)
        self._steps = (StepCounter if steps is True else steps)(module, state, saw) if steps else None
        self.reference = weakref.ref(self)
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

    # What a tracer does: enter, leave.

    def enter(self) -> None:
        """Opens the run for the block. The model has not started yet."""
        owner = self._owner
        if owner.waiting:
            owner.end_waiting()
        owner.runs[id(self)] = self.reference
        self.is_open = self._entered = True
        add_open(self.reference)
        if self._steps:
            self._hold_on(self.module)
            self._steps.arm()

    def leave(self) -> None:
        """Takes the run away from its block, wherever in the order of open runs it stands; it counts as absent now."""
        self.is_open = False

    def finish(self, *, is_left: bool = False) -> Any:
        """Lets the model run to its end, and returns what it returned.

        Args:
            is_left: Whether the block is over, so that nobody will ask why something never came.
        """
        if self.ahead:
            ahead.check_used(self)
        state = self.state
        state.is_left = is_left
        while not state.ended:
            if get_ident() != self._owner.ident:
                self._check_thread()
            self._resume()
        return state.result

    def returned(self) -> Any:
        """What the call returned, for who asks for it; where the run ended otherwise, an error that says so."""
        if self.outcome not in ("open", "finished"):
            raise missed.no_result(self)
        return self.finish()

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
        """Ends a run that nobody can leave any more: as soon as its own thread, and the order of runs, allow it."""
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
            if self._entered and self.outcome == "open" and not sys.is_finalizing():
                self.drop()
        except AttributeError:  # a Ctrl-C came before it was made
            if hasattr(self, "_entered"):
                raise

    # What an Envoy does: wait for a port, give a value back, let it go on.

    def read(self, module: nn.Module, kind: str, at: int | None = None) -> Visit:
        """Waits until the model stands at this port, and returns the values there; `at`: which input is meant."""
        visit = self.recorded.get(module) if self.recorded else None
        if visit is None:
            visit = self._wait(module, kind)
        if kind == "output":
            value = visit.output
        else:
            value = (visit.args, visit.kwargs) if at is None else visit.args[at]
        self.history.note("read", module, kind, self.state.step, value)
        return visit

    def write_output(self, module: nn.Module, value: Any, widen: Callable[[Visit, Any], Any] | None = None) -> None:
        """`widen` makes the output of the whole batch from a row's."""
        if type(value) is not torch.Tensor:
            self._check_written(value)
        visit = self._wait(module, "output", "write")
        if value is None and not isinstance(module, Attached):
            if visit.output is None:
                return
            raise WriteError(
                f"`{self.tree.label(module)}.output` can't become None: to torch, a hook's None changes nothing.",
                you_wrote=user_place().source,
                instead=f"{self.tree.spelled(module)}.skip(None), which leaves its forward out",
            )
        if visit.versions is not None:
            self._check_recompute(visit, "output", same=value is visit.output)
        if widen is not None:
            value = widen(visit, value)
        self.history.note("wrote", module, "output", self.state.step, value, visit.output)
        visit.output, visit.changed = value, True

    def write_inputs(
        self, module: nn.Module, change: Callable[[Visit], tuple[tuple[Any, ...], dict[str, Any]]]
    ) -> None:
        """`change` makes the new `(args, kwargs)` from the visit at the module's input."""
        visit = self._wait_for_input(module, "write")
        self._check_recompute(visit, "input")
        if visit.skipped or visit.left_out or (visit.shares is not None and visit.shares.is_skipped()):
            raise missed.nothing_takes(self, module)
        args, kwargs = change(visit)
        self._check_written((args, kwargs))
        self.history.note("wrote", module, "input", self.state.step, (args, kwargs), (visit.args, visit.kwargs))
        visit.args, visit.kwargs, visit.changed = args, kwargs, True

    def skip(self, module: nn.Module, value: Any, part: Callable[[Visit], None] | None = None) -> None:
        """Has the module's forward left out in this call; `value` is its output.

        Args:
            part: Is told instead, where `value` is a part of the output only.
        """
        self._check_written(value)
        if forward_is_property(module):
            raise WriteError(
                f"`{self.tree.label(module)}` can't be skipped: its forward is a property, and nothing can replace it.",
                you_wrote=user_place().source,
                instead=f"{self.tree.spelled(module)}.output = ..., which the model goes on with",
            )
        visit = self._wait_for_input(module, "skip")
        if isinstance(visit.port, StepCounter):
            raise WriteError("A step of a generation can't be left out.", you_wrote=user_place().source)
        self._check_recompute(visit, "output")
        self.history.note("skipped", module, "output", self.state.step, value)
        if part is not None:
            part(visit)
        else:
            visit.skipped, visit.skip_value = True, value

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a module on the block's side, hooks and all, and keeps its inner values to be read afterwards."""
        hears = nullcontext() if self.recording is None else self.recording.hearing_the_block()
        recorder = Recorder(module)
        try:
            with hears, recorder:
                output = module(*args, **kwargs)
        except BaseException:  # a Ctrl-C may have come while it left
            recorder.leave()
            raise
        self.recorded.update(recorder.visits)
        return output

    def listen(
        self, modules: Mapping[nn.Module, str], log: Log, *, inputs: bool, output: bool, part: Narrow | None
    ) -> None:
        """Has `log` keep the values of these modules, which come with their paths, at each call from here on."""
        self._check_thread()
        if self.recording is None:
            self.recording = Recording(self.state)
        self.recording.listen(modules, log, inputs=inputs, output=output, part=part)
        if not self._eager and compiled.in_use():
            concerned: Collection[nn.Module] = modules
            known = self.tree.catalogue
            if known is None or len(modules) < len(known.paths):  # else those above them are among them
                concerned = {*modules}.union(*map(self.tree.above, modules))
            if compiled.any_compiled(concerned):
                self._run_eagerly()

    def _check_written(self, value: Any) -> None:
        if (module := no_value_in(value)) is not None:
            raise module._is_no_value("the model can't go on with it")
        if holds_fakes(value):
            raise FakeValueError(
                "A scan's tensors have shapes and no values, and a trace can't go on with one.",
                you_wrote=user_place().source,
                instead="a value of this trace, or of the block's own",
            )

    @property
    def target(self) -> Any:
        """What edits work on where its block calls a module, if not the model itself (block/replay.py)."""
        return None

    @property
    def called(self) -> Inputs | None:
        """What its call was given, as notes that hold nothing; None of a generation, whose steps have their own."""
        state = self.state
        if self._steps is not None:
            return None
        if state.called is None and state.given is not None:
            state.called = describe_inputs(*state.given[1:])
        return state.called

    def named(self, module: nn.Module) -> nn.Module:
        """The module of the tree that a running one stands for: itself, but for a scan."""
        return module

    def asked(self) -> Any:
        """What answers for this run where it is asked: itself, or a part of its batch."""
        return self

    def own(self, thing: Any) -> Any:
        """What stands for a module or parameter of the tree in this run: itself, but for a scan."""
        return thing

    def _check_recompute(self, visit: Visit, kind: str, *, same: bool = False) -> None:
        """Refuses a write that the backward pass would miss; `same`: what is written is what stands there."""
        if visit.versions is not None and not (same and not recompute.was_changed(visit)):
            assert visit.port is not None
            raise recompute.refuse(self.tree.name_of(visit.port.module, kind))

    def _wait_for_input(self, module: nn.Module, verb: str) -> Visit:
        visit = self._wait(module, "input", verb)
        if visit.port is None or visit.port.kind != "input":
            done = {"write": "written", "skip": "skipped"}[verb]
            what, run = ("operation", "it") if isinstance(module, Attached) else ("module", "its forward")
            raise WriteError(
                f"`{self.tree.label(module)}` can't be {done} any more: {run} has run.",
                you_wrote=user_place().source,
                instead=f"do it before you read this {what}'s output",
            )
        return visit

    def _wait(self, module: nn.Module, kind: str, verb: str = "read") -> Visit:
        if get_ident() != self._owner.ident:
            self._check_thread()
        passed = ahead.take(self, module) if self.ahead else 0
        state = self.state
        stood = state.visit.port if state.visit is not None else None
        here = stood.kind if stood is not None and stood.module is module else None
        if here and not passed and kind in (here, "input"):  # at its output, a module's input is still known
            visit = state.visit
            assert visit is not None
            if visit.views is not None or visit.shares is not None:
                self.settle(stays=True)
            elif self.history.seen:  # `settle`, a call less
                self.history.note_changes(stays=True)
            return visit
        steps = self._steps
        outside = steps is not None and steps.has_outside and steps.is_outside(module, self.tree)
        if state.ended or (state.turn > state.block_turn and not outside):
            raise missed.why(self, module, kind, stood, passed, verb=verb)
        passes = passed
        if passed and (
            here == "output" or (kind == "input" and ahead.is_inside(self, module))
        ):  # this call's is behind us
            passes -= 1
        port = (Output if kind == "output" else Input)(module, state, passes)
        if self.turns is not None:
            self.turns.bind(port)
        held, tree = self._hold.modules, self.tree
        for above in tree.callers.get(module) or tree.callers_of(module):
            if above not in held:
                if isinstance(above, _UNHEARD):
                    self._check_heard(module, above)
                self._hold_on(above)
        if not self._eager and compiled.is_compiled(module):
            self._run_eagerly()
        if outside:
            self._outlast_steps(port)
        elif passed and steps is not None:
            several.pass_calls(self, port, passed)
        else:
            self._resume(until=port)
        if self.turns is not None:
            self.turns.over(port)
        if (visit := state.visit) is None or visit.port is not port:
            raise missed.why(self, module, kind, stood, passed, port.elsewhere, verb)
        return visit

    def _outlast_steps(self, port: Port) -> None:
        """Waits for what belongs to no step, however many go by."""
        state = self.state
        before, state.block_step, state.block_turn = (state.block_step, state.block_turn), sys.maxsize, sys.maxsize
        try:
            self._resume(until=port)
        finally:
            state.block_step, state.block_turn = before

    def to_step(self, step: int) -> bool:
        """Runs the model to where this step begins, and has the block's waits belong to it. False if it never comes."""
        if get_ident() != self._owner.ident:
            self._check_thread()
        state = self.state
        if self.ahead and step > state.block_step:
            ahead.check_used(self)
        if self._steps is not None and self._steps.is_over is not None and step > state.step:
            return False
        if not state.ended and step > max(state.step, 0):  # where the model stands, or starts, is begun already
            self._come_to(step)
        if state.ended or (step > state.step >= 0):
            return False
        if step != state.block_step:
            state.block_step, state.block_turn = step, state.turn if self._steps is None else self._steps.began
        return True

    def begin(self) -> None:
        """Runs the model to where its first step begins, if it has steps and hasn't come there yet."""
        if self._steps is not None and self.state.step < 0 and not self.state.ended:
            self._check_thread()
            self._come_to(0)

    def _come_to(self, step: int) -> None:
        """Runs the model to where a step begins; what is inside its forward can be asked for there."""
        self.state.until_step = step
        if not self._stands_in:
            self._stands_in = True
            undo = self._hold.undo
            for module in [self.module] if self._steps is None else self._steps.counted:
                undo.append(partial(StandIn.over(module).leave, module))
        try:
            self._resume()
        finally:
            self.state.until_step = None

    # `.next()`.

    def next(self, module: nn.Module, calls: Any = 1) -> None:
        """Has the following wait for this module, or for anything inside it, pass over calls of it."""
        ahead.go_on(self, module, calls)

    def come_into(self, module: nn.Module, *, itself: bool = True) -> None:
        """Runs to the beginning of the calls that `.next()` meant, of what `module` is inside, and of `itself`."""
        if self.ahead:
            for one in ahead.meant_by(self, module, itself=itself):
                self._wait(one, "input")

    def come_to(self, turn: Turn) -> None:
        """Runs to this call of a module, in which alone what is waited for next is looked for."""
        if self.turns is None:
            self.turns = Turns(self)
        self.turns.come_to(turn)

    def _resume(self, until: Port | None = None) -> None:
        """Runs the model until it comes to a port, or to its end; raises what it raised."""
        state = self.state
        if (in_transform() or state.functorch_level is not None) and functorch_level() != state.functorch_level:
            raise TransformError(
                "A model can't go on inside `vmap`, `func.grad` or another transform of torch.func.",
                instead="read the value before the transform, or open the trace inside it",
            )
        if self.history.seen:  # `settle`, a call less
            self.history.note_changes()
        if (visit := state.visit) is not None:
            if visit.views is not None:
                visit.views.settle()
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

    def settle(self, *, stays: bool = False) -> None:
        """Notes what was changed in place, and writes back what was changed in a copy.

        Before the model goes on, and, where it `stays`, before the block asks again.
        """
        if self.history.seen:
            self.history.note_changes(stays=stays)
        if (visit := self.state.visit) is not None:
            if visit.views is not None:
                visit.views.settle()
            if stays and visit.shares is not None:
                visit.shares.bring_together(visit)

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
            except KeyboardInterrupt:
                modes.to_block(read_modes(), ended=state.ended)
                raise
            finally:
                if state.ended:
                    self._ended("finished" if state.error is None else "failed in the model")
                else:
                    paused.append(self.reference)
        as_in_checkpoint = not model.grad or model.saved_hooks or not modes.sees_both
        if as_in_checkpoint and self.records and self._steps is None and state.visit is not None:
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
        if note := missed.blame(self.tree, [access for access in self.history if access.verb != "read"]):
            add_note(error, note)
        if note := missed.without_weights(self.module, error):
            add_note(error, note)
        try:
            raise error.with_traceback(missed.without_plumbing(error.__traceback__))
        finally:
            del error  # this frame is in its traceback

    def _ended(self, outcome: str) -> None:
        self.state.given, self.state.ended = None, True
        hold = self._hold
        if hold.modules or hold.undo:
            hold.release()
        if self._steps:
            self._steps.disarm()
        if self.recording is not None:
            self.recording.close()
        if self._eager:
            compiled.allow_compiled()
            self._eager = False
        self._owner.runs.pop(id(self), None)
        self.outcome = outcome

    @property
    def counter(self) -> StepCounter | None:
        """What counts its steps, if it has any."""
        return self._steps

    @property
    def generates(self) -> bool:
        """Whether the module runs again and again, a step each time."""
        return self._steps is not None

    @property
    def shares_thread(self) -> bool:
        """Whether the model stands on the block's thread, so that what C++ keeps for each thread sees both."""
        return self._stack is not None and self._stack.shares_thread

    def frames(self) -> list[FrameType]:
        """Where the model is paused, innermost frame first."""
        return [] if self._stack is None else self._stack.frames()

    # What it takes to be heard.

    def until_end(self, undo: Callable[[], None]) -> None:
        """Has `undo` called when the run ends: it takes away what was put on the model for it."""
        self._check_thread()
        self._hold.undo.append(undo)

    def _check_heard(self, module: nn.Module, above: nn.Module) -> None:
        """Refuses what `module` is inside, where a hook on `module` would not be called."""
        if isinstance(above, torch.jit.ScriptModule):
            inside, script = self.tree.label(module), self.tree.label(above)
            raise ModelError(
                f"`{inside}` runs inside TorchScript (`{script}`), which calls no hooks.",
                instead=f"read the output of `{script}`, or wrap the model before it is scripted",
            )
        if isinstance(above, nn.DataParallel) and self.module in (above, *self.tree.above(above)):
            inside, parallel = self.tree.label(module), self.tree.label(above)
            raise ModelError(
                f"`{inside}` is inside a DataParallel (`{parallel}`), which runs copies on other threads.",
                instead=f"model.{parallel} = model.{parallel}.module, before it is wrapped",
            )

    def _hold_on_itself(self) -> None:
        """Not one that calls no hooks inside it: who asks for what is there is told so (`_check_heard`)."""
        if not isinstance(self.module, _UNHEARD):
            self._hold_on(self.module)

    def _hold_on(self, module: nn.Module) -> None:
        self._hold.on(module)
        if not self._eager and compiled.is_compiled(module):
            self._run_eagerly()

    def _run_eagerly(self) -> None:
        self._eager = True
        compiled.force_eager()

    def _check_thread(self) -> None:
        if not self._owner.is_here():
            raise OtherThreadError(
                f"This run was opened on thread {self._owner.name!r}, and only that thread may ask it for values.",
                instead="read the value in the block's own thread and hand it over, or open a trace in this thread",
            )

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
