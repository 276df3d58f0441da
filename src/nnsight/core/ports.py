"""Ports: the places where a value passes from the model to the block and back.

A port is made for one wait, and is itself the hook that it installs: it fires at the first call of its module in its
own run, passes control to the block with the value, and gives the model what the block left there.

| port     | fires                             | the block may            | gives back                          |
|----------|-----------------------------------|--------------------------|-------------------------------------|
| `Input`  | before a module's forward         | read, write, skip        | `(args, kwargs)`, or a skip's value |
| `Output` | after it, behind all other hooks  | read both, write output  | the output                          |
| `Calls`  | at a call's begin and end         | what its user decides    | `(args, kwargs)`                    |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from greenlet import getcurrent
from torch import nn

from nnsight.core.hooks import inert, listens, put_hook, take_hook
from nnsight.core.modes import functorch_level, in_transform
from nnsight.core.owner import has_runs
from nnsight.core.standin import StandIn, is_left_out
from nnsight.core.state import RunState
from nnsight.errors import TransformError

_is_tracing = torch._C._is_tracing
_graph_task = torch._C._current_graph_task_id


class Port(ABC):
    """One wait for one module; armed by the run, disarmed by it as soon as control is back."""

    __slots__ = ("elsewhere", "module", "passes", "state")
    kind: ClassVar[str]
    fires_once: ClassVar[bool] = True

    def __init__(self, module: nn.Module, state: RunState, passes: int = 0) -> None:
        self.module, self.state = module, state
        self.passes = passes  # calls to let go by
        self.elsewhere: str | None = None  # where a call was met that isn't the run's

    @abstractmethod
    def arm(self) -> None: ...

    @abstractmethod
    def disarm(self) -> None: ...

    @property
    def tables(self) -> tuple[Any, ...]:
        """Torch's dicts that a hook stands in which is called where this port is."""
        module = self.module
        if self.kind == "output":
            return module._forward_hooks, module._forward_hooks_with_kwargs
        return module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs

    def fires(self) -> bool:
        """Whether a call that is met now is the one that the run waits for."""
        state = self.state
        if state.link.model() is not getcurrent() or _graph_task() != state.graph_task:  # `listens`, a call less
            self._note_elsewhere()
            return False
        if self.passes:
            self.passes -= 1
            return False
        if functorch_level() != state.functorch_level or _is_tracing():
            raise _refusal()
        return True

    def _note_elsewhere(self) -> None:
        if self.state.link.is_here():
            self.elsewhere = "in a recompute of the backward pass"
        elif not has_runs():  # a thread of the model's, rather than one that traces the same modules
            self.elsewhere = "on another thread"

    def __reduce__(self) -> Any:
        return inert, ()  # a module that is copied or pickled while a port is armed


def _refusal() -> TransformError:
    if _is_tracing():
        return TransformError("This module is being traced by torch.jit, where a model can't pause.")
    return TransformError(
        "This value is inside `vmap`, `func.grad` or another transform of torch.func, where a model can't pause.",
        instead="read it outside the transform: the module's input, or the output of the module that applies it",
    )


NOTHING: Any = object()  # what an operation is given instead of its output, where that is to be None


class Output(Port):
    __slots__ = ()
    kind = "output"

    def arm(self) -> None:
        self.module._forward_hooks[self] = self.module._forward_hooks_with_kwargs[self] = self  # type: ignore[index,assignment]

    def disarm(self) -> None:
        self.module._forward_hooks.pop(self, None)  # type: ignore[call-overload]
        self.module._forward_hooks_with_kwargs.pop(self, None)  # type: ignore[call-overload]

    def __call__(self, _: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        state = self.state
        if (  # the usual case of `fires`, a call less
            self.passes
            or state.link.model() is not getcurrent()
            or _graph_task() != state.graph_task
            or in_transform()
            or state.functorch_level is not None
            or _is_tracing()
        ) and not self.fires():
            return None
        if len(rest) == 1:
            return None  # no kwargs: disarmed, by the block or another thread, since torch began with these hooks
        visit = state.arrive(self, args, *rest)
        if not visit.changed:
            return None
        return NOTHING if visit.output is None else visit.output


class Input(Port):
    """Also the way to skip: `forward` has a stand-in from before the call, which knows what the block decided."""

    __slots__ = ("_standin", "skip_value", "skipped")
    kind = "input"

    def arm(self) -> None:
        self.skipped: bool | None = None  # it has not fired
        self.skip_value: Any = None
        put_hook(self, self.module._forward_pre_hooks, self.module._forward_pre_hooks_with_kwargs)
        self._standin: StandIn | None = StandIn.over(self.module, self)

    def disarm(self) -> None:
        take_hook(self, self.module._forward_pre_hooks, self.module._forward_pre_hooks_with_kwargs)
        if (standin := getattr(self, "_standin", None)) is None:  # a Ctrl-C came while it was armed
            standin = StandIn.known_to(self.module, self)
        if standin is not None:
            standin.leave(self.module)
            self._standin = None  # a cycle otherwise

    def __call__(self, _: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        if not self.fires() or not rest:  # without kwargs it was disarmed, as an output is
            return None
        visit = self.state.arrive(self, args, rest[0], left_out=is_left_out(self))
        self.skipped, self.skip_value = visit.skipped, visit.skip_value
        for calls in visit.late:
            calls(self.module, visit.args, visit.kwargs)
        return (visit.args, visit.kwargs) if visit.changed else None


class Calls(Port):
    """Tells where each call of a module begins and ends, for as long as it is armed; a call within a call is passed by.

    Args:
        begin: Called with the port and the inputs of the call; returns what the module is to be called with.
        end: Called when the call has returned, or raised.
    """

    __slots__ = ("_begin", "_depth", "_end", "skip_value", "skipped")
    kind = "input"
    fires_once = False

    def __init__(
        self,
        module: nn.Module,
        state: RunState,
        begin: Callable[[Calls, tuple[Any, ...], dict[str, Any]], Any],
        end: Callable[[Calls], None],
    ) -> None:
        super().__init__(module, state)
        self._begin, self._end, self._depth = begin, end, 0
        self.skipped: bool | None = None  # what `begin` decides about the call, where a `StandIn` knows this port
        self.skip_value: Any = None

    def arm(self) -> None:
        module: Any = self.module
        put_hook(self, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        put_hook(self, module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called)

    def disarm(self) -> None:
        module: Any = self.module
        take_hook(self, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        take_hook(self, module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called)

    def __call__(self, _: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        if not listens(self.state):
            return None
        if len(rest) == 1:
            self._depth += 1
            return self._begin(self, args, rest[0]) if self._depth == 1 else None
        if self._depth:  # else the call failed before it came here: the hooks that end it are called all the same
            self._depth -= 1
            if not self._depth:
                self._end(self)
        return None


def put_first(port: Port) -> None:
    """Moves a port that was just armed in front of what its run, and all others, wait with at this module.

    Behind torch's own hooks it stays, and behind ports of a lower rank: edits come in the order of their writing. The
    end of a call comes behind all edits.
    """
    table: Any = port.module._forward_hooks if isinstance(port, Output) else port.module._forward_pre_hooks
    before = [key for key, hook in list(table.items()) if key is not hook or _precedes(key, port)]
    for key in [port, *reversed(before)]:
        if key in table:  # another thread may have taken its own away
            table.move_to_end(key, last=False)


def _precedes(key: Any, port: Port) -> bool:
    if key is port or not isinstance(key, Port) or (isinstance(port, Output) and isinstance(key, Calls)):
        return False
    return key.state.rank <= port.state.rank
