"""Turns: the calls of a module that a forward pass calls several times, each asked for by its number.

ALBERT calls one layer twelve times. A run that is asked for something in one of these calls counts them from its start
on. It goes to the beginning of that call, and a wait for something inside ends where that call does: what the next one
makes is another value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from nnsight.core.history import user_place
from nnsight.core.hooks import listens, put_hook, take_hook
from nnsight.core.ports import NOTHING, Input, Port
from nnsight.core.state import RunState
from nnsight.core.tree import Attached
from nnsight.errors import AlreadyPastError, BlockError, CalledFewerTimesError, NeverCalledError, OutOfOrderError

if TYPE_CHECKING:
    from nnsight.core.run import Run


@dataclass(frozen=True)
class Counted:
    """Modules whose calls are told apart.

    Attributes:
        paths: Theirs, below the root.
        before: The places that a pass comes by before the first of the calls: modules' paths, "input" or "output".
    """

    paths: tuple[str, ...]
    before: frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Turn:
    """One of the calls of a module in a forward pass.

    Attributes:
        path: The module, below the root.
        index: Which call of it: the first is 0.
        name: What it is called, for errors: `layers[3]`.
        counted: It, and others that are counted with it.
    """

    path: str
    index: int
    name: str
    counted: Counted


class Turns:
    """The modules of a run whose calls are counted, and which call the next wait belongs to."""

    __slots__ = ("_counters", "_from_start", "_run", "bound", "lost")

    def __init__(self, run: Run) -> None:
        self._run = run.reference
        self._counters: dict[str, Counter] = {}
        self.bound: tuple[Counter, Turn] | None = None
        self.lost: dict[Port, Turn] = {}  # waits whose call has ended
        self._from_start: set[Port] = set()  # waits before which nothing had run in their call

    def come_to(self, turn: Turn) -> None:
        """Has the run stand in this call of a module, and the wait that follows end with it."""
        run = self._run()
        assert run is not None
        if turn.path not in self._counters:
            self._count(run, turn.counted)
        counter = self._counters[turn.path]
        if not self._is_in(run, counter, turn):
            self._go_to(run, counter, turn)
        self.bound = counter, turn

    def _count(self, run: Run, counted: Counted) -> None:
        is_before = _is_before(run, counted)
        for path in counted.paths:
            module = run.tree.at(path)
            counter = self._counters[path] = Counter(module, run.state, 0 if is_before else None, self.lost)
            if not run.state.ended:
                run.until_end(counter.disarm)
                counter.arm()

    def _is_in(self, run: Run, counter: Counter, turn: Turn) -> bool:
        begun = counter.begun_in(run.state)
        if begun is None and not run.state.ended:
            raise OutOfOrderError(
                f"`{turn.name}` is call {turn.index + 1} of `{turn.path}`, and which one the run is in isn't known: "
                "they are counted from where such a name is first asked for.",
                you_wrote=user_place().source,
                instead="this value before the others that the block reads",
            )
        visit = run.state.visit
        at_output = visit is not None and visit.port is not None and visit.port.module is counter.module
        if begun == turn.index + 1 and (counter.is_inside or at_output):
            return True
        if begun is None or begun > turn.index:
            raise _past(f"`{turn.name}`", turn)
        return False

    def _go_to(self, run: Run, counter: Counter, turn: Turn) -> None:
        state, module = run.state, counter.module
        begun = counter.begun_in(state)
        if state.ended or state.turn > state.block_turn or begun is None:
            raise _past(f"`{turn.name}`", turn)
        for above in run.tree.callers_of(module):
            if above not in run._hold.modules:
                run._hold_on(above)
        run._hold_on(module)
        port = Input(module, state, turn.index - begun)
        run._resume(until=port)
        if state.visit is None or state.visit.port is not port:
            raise CalledFewerTimesError(
                f"`{turn.name}` has no value: `{turn.path}` was called {counter.begun} times, and this is call "
                f"{turn.index + 1}.",
                you_wrote=user_place().source,
                instead=None
                if run.module is run.tree.root
                else f"model.get({turn.path!r}), for each call in this trace",
            )

    def bind(self, port: Port) -> None:
        """Has this wait end with the call that the run was brought into for it."""
        if self.bound is None:
            return
        (counter, turn), self.bound = self.bound, None
        if port.kind != "input" and port.module is counter.module:  # its output is at the end of the call
            return
        if not counter.is_inside:  # the run stands at that output
            raise self._missed(port, turn)
        stands = counter.state.visit.port if counter.state.visit is not None else None
        if stands is not None and stands.module is counter.module and stands.kind == "input":
            self._from_start.add(port)
        counter.waiting[port] = turn

    def over(self, port: Port) -> None:
        """Notes that a wait is over, and raises where it ended with its call."""
        for counter in self._counters.values():
            counter.waiting.pop(port, None)
        turn = self.lost.pop(port, None)
        if turn is not None:
            raise self._missed(port, turn)
        self._from_start.discard(port)

    def _missed(self, port: Port, turn: Turn) -> BlockError:
        run, module = self._run(), port.module
        assert run is not None
        name = run.tree.name_of(module, port.kind)
        if isinstance(module, Attached) and not module.has_run and module.was_entered:
            return module.never_came(name, {"you_wrote": user_place().source})
        if port in self._from_start:
            self._from_start.remove(port)
            was_skipped = self._counters[turn.path].module in run._hold.skipped
            why = "was skipped" if was_skipped else "did not call that"
            return NeverCalledError(f"`{name}` has no value: `{turn.name}` {why}.", you_wrote=user_place().source)
        return _past(f"`{name}` of `{turn.name}`", turn)


class Counter(Port):
    """Counts the calls of a module in a forward pass, and ends the waits that belong to a call where that ends.

    Attributes:
        begun: How many calls have begun in this pass; None where that isn't known.
        is_inside: Whether the model is in one.
        waiting: Who waits for something in which call.
    """

    __slots__ = ("_lost", "_pass", "begun", "is_inside", "waiting")
    kind = "output"

    def __init__(self, module: nn.Module, state: RunState, begun: int | None, lost: dict[Port, Turn]) -> None:
        super().__init__(module, state)
        self.begun = begun
        self.is_inside = False
        self.waiting: dict[Port, Turn] = {}
        self._lost = lost
        self._pass = state.turn  # of a generation: which call of the model

    def begun_in(self, state: RunState) -> int | None:
        """How many have begun in the pass in which the run is now."""
        return self.begun if state.turn == self._pass else 0

    @property
    def _tables(self) -> tuple[Any, ...]:
        module = self.module
        return (
            *(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            *(module._forward_hooks, module._forward_hooks_with_kwargs),
        )

    def arm(self) -> None:
        put_hook(self, *self._tables)

    def disarm(self) -> None:
        take_hook(self, *self._tables)

    def __call__(self, _: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        state = self.state
        if not listens(state):
            return None
        if len(rest) == 1:
            begun, self._pass = self.begun_in(state), state.turn
            self.begun = None if begun is None else begun + 1
            self.is_inside = True
            return None
        self.is_inside = False
        ended = [port for port, turn in self.waiting.items() if turn.index + 1 == self.begun]
        if not ended:
            return None
        for port in ended:
            self._lost[port] = self.waiting.pop(port)
        visit = state.arrive(self, args, *rest)
        if not visit.changed:
            return None
        return NOTHING if visit.output is None else visit.output


def _is_before(run: Run, counted: Counted) -> bool:
    """Whether a run has not come to the first of these calls yet, in the pass in which it is."""
    visit = run.state.visit
    if visit is None or visit.port is None:
        return run._stack is None
    module, kind = visit.port.module, visit.port.kind
    return (module is run.module and kind == "input") or (run.tree.path(module), kind) in counted.before


def _past(what: str, turn: Turn) -> AlreadyPastError:
    return AlreadyPastError(
        f"{what} is past: the model ran on from it.",
        you_wrote=user_place().source,
        it_is=f"call {turn.index + 1} of `{turn.path}`",
        instead="read it before what comes behind it in the model, or in a second trace",
    )
