"""nnsight: read, change and recompute the inner values of any PyTorch model, in ordinary Python, while the model runs.

    errors.py           every error, drawn as a tree
    absent.py           what the existing package of this name has, and this one doesn't
    core/               what drives: the switch between block and model, ports, runs; torch and greenlet only
    block/              what a block may do: the tracer and its receipt, steps, caches, scans, gradients
    aliases.py, shown.py, views.py, kinds.py, node.py, methods.py, children.py, stub.py, generator.py, launches.py,
    running.py, scopes.py, envoy.py, root.py
                        the tree a user sees
    homes/              where programs written for it look for names: `nnsight.intervention` is homes/intervention.py
    anatomy/            one set of names for language models, and the proof of it
    models/             language models, and others, over transformers and diffusers
    analysis/           functions from arrays to arrays: the logit lens
    plots/              pictures of them
    demo/               the bundled model
    cli.py              the command line

Below this file, each imports only from those above it. The names load when they are first used: `nnsight --help` needs
no torch, and `import nnsight` no transformers.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnsight import analysis, errors, plots
    from nnsight.anatomy.verify import verify
    from nnsight.block.grad import grad
    from nnsight.block.gradient import backward
    from nnsight.core.config import CONFIG
    from nnsight.core.save import save
    from nnsight.envoy import Envoy
    from nnsight.errors import Error, OutOfOrderError
    from nnsight.kinds import eproperty
    from nnsight.models.diffusion import DiffusionModel
    from nnsight.models.language import LanguageModel
    from nnsight.models.transformers_model import TransformersModel
    from nnsight.models.vision import VisionLanguageModel
    from nnsight.root import NNsight

__version__ = "1.0.0.dev0"
__path__.append(os.path.join(__path__[0], "homes"))
__all__ = [
    "CONFIG",
    "DiffusionModel",
    "Envoy",
    "Error",
    "LanguageModel",
    "NNsight",
    "OutOfOrderError",
    "TransformersModel",
    "VisionLanguageModel",
    "__version__",
    "analysis",
    "backward",
    "eproperty",
    "errors",
    "grad",
    "plots",
    "save",
    "verify",
]

_HOMES = {
    "CONFIG": "nnsight.core.config",
    "DiffusionModel": "nnsight.models.diffusion",
    "Envoy": "nnsight.envoy",
    "Error": "nnsight.errors",
    "LanguageModel": "nnsight.models.language",
    "VisionLanguageModel": "nnsight.models.vision",
    "NNsight": "nnsight.root",
    "OutOfOrderError": "nnsight.errors",
    "TransformersModel": "nnsight.models.transformers_model",
    "backward": "nnsight.block.gradient",
    "eproperty": "nnsight.kinds",
    "grad": "nnsight.block.grad",
    "save": "nnsight.core.save",
    "verify": "nnsight.anatomy.verify",
    # Of the existing package's alone, for programs that import them.
    **dict.fromkeys(
        ("compare", "is_model_running", "login", "ndif_status", "register", "status", "whoami"), "nnsight.ndif"
    ),
}
_OF_PROGRAMS = ("contexts", "intervention", "modeling", "ndif", "schema", "tracing", "util")  # in homes/


def __getattr__(name: str) -> Any:
    if name in ("analysis", "errors", "plots", *_OF_PROGRAMS):
        return import_module(f"nnsight.{name}")
    if name == "Object":  # in annotations of programs written for the existing package: a value is a tensor
        return import_module("torch").Tensor
    if name == "NNsightDeprecationWarning":  # as which ours can be silenced
        return FutureWarning
    if name not in _HOMES:
        imported = sys._getframe(1).f_code.co_name == "_handle_fromlist"
        raise import_module("nnsight.absent").no_such_name(__name__, name, imported=imported)
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
