"""What can be taken for a value of the model's: a module in the tree, a layer, where somebody forgot `.output`."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NoReturn

from torch import Tensor

from nnsight.core.history import Place, user_frame, user_place
from nnsight.core.values import DEEPEST
from nnsight.errors import BlockError


class NoValue(ABC):
    """Something that has values and is none: what is computed with it is answered with where the value is."""

    __slots__ = ()
    _is: ClassVar[str] = "no value itself"
    _meant: ClassVar[str] = "output"  # the value that is meant

    @abstractmethod
    def _names(self) -> tuple[str, str]:
        """What errors call it, and what leads to it in Python: `layers.3`, `model.layers[3]`."""

    def _is_no_value(self, what: str, instead: str | None = None) -> BlockError:
        """The error that says so: `what` could not be done with it, and what is to be written instead."""
        frame, (label, spelled) = user_frame(), self._names()
        return BlockError(
            f"`{label}` is {self._is}: {what}.",
            you_wrote=Place(frame.f_code, frame.f_lineno).source,
            instead=instead or f"{spelled}.{self._meant}",
        )

    def __delattr__(self, name: str) -> None:
        if name.startswith("_"):
            object.__delattr__(self, name)
            return
        if not hasattr(type(self), name):
            getattr(self, name)  # a misspelt one says so
        raise self._is_kept(name)

    def _is_kept(self, name: str, instead: str = "") -> BlockError:
        """The error for a `del` of what is the model's; `instead`: what to write beside the usual."""
        label, spelled = self._names()
        is_value = getattr(inspect.getattr_static(type(self), name, None), "fset", None) is not None
        return BlockError(
            f"`{label}.{name}` is {'a value' if is_value else 'a part'} of the model's, which can't be deleted.",
            you_wrote=user_place().source,
            instead=f"{instead}{spelled}.{name}[:] = 0" if is_value else None,
        )

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

    def __format__(self, form: str) -> str:
        if form:  # `f"{model.a:.2f}"`
            raise self._is_no_value(f"`{form}` is the format of a number")
        return str(self)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _computed_with
    __matmul__ = __rmatmul__ = __pow__ = __rpow__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _computed_with
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __divmod__ = __rdivmod__ = _computed_with
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __lt__ = __le__ = __gt__ = __ge__ = _computed_with
    __neg__ = __pos__ = __abs__ = __invert__ = __round__ = __trunc__ = __floor__ = __ceil__ = _computed_with
    __int__ = __float__ = __complex__ = _computed_with
    # No `__index__`: who has one is a number to Python. `==` and `hash` are those of the module.


class MadeAnew(NoValue):
    """One that is made each time it is asked for: equal to another that stands for the same."""

    __slots__ = ()

    @abstractmethod
    def _stands_for(self) -> tuple[Any, ...]:
        """What it has in common with those that are equal to it."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._stands_for() == other._stands_for()

    def __hash__(self) -> int:
        return hash(self._stands_for())


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
