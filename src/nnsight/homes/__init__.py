"""Where programs written for the existing package look for names: packages of it, which here lead to our own."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from importlib import import_module
from types import FrameType
from typing import Any

import nnsight
from nnsight.absent import NAMES

# By the names that they have there, and for annotations alone where a value has been a proxy.
OURS = {
    "Barrier": ("nnsight.block.barrier", "Barrier"),
    **dict.fromkeys(("Cache", "CacheDict", "CacheView"), ("nnsight.block.cache", "Cache")),
    **dict.fromkeys(("InterleavingTracer", "Tracer"), ("nnsight.block.tracer", "Tracer")),
    **dict.fromkeys(("Source", "SourceEnvoy"), ("nnsight.block.source", "Source")),
    "OperationEnvoy": ("nnsight.block.source", "Operation"),
    "SourceNotAvailable": ("nnsight.errors", "NoSourceError"),
    **dict.fromkeys(("InterventionProxy", "LanguageModelProxy", "Object", "Proxy"), ("torch", "Tensor")),
    "WrapperModule": ("torch.nn", "Identity"),
}


def old_home(package: str, *modules: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package that the existing one has, and all its modules: here its names are nnsight's."""
    here = sys.modules[package]
    sys.modules.update({f"{package}.{module}": here for module in modules})

    def get(name: str) -> Any:
        if name in nnsight.__all__:
            return getattr(nnsight, name)
        if name in OURS:
            module, ours = OURS[name]
            return getattr(import_module(module), ours)
        if name in modules and name not in NAMES:
            return here
        why = NAMES.get(name, "What the existing package of this name has inside isn't here.")
        text = f"module {package!r} has no attribute {name!r}. {why}"
        raise ImportError(text, name=package) if _imports(sys._getframe(1), name) else AttributeError(text)

    return get


def _imports(frame: FrameType, name: str) -> bool:
    """Whether this is asked for by `from module import name`, which replaces the text of an AttributeError."""
    if frame.f_code.co_name == "_handle_fromlist":  # which looks for a module of that name next
        return name in NAMES
    return frame.f_lasti >= 0 and frame.f_code.co_code[frame.f_lasti] == dis.opmap["IMPORT_FROM"]
