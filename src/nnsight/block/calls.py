"""How a call stands in its caller's code, read off the caller's bytecode; no source is needed."""

from __future__ import annotations

import dis
import sys
from types import FrameType

_BESIDE = {dis.opmap.get("CACHE"), dis.opmap["EXTENDED_ARG"]}  # the latter on 3.10, before a `with` of many lines
_ENTERS = {dis.opmap[name] for name in ("SETUP_WITH", "BEFORE_WITH") if name in dis.opmap}


def stands_in_with(frame: FrameType) -> bool:
    """Whether the call that `frame` is in the middle of is the context manager of a `with` statement.

    It is when the next instruction enters a `with`: SETUP_WITH on CPython 3.10, BEFORE_WITH on 3.11 to 3.13, and on
    3.14 a COPY that is followed by the load of `__exit__`.
    """
    code = frame.f_code.co_code
    at = _next(code, frame.f_lasti)
    if at >= len(code):
        return False
    if sys.version_info < (3, 14):
        return code[at] in _ENTERS
    following = _next(code, at)
    loads_special = following < len(code) and code[following] == dis.opmap["LOAD_SPECIAL"]
    return (
        code[at] == dis.opmap["COPY"] and loads_special and code[following + 1] in (0, 1)
    )  # not __aenter__, __aexit__


def stands_in_for(frame: FrameType) -> bool:
    """Whether the call that `frame` is in the middle of is what a `for` goes through."""
    code = frame.f_code.co_code
    at = _next(code, frame.f_lasti)
    return at < len(code) and code[at] == dis.opmap["GET_ITER"]


def _next(code: bytes, at: int) -> int:
    at += 2
    while at < len(code) and code[at] in _BESIDE:
        at += 2
    return at
