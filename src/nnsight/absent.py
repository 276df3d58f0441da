"""What the existing package of this name has and this one doesn't: each answered with one line, never ignored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from nnsight.errors import InputError

_REMOTE = "Models run in this process; there is no remote execution here."
_NO_BACKEND = "A block runs where it stands, so there is no backend to choose."

NAMES = {
    **dict.fromkeys(("login", "whoami", "register", "status", "ndif_status", "is_model_running", "compare"), _REMOTE),
    "VisionLanguageModel": 'TransformersModel(name, task="image-text-to-text") is the class for it.',
    "DiffusionModel": "There is no class for this kind of model here. NNsight(module) wraps any module: pipe.unet.",
    "VLLM": "Models of vLLM can't be traced here.",
    "Object": "Values are tensors and containers themselves: annotate with torch.Tensor.",
    "NNsightDeprecationWarning": "What is deprecated here says so with a FutureWarning.",
    "deprecated": "Nothing here is marked with it.",
}
METHODS = {
    "pipe": "A pipeline is not a trace here: call model.generate(...), and decode what it returns.",
    "to_model_key": _REMOTE,
    **dict.fromkeys(("iter", "all"), "The steps of a generation are its trace's: for step in tracer.iter[:]"),
    "generator": "What a generation returns is tracer.result; step by step, it is for step in tracer.iter[:]",
    "backend": _NO_BACKEND,
    **{
        name: f"That is of its trace: with model.trace(...) as tracer, and then tracer.{name}"
        for name in ("invoke", "barrier", "rows", "cache", "stop", "result")
    },
}
OPTIONS = {
    "remote": _REMOTE,
    "blocking": _REMOTE,
    "job_id": _REMOTE,
    "verbose": _REMOTE,
    "backend": _NO_BACKEND,
    "tracer_cls": "The kind of tracer is the model's own.",
}
SETTINGS = {
    **dict.fromkeys(("API", "set_default_api_key"), _REMOTE),
    "APP": "There is nothing to set: see nnsight.CONFIG.switch.",
    "save": "It lasts as long as the process, and is written nowhere.",
}
PACKAGES = {
    "nnsight.intervention": "Its names are in nnsight itself: from nnsight import Envoy, eproperty, OutOfOrderError. "
    'Any method can be traced: model.trace(x, fn="its name").',
    "nnsight.modeling": f"Its names are in nnsight itself: from nnsight import LanguageModel. {NAMES['VLLM']}",
}


def refuse_import(package: str) -> ImportError:
    """For `import` of a package that the existing one has: why there is none here."""
    return ImportError(f"nnsight has no `{package}`. {PACKAGES[package]}", name=package)


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
