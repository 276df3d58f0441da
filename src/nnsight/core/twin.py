"""A twin of a model: a copy whose tensors are fake, run on fake inputs to learn which modules a forward pass calls.

Only ever made after something went wrong, so that an error can tell a module that is past from one that is never called.
Neither the model nor the user's inputs are touched: everything that the forward pass could change is a copy.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from .specs import Inputs, TensorSpec, Weak

_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Calls(NamedTuple):
    """Which modules a forward pass calls, by path below the traced module, in the order of their start.

    `complete` is False where the twin could not run to its end: on a branch that depends on values, say.
    """

    order: list[str]
    complete: bool


def calls_of(module: nn.Module, inputs: Inputs | None) -> Calls:
    """Runs a twin of `module` on inputs that look like `inputs`."""
    order: list[str] = []
    if inputs is None:
        return Calls(order, False)
    try:
        _run(module, inputs, order)
    except Exception:  # broad: any model may fail on fake tensors in any way, and then we just know less
        return Calls(order, False)
    return Calls(order, True)


def _run(module: nn.Module, inputs: Inputs, order: list[str]) -> None:
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        twin = copy.deepcopy(module)
        args, kwargs = copy.deepcopy([_awake(value) for value in inputs])
    for path, part in twin.named_modules():
        for table in _HOOK_TABLES:
            getattr(part, table).clear()
        part.register_forward_pre_hook(lambda _, __, path=path: order.append(path))
    with mode, torch.no_grad():
        twin(*_fake(args), **_fake(kwargs))


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
    if type(value) in (list, tuple):
        return type(value)([change(item) for item in value])
    if type(value) is dict:
        return {key: change(item) for key, item in value.items()}
    return value
