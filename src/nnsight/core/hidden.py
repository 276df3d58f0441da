"""What stands in a value for a part of it that can't be had: a row's, where the rows can't be told; a cache's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn


class Hidden:
    """Says why it can't be had, as soon as it is used. It can be passed on and pickled.

    Args:
        why: Makes the error.
        kind: What it stands for: the name of a class, or a shape.
    """

    def __init__(self, why: Callable[[], Exception], kind: str) -> None:
        self._why, self._kind = why, kind

    def _raise(self, *_: Any, **__: Any) -> NoReturn:
        raise self._why()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") or "_why" not in self.__dict__:
            raise AttributeError(name)
        raise self._why()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise next(arg._why() for arg in [*args, *(kwargs or {}).values()] if isinstance(arg, cls))

    def __reduce__(self) -> Any:
        return hidden, (self._why(), self._kind)

    def __repr__(self) -> str:
        return f"<{self._kind}, hidden: {str(self._why()).splitlines()[0]}>"


for _name in "getitem setitem len iter bool float int neg".split() + [
    side + operator for side in ("", "r", "i") for operator in "add sub mul truediv matmul pow".split()
]:
    setattr(Hidden, f"__{_name}__", Hidden._raise)


def hidden(error: Exception, kind: str) -> Hidden:
    """What raises this error when it is used."""
    return Hidden(partial(_itself, error), kind)


def _itself(error: Exception) -> Exception:
    return error
