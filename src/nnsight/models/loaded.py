"""Options for loading that come with a module which is loaded already: taken if they say what it is, else refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from nnsight.core.history import deprecated
from nnsight.errors import ModelError
from nnsight.models import tasks


def check_loaded(module: nn.Module, options: Mapping[str, Any]) -> None:
    """Raises ModelError for options that ask for something else than this module is."""
    asks_else = [name for name, value in options.items() if not _IS.get(name, _never)(module, value)]
    if asks_else:
        raise ModelError(
            "Options for loading have no effect on a module that is loaded already, and it is not what these say.",
            you_gave=", ".join(f"{name}={' '.join(repr(options[name]).split())[:60]}" for name in asks_else),
        )


def _is_there(module: nn.Module, device_map: Any) -> bool:
    """Whether all its weights are where a device map of one device has them; any place will do for "auto"."""
    where = device_map.get("") if isinstance(device_map, Mapping) and len(device_map) == 1 else device_map
    if where == "auto":
        return True
    if not isinstance(where, (str, int, torch.device)):
        return False
    try:
        device = torch.device(where)
    except (RuntimeError, TypeError):  # "balanced", say
        return False
    return {_same(device, parameter.device) for parameter in module.parameters()} <= {True}


def _same(asked: torch.device, has: torch.device) -> bool:
    return asked.type == has.type and asked.index in (None, has.index)


def _has_dtype(module: nn.Module, dtype: Any) -> bool:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    return dtype == "auto" or getattr(module, "dtype", None) == dtype


def _attends(module: nn.Module, implementation: Any) -> bool:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == implementation


def _has_config(module: nn.Module, config: Any) -> bool:
    return getattr(module, "config", None) is config


def _is_of(module: nn.Module, automodel: Any) -> bool:
    if not tasks.is_of(type(module).__name__, automodel, getattr(module, "config", None)):
        text = "`automodel=` says how a model is loaded, and has no effect on a module that is loaded already."
        deprecated(text)
    return True


def _never(_: nn.Module, __: Any) -> bool:
    return False


def _always(_: nn.Module, __: Any) -> bool:
    return True


_IS: dict[str, Callable[[nn.Module, Any], bool]] = {
    "attn_implementation": _attends,
    "automodel": _is_of,
    "config": _has_config,
    "device_map": _is_there,
    "dtype": _has_dtype,
    "trust_remote_code": _always,  # a permission, which nothing needs any more
}
