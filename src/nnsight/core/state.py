"""What a run's two sides share while it goes on. A paused model's stack holds this, and nothing else of its run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from nnsight.core.switch import NOT_STARTED, Link

if TYPE_CHECKING:
    from nnsight.core.counter import StepCounter
    from nnsight.core.ports import Calls, Port


class Unwind(BaseException):
    """Thrown into a model that is ended early, so that its `finally` blocks run. Recognised by identity."""


class Visit:
    """Where a run is paused, with the values there: the model's on arrival, the block's when it goes on.

    `views` is what was had there of eproperties whose changes are written back, `shares` what rows of the batch were
    given; both are settled before the model goes on. `versions`: of the tensors there, and of those that the block had
    before, with the modules that they were had of, where the backward pass computes them again (core/recompute.py).
    `left_out`: whether another, an edit, has skipped the module in this call. `late`, at a module's input: who is told
    of this call though it has begun. `amid`, once somebody has asked: what goes on around it, for which no other run of
    the model may go on (core/owner.py).
    """

    __slots__ = (
        "amid", "args", "changed", "kwargs", "late", "left_out", "output", "port",
        "shares", "skip_value", "skipped", "versions", "views",
    )  # fmt: skip
    amid: str | None

    def __init__(
        self,
        port: Port | StepCounter | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        left_out: bool = False,
    ) -> None:
        self.port, self.args, self.kwargs, self.output, self.left_out = port, args, kwargs, output, left_out
        self.changed = self.skipped = False
        self.skip_value: Any = None
        self.late: tuple[Calls, ...] = ()
        self.views: Any = None
        self.shares: Any = None
        self.versions: list[tuple[Any, int, Any, str]] | None = None

    def value(self, kind: str) -> Any:
        """What passes there: the "output", or the "input", `(args, kwargs)`."""
        return (self.args, self.kwargs) if kind == "input" else self.output

    def replace(self, kind: str, value: Any) -> None:
        """Has the model go on with another value."""
        if kind == "input":
            self.args, self.kwargs = value
        else:
            self.output = value
        self.changed = True

    def narrowed(self, kind: str, part: Any) -> Visit:
        """The same for a part of the batch, whose value this is."""
        args, kwargs = part if kind == "input" else (self.args, self.kwargs)
        return Visit(self.port, args, kwargs, part if kind == "output" else None)


class RunState:
    """The state of one run.

    `visit` is None while the model runs, and before and after. `step` is the model's, -1 before the first; `block_step`
    the one that the block is in, whose end a wait doesn't outlast. `turn` and `block_turn` are the same of the calls of
    the model: as many as steps, but where a step has several (core/several.py). `waiting` says that the block waits for
    a port; `until_step`, that it waits for this step to begin. Of several who wait at one port, the lowest `rank` is
    served first. `given` is what is called, with its inputs, until that has ended. `called`, a note of the inputs, is
    made when it is asked for, or at that end unless the block `is_left`. `had` is what the block had in a part that the
    backward pass computes again (core/recompute.py).
    """

    __slots__ = (
        "block_step", "block_turn", "called", "ended", "error", "first_call", "functorch_level", "given", "graph_task",
        "had", "is_left", "link", "rank", "result", "step", "turn", "until_step", "unwinding", "visit", "waiting",
    )  # fmt: skip
    link: Link

    def __init__(self, functorch_level: int | None, graph_task: int) -> None:
        self.functorch_level, self.graph_task = functorch_level, graph_task
        self.link = NOT_STARTED
        self.visit: Visit | None = None
        self.unwinding: Unwind | None = None
        self.error: BaseException | None = None
        self.result: Any = None
        self.ended = self.waiting = self.is_left = False
        self.given: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None
        self.called: Any = None
        self.step, self.block_step = -1, 0
        self.turn, self.block_turn = -1, 0
        self.until_step: int | None = None
        self.rank = math.inf
        self.first_call: Any = None
        self.had: Any = ()

    def arrive(
        self,
        port: Port | StepCounter | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any = None,
        left_out: bool = False,
    ) -> Visit:
        """On the model's side: stops here until the block goes on, and returns what it left."""
        visit = self.visit = Visit(port, args, kwargs, output, left_out)
        self.link.pause()
        self.visit = None
        if self.unwinding is not None:
            raise self.unwinding
        return visit
