"""One run that several carried blocks ask, each as if it had the run for itself: the invokes of a trace.

Each block stands on a stack of its own, and `GroupRun.drive` lets them go on, in written order, until each waits: for a
place in the model, for a step, for the end, or for something that another block does. Where all wait, the model runs on
to the next place that one of them waits for. Blocks that wait for the same place are served at one and the same visit,
and so is one that asks for the place where the model just stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import Any

from torch import nn

from nnsight.core.ahead import Ahead, check_used
from nnsight.core.history import add_note
from nnsight.core.modes import Modes, SharedModes, read_modes
from nnsight.core.opened import add_open
from nnsight.core.owner import Owner, this_thread
from nnsight.core.ports import Port
from nnsight.core.run import Run
from nnsight.core.side import stack_for
from nnsight.core.state import Unwind, Visit
from nnsight.core.switch import Stack
from nnsight.errors import OutOfOrderError


class Member:
    """One block of a group: how far it is, and what it waits for.

    Args:
        body: The block. It runs with the modes and in the context of where it was written.
        narrow: Makes, of the run, what the block's Envoys ask: the run itself, or a part of its batch.
    """

    def __init__(
        self,
        body: Callable[[], Any],
        modes: Modes | SharedModes,
        context: Context,
        narrow: Callable[[Run], Any] | None = None,
    ) -> None:
        self.body, self.modes, self.context, self.narrow = body, modes, context, narrow
        modes.turned = True
        self.stack: Stack | None = None  # until it starts
        self.owner: Owner | None = None
        self.error: BaseException | None = None
        self.unwinding: Unwind | None = None
        self.ended = False
        # What a run keeps for its one block.
        self.block_step = self.block_turn = 0
        self.ahead: Ahead = {}
        self.recorded: dict[nn.Module, Visit] = {}
        # What it waits for: a port, a step, a condition; the end of the model where all are None.
        self.port: Port | None = None
        self.until_step: int | None = None
        self.condition: Callable[[], bool] | None = None
        self.served = self.stuck = self.reads = False


class _Recorded(BaseException):
    """Ends a wait for a module that another block has called meanwhile, with `hook=True`."""


class GroupRun(Run):
    """A run that is asked by its members, one at a time."""

    __slots__ = ("_current", "_recorders", "members")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.members: list[Member] = []
        self._recorders: list[Member] = []  # those that have called a module with its hooks
        self._current: Member | None = None

    @property
    def current(self) -> Member | None:
        """The block that runs now; None where the model does, and when all have ended."""
        return self._current

    def asked(self) -> Any:
        member = self._current
        return self if member is None or member.narrow is None else member.narrow(self)

    # What drives.

    def drive(self) -> None:
        """Runs the blocks to their ends, and the model as far as they ask. What the model raises ends them all."""
        try:
            while waiting := [member for member in self.members if not member.ended]:
                ready = next(filter(self._is_ready, waiting), None)
                if ready is not None:
                    self._go_on(ready)
                    if isinstance(ready.error, (KeyboardInterrupt, SystemExit)):
                        raise ready.error
                elif any(member.condition is None for member in waiting):
                    self._run_on(waiting)
                else:
                    waiting[0].stuck = True  # each waits for another
                    self._go_on(waiting[0])
        except BaseException as error:
            self._end_all(error)
            raise

    def _is_ready(self, member: Member) -> bool:
        state = self.state
        if member.stack is None or member.served:
            return True
        if member.condition is not None:
            return member.condition()
        if member.port is not None:
            late = state.ended or state.step > member.block_step or state.turn > member.block_turn
            late = late or (self.turns is not None and member.port in self.turns.lost)
            return late or (member.reads and self._recorded_by_another(member.port.module) is not None)
        is_over = self.counter is not None and self.counter.is_over is not None
        return state.ended or (member.until_step is not None and (is_over or state.step >= member.until_step))

    def _go_on(self, member: Member) -> None:
        """Passes control to a block, and comes back when it waits or ends."""
        state, owner = self.state, self._owner
        if member.served and state.visit is not None:
            state.visit.port = member.port  # which is at the same place as the one that fired
            if (shares := state.visit.shares) is not None:
                shares.asked_by_part = member.narrow is not None and member.narrow(self) is not self
                shares.bring_together(state.visit, self.history)
                shares.asked_by_part = False
        if member.stack is None:
            member.stack = stack_for(partial(_run_member, self, member), member.modes, member.context, pauses=True)
        self._current = member
        state.block_step, state.block_turn = member.block_step, member.block_turn
        self.ahead, self.recorded = member.ahead, member.recorded
        self._owner = member.owner or owner
        member.modes.to_model(read_modes())  # the other side, which here is the block's
        try:
            member.stack.resume()
        finally:
            try:
                member.modes.to_block(read_modes(), ended=member.ended)
            except BaseException:
                member.modes.to_block(read_modes(), ended=member.ended)
                raise
            member.block_step, member.block_turn = state.block_step, state.block_turn
            self._current, self._owner = None, owner

    def _run_on(self, waiting: list[Member]) -> None:
        """Runs the model until it comes to something that a block waits for, or to its end."""
        state = self.state
        ports = [member.port for member in waiting if member.port is not None]
        state.waiting = bool(ports)
        wait = [member for member in waiting if member.port is not None]
        state.block_step = min((member.block_step for member in wait), default=0)
        state.block_turn = min((member.block_turn for member in wait), default=0)
        state.until_step = min((m.until_step for m in waiting if m.until_step is not None), default=None)
        if state.visit is not None and state.visit.shares is not None:
            state.visit.shares.settle(state.visit)
        counting = [port for port in ports if port.passes]
        try:
            for port in ports:
                port.arm()
            self._switch()
        finally:
            state.until_step = None
            try:
                for port in ports:
                    port.disarm()
            except BaseException:  # a Ctrl-C, as in `Execution`
                for port in ports:
                    port.disarm()
                raise
        if state.error is not None:
            self._raise()
        self._serve(waiting, ports, counting)

    def _serve(self, waiting: list[Member], ports: list[Port], counting: list[Port]) -> None:
        """Marks all who wait for where the model stands now. Their ports, which torch still calls, let that pass.

        `counting`: those that were to pass over calls.
        """
        stands = self.state.visit.port if self.state.visit is not None else None
        if stands not in ports:
            return
        # torch called these before it, so that they have counted this call; others would have fired
        passed = [port for port in ports[: ports.index(stands)] if port in counting]
        for member in waiting:
            port = member.port
            if port is None or port in passed or port.module is not stands.module or port.kind != stands.kind:
                continue
            if port is stands or not port.passes:
                member.served = True
                port.passes = math.inf  # type: ignore[assignment]

    def _end_all(self, error: BaseException) -> None:
        """Unwinds the blocks that have not ended."""
        for member in self.members:
            if member.stack is None:
                member.ended = True
            if member.ended:
                continue
            member.unwinding = Unwind()
            self._go_on(member)
            member.ended = True
            if member.error is not None:
                late, member.error = member.error, None
                add_note(error, f"While a block of this trace was ended, it raised {type(late).__name__}: {late}")

    # What a block does, on its own stack.

    def wait_until(self, condition: Callable[[], bool], stuck: Callable[[], BaseException]) -> None:
        """Has the block wait for what another one does; raises what `stuck` makes where each waits for another."""
        member = self._current
        while not condition():
            if member is None:
                raise stuck()
            if member.stuck:
                member.stuck = False
                raise stuck()
            member.condition = condition
            self._pause(member)

    def read(self, module: nn.Module, kind: str, at: int | None = None) -> Visit:
        member = self._current
        if member is None:
            return super().read(module, kind, at)
        member.reads = True
        try:
            return super().read(module, kind, at)
        except (_Recorded, OutOfOrderError):
            visit = self._recorded_by_another(module)
            if visit is None:
                raise
            return visit
        finally:
            member.reads = False

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output, member = super().record(module, args, kwargs), self._current
        if member is not None and member not in self._recorders:
            self._recorders.append(member)
        return output

    def _recorded_by_another(self, module: nn.Module) -> Visit | None:
        """Asked of all blocks that wait, whenever one of them goes on: so not all blocks are looked at."""
        return next((member.recorded[module] for member in self._recorders if module in member.recorded), None)

    def _resume(self, until: Port | None = None) -> None:
        """Has the block that asks wait. The model goes on when all blocks wait."""
        member, state = self._current, self.state
        if member is None:
            super()._resume(until)
            return
        self._check_transform()
        member.port, member.until_step = until, state.until_step
        state.until_step = None
        self._pause(member)
        if until is not None and member.reads and until.passes != math.inf and self._recorded_by_another(until.module):
            raise _Recorded

    def _pause(self, member: Member) -> None:
        member.served = False
        if member.unwinding is None:
            self.settle()
            assert member.stack is not None
            member.stack.link.pause()
            member.port = member.until_step = member.condition = None
            member.served = False
        if member.unwinding is not None:
            raise member.unwinding


def _run_member(run: GroupRun, member: Member, _: None) -> None:
    """What runs on a block's stack. Nothing is ever raised out of it."""
    member.owner = run._owner = this_thread()
    add_open(run.reference)
    try:
        member.body()
        run.settle()
        check_used(run)
    except BaseException as error:  # noqa: BLE001  raised again when all blocks have ended
        if error is not member.unwinding:
            member.error = error
    member.ended = True
