"""Runs compiled code eagerly while somebody traces it: compiled, a module ignores hooks that come after compilation."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Collection
from typing import Any

from torch import nn

_DYNAMO = "torch._dynamo.eval_frame"
_MARK = "_torchdynamo_orig_callable"  # what a compiled function has
_lock = threading.Lock()
_open_runs = 0
_before: Any = None


def is_compiled(module: nn.Module) -> bool:
    """Whether calling this module runs code of `torch.compile`."""
    own = module.__dict__
    if "forward" not in own and "_compiled_call_impl" not in own:  # on the way of every read
        return hasattr(getattr(type(module), "forward", None), _MARK)
    if module._compiled_call_impl is not None or hasattr(module.forward, _MARK):
        return True
    optimized = getattr(sys.modules.get(_DYNAMO), "OptimizedModule", None)
    return optimized is not None and isinstance(module, optimized)


def eager_generation(module: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The same options for `generate`, and that it compiles nothing, where it would do so in the middle of a run.

    For a key-value cache of a fixed size, transformers compiles the model's call by itself, on an accelerator.
    """
    if not hasattr(module, "get_compiled_call"):
        return options
    given = options.get("generation_config")
    configs = (given, getattr(module, "generation_config", None))
    asked = (options, *(vars(config) for config in configs if config is not None))
    caches = (options.get("past_key_values"), options.get("cache_params"))
    if not any(one.get("cache_implementation") for one in asked) and not any(
        getattr(cache, "is_compileable", False) for cache in caches
    ):
        return options
    if given is None:
        return {**options, "disable_compile": True}
    given = copy.copy(given)  # a config and an option beside it are too much for transformers
    given.disable_compile = True
    return {**{k: v for k, v in options.items() if k != "disable_compile"}, "generation_config": given}


def any_compiled(modules: Collection[nn.Module]) -> bool:
    """`is_compiled` for many: asks each class once, and only those modules that have something of their own there."""
    optimized = getattr(sys.modules.get(_DYNAMO), "OptimizedModule", None)
    if optimized is None:
        return False
    kinds: set[Any] = {*map(type, modules)}
    if any(issubclass(kind, optimized) or hasattr(getattr(kind, "forward", None), _MARK) for kind in kinds):
        return True
    return any(is_compiled(m) for m in modules if "forward" in (own := vars(m)) or "_compiled_call_impl" in own)


def in_use() -> bool:
    """Whether anything in this process can be compiled."""
    return _DYNAMO in sys.modules


def force_eager() -> None:
    """Called by a run that needs it, once. The setting is the process's: runs end in any order, so they are counted."""
    global _open_runs, _before
    from torch._dynamo.eval_frame import DynamoStance, _set_stance

    with _lock:
        _open_runs += 1
        if _open_runs == 1:
            _before = _set_stance(DynamoStance("force_eager"))


def allow_compiled() -> None:
    """Called by the same run when it ends; the last one puts back what was set before the first."""
    global _open_runs, _before
    from torch._dynamo.eval_frame import _set_stance

    with _lock:
        _open_runs -= 1
        if _open_runs == 0:
            _set_stance(_before)
            _before = None
