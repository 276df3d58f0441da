"""What can be taken for a value of the model's: a module in the tree, a layer, where somebody forgot `.output`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NoReturn

from nnsight.core.specs import DEEPEST


class NoValue(ABC):
    """Something that has values and is none: what is computed with it is answered with where the value is."""

    __slots__ = ()

    @abstractmethod
    def _is_no_value(self, what: str, instead: str | None = None) -> Exception:
        """The error that says so: `what` could not be done with it, and what is to be written instead."""

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        found = next(_all_in([*args, *(kwargs or {}).values()]))
        raise found._is_no_value(f"`{getattr(function, '__name__', function)}` can't compute with it")

    def _computed_with(self, *_: Any) -> NoReturn:
        raise self._is_no_value("nothing can be computed with it")

    def __getitem__(self, _: Any) -> Any:
        raise self._is_no_value("it has no items")

    def __setitem__(self, _: Any, __: Any) -> None:
        raise self._is_no_value("it has no items")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _computed_with
    __matmul__ = __rmatmul__ = __pow__ = __rpow__ = __neg__ = _computed_with


def no_value_in(value: Any) -> NoValue | None:
    """What is no value and stands in the place of one, looking into containers."""
    return next(_all_in(value), None)


def _all_in(value: Any, depth: int = 0) -> Iterator[NoValue]:
    if isinstance(value, NoValue):
        yield value
    if depth < DEEPEST:
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        for item in items:
            yield from _all_in(item, depth + 1)
