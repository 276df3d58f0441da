"""A module's own methods, called on its Envoy.

Where the weights are not there yet, what is done to the module has them loaded first. Where torch returns the module
itself, so that calls can be chained, `model.eval()` is the Envoy. A method that calls the model does so with its edits.
`generate` is a trace where it stands in a `with`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from nnsight.block.calls import stands_in_with
from nnsight.block.replay import Replay

if TYPE_CHECKING:
    from nnsight.envoy import Envoy
    from nnsight.scopes import Scope

# They tell how a model is built, for which no weight is needed.
_LOOKS = frozenset({
    "can_generate", "children", "extra_repr", "forward", "get_decoder", "get_encoder", "get_input_embeddings",
    "get_output_embeddings", "get_submodule", "modules", "named_children", "named_modules", "num_parameters",
})  # fmt: skip

_CHAINED = frozenset({
    "apply", "bfloat16", "double", "eval", "float", "half", "requires_grad_", "share_memory", "to_empty", "train",
    "type",
})  # fmt: skip


def of_envoy(envoy: Envoy, name: str, method: MethodType) -> Callable[..., Any]:
    """What stands for a method of an Envoy's module.

    Called on a module without weights, `train`, `register_forward_hook` or `to` would change what is thrown away then:
    the weights are loaded when it is called.
    """
    loads = name not in _LOOKS and envoy._is_unloaded()
    may_call = bool(envoy._tree.edits) and name not in _LOOKS and not hasattr(nn.Module, name)
    generates = name == "generate"
    if method.__self__ is not envoy._module or not (loads or may_call or generates or name in _CHAINED):
        return method

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if generates and stands_in_with(sys._getframe(1)):
            return envoy._start(name, args, kwargs, trace=True)
        module = envoy._loaded() if loads else envoy._module
        if may_call and envoy._run_or_none() is None:  # in a block, edits take part where it says `hook=True`
            edits = Replay(envoy, name, kwargs, above=False, may_look=not generates)
            return edits.around(getattr(module, name), *args, **kwargs)
        result = getattr(module, name)(*args, **kwargs)
        return envoy if result is module and name in _CHAINED else result

    return call


def of_scope(scope: Scope, name: str, method: Any) -> Any:
    """What stands for a method of an Envoy on its scope, which is returned where the Envoy is."""
    if name not in _CHAINED and name not in ("cpu", "cuda", "to"):
        return method

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        return scope if result is scope._envoy else result

    return call
