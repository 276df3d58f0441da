"""Setting a context variable where the garbage collector may come."""

from __future__ import annotations

from contextvars import ContextVar, copy_context
from typing import TypeVar

T = TypeVar("T")


def put(variable: ContextVar[T], value: T) -> None:
    """Sets a context variable; the library sets its own in no other way.

    On CPython 3.11, `ContextVar.set` allocates while it reads a mapping that a set within a collection frees: the
    collector ends blocks. The copy of the context keeps that mapping alive.
    """
    keep = copy_context()
    variable.set(value)
    del keep
