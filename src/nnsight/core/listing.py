"""Debuggers that ask for values nobody asked for: they read all that an object has, where it is unfolded or completed.

In VS Code and PyCharm that is pydevd. Each such value would have the model run on, and the last one to its end.
"""

from __future__ import annotations

from types import FrameType

from nnsight.core.history import user_frame
from nnsight.errors import BlockError

PYDEVD = "_pydevd_bundle.pydevd_resolver"
_LISTERS = (PYDEVD, "_pydev_bundle._pydev_imports_tipper")
_EVALUATES = "internal_evaluate_expression_json"  # its `context` says what for


def refuse_listing(name: str) -> None:
    """Refuses to run the model on, where it is a debugger that lists values, or shows what the pointer is over."""
    frame = user_frame()
    if frame.f_globals.get("__name__") in _LISTERS or _is_hover(frame):
        raise BlockError(
            f"`{name}` isn't there yet, and a model doesn't run on for a debugger's list, or for where a pointer is.",
            instead="ask for it by itself, in the debug console or the block",
        )


def _is_hover(frame: FrameType) -> bool:
    if frame.f_code.co_filename != "<string>":  # it is compiled for this
        return False
    above: FrameType | None = frame
    while above is not None and above.f_code.co_name != _EVALUATES:
        above = above.f_back
    return above is not None and above.f_locals.get("context") == "hover"
