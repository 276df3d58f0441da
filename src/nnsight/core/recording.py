"""What caches hear: every call of the modules that they were asked for, in their own run. A hook here never pauses.

A cache keeps what a module was left with, so it comes last at each port: behind what the block does there. torch calls
hooks in the order of its tables, as they stand when the first of them is called, and a port that the block arms later
stands behind. So the recording passes the value to those ports itself, keeps what they give back, and lets them pass
over the call when torch comes to them.

One recording serves all caches of a run: with two, the second would take a port for the next call for one of this.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar

import torch
from greenlet import getcurrent
from torch import nn

from nnsight.core import accelerator
from nnsight.core.hidden import Hidden
from nnsight.core.modes import functorch_level, in_transform
from nnsight.core.ports import Port
from nnsight.core.state import RunState, Visit
from nnsight.core.values import fields_of, is_plain, is_record, mapped, with_fields
from nnsight.errors import NotCachedError, TransformError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Narrow = Callable[[nn.Module, str, Any], Any]  # of a module, "input" or "output", and a value of the whole batch
MISSING: Any = ...  # what was not kept; no module returns it, and it pickles as itself
_is_tracing = torch._C._is_tracing
_graph_task = torch._C._current_graph_task_id


class CachedVisit:
    """One call of a module, as a cache keeps it.

    Attributes:
        path: The module's.
        step: The generation step in which it was called; -1 where there are none, and before the first.
    """

    __slots__ = ("_changed", "_inputs", "_marks", "_output", "_version", "path", "step")

    def __init__(self, path: str, step: int) -> None:
        self.path, self.step = path, step
        self._inputs = self._output = MISSING
        # What was kept uncopied, and how often it had been written to: an output that is one tensor, and all else.
        self._version = -1
        self._marks: tuple[tuple[str, torch.Tensor, int], ...] = ()
        self._changed: tuple[str, ...] = ()

    def changed(self) -> tuple[str, ...]:
        """What of "inputs" and "output" was changed in place after it was kept, while the run went on."""
        changed = [kind for kind, tensor, version in self._marks if tensor._version != version]
        if self._version >= 0 and self._output._version != self._version:
            changed.append("output")
        return (*self._changed, *changed)

    def seal(self) -> None:
        """The run is over: what is done to the values from now on is the user's own business."""
        if self._marks or (self._version >= 0 and self._output._version != self._version):
            self._changed, self._marks = self.changed(), ()
        self._version = -1


