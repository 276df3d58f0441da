"""What can be taken for a value of the model's: a module in the tree, a layer, where somebody forgot `.output`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NoReturn

from torch import Tensor

from nnsight.core.specs import DEEPEST


class NoValue(ABC):
    """Something that has values and is none: what is computed with it is answered with where the value is."""

    __slots__ = ()

    @abstractmethod
    def _is_no_value(self, what: str, instead: str | None = None) -> Exception:
        """The error that says so: `what` could not be done with it, and what is to be written instead."""

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = no_value_in([*args, *(kwargs or {}).values()])
        if found is None:  # torch says that nobody computes this
            return NotImplemented
        raise found._is_no_value(f"`{getattr(function, '__name__', function)}` can't compute with it")

    def _computed_with(self, *_: Any) -> NoReturn:
        raise self._is_no_value("nothing can be computed with it")

    def __getitem__(self, _: Any) -> Any:
        raise self._is_no_value("it has no items")

    def __setitem__(self, _: Any, __: Any) -> None:
        raise self._is_no_value("it has no items")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _computed_with
    __matmul__ = __rmatmul__ = __pow__ = __rpow__ = __neg__ = _computed_with


def no_value_in(value: Any, depth: int = 0) -> NoValue | None:
    """What is no value and stands in the place of one, looking into containers."""
    if type(value) is Tensor:  # most are, and this is on the way of each write
        return None
    if not isinstance(value, (dict, list, tuple)):
        return value if isinstance(value, NoValue) else None
    if depth < DEEPEST:
        for item in value.values() if isinstance(value, dict) else value:
            if (found := no_value_in(item, depth + 1)) is not None:
                return found
    return None
