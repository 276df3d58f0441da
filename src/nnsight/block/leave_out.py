"""Leaves the body of a `with` out: a trace function raises at its first instruction, and `__exit__` swallows that."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from nnsight.block.carry import Block

SEES_OPCODES = sys.version_info[:2] != (3, 12)  # there, a frame that runs already gets line events only
_STORES = {"STORE_NAME", "STORE_FAST", "STORE_GLOBAL", "STORE_DEREF"}


class _Skipped(BaseException):
    """Raised at the first instruction of a body that is left out. Recognised by identity."""


class Skip:
    """Leaves out `block`, the body of the `with` that `frame` is entering.

    Made in `__enter__`, with what that returns; `__exit__` asks `done(error)` whether the body was left out.
    """

    def __init__(self, frame: FrameType, block: Block, entered: Any) -> None:
        self._frame, self._error, self._from_line = frame, _Skipped(), block.first_line
        self._at, self._names = block.target.offset, _values(block.target.names, entered)
        self._old = sys.gettrace(), frame.f_trace, frame.f_trace_opcodes
        if self._from_line is None:  # nothing but `pass`: CPython 3.12 has no handler for an error there
            return
        frame.f_trace_opcodes = SEES_OPCODES
        frame.f_trace = self._local
        sys.settrace(_ignore)

    def done(self, error: BaseException | None) -> bool:
        """Puts back what traced before (a debugger's function, coverage's), and says whether the body was left out."""
        old, local, opcodes = self._old
        sys.settrace(old)
        self._frame.f_trace, self._frame.f_trace_opcodes = local, opcodes
        self._frame, self._names = None, {}  # type: ignore[assignment]
        self._error.__traceback__ = None  # a cycle, which holds the frame
        return error is (None if self._from_line is None else self._error)

    def _local(self, frame: FrameType, event: str, _: Any) -> Any:
        at = frame.f_lasti
        if event == "opcode" and at == self._at:
            for name, (kind, value) in self._names.items():
                (frame.f_globals if kind == "STORE_GLOBAL" else frame.f_locals)[name] = value
            raise self._error
        if event == "line" and at > self._at and frame.f_lineno >= (self._from_line or 0):
            raise self._error
        return self._local


def _ignore(*_: Any) -> None:
    return None


class _Target(NamedTuple):
    """What stands behind `as`: the offset of the last instruction that binds it, and what is bound, in order."""

    offset: int
    names: list[tuple[str, str]] | None  # None: something else than names


def entering(frame: FrameType) -> int:
    """The offset of the instruction that `frame` is in the middle of. On 3.10, a long `with` has another in front."""
    at = frame.f_lasti
    while frame.f_code.co_code[at] == dis.EXTENDED_ARG:
        at += 2
    return at


def target_of(frame: FrameType) -> _Target:
    names: list[tuple[str, str]] = []
    to_come = 1
    for one in _behind(frame.f_code, entering(frame)):
        if one.opname == "UNPACK_SEQUENCE":
            to_come += (one.arg or 0) - 1
        elif one.opname in _STORES:
            names.append((one.opname, one.argval))
        elif one.opname == "STORE_FAST_STORE_FAST":
            names += [("STORE_FAST", name) for name in one.argval]
        elif one.opname == "STORE_FAST_LOAD_FAST":
            names.append(("STORE_FAST", one.argval[0]))
        elif one.opname == "POP_TOP":
            return _Target(one.offset, names)
        else:
            break
        if len(names) == to_come:
            return _Target(one.offset, names)
    return _Target(-1, None)


def _values(names: list[tuple[str, str]] | None, entered: Any) -> dict[str, tuple[str, Any]]:
    values = list(entered) if len(names or ()) > 1 else [entered]
    return {name: (kind, value) for (kind, name), value in zip(names or (), values, strict=False)}


def unpacks(frame: FrameType) -> bool:
    """Whether the `with` that `frame` is entering unpacks what it is given: `as (tracer, edited)`."""
    return _following(frame) in ("UNPACK_SEQUENCE", "UNPACK_EX")


def binds_nothing(frame: FrameType) -> bool:
    """Whether there is no `as` in the `with` that `frame` is entering."""
    return _following(frame) == "POP_TOP"


def _following(frame: FrameType) -> str:
    """The name of the instruction that takes what the entered `with` gives."""
    return _name_behind(frame.f_code, entering(frame))


@lru_cache(maxsize=1024)  # a long script is gone through once, and not at each turn of a loop
def _name_behind(code: CodeType, at: int) -> str:
    return next((one.opname for one in _behind(code, at)), "")


def _behind(code: CodeType, at: int) -> Iterator[dis.Instruction]:
    """The instructions behind the one at this offset that do something."""
    for one in dis.get_instructions(code):
        if one.offset > at and one.opname not in ("CACHE", "EXTENDED_ARG", "NOP"):
            yield one
