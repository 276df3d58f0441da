"""What the existing package of this name has and this one doesn't: each answered with one line, never ignored."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import nnsight
from nnsight.errors import InputError

REMOTE = "Models run in this process; there is no remote execution here."
_NO_BACKEND = "A block runs where it stands, so there is no backend to choose."

NAMES = {
    "VLLM": "Models of vLLM can't be traced here.",
    "NNsightDeprecationWarning": "What is deprecated here says so with a FutureWarning.",
    "deprecated": "Nothing here is marked with it.",
    **dict.fromkeys(
        ("apply", "bool", "bytes", "cond", "dict", "float", "int", "list", "log", "set", "str", "tuple"),
        "A block is ordinary Python: write it as outside of one.",
    ),
    "traceable": 'Any method can be traced: model.trace(x, fn="its name").',
}
METHODS = {
    "pipe": "A pipeline is not a trace here: call model.generate(...), and decode what it returns.",
    "to_model_key": REMOTE,
    **dict.fromkeys(("iter", "all"), "The steps of a generation are its trace's: for step in tracer.iter[:]"),
    "generator": "What a generation returns is tracer.result; step by step, it is for step in tracer.iter[:]",
    "backend": _NO_BACKEND,
    **{
        name: f"That is of its trace: with model.trace(...) as tracer, and then tracer.{name}"
        for name in ("invoke", "barrier", "rows", "cache", "stop", "result")
    },
}
OPTIONS = {
    "remote": REMOTE,
    "blocking": REMOTE,
    "job_id": REMOTE,
    "verbose": REMOTE,
    "backend": _NO_BACKEND,
    "tracer_cls": "The kind of tracer is the model's own.",
    "scan": "A block is checked as it runs; model.scan(...) has its shapes without weights.",
    "validate": "A block is checked as it runs.",
    "invoker_args": "What it would hold is given to the trace itself: truncation=True, max_length=...",
}
SETTINGS = {
    **dict.fromkeys(("API", "set_default_api_key"), REMOTE),
    "APP": "There is nothing to set: see nnsight.CONFIG.switch.",
    "save": "It lasts as long as the process, and is written nowhere.",
}


def no_such_name(module: str, name: str, *, imported: bool) -> AttributeError | ImportError:
    """For a module's `__getattr__`: why it doesn't have a name that the existing package has there.

    Args:
        imported: Whether it is asked for by `from module import name`, which replaces the text of an AttributeError.
    """
    why = NAMES.get(name)
    text = f"module {module!r} has no attribute {name!r}" + (f". {why}" if why else "")
    return ImportError(text, name=module) if why and imported else AttributeError(text)


def old_home(package: str, *modules: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package that the existing one has, and all its modules: here its names are nnsight's."""
    here = sys.modules[package]
    sys.modules.update({f"{package}.{module}": here for module in modules})

    def get(name: str) -> Any:
        if name in nnsight.__all__ or name == "Object":
            return getattr(nnsight, name)
        if name in modules:
            return here
        raise no_such_name(package, name, imported=True)

    return get


def refuse_options(given: Mapping[str, Any]) -> None:
    """Raises InputError for a keyword that means nothing here, but for those of the existing package, switched off."""
    for name, value in given.items():
        if name not in OPTIONS or value:
            why = OPTIONS.get(name, "There is no such option.")
            raise InputError(f"`{name}` has no meaning here. {why}", you_gave=f"{name}={value!r}")


def without_options(kwargs: dict[str, Any], takes: Collection[str]) -> dict[str, Any]:
    """A call's keywords without those that are switched off (`remote=False`) and so ask for nothing.

    Args:
        takes: Names that are the model's own.

    Raises:
        InputError: One of them is not switched off.
    """
    given = {name: why for name, why in OPTIONS.items() if name in kwargs and name not in takes}
    for name, why in given.items():
        if kwargs[name]:
            raise InputError(f"`{name}` has no meaning here. {why}", you_gave=f"{name}={kwargs[name]!r}")
    return {name: value for name, value in kwargs.items() if name not in given}
