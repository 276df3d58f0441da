"""Copies of models, for twins and for scans: with fake tensors, or with the model's own weights.

What accelerate keeps on `meta` until a call is placed where the call would have it, and its hooks stay behind.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")
_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


_TRIES = 50


def _patiently(make: Callable[[], T]) -> T:
    """What copies a model, where other threads put hooks on it, and take them off, meanwhile."""
    for _ in range(_TRIES):
        try:
            return make()
        except RuntimeError as error:
            if "during iteration" not in str(error):
                raise
    return make()


def fake_copy(root: nn.Module, mode: Any, device: torch.device | None) -> tuple[Any, dict[int, Any]]:
    """A copy of a module tree on fake tensors of this mode, without the hooks of others.

    Args:
        root: Never changed, nor are its weights read.
        mode: A FakeTensorMode.
        device: Where tensors on `meta` are said to be that accelerate doesn't place; None: on `meta`.

    Returns:
        The copy, and the copies of its parts by the ids of the originals.
    """
    return _patiently(partial(_fake_copy, root, mode, device))


def weighted_copy(root: nn.Module) -> Any:
    """A copy of a module tree with its weights, without the hooks of others.

    It has buffers of its own; the weights are the same, but in training, where a forward may change them.
    """
    shared = [] if any(part.training for part in root.modules()) else list(root.parameters())

    def make() -> Any:
        copies: dict[int, Any] = {id(weight): weight for weight in shared}
        copies.update((id(made), made.detach().clone()) for module in root.modules() for made in _made_in(module))
        new = copy.deepcopy(root, copies)
        _leave_hooks(new)
        return new

    return _patiently(make)


def _fake_copy(root: nn.Module, mode: Any, device: torch.device | None) -> tuple[Any, dict[int, Any]]:
    from torch._subclasses.fake_tensor import FakeCopyMode

    copies: dict[int, Any] = {}
    for module in root.modules():
        place = getattr(vars(module).get("_hf_hook"), "execution_device", None)
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and tensor.is_meta and id(tensor) not in copies:
                copies[id(tensor)] = _placed(tensor, mode, device if place is None else torch.device(place))
        for made in _made_in(module):
            copies[id(made)] = _placed(made, mode, made.device)
    for module in root.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            _stand_in(module, mode, copies)
    with FakeCopyMode(mode):
        new = copy.deepcopy(root, copies)
    _leave_hooks(new)
    return new, copies


def _made_in(module: nn.Module) -> list[torch.Tensor]:
    """Weights that are made anew in each call, by pruning say: torch copies no tensor that has a graph."""
    return [made for made in vars(module).values() if isinstance(made, torch.Tensor) and made.grad_fn is not None]


def _leave_hooks(copied: nn.Module) -> None:
    for part in copied.modules():
        for table in _HOOK_TABLES:
            _keep_own_hooks(getattr(part, table))
        if vars(part).pop("_hf_hook", None) is not None:
            vars(part).pop("forward", None)


class _AnyType(nn.Linear):
    """Stands in for a quantised matrix, whose weights can't be fake: it has its sizes, and its input's type."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.to(input.dtype).T


def _stand_in(module: Any, mode: Any, copies: dict[int, Any]) -> None:
    """Has a matrix of bitsandbytes copied as one that runs on fake tensors."""
    if not isinstance(module, nn.Linear):
        return
    with mode:
        stand_in = _AnyType(
            module.in_features, module.out_features, module.bias is not None, device=module.weight.device
        )
    stand_in.train(module.training)
    copies[id(module)] = stand_in
    copies[id(module.weight)] = stand_in.weight
    if module.bias is not None:
        copies[id(module.bias)] = stand_in.bias


def _placed(tensor: torch.Tensor, mode: Any, device: torch.device | None) -> torch.Tensor:
    with mode:
        new = torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device if device is None else device
        )
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new


def _keep_own_hooks(hooks: dict[Any, Any]) -> None:
    """Takes away all hooks but those by which transformers collects a model's hidden states."""
    for key, hook in list(hooks.items()):
        if not str(getattr(hook, "__module__", "")).startswith("transformers."):
            del hooks[key]


def watch(part: nn.Module, before: Callable[..., None], after: Callable[..., None] | None = None) -> None:
    """Has a copy's calls told, with keyword arguments, for good.

    torch's tables are written directly: a ScriptModule, which calls such hooks, refuses to register them.
    """
    part._forward_pre_hooks[before] = before  # type: ignore[index]
    part._forward_pre_hooks_with_kwargs[before] = True  # type: ignore[index]
    if after is not None:
        part._forward_hooks[after] = after  # type: ignore[index]
        part._forward_hooks_with_kwargs[after] = True  # type: ignore[index]


class _Quiet(logging.Filter):
    """Keeps torch from logging that an operation on fake tensors failed, on the threads where one runs."""

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


quiet = _Quiet()
