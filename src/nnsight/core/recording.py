"""What caches hear: every call of the modules that they were asked for, in their own run. A hook here never pauses.

A cache keeps what a module was left with, so it comes last at each port: behind what the block does there. torch calls
hooks in the order of its tables, as they stand when the first of them is called, and a port that the block arms later
stands behind. So the recording passes the value to those ports itself, keeps what they give back, and lets them pass
over the call when torch comes to them.

One recording serves all caches of a run: with two, the second would take a port for the next call for one of this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, ClassVar

import torch
from greenlet import getcurrent
from torch import nn

from nnsight.core.hooks import inert
from nnsight.core.log import MISSING, Log
from nnsight.core.modes import functorch_level, in_transform
from nnsight.core.ports import Port
from nnsight.core.state import RunState, Visit
from nnsight.errors import TransformError

Narrow = Callable[[nn.Module, str, Any], Any]  # of a module, "input" or "output", and a value of the whole batch
_is_tracing = torch._C._is_tracing
_graph_task = torch._C._current_graph_task_id


class Recording:
    """All that the caches of one run hear."""

    __slots__ = ("_inputs", "_logs", "_outputs")

    def __init__(self, state: RunState) -> None:
        self._inputs, self._outputs = _InputHook(state), _OutputHook(state)
        self._logs: list[Log] = []

    def listen(
        self, modules: Mapping[nn.Module, str], log: Log, *, inputs: bool, output: bool, part: Narrow | None
    ) -> None:
        """Has `log` hear each call of these modules from here on; they come with their paths.

        Args:
            part: Makes of a module's input or output what is kept of it; None: all.
        """
        self._logs.append(log)
        if inputs:
            self._inputs.on(modules, log, part)
        if output:
            self._outputs.on(modules, log, part)

    @contextmanager
    def hearing_the_block(self) -> Iterator[None]:
        """Has the calls heard that the block makes itself; their values are its own, whole ones."""
        before = self._inputs.block, self._outputs.block
        self._inputs.block = self._outputs.block = getcurrent()
        try:
            yield
        finally:
            self._inputs.block, self._outputs.block = before

    def arrived(self, visit: Visit) -> None:
        """The run ends at this visit, and its model won't come back to hear what the block left there."""
        if visit.port is not None:
            hook = self._inputs if visit.port.kind == "input" else self._outputs
            hook.keep(visit.port.module, visit.args, visit.kwargs, visit.output)

    def close(self) -> None:
        self._inputs.off()
        self._outputs.off()
        for log in self._logs:
            log.close()


class _Hook(ABC):
    """One hook on all the modules that are heard, called with what torch gives to hooks that want keywords.

    It is called between two operations of the model, where each further Python function costs a microsecond or two: so
    its `__call__` decides by itself whether there is anything unusual to do.
    """

    __slots__ = ("_heard", "_state", "block")
    tables: ClassVar[attrgetter[tuple[Any, Any]]]  # where torch has hooks of a module, and has that they take keywords

    def __init__(self, state: RunState) -> None:
        self._state = state
        self.block: Any = None  # its stack, while it calls a module with `hook=True`
        self._heard: list[tuple[Log, Mapping[nn.Module, str], Narrow | None]] = []

    def on(self, modules: Mapping[nn.Module, str], log: Log, part: Narrow | None) -> None:
        self._heard.append((log, modules, part))
        tables = self.tables
        for module in modules:
            hooks, with_kwargs = tables(module)
            hooks[self] = with_kwargs[self] = self

    def off(self) -> None:
        tables = self.tables
        for _, modules, _ in self._heard:
            for module in modules:
                hooks, with_kwargs = tables(module)
                hooks.pop(self, None)
                with_kwargs.pop(self, None)
        self._heard = []

    @abstractmethod
    def keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None: ...

    def keep_the_blocks(self, module: nn.Module, *call: Any) -> None:
        """Keeps a call that the model did not make, if the block did: whole, since it has no rows of the run's."""
        if self.block is not None and self.block is getcurrent():
            heard = self._heard
            self._heard = [(log, modules, None) for log, modules, _ in heard]
            try:
                self.keep(module, *call)
            finally:
                self._heard = heard

    def ports_behind(self, table: Any) -> Iterable[Port]:
        """The run's own ports that torch would call after this hook, where it isn't the last one."""
        hooks = list(table)
        behind = hooks[hooks.index(self) + 1 :] if self in hooks else ()
        return [hook for hook in behind if isinstance(hook, Port) and hook.state is self._state]

    def __reduce__(self) -> Any:
        return inert, ()  # a module that is copied or pickled meanwhile


class _OutputHook(_Hook):
    __slots__ = ()
    tables = attrgetter("_forward_hooks", "_forward_hooks_with_kwargs")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = MISSING) -> Any:
        state, answer = self._state, None
        if state.link.model() is not getcurrent() or _graph_task() != state.graph_task:  # `listens`, a call less
            self.keep_the_blocks(module, args, kwargs, output)
            return None
        if in_transform() or state.functorch_level is not None or _is_tracing():
            _check_place(state, module)
        if len(module._forward_hooks) > 1:
            for port in self.ports_behind(module._forward_hooks):
                left: Any = port(module, args, kwargs, output)  # type: ignore[operator]
                port.passes += 1
                if left is not None:
                    output = answer = left
        self.keep(module, args, kwargs, output)
        return answer

    def keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        step = self._state.step
        for log, paths, part in self._heard:
            if module in paths:
                kept = output if part is None else part(module, "output", output)
                log.keep_output(paths[module], step, kwargs, kept)


class _InputHook(_Hook):
    __slots__ = ()
    tables = attrgetter("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = MISSING) -> Any:
        state, answer = self._state, None
        if state.link.model() is not getcurrent() or _graph_task() != state.graph_task:
            self.keep_the_blocks(module, args, kwargs)
            return None
        if in_transform() or state.functorch_level is not None or _is_tracing():
            _check_place(state, module)
        if len(module._forward_pre_hooks) > 1:
            for port in self.ports_behind(module._forward_pre_hooks):
                left: Any = port(module, args, kwargs)  # type: ignore[operator]
                port.passes += 1
                if left is not None:
                    args, kwargs = answer = left
        self.keep(module, args, kwargs)
        return answer

    def keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        step = self._state.step
        for log, paths, part in self._heard:
            if module in paths:
                inputs = (args, kwargs) if part is None else part(module, "input", (args, kwargs))
                log.keep_inputs(paths[module], step, kwargs, inputs)


def _check_place(state: RunState, module: nn.Module) -> None:
    if functorch_level() != state.functorch_level or _is_tracing():
        raise _refusal(module)


def _refusal(module: nn.Module) -> TransformError:
    return TransformError(
        f"A {type(module).__name__} was called inside `vmap`, `func.grad` or a tracing compiler, where a cache can't "
        "keep its values.",
        instead="give `tracer.cache` the modules outside of it",
    )
