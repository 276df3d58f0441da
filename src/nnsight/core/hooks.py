"""Hooks of ours in torch's tables: how they come there, which calls they hear, and what has torch look for them.

`Module._call_impl` looks for hooks once, when a call starts: one that is added to a running module never fires. So a
run puts a `Hold`, a hook that does nothing, on the root and on all modules above each port that it arms.

The tables are written directly, since `register_forward_hook` costs as much as the rest of a read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from greenlet import getcurrent
from torch import nn

from nnsight.core.state import RunState

_graph_task = torch._C._current_graph_task_id


def put_hook(hook: Any, *tables: Any) -> None:
    """Puts a hook into torch's tables, keyed by itself: by identity, since another run's may stand there too."""
    for table in tables:
        table[hook] = hook


def take_hook(hook: Any, *tables: Any) -> None:
    for table in tables:
        table.pop(hook, None)


def listens(state: RunState) -> bool:
    """Whether a call that is met now belongs to the run: not another run's, another thread's, or the block's own call.

    Nor one in an autograd engine call that the run did not begin in: a checkpoint's recompute.
    """
    return state.link.model() is getcurrent() and _graph_task() == state.graph_task


def inert() -> Any:
    """What a hook of ours is in a copy or a pickle of its module: one that does nothing."""
    return _return_none


def _return_none(*_: Any) -> None:
    return None


class Hold:
    """Keeps torch's slow path open for hooks that come later, and ends a model that ran on after it was unwound.

    `skipped`: what was skipped, of those held and inside them: since its run began to wait, or since an edit began.
    """

    __slots__ = ("modules", "skipped", "state", "undo")

    def __init__(self, state: RunState) -> None:
        self.state = state
        self.modules: dict[nn.Module, None] = {}
        self.skipped: list[nn.Module] = []
        self.undo: list[Callable[[], None]] = []  # called with the release: what else was put on the model

    def on(self, module: nn.Module) -> None:
        self.modules[module] = None
        module._forward_pre_hooks[self] = self  # type: ignore[index]

    def release(self) -> None:
        for module in self.modules:
            module._forward_pre_hooks.pop(self, None)  # type: ignore[call-overload]
        self.modules = {}
        while self.undo:
            self.undo[-1]()
            self.undo.pop()

    def __call__(self, *_: Any) -> None:
        state = self.state
        if state.unwinding is not None and state.link.is_here():
            raise state.unwinding

    def __reduce__(self) -> Any:
        return inert, ()
