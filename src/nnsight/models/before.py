"""What somebody did to a model before its weights were loaded: its config goes on to the one with weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from nnsight.core.history import user_place
from nnsight.errors import ModelError

_CONFIGS = ("config", "generation_config")
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
_NO_VALUE = object()


class Before:
    """How a model without weights was made, to see what is another by now."""

    def __init__(
        self, module: nn.Module, configs: dict[str, Any] | None = None, made: Mapping[str, _Made] | None = None
    ) -> None:
        self._configs = configs or {name: copy.deepcopy(getattr(module, name, None)) for name in _CONFIGS}
        self._modules = dict(module.named_modules())
        # What a class does itself where it makes its modules, as Mamba's hooks for loading.
        self._made = {path: _Made.of(one) for path, one in self._modules.items()} | dict(made or {})
        self._weights = {name: (one, _Weight.of(one)) for name, one in module.named_parameters()}

    def __reduce__(self) -> Any:
        return Before, (self._modules[""], self._configs, self._made)  # in a copy, torch counts changes anew

    def go_on(self, module: nn.Module, loaded: nn.Module) -> None:
        """Gives the loaded model what was set in the configs of the one without weights."""
        for name in _CONFIGS:
            _set_what_differs(self._configs[name], getattr(module, name, None), getattr(loaded, name, None))

    def check(self, module: nn.Module, *, is_adapted: bool) -> None:
        """Raises where something was done that the loaded model wouldn't have.

        Args:
            is_adapted: Whether an adapter was put on: that freezes weights and exchanges modules itself.

        Raises:
            ModelError: Modules or weights were changed by hand.
        """
        for what in self._changed(module, is_adapted):
            raise ModelError(
                f"{what} before the weights were loaded, and they come from the checkpoint.",
                you_wrote=user_place().source,
                instead="model.dispatch(), which loads them, and then the change",
            )

    def _changed(self, module: nn.Module, is_adapted: bool) -> Iterator[str]:
        now = dict(module.named_modules())
        for path, one in self._modules.items():
            label, made, is_now = f"`{path or 'model'}`", self._made[path], _Made.of(one)
            if is_now.training is not made.training:
                yield f"{label} was set to {'training' if is_now.training else 'evaluation'}"
            if is_now.hooks - made.hooks:
                yield f"A hook was put on {label}"
            if made.hooks - is_now.hooks:
                yield f"A hook of {label} was taken away"
            if is_now.has_forward is not made.has_forward:
                yield f"`forward` of {label} was exchanged"
            if now.get(path) is not one and not is_adapted:
                yield f"{label} was exchanged or taken out"
        weights = dict(module.named_parameters())
        for name, (weight, made_as) in self._weights.items():
            now_is = _Weight.of(weight)
            if now_is.version != made_as.version:
                yield f"`{name}` was changed"
            if now_is.dtype != made_as.dtype:
                yield f"`{name}` was cast"
            if weight._backward_hooks or weight._post_accumulate_grad_hooks:
                yield f"A hook was put on `{name}`"
            if now_is.learns is not made_as.learns and not is_adapted:
                yield f"Whether `{name}` has a gradient was changed"
            if weights.get(name) is not weight and not is_adapted:
                yield f"`{name}` was exchanged or taken out"


class _Made(NamedTuple):
    """What a module was when it was made: its mode, the keys of its hooks, and whether it has a `forward` itself."""

    training: bool
    hooks: frozenset[tuple[str, int]]
    has_forward: bool

    @classmethod
    def of(cls, module: nn.Module) -> _Made:
        hooks = frozenset((kind, key) for kind in _HOOKS for key in getattr(module, kind))
        return cls(module.training, hooks, "forward" in vars(module))


class _Weight(NamedTuple):
    """What a weight was when it was made."""

    version: int
    dtype: torch.dtype
    learns: bool

    @classmethod
    def of(cls, weight: nn.Parameter) -> _Weight:
        return cls(weight._version, weight.dtype, weight.requires_grad)


def _set_what_differs(before: Any, now: Any, loaded: Any) -> None:
    if before is None or now is None or loaded is None:
        return
    for name, value in vars(now).items():
        was, there = vars(before).get(name, _NO_VALUE), getattr(loaded, name, None)
        if isinstance(value, (PreTrainedConfig, GenerationConfig)) and type(was) is type(value) is type(there):
            _set_what_differs(was, value, there)
        elif not _same(was, value):
            setattr(loaded, name, value)


def _same(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except (RuntimeError, ValueError):  # of tensors or arrays
        return False
