"""Whether the lines between two places in a function bind a name, on every way from the one to the other."""

from __future__ import annotations

import dis
from functools import lru_cache
from types import CodeType
from typing import NamedTuple

_STORES = ("STORE_NAME", "STORE_FAST", "STORE_GLOBAL", "STORE_DEREF")
_JUMPS = {*dis.hasjrel, *dis.hasjabs}
_BEGIN_HANDLERS = ("SETUP_FINALLY", "SETUP_WITH", "SETUP_ASYNC_WITH")  # "jumps" of 3.10, to what follows an error
_LEAVES = ("RETURN_", "RAISE_", "RERAISE")
_GOES_ELSEWHERE = ("JUMP_FORWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT")


class _Step(NamedTuple):
    """An instruction: what may come next, and the names that it binds."""

    following: tuple[int, ...]
    binds: tuple[str, ...]


@lru_cache(maxsize=4096)
def binds_between(code: CodeType, start: int, end: int, name: str) -> bool:
    """Whether `name` is bound on every way from one instruction to another.

    Args:
        start: The offset of an instruction that has run.
        end: Of the one that is about to.
    """
    steps = _steps(code)
    return _leads(steps, start, end, None) and not _leads(steps, start, end, name)


def _leads(steps: dict[int, _Step], start: int, end: int, without: str | None) -> bool:
    """Whether there is a way that doesn't bind the name `without`."""
    to_come, seen = [*steps[start].following], set[int]()
    while to_come:
        at = to_come.pop()
        if at == end:
            return True
        if at not in seen and at in steps and without not in steps[at].binds:
            seen.add(at)
            to_come += steps[at].following
    return False


@lru_cache(maxsize=256)
def _steps(code: CodeType) -> dict[int, _Step]:
    """All instructions, by their offsets. What errors lead to is none of the ways."""
    instructions = list(dis.get_instructions(code))
    steps: dict[int, _Step] = {}
    inlined: list[str] = []  # names of a comprehension that stands in the code itself, from 3.12 on
    for at, one in enumerate(instructions):
        following = (
            [] if one.opname.startswith(_LEAVES) or one.opname in _GOES_ELSEWHERE else instructions[at + 1 : at + 2]
        )
        jumps = one.opcode in _JUMPS and one.opname not in _BEGIN_HANDLERS
        ways = (*(next_.offset for next_ in following), *((one.argval,) if jumps else ()))
        binds = _bound(one)
        if one.opname == "LOAD_FAST_AND_CLEAR":
            inlined += [one.argval] * 2  # it binds it, and puts back what it stood for
        for name in [name for name in binds if name in inlined]:
            inlined.remove(name)
            binds = tuple(other for other in binds if other != name)
        steps[one.offset] = _Step(ways, binds)
    return steps


def _bound(one: dis.Instruction) -> tuple[str, ...]:
    if one.opname in _STORES:
        return (one.argval,)
    if one.opname == "STORE_FAST_STORE_FAST":
        return tuple(one.argval)
    return (one.argval[0],) if one.opname == "STORE_FAST_LOAD_FAST" else ()
