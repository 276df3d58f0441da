"""`tracer.barrier`: where the blocks of several invokes wait for each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight.core.group import GroupRun
from nnsight.core.history import user_place
from nnsight.errors import BlockError

if TYPE_CHECKING:
    from nnsight.block.tracer import Tracer


class Barrier:
    """`barrier = tracer.barrier(2)`; `barrier()` in two invokes has each wait until both are there, again and again."""

    def __init__(self, tracer: Tracer, count: Any) -> None:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise BlockError(f"A barrier is for a number of invokes, not {count!r}.", you_wrote=user_place().source)
        self._tracer, self._count, self._arrived = tracer, count, 0

    def __call__(self) -> None:
        run = self._tracer._run
        if not isinstance(run, GroupRun) or run.current is None:
            raise BlockError(
                "A barrier is for invokes that run in one batch, and this line stands in none.",
                you_wrote=user_place().source,
            )
        self._arrived += 1
        needed = -(-self._arrived // self._count) * self._count

        def stuck() -> BlockError:
            came = self._arrived - (needed - self._count)
            return BlockError(
                f"This barrier waits for {self._count} invokes, and only {came} came to it.",
                you_wrote=user_place().source,
                instead=f"tracer.barrier({came}), or a call of the barrier in each invoke that is meant",
            )

        run.wait_until(lambda: self._arrived >= needed, stuck)
