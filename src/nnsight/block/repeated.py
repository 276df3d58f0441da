"""`with tracer.iter[:]:`, the older form of `for step in tracer.iter[:]`: its body is left out, and runs in each step.

Programs written for the existing package have it. A loop needs no source, and anything can stand in it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import NoReturn

from nnsight.block.around import write_back
from nnsight.block.carry import Block, Body
from nnsight.block.leave_out import Skip
from nnsight.core.history import deprecated, no_such_name
from nnsight.errors import BlockError

_INSTEAD = "for step in tracer.iter[:]:"


class Repeats:
    """Steps to go through, which a `with` goes through, too."""

    def __iter__(self) -> Iterator[int]:
        raise NotImplementedError

    def __getattr__(self, name: str) -> NoReturn:
        raise no_such_name(
            name,
            f"`{name}` is asked of a module, and these are steps.",
            f"for step in tracer.iter[...]:    and in it model.layer.{name}",
        )

    def __enter__(self) -> None:
        self._repeated = _Repeated(sys._getframe(1))

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> bool:
        return self._repeated.run(self, error)


class _Repeated:
    """The body of the `with` that `frame` is entering, left out where it stands.

    What `as` binds is the step.
    """

    def __init__(self, frame: FrameType) -> None:
        self._frame, self._block = frame, Block.of(frame, _INSTEAD, in_place=True)
        text = f"`with tracer.iter[...]` runs its body once a step, which a loop says: {_INSTEAD}"
        deprecated(text)
        self._skip = Skip(frame, self._block, None)

    def run(self, steps: Iterable[int], error: BaseException | None) -> bool:
        """Called by `__exit__`: the body, once for each step. False where it was not left out."""
        frame, block = self._frame, self._block
        del self._frame  # a cycle
        if not self._skip.done(error):
            if error is None:
                raise BlockError("The body of this `with` ran in its place, in one step.", instead=_INSTEAD)
            return False
        names = {name for _, name in block.target.names or ()}
        around = {name: frame.f_locals[name] for name in block.names.intersection(frame.f_locals) - names}
        body = Body(block, {**around, **dict.fromkeys(names)})
        last: dict[str, int] = {}
        try:
            for step in steps:
                last = dict.fromkeys(names, step)
                for name in names & body.cells.keys():
                    body.cells[name].cell_contents = step
                body()
        finally:
            write_back(frame, {**body.bound(), **last}, body.unbound())
        return True
