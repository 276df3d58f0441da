"""The steps of a run that are calls of a part of the model, with other parts before them, between and behind them.

So is a pipeline of diffusers: text encoders, then the denoiser once a step, then the decoder of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from nnsight.core.counter import StepCounter
from nnsight.core.hooks import listens, put_hook, take_hook
from nnsight.core.specs import Inputs, describe_inputs
from nnsight.core.standin import StandIn
from nnsight.core.state import RunState
from nnsight.core.tree import Tree
from nnsight.errors import BlockError


class Stages(StepCounter):
    """Counts the calls of some modules as steps, and knows where the last of them is over.

    That is where something is called that was not called before the first step. A run that is asked for a further step
    stops there, so that what comes behind the steps can still be asked for.

    Args:
        counted: The modules whose calls are steps.
        others: Those that are called outside of them.
        between: Those of the others that are known to be called between two steps; what turns out to be so is added.
    """

    __slots__ = ("_before", "_between", "_counted", "_others", "_standins", "calls")

    def __init__(
        self,
        counted: Sequence[nn.Module],
        others: Sequence[nn.Module],
        between: set[nn.Module],
        state: RunState,
        saw: Callable[..., None] | None,
    ) -> None:
        super().__init__(counted[0], state, saw)
        self._counted, self._others, self._between = counted, others, between
        self._before: set[nn.Module] = set()
        self._standins: dict[nn.Module, StandIn] = {}
        self.calls: dict[nn.Module, tuple[Inputs, int]] = {}  # what each was first called with, and in which step

    has_outside = True
    can_skip = True

    @property
    def counted(self) -> Sequence[nn.Module]:
        return self._counted

    def is_outside(self, module: nn.Module, tree: Tree) -> bool:
        return module not in self._counted and not any(above in self._counted for above in tree.above(module))

    def arm(self) -> None:
        for module in (*self._counted, *self._others):
            put_hook(self, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
            self._standins[module] = StandIn.over(module, self)

    def disarm(self) -> None:
        for module in (*self._counted, *self._others):
            take_hook(self, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        for module, standin in self._standins.items():
            standin.leave(module, self)
        self._standins = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        state = self.state
        if not listens(state):
            return None
        (kwargs,) = rest
        if module not in self.calls:
            self.calls[module] = describe_inputs(args, kwargs), state.step + (module in self._counted)
        if module in self._counted:
            if self.is_over is not None:
                self._between.add(self.is_over)
                raise BlockError(
                    f"A {type(self.is_over).__name__} is called between two steps, and the loop had taken it for their "
                    "end. That is known from now on.",
                    instead="the same block again",
                )
            self.module = module
            return super().__call__(module, args, kwargs)
        if state.step < 0:
            self._before.add(module)
        elif state.until_step is not None and module not in self._before and module not in self._between:
            self.is_over, self.module = module, module
            return self.stand(args, kwargs)
        return None
