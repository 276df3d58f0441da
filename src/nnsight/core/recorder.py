"""The inner values of a call that the block makes: `module(x, hook=True)`."""

from __future__ import annotations

from typing import Any

from greenlet import getcurrent
from torch import nn

from nnsight.core.hooks import inert, put_hook, take_hook
from nnsight.core.state import Visit


class Recorder:
    """Records the inputs and outputs of a module and all below it, for one call on the block's side."""

    __slots__ = ("_greenlet", "_modules", "visits")

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        self._greenlet = getcurrent()
        self.visits: dict[nn.Module, Visit] = {}

    def __enter__(self) -> Recorder:
        for module in self._modules:
            put_hook(self, module._forward_hooks, module._forward_hooks_with_kwargs)
        return self

    def __exit__(self, *_: Any) -> None:
        self.leave()

    def leave(self) -> None:
        for module in self._modules:
            take_hook(self, module._forward_hooks, module._forward_hooks_with_kwargs)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if getcurrent() is self._greenlet:
            kwargs, output = rest
            self.visits[module] = Visit(None, args, kwargs, output)

    def __reduce__(self) -> Any:
        return inert, ()
