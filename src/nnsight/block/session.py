"""`with model.session():`, for programs written for the existing package; traces in it are what they are anywhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from nnsight.absent import OPTIONS
from nnsight.core.history import user_place
from nnsight.core.save import mount
from nnsight.errors import BlockError


class Session:
    """Several traces in one block. It holds nothing: values, errors and order are those of the block itself."""

    def __init__(self, options: dict[str, Any]) -> None:
        asked = [name for name, value in options.items() if name not in OPTIONS or value not in (None, False)]
        if asked:
            raise BlockError(
                "A session runs here, in this process, and takes no options.",
                you_wrote=user_place().source,
                you_gave=", ".join(f"{name}=..." for name in asked),
                instead="with model.session():",
            )

    def __enter__(self) -> Session:
        mount()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        return None

    def __repr__(self) -> str:
        return "<session>"
