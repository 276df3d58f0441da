"""The names around a body that runs elsewhere: what it binds and unbinds is bound and unbound there afterwards.

Refused is what that can't be right for: a function that looks there for what the body is only to bind, and, where
Python can't unbind names from elsewhere, a `del`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import CodeType, FrameType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from nnsight.block.body_names import global_names
from nnsight.block.statements import refused

if TYPE_CHECKING:
    from nnsight.block.carry import Block

_FUNCTION = 0x01 | 0x02  # CO_OPTIMIZED and CO_NEWLOCALS: a frame that keeps its names in slots
_COPIES = sys.version_info < (3, 13)  # there, `f_locals` of a function is a copy, which is put back as a whole
_UNBINDS = sys.version_info < (3, 12)  # later Pythons trust that a function's variable stays bound until its own `del`


def is_function(frame: FrameType) -> bool:
    return frame.f_code.co_flags & _FUNCTION == _FUNCTION


def write_back(frame: FrameType, names: Mapping[str, Any], gone: Mapping[str, Any] | None = None) -> None:
    """Binds names in a frame that goes on later, as if the body had run in its place.

    Args:
        gone: Names that it unbound, and what they stood for before; one that stands for something else now stays.
    """
    around = frame.f_locals
    around.update(names)
    if gone and (_UNBINDS or not is_function(frame)):
        for name in [name for name, value in gone.items() if name in around and around[name] is value]:
            del around[name]
    if _COPIES:
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(bool(gone) and _UNBINDS))
        if is_function(frame):
            around.clear()  # it would keep all that is in it


def check_names(block: Block, frame: FrameType, instead: str) -> None:
    """Refuses a body that looks at the names around it by itself, or whose names can't all be had here."""
    if looks := sorted(block.names & {"locals", "eval", "exec", "vars", "dir"}):
        raise refused(frame, f"`{looks[0]}` in it looks at the names around it", instead)
    if not is_function(frame) and block.names & {*frame.f_code.co_freevars} - {*frame.f_locals}:
        raise refused(frame, "in a class, the names of the function around it can't be had", instead)


def check_around(block: Block, frame: FrameType, instead: str) -> None:
    """Refuses a body that can only mean in its place what it says."""
    if not _UNBINDS and is_function(frame) and (gone := sorted(block.deletes & {*frame.f_locals})):
        raise refused(frame, f"it unbinds `{gone[0]}`, which stands for something around it", instead)
    if found := next(looking_for(block, frame, block.binds), None):
        raise refused(frame, f"`{found[0]}` looks around it for `{found[1]}`, which it binds", instead)


def looking_for(block: Block, frame: FrameType, names: frozenset[str]) -> Iterator[tuple[str, str]]:
    """The functions that a body names which look for one of these names around the body, and that name."""
    around, known = frame.f_locals, set[Any]()
    for name in sorted(block.names - block.binds):
        value = around[name] if name in around else frame.f_globals.get(name)
        for looked_for in _looked_for(value, frame, known):
            if looked_for in names:
                yield name, looked_for


def _looked_for(value: Any, frame: FrameType, known: set[Any]) -> Iterator[str]:
    """The names of this frame that a function looks for when it is called, or another one that it calls."""
    for function in _functions(value, frame):
        code, own = function.__code__, frame.f_code
        if code in known:
            continue
        known.add(code)
        if is_function(frame):
            yield from {*code.co_freevars} & {*own.co_cellvars, *own.co_freevars}
        for name in _globals_of(code) if function.__globals__ is frame.f_globals else ():
            if not is_function(frame):
                yield name
            yield from _looked_for(frame.f_globals.get(name), frame, known)


def _functions(value: Any, frame: FrameType) -> list[FunctionType]:
    """The functions that a call of this, or of one of its methods, may run, of those that are written around here."""
    if isinstance(value, MethodType):
        value = value.__func__
    value = getattr(value, "__dict__", {}).get("__wrapped__", value)
    if isinstance(value, FunctionType):
        return [value]
    kind = value if isinstance(value, type) else type(value)
    if kind.__module__ != frame.f_globals.get("__name__"):
        return []
    return [one for one in vars(kind).values() if isinstance(one, FunctionType)]


@lru_cache(maxsize=256)
def _globals_of(code: CodeType) -> frozenset[str]:
    return frozenset(global_names(code))