class Log:
    """What one cache has kept so far, and how it keeps a value."""

    def __init__(
        self,
        *,
        device: torch.device | None,
        dtype: torch.dtype | None,
        detach: bool,
        clone: bool,
        non_blocking: bool,
    ) -> None:
        self.device, self.dtype, self.detach, self.clone, self.non_blocking = device, dtype, detach, clone, non_blocking
        self.ended = False
        self._calls: list[CachedVisit] = []  # in the order in which they began
        self._by_path: dict[str, list[CachedVisit]] = {}
        self._n_sorted = 0
        self._arriving: set[torch.device] = set()  # where copies come from, or go to, that were not waited for
        self._began: list[tuple[dict[str, Any], CachedVisit]] = []

    @property
    def visits(self) -> dict[str, list[CachedVisit]]:
        """The calls by path, in the order of each module's first; sorted when asked for, not while the model runs."""
        new = self._calls[self._n_sorted :]
        for visit in new:
            self._by_path.setdefault(visit.path, []).append(visit)
        self._n_sorted += len(new)
        return self._by_path

    def keep_inputs(self, path: str, step: int, kwargs: dict[str, Any], inputs: Inputs) -> None:
        """Keeps what a call begins with. The call's own dict of keywords is what its end will be known by."""
        visit = CachedVisit(path, step)
        visit._inputs = self._kept(inputs, "inputs", visit)
        self._calls.append(visit)
        self._began.append((kwargs, visit))

    def keep_output(self, path: str, step: int, kwargs: dict[str, Any], output: Any) -> None:
        """Keeps what a call ends with: beside its inputs, where those are kept."""
        visit = self._begun(kwargs) if self._began else None
        if visit is None:
            visit = CachedVisit(path, step)
            self._calls.append(visit)
        if isinstance(output, torch.Tensor):
            visit._output, visit._version = self._kept_tensor(output)
        else:
            visit._output = self._kept(output, "output", visit)

    def _begun(self, kwargs: dict[str, Any]) -> CachedVisit | None:
        for i in range(len(self._began) - 1, -1, -1):
            if self._began[i][0] is kwargs:
                visit = self._began[i][1]
                del self._began[i:]  # with those whose call ended in an error
                return visit
        return None

    def close(self) -> None:
        self.ended = True
        self._began = []
        for visit in self._calls:
            visit.seal()

    def settle(self) -> None:
        """Waits for copies that are still on their way from another device."""
        while self._arriving:
            torch.accelerator.synchronize(self._arriving.pop())

    def of(self, paths: set[str]) -> Log:
        """A copy with the visits of some paths."""
        new = copy.copy(self)
        new._calls = [visit for visit in new._calls if visit.path in paths]
        return new

    def _kept(self, value: Any, kind: str, visit: CachedVisit) -> Any:
        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept, version = self._kept_tensor(tensor)
            if version >= 0:
                visit._marks = (*visit._marks, (kind, kept, version))
            return kept

        return through(value, keep, _not_kept)

    def _kept_tensor(self, tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        """What is kept of a tensor, and how often that had been written to, if it is no copy; else -1."""
        kept = held = tensor.detach() if self.detach and tensor.requires_grad else tensor
        if self.non_blocking and self.dtype is not None and kept.is_floating_point():
            kept = kept.to(self.dtype)  # not after a copy that may still be under way
        if self.device is not None and kept.device != self.device and not kept.is_meta:
            kept = kept.to(self.device, non_blocking=self.non_blocking)
            if self.non_blocking:
                self._arriving.update(at for at in (tensor.device, kept.device) if at.type == accelerator.KIND != "cpu")
        if self.dtype is not None and kept.is_floating_point():
            kept = kept.to(self.dtype)
        if kept is not held:
            return kept, -1
        if self.clone:
            return kept.clone(), -1
        return kept, -1 if kept.is_inference() else kept._version  # torch doesn't count writes to the former

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        calls = [copy.copy(visit) for visit in self._calls]
        for visit in calls:
            visit.seal()  # what is pickled in the middle of a run changes no more
        return {**self.__dict__, "_calls": calls, "_by_path": {}, "_n_sorted": 0, "_began": []}


def _as_it_is(value: Any) -> Any:
    return value


def through(value: Any, change: Callable[[torch.Tensor], Any], closed: Callable[[Any], Any] = _as_it_is) -> Any:
    """`value` with its tensors changed, through tuples, lists and dicts of any class; those are made anew.

    Dataclasses are gone through too. An object of another class (a key-value cache) stays what it is, or becomes what
    `closed` makes of it.
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    if value is None:
        return None
    kind = type(value)  # what is frequent comes first: `is_plain` asks for two dozen classes
    if kind is tuple or kind is list:
        return kind([through(item, change, closed) for item in value])
    if isinstance(value, dict):
        return mapped(value, lambda _, item: through(item, change, closed))
    if is_plain(value) or isinstance(value, Hidden):
        return value
    if isinstance(value, (tuple, list)):
        items = [through(item, change, closed) for item in value]
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    if is_record(value):
        return with_fields(value, {k: through(item, change, closed) for k, item in fields_of(value).items()})
    return closed(value)


def _not_kept(value: Any) -> Hidden:
    """Stands in a cache for an object that goes on changing, holds the graph, or holds all that was ever put there."""
    what = type(value).__name__
    return Hidden(partial(_why_not, what), what)


def _why_not(what: str) -> NotCachedError:
    why = (
        f"A cache keeps tensors, in tuples, lists, dicts and dataclasses, and this is a {what}, which may change later."
    )
    return NotCachedError(why, instead="read it in the block: envoy.output, envoy.inputs")


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
        return _inert, ()  # a module that is copied or pickled meanwhile


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


def _inert() -> Any:
    return _return_none


def _return_none(*_: Any) -> None:
    return None
