"""Counts the steps of a generation, and stands at the beginning of those that the block asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import nn

from nnsight.core.hooks import inert, listens, put_hook, take_hook
from nnsight.core.specs import describe_inputs
from nnsight.core.standin import StandIn, is_left_out
from nnsight.core.state import RunState
from nnsight.core.tree import Tree


class StepCounter:
    """Counts the steps of a generation: one a call of the generating module, at whose input a run can stand with it.

    A wait ends where the step ends that it belongs to. `saw` is shown the inputs of each. `window`: which of the tokens
    the call has where the run stands, if that isn't all that there are (core/several.py).

    `stands_in`: whether something stood in for the module's `forward` when the call began where the run stands, so that
    it can still be exchanged. `skipped`: what the block decided about the call, where a `StandIn` knows this port.
    """

    __slots__ = ("is_over", "module", "saw", "skip_value", "skipped", "stands_in", "state", "window")
    kind = "input"
    fires_once = False
    can_skip: ClassVar[bool] = False  # whether what one step makes can be left out, and something else stand for it

    def __init__(self, module: nn.Module, state: RunState, saw: Callable[..., None] | None) -> None:
        self.is_over: nn.Module | None = None  # what was called behind the last step, where that can be told
        self.module, self.state, self.saw = module, state, saw
        self.stands_in = False
        self.window: Any = None
        self.skipped: bool | None = None
        self.skip_value: Any = None

    @property
    def began(self) -> int:
        """With which call of all the step began."""
        return self.state.turn

    @property
    def counted(self) -> Sequence[nn.Module]:
        """The modules whose calls are steps."""
        return (self.module,)

    has_outside: ClassVar[bool] = False
    has_several: ClassVar[bool] = False  # whether a step may be several calls

    def is_outside(self, module: nn.Module, tree: Tree) -> bool:
        """Whether a module is called outside of all steps, so that a wait for it is over with none."""
        return False

    def arm(self) -> None:
        put_hook(self, self.module._forward_pre_hooks, self.module._forward_pre_hooks_with_kwargs)

    def disarm(self) -> None:
        take_hook(self, self.module._forward_pre_hooks, self.module._forward_pre_hooks_with_kwargs)

    def __call__(self, _: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        state = self.state
        if not listens(state):
            return None
        (kwargs,) = rest
        state.step += 1
        state.turn += 1
        if self.saw is not None:
            self.saw(args, kwargs)
        if state.step == 0:
            state.first_call = describe_inputs(args, kwargs)
        if state.step == state.until_step or (state.waiting and state.step > state.block_step):
            return self.stand(args, kwargs)
        return None

    def stand(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Has the run stand where this call begins; returns what the block has it called with, where that is new."""
        self.stands_in = type(vars(self.module).get("forward")) is StandIn
        visit = self.state.arrive(self, args, kwargs, left_out=is_left_out(self))
        self.skipped, self.skip_value = visit.skipped, visit.skip_value
        return visit.value("input") if visit.changed else None

    def __reduce__(self) -> Any:
        return inert, ()
