"""Modules that are put in the place of a child; and what somebody takes for that who forgot `.output`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

from nnsight.core.history import user_place
from nnsight.errors import WriteError
from nnsight.node import Node

if TYPE_CHECKING:
    from nnsight.envoy import Envoy


def put(envoy: Envoy, name: str, module: nn.Module) -> None:
    """Has a module be the child of this name."""
    setattr(envoy._loaded() if name in envoy._module._modules else envoy._module, name, module)
    envoy._tree.forget()


def put_at(envoy: Envoy, key: int | str, value: Any) -> None:
    """`envoy[key] = value`: of a list, by number; by name, also a dotted one.

    Raises:
        WriteError: It is no module.
        UnknownIndexError: There is no child of this number.
    """
    if isinstance(key, str):
        above, _, name = key.rpartition(".")
        if above:
            envoy.get(above)[name] = value
            return
    else:
        name = _name_at(envoy, key)
    if not isinstance(value, nn.Module):
        refuse(envoy, name, value)
    elif name in envoy._module._modules:
        put(envoy, name, value)
    else:
        setattr(envoy, name, value)


def _name_at(envoy: Envoy, key: int) -> str:
    """The name of the child of this number."""
    if not hasattr(key, "__index__") or isinstance(key, Tensor):
        raise envoy._in_brackets(key, " = ...")
    try:
        return list(envoy._module._modules)[key]
    except IndexError:
        raise envoy._no_index(key) from None


def refuse(envoy: Envoy, name: str, value: Any) -> NoReturn:
    """Raises for what is no module: somebody forgot `.output` on the left."""
    child = envoy._child(name)
    label = name if child is None else child._label
    here = name if child is None else child._spelled
    if isinstance(value, Node):
        raise WriteError(
            f"`{label}` is a module, and `{value._label}` has a place in a model already.",
            you_wrote=user_place().source,
            instead=f"{here}.output = {value._spelled}.output, or for the module itself {value._spelled}._module",
        )
    raise WriteError(
        f"`{label}` is a module, and no {type(value).__name__} can take its place.",
        you_wrote=user_place().source,
        instead=None if child is None else f"{here}.output = ...",
    )
