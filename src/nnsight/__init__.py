"""nnsight: read, change and recompute the inner values of any PyTorch model, in ordinary Python, while the model runs.

core/      what drives: the switch between block and model, ports, runs, errors; torch and greenlet only
block/     what a `with` binds: the tracer and its receipt
envoy.py   the module tree that a user sees
models/    language models over transformers
analysis/  functions from arrays to arrays: the logit lens
plots/     pictures of them
demo/      the bundled model
cli.py     the command line
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight import errors
from nnsight.core.config import CONFIG
from nnsight.core.save import save
from nnsight.envoy import Envoy, NNsight
from nnsight.errors import Error, OutOfOrderError

if TYPE_CHECKING:
    from nnsight.models.language import LanguageModel

__version__ = "1.0.0.dev0"
__all__ = ["CONFIG", "Envoy", "Error", "LanguageModel", "NNsight", "OutOfOrderError", "__version__", "errors", "save"]


def __getattr__(name: str) -> Any:
    if name == "LanguageModel":  # imports transformers, which `import nnsight` does not
        from nnsight.models.language import LanguageModel

        return LanguageModel
    raise AttributeError(f"module 'nnsight' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
