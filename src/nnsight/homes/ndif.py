"""The names with which the existing package runs models elsewhere: a program may import them, and not call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from nnsight.absent import REMOTE, means_nothing
from nnsight.core.history import user_place
from nnsight.errors import InputError


def _refuses(name: str) -> Callable[..., NoReturn]:
    def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise InputError(f"`{name}` has no meaning here. {REMOTE}", you_wrote=user_place(2).source)

    refuse.__name__ = refuse.__qualname__ = name
    return refuse


def register(*_args: Any, **_kwargs: Any) -> None:
    """For programs written for the existing package: warns that there is nowhere to send a module to."""
    means_nothing("nnsight.ndif.register", REMOTE)


status = _refuses("status")
ndif_status = _refuses("ndif_status")
is_model_running = _refuses("is_model_running")
compare = _refuses("compare")
login = _refuses("login")
whoami = _refuses("whoami")
