"""Steps in which the model is called several times: with guidance twice, and for a prompt that is read in chunks.

A step begins with one of these calls, and a wait belongs to that one alone: what comes in a further call is had with
`.next()`, so that a value of one call is never taken for another's.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from nnsight.core.counter import StepCounter
from nnsight.core.hooks import listens
from nnsight.core.ports import Port
from nnsight.core.state import RunState

if TYPE_CHECKING:
    from nnsight.core.run import Run


class Call(Enum):
    """What a call of the model is to the generation that makes it."""

    STEP = "it says which token comes next"
    CHUNK = "it reads a part of the prompt"
    ASIDE = "it reads something else than the prompt and what was generated"

    def begins(self, n_steps: int) -> bool:
        """Whether a step begins with it, where so many have begun."""
        return self is Call.STEP or (self is Call.CHUNK and not n_steps)


class Window(NamedTuple):
    """Which columns a call was given of the rows of prompts, with their padding and what was generated behind them.

    From `start` to before `stop`; None: it was given other tokens.
    """

    start: int | None
    stop: int | None

    @property
    def width(self) -> int | None:
        return None if self.start is None or self.stop is None else self.stop - self.start


class SeveralCalls(StepCounter):
    """Counts the steps of a generation in which a step may be several calls.

    Args:
        kind: Says what the call is that begins just now.
        saw: Is shown what kind of call it is, and its inputs; returns what of the rows it has.
    """

    __slots__ = ("_began", "_kind", "_saw", "_waiting", "first")

    def __init__(
        self,
        kind: Callable[[], Call],
        saw: Callable[[Call, tuple[Any, ...], dict[str, Any]], Window | None],
        module: nn.Module,
        state: RunState,
        _: Any = None,
    ) -> None:
        super().__init__(module, state, None)
        self._kind, self._saw = kind, saw
        self._began = 0
        self.first: Window | None = None  # what the first call was given
        self._waiting: list[tuple[Port, int]] = []

    has_several = True

    @property
    def began(self) -> int:
        return self._began

    def may_pass(self, port: Port) -> None:
        """Has a port that waits for a later call of its module know where the model's next call begins.

        Until then, the module's call in this one comes by, which is not meant; or it is past, and has not to come by.
        """
        self._waiting.append((port, port.passes))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        state = self.state
        if not listens(state):
            return None
        (kwargs,) = rest
        kind = self._kind()
        self.window = self._saw(kind, args, kwargs)
        if kind.begins(state.step + 1):
            self._began = state.turn + 1
            self._waiting.clear()
            if state.step < 0:
                self.first = self.window
            return super().__call__(module, args, kwargs)
        state.turn += 1
        for port, passes in self._waiting:
            port.passes -= port.passes == passes
        self._waiting.clear()
        if state.waiting and state.turn > state.block_turn:
            return self.stand(args, kwargs)
        return None


def pass_calls(run: Run, port: Port, passed: int) -> None:
    """Has a run wait for what `.next()` meant: where a step has several calls, it may stand in a later one.

    Args:
        passed: How many calls of the port's module are meant to come by.
    """
    state, before = run.state, run.state.block_turn
    state.block_turn += passed
    if isinstance(run.counter, SeveralCalls) and port.passes == passed:
        run.counter.may_pass(port)
    try:
        run._resume(until=port)
    finally:
        came = state.visit is not None and state.visit.port is port
        state.block_turn = state.turn if came else before
