"""Where a block waits for the gradient of a tensor, and where one is kept that comes before it is asked for."""

from __future__ import annotations

import torch
from greenlet import getcurrent

from nnsight.core.modes import functorch_level
from nnsight.core.state import Unwind
from nnsight.core.switch import NOT_STARTED, Link

graph_task = torch._C._current_graph_task_id


class PassState:
    """What the two sides of a backward pass share. A paused engine's stack holds this, and nothing else of its pass.

    `at` is the port where the pass is paused; None while it runs, and before and after.
    """

    __slots__ = ("at", "ended", "error", "functorch_level", "graph_task", "link", "unwinding")
    link: Link

    def __init__(self) -> None:
        self.functorch_level = functorch_level()
        self.graph_task = -1
        self.link = NOT_STARTED
        self.at: GradientPort | None = None
        self.unwinding: Unwind | None = None
        self.error: BaseException | None = None
        self.ended = False


class GradientPort:
    """One wait for the gradient of one tensor; the hook that it installs, and what passes there.

    What the block reads is a copy: torch hands one buffer to several tensors, and a change in place would change them
    all. A copy that the block did change in place goes on instead of the original.
    """

    __slots__ = ("gradient", "in_checkpoint", "is_written", "reads", "state", "tensor")

    def __init__(self, tensor: torch.Tensor, state: PassState, *, reads: bool) -> None:
        self.tensor, self.state, self.reads = tensor, state, reads
        self.gradient: torch.Tensor | None = None
        self.is_written = self.in_checkpoint = False

    def __call__(self, gradient: torch.Tensor | None) -> torch.Tensor | None:
        state = self.state
        if state.link.model() is not getcurrent():  # `is_here`, a call less
            return None
        if graph_task() != state.graph_task:  # a part of the gradient only, of one reentrant checkpoint
            self.in_checkpoint = True
            return None
        copied = self.gradient = gradient.clone() if self.reads and gradient is not None else gradient
        version = 0 if copied is None else copied._version
        state.at = self
        state.link.pause()
        state.at = None
        if state.unwinding is not None:
            raise state.unwinding
        if self.is_written:
            return self.gradient
        return copied if self.reads and copied is not None and copied._version != version else None


class Kept:
    """A gradient that is complete before it is asked for; the hook that keeps it.

    Those of two rows come one after the other, and a block may ask for them in either order.
    """

    __slots__ = ("_handle", "_version", "gradient", "state", "tensor")

    def __init__(self, tensor: torch.Tensor, state: PassState) -> None:
        self.tensor, self.state = tensor, state
        self.gradient: torch.Tensor | None = None
        self._version = 0
        self._handle = tensor.register_hook(self)

    def remove(self) -> None:
        self._handle.remove()

    def __call__(self, gradient: torch.Tensor | None) -> None:
        if self.state.link.is_here() and graph_task() == self.state.graph_task and gradient is not None:
            self.gradient = gradient.clone()
            self._version = self.gradient._version

    @property
    def was_changed(self) -> bool:
        return self.gradient is not None and self.gradient._version != self._version
