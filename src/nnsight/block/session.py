"""`with model.session():`, for programs written for the existing package; traces in it are what they are anywhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, NoReturn

from nnsight.absent import OPTIONS, SESSION
from nnsight.block import gradient
from nnsight.core.history import user_place
from nnsight.core.save import mount
from nnsight.errors import BlockError


class Session:
    """Several traces in one block. It holds nothing: values, errors and order are those of the block itself.

    `with loss.backward():` is seen in it, also between the traces.
    """

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
        self._mode = gradient.seeing_backward(sys._getframe(1).f_code)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._mode is not None:
            self._mode.leave()
        if error is not None:
            gradient.explain(error)

    def __getattr__(self, name: str) -> NoReturn:
        why = SESSION.get(name, "It is a block around traces, and nothing else.")
        raise AttributeError(f"a session has no `{name}`. {why}")

    def __repr__(self) -> str:
        return "<session>"
