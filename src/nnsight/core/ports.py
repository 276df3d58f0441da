"""Ports: the places where a value passes from the model to the block and back.

A port is made for one wait, and is itself the hook that it installs: it fires at the first call of its module in its
own run, passes control to the block with the value, and gives the model what the block left there.

| port     | fires                             | the block may            | gives back                          |
|----------|-----------------------------------|--------------------------|-------------------------------------|
| `Input`  | before a module's forward         | read, write, skip        | `(args, kwargs)`, or a skip's value |
| `Output` | after it, behind all other hooks  | read both, write output  | the output                          |
| `Hold`   | never passes control              |                          |                                     |
| `Calls`  | at a call's begin and end         | what its user decides    | `(args, kwargs)`                    |

`Module._call_impl` looks for hooks once, when a call starts: one that is added to a running module never fires. So a
run puts a `Hold`, a hook that does nothing, on the root and on all modules above each port that it arms.

The hook dicts are written directly, since `register_forward_hook` costs as much as the rest of a read.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from greenlet import getcurrent
from torch import nn

from nnsight.core.modes import functorch_level, in_transform
from nnsight.core.owner import has_runs
from nnsight.core.specs import describe_inputs
from nnsight.core.state import RunState, Visit
from nnsight.core.tree import Attached, Tree
from nnsight.errors import TransformError

_is_tracing = torch._C._is_tracing
_graph_task = torch._C._current_graph_task_id


class Port(ABC):
    """One wait for one module; armed by the run, disarmed by it as soon as control is back."""

    __slots__ = ("elsewhere", "module", "passes", "state")
    kind: ClassVar[str]

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
        return _inert, ()  # a module that is copied or pickled while a port is armed


def _inert() -> Any:
    return _return_none


def _itself(value: Any) -> Any:
    return value


def _return_none(*_: Any) -> None:
    return None


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
        if (standin := getattr(self, "_standin", None)) is not None:  # it was armed, to the end
            standin.leave(self.module)
            self._standin = None  # a cycle otherwise

    def __call__(self, _: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        if not self.fires() or not rest:  # without kwargs it was disarmed, as an output is
            return None
        visit = self.state.arrive(self, args, rest[0], left_out=is_left_out(self))
        self.skipped, self.skip_value = visit.skipped, visit.skip_value
        return (visit.args, visit.kwargs) if visit.changed else None


class StandIn:
    """Stands in for a module's `forward` while a run waits for its input, and puts back what was there.

    torch fetches `forward` before it calls pre-hooks, so a skip that is decided at the input needs it in place by then.
    """

    __slots__ = ("_armed", "_module", "_ports", "original", "own")
    lock = threading.RLock()  # the collector, which ends runs, may come while it is held
    rewritten: ClassVar[dict[nn.Module, Any]] = {}  # forwards put in place (core/operations.py), also after the fetch

    def __init__(self, module: nn.Module) -> None:
        self.own, self.original = "forward" in module.__dict__, module.forward
        self._armed, self._module = 0, module
        self._ports: list[Input | Calls] = []

    @property
    def __wrapped__(self) -> Any:
        """For `inspect.signature`, by which transformers chooses what to pass."""
        return self.original

    @classmethod
    def over(cls, module: nn.Module, port: Input | Calls | None = None) -> StandIn:
        """The stand-in of this module, put there if it isn't yet: runs that wait for the same module share it."""
        with cls.lock:
            standin = module.__dict__.get("forward")
            if type(standin) is not cls:
                standin = module.__dict__["forward"] = cls(module)
            standin._armed += 1
            if port is not None:
                standin._ports.append(port)
            return standin

    def leave(self, module: nn.Module, port: Calls | None = None) -> None:
        with self.lock:
            if port is not None:
                self._ports.remove(port)
            self._armed -= 1
            if self._armed or module.__dict__.get("forward") is not self:
                return
            if self.own:
                module.__dict__["forward"] = self.original
            else:
                del module.__dict__["forward"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._ports:
            return self.rewritten.get(self._module, self.original)(*args, **kwargs)
        fired = [port for port in tuple(self._ports) if port.skipped is not None and listens(port.state)]
        skipping = [port for port in fired if port.skipped]
        for port in fired:
            if isinstance(port, Input):
                self._ports.remove(port)
            else:  # it hears the next call too, and decides nothing where `forward` is called by itself
                port.skipped = None
        if skipping:
            self._tell_who_waits_inside()
            value = max(skipping, key=_rank).skip_value  # a block has the last word over an edit
            for port in skipping:
                port.skip_value = None
            return value
        return self.rewritten.get(self._module, self.original)(*args, **kwargs)

    def _tell_who_waits_inside(self) -> None:
        """Others may wait for what a skipped module would have called: their errors say why it never came."""
        module = self._module.place[0] if isinstance(self._module, Attached) else self._module
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, Hold) and listens(hook.state):
                hook.skipped.append(self._module)

    def __reduce__(self) -> Any:
        """A module that is copied meanwhile gets what stood there before, bound to the copy."""
        if self.own:
            return _itself, (self.original,)
        module: Any = getattr(self.original, "__self__", None)
        return getattr, (module, "forward")


def forward_is_property(module: nn.Module) -> bool:
    """Whether a module finds its forward in its class, whatever it has itself."""
    return hasattr(getattr(type(module), "forward", None), "__set__")


def _rank(port: Port) -> float:
    return port.state.rank


def is_left_out(port: Port | StepCounter) -> bool:
    """Whether another, an edit, has skipped the module in the call at whose input this port stands."""
    standin = vars(port.module).get("forward")
    if type(standin) is not StandIn:
        return False
    return any(other.skipped and other is not port and listens(other.state) for other in tuple(standin._ports))


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
        return _inert, ()


class StepCounter:
    """Counts the steps of a generation: one a call of the generating module, at whose input a run can stand with it.

    A wait ends where the step ends that it belongs to. `saw` is shown the inputs of each. `window`: which of the tokens
    the call has where the run stands, if that isn't all that there are (core/several.py).

    `stands_in`: whether something stood in for the module's `forward` when the call began where the run stands, so that
    it can still be exchanged.
    """

    __slots__ = ("is_over", "module", "saw", "stands_in", "state", "window")
    kind = "input"

    def __init__(self, module: nn.Module, state: RunState, saw: Callable[..., None] | None) -> None:
        self.is_over: nn.Module | None = None  # what was called behind the last step, where that can be told
        self.module, self.state, self.saw = module, state, saw
        self.stands_in = False
        self.window: Any = None

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
            self.stands_in = type(vars(self.module).get("forward")) is StandIn
            visit = state.arrive(self, args, kwargs, left_out=is_left_out(self))
            return (visit.args, visit.kwargs) if visit.changed else None
        return None

    def __reduce__(self) -> Any:
        return _inert, ()


class Calls(Port):
    """Tells where each call of a module begins and ends, for as long as it is armed; a call within a call is passed by.

    Args:
        begin: Called with the port and the inputs of the call; returns what the module is to be called with.
        end: Called when the call has returned, or raised.
    """

    __slots__ = ("_begin", "_depth", "_end", "skip_value", "skipped")
    kind = "input"

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
        return _inert, ()
