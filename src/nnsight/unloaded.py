"""A model whose weights are not there yet: what is done to it by its own methods has them loaded first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnsight.envoy import Envoy

# They tell how a model is built, for which no weight is needed.
_LOOKS = frozenset({
    "can_generate", "children", "extra_repr", "forward", "get_decoder", "get_encoder", "get_input_embeddings",
    "get_output_embeddings", "get_submodule", "modules", "named_children", "named_modules", "num_parameters",
})  # fmt: skip


def loading_first(envoy: Envoy, name: str, value: Any) -> Any:
    """What stands for a method of a module whose weights are not there: they are loaded when it is called.

    Called on the module as it is, `train`, `register_forward_hook` or `to` would change what is thrown away then.
    """
    if type(value) is not MethodType or value.__self__ is not envoy._module or name in _LOOKS:
        return value
    method: Callable[..., Any] = value

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        envoy.root._ready()
        return getattr(envoy._module, name)(*args, **kwargs)

    return call
