"""Runs compiled code eagerly while somebody traces it: compiled, a module ignores hooks that come after compilation."""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection
from typing import Any

from torch import nn

_MARK = "_torchdynamo_orig_callable"  # what a compiled function has
_lock = threading.Lock()
_open_runs = 0
_before: Any = None


def is_compiled(module: nn.Module) -> bool:
    """Whether calling this module runs code of `torch.compile`."""
    optimized = _optimized_module()
    if optimized is None:
        return False
    if module._compiled_call_impl is not None or hasattr(module.forward, _MARK):
        return True
    return isinstance(module, optimized)


def any_compiled(modules: Collection[nn.Module]) -> bool:
    """`is_compiled` for many: asks each class once, and only those modules that have something of their own there."""
    optimized = _optimized_module()
    if optimized is None:
        return False
    kinds: set[Any] = {*map(type, modules)}
    if any(issubclass(kind, optimized) or hasattr(kind.forward, _MARK) for kind in kinds):
        return True
    return any(is_compiled(m) for m in modules if "forward" in (own := vars(m)) or "_compiled_call_impl" in own)


def _optimized_module() -> Any:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return getattr(dynamo, "OptimizedModule", None)  # None, too, while another thread still imports it


def in_use() -> bool:
    """Whether anything in this process can be compiled."""
    return "torch._dynamo.eval_frame" in sys.modules


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
