"""A run: what a block asks of one execution of a model.

It waits for a port, gives a value back, lets the model go on: to a step, to another call of a module, to the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from functools import partial
from threading import get_ident
from typing import Any, ClassVar

import torch
from torch import nn

from nnsight.core import ahead, compiled, missed, recompute, several
from nnsight.core.counter import StepCounter
from nnsight.core.execution import UNHEARD, Execution
from nnsight.core.history import user_place
from nnsight.core.listing import PYDEVD, refuse_listing
from nnsight.core.log import Log
from nnsight.core.no_value import no_value_in
from nnsight.core.opened import add_open
from nnsight.core.ports import Input, Output, Port
from nnsight.core.recorder import Recorder
from nnsight.core.recording import Narrow, Recording
from nnsight.core.specs import Inputs, describe_inputs
from nnsight.core.standin import StandIn, forward_is_property
from nnsight.core.state import Visit
from nnsight.core.tree import Attached, Tree
from nnsight.core.turns import Turn, Turns
from nnsight.core.values import holds_fakes
from nnsight.errors import (
    FakeValueError,
    ModelError,
    WriteError,
)


class Run(Execution):
    """One execution of `call(*args, **kwargs)`, which runs `module`.

    Args:
        tree: The tree that the module stands in.
        module: The module that is traced.
        call: What to run: the module, or one of its methods.
        args, kwargs: What it is called with.
        steps: Whether `call` runs the module again and again (`generate`): each call of the module is a step then. Or
            what makes the counter, where the steps are calls of something inside.
        saw: Is shown the inputs of each step.
        seen: Tells where in its prompt each token of a step is, if anything does.
    """

    __slots__ = ("_stands_in", "ahead", "functions", "is_open", "outer", "plan", "recorded", "seen", "turns")

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
        counter = StepCounter if steps is True else steps or None
        super().__init__(tree, module, call, args, kwargs, counter, saw)
        self.outer, self.seen = tree, seen  # `outer`: whose Envoys ask this run: of another tree in a scan
        self.plan: Any = None  # how many steps it will have, where a trace began it
        self.recorded: dict[nn.Module, Visit] = {}
        self.functions: set[nn.Module] = set()  # what the block called without keeping what goes on in it
        self.ahead: ahead.Ahead = {}
        self.turns: Turns | None = None  # where calls of a module are asked for by their numbers
        self.is_open = self._stands_in = False

    # What a tracer does: enter, leave.

    def enter(self) -> None:
        """Opens the run for the block. The model has not started yet."""
        owner = self._owner
        if owner.waiting:
            owner.end_waiting()
        owner.runs[id(self)] = self.reference
        self.is_open = self._entered = True
        add_open(self.reference)
        if self.counter:
            self._hold_on(self.module)
            self.counter.arm()

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
        if PYDEVD in sys.modules and not is_left and not state.ended:
            refuse_listing("result")
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
        if isinstance(visit.port, StepCounter) and not visit.port.can_skip:
            raise WriteError(
                "A step of a generation can't be left out: the next one goes on from what it makes.",
                you_wrote=user_place().source,
                instead="tracer.stop(), which ends the generation here; or .skip on a module inside, as on a layer",
            )
        if visit.kwargs.get("return_dict") is False and isinstance(value, torch.Tensor):
            raise WriteError(
                f"`{self.tree.label(module)}` is called with return_dict=False, and returns a tuple, not a tensor.",
                you_wrote=user_place().source,
                instead=f"{self.tree.spelled(module)}.skip((value,))",
            )
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
        if self.counter is not None:
            return None
        if state.called is None and state.given is not None:
            state.called = describe_inputs(*state.given[1:])
        return state.called

    index: ClassVar[int | None] = None  # which part of the batch asks, where that isn't all of it

    def here(self, _module: nn.Module, _kind: str) -> Visit:
        """What stands where the run does, at this module; `_kind`: what of it is looked at, which a part is made of."""
        visit = self.state.visit
        assert visit is not None
        return visit

    def put(self, module: nn.Module, kind: str, value: Any) -> None:
        """Has the model go on with another value there; no write of the block's."""
        self.here(module, kind).replace(kind, value)

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
        if PYDEVD in sys.modules and not state.ended:
            refuse_listing(self.tree.name_of(module, kind))
        steps = self.counter
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
                if isinstance(above, UNHEARD):
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
        if self.counter is not None and self.counter.is_over is not None and step > state.step:
            return False
        if not state.ended and step > max(state.step, 0):  # where the model stands, or starts, is begun already
            self._come_to(step)
        if state.ended or (step > state.step >= 0):
            return False
        if step != state.block_step:
            state.block_step, state.block_turn = step, state.turn if self.counter is None else self.counter.began
        return True

    def begin(self) -> None:
        """Runs the model to where its first step begins, if it has steps and hasn't come there yet."""
        if self.counter is not None and self.state.step < 0 and not self.state.ended:
            self._check_thread()
            self._come_to(0)

    def _come_to(self, step: int) -> None:
        """Runs the model to where a step begins; what is inside its forward can be asked for there."""
        self.state.until_step = step
        if not self._stands_in:
            self._stands_in = True
            undo = self._hold.undo
            for module in [self.module] if self.counter is None else self.counter.counted:
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
