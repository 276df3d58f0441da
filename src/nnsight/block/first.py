"""`.input` and `.inputs` of a call: which of its inputs is the first, and what can be assigned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnsight.core.history import user_place
from nnsight.core.state import Visit
from nnsight.errors import BlockError, WriteError

Given = tuple[tuple[Any, ...], dict[str, Any]]


def first_input(visit: Visit, label: Callable[[], str]) -> Any:
    """The first positional input of a call, or else the first keyword one.

    Raises:
        BlockError: It has none; `label` says of what it is a call.
    """
    if not visit.args and not visit.kwargs:
        raise BlockError(
            f"`{label()}` was called without any input.",
            you_wrote=user_place().source,
            instead=".inputs, which is ((), {}) here",
        )
    return visit.args[0] if visit.args else next(iter(visit.kwargs.values()))


def with_first_input(visit: Visit, value: Any, label: Callable[[], str]) -> Given:
    """The inputs of a call with another first one."""
    first_input(visit, label)
    if visit.args:
        return (value, *visit.args[1:]), visit.kwargs
    return (), {**visit.kwargs, next(iter(visit.kwargs)): value}


def check_pair(value: Any, name: str) -> None:
    """Refuses what is no `(args, kwargs)`; `name` is what the user calls the place."""
    if not isinstance(value, tuple) or [type(part) for part in value] != [tuple, dict]:
        raise WriteError(
            "`.inputs` takes a pair: a tuple of positional inputs and a dict of keyword inputs.",
            you_wrote=user_place().source,
            instead=f"{name}.inputs = (x,), {{}}    or {name}.input = x, which keeps the rest",
        )
