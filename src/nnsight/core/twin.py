"""A twin of a model: a copy whose tensors are fake, run on fake inputs.

It tells which modules a forward pass calls, so that an error can tell a module that is past from one that is never
called; and which axes of a value are rows (axes.py). Neither the model nor the user's inputs are touched: everything
that the forward pass could change is a copy.
"""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any, NamedTuple

import torch
from torch import nn

from nnsight.core.compiled import allow_compiled, force_eager, is_compiled
from nnsight.core.specs import Inputs, TensorSpec, Weak
from nnsight.core.values import mapped

_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Calls(NamedTuple):
    """Which modules a forward pass calls (the model's own, not the twin's), in the order of their start.

    `around` has the modules that were running when one was called. `complete` is False where the twin could not run
    to its end: on a branch that depends on values, say.
    """

    order: list[nn.Module]
    around: dict[nn.Module, set[nn.Module]]
    complete: bool


def calls_of(module: nn.Module, inputs: Inputs | None) -> Calls:
    """Runs a twin of `module` on inputs that look like `inputs`."""
    recorder = _Recorder()
    if inputs is None:
        return Calls(recorder.order, recorder.around, False)
    try:
        twin = Twin(module)
        for original, part in twin.parts:
            recorder.watch(part, original)
        twin.run(inputs)
    except Exception:  # noqa: BLE001  any model may fail on fake tensors in any way, and then we just know less
        return Calls(recorder.order, recorder.around, False)
    return Calls(recorder.order, recorder.around, True)


class _Recorder:
    def __init__(self) -> None:
        self.order: list[nn.Module] = []
        self.around: dict[nn.Module, set[nn.Module]] = {}
        self._running: list[nn.Module] = []

    def watch(self, part: nn.Module, original: nn.Module) -> None:
        part.register_forward_pre_hook(lambda *_: self._enter(original))
        part.register_forward_hook(lambda *_: self._leave())

    def _enter(self, original: nn.Module) -> None:
        self.order.append(original)
        self.around.setdefault(original, set()).update(self._running)
        self._running.append(original)

    def _leave(self) -> None:
        self._running.pop()


class Twin:
    """A copy of a module whose tensors are fake, without the hooks of others.

    `parts` pairs the modules with their copies.
    """

    def __init__(self, module: nn.Module) -> None:
        from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with FakeCopyMode(self._mode):
            self._module = copy.deepcopy(module)
        self.parts = list(zip(module.modules(), self._module.modules(), strict=True))
        for _, part in self.parts:
            for table in _HOOK_TABLES:
                _keep_own_hooks(getattr(part, table))
        self._is_compiled = any(is_compiled(part) for _, part in self.parts)
        choose_experts: Any = getattr(self._module, "set_experts_implementation", None)
        if choose_experts is not None:
            choose_experts("batched_mm")  # of transformers', the one that runs on fake tensors of every type

    def run(self, inputs: Inputs, fn: str | None = None) -> Any:
        """Calls the copy, or its method `fn`, on inputs that look like `inputs`."""
        from torch._subclasses.fake_tensor import FakeCopyMode

        with FakeCopyMode(self._mode):
            args, kwargs = copy.deepcopy([_awake(value) for value in inputs])
        call = getattr(self._module, fn) if fn else self._module
        if self._is_compiled:
            force_eager()
        try:
            with self._mode, torch.no_grad(), torch.random.fork_rng(devices=()), _quiet:
                return call(*_fake(args), **_fake(kwargs))
        finally:
            if self._is_compiled:
                allow_compiled()


def _keep_own_hooks(hooks: dict[Any, Any]) -> None:
    """Takes away all hooks but those by which transformers collects a model's hidden states."""
    for key, hook in list(hooks.items()):
        if not str(getattr(hook, "__module__", "")).startswith("transformers."):
            del hooks[key]


class _Quiet(logging.Filter):
    """Keeps torch from logging that a twin failed, on the threads where one runs."""

    def __init__(self) -> None:
        super().__init__()
        self._running: list[int] = []
        self._logger = logging.getLogger("torch._subclasses.fake_tensor")

    def __enter__(self) -> None:
        self._running.append(threading.get_ident())
        self._logger.addFilter(self)

    def __exit__(self, *_: Any) -> None:
        self._running.remove(threading.get_ident())
        if not self._running:
            self._logger.removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread not in self._running


_quiet = _Quiet()


def _awake(value: Any) -> Any:
    if isinstance(value, Weak):
        if (referent := value.reference()) is None:
            raise LookupError("an input is gone")
        return referent
    return _through(value, _awake)


def _fake(value: Any) -> Any:
    if isinstance(value, TensorSpec):
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    return _through(value, _fake)


def _through(value: Any, change: Any) -> Any:
    new = mapped(value, lambda _, item: change(item))
    return value if new is None else new
