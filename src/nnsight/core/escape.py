"""Lets an AttributeError of the model's out of a property as itself.

Python turns an AttributeError that a property raises into a call of `__getattr__`, which would report a misspelt name.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_local = threading.local()


def escaping(get: Callable[P, T]) -> Callable[P, T]:
    """A property's function, or one that it calls, whose AttributeError is kept for `raise_escaped`."""

    @functools.wraps(get)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return get(*args, **kwargs)
        except AttributeError as error:
            let_escape(error)
            raise

    return call


def let_escape(error: AttributeError) -> None:
    """What `escaping` does with the error, for properties on the way of every read, where one call less counts."""
    _local.error = error


def raise_escaped() -> None:
    """Called by `__getattr__` for the name of such a property: raises what the property raised."""
    error: AttributeError | None = vars(_local).pop("error", None)
    if error is not None:
        raise error
