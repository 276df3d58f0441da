"""What a block did to its model, as text."""

from __future__ import annotations

from nnsight.core.history import Access
from nnsight.core.run import Run
from nnsight.core.specs import shape_of, show_shape

_CHANGED = "changed in place"
_FIRST, _LAST = 100, 20  # lines that are shown of more


def receipt(run: Run, *, whole: bool = False) -> str:
    """One line on how the run ended, then a line for each thing read, written and skipped, with its shape and line.

    Of very many, the first and the last, if it isn't to be `whole`.

    What was written is what was assigned. What was read and then changed in place is told by torch's count of such
    changes, when the model goes on; in inference mode torch counts none, and it is listed as read.
    """
    done = [_done(access) for access in run.history]
    counts = [f"{n} {what}" for what in ("read", _CHANGED, "wrote", "skipped") if (n := done.count(what))]
    title = f"<trace of {type(run.module).__name__}, {run.outcome}: {', '.join(counts) or 'nothing asked'}>"
    every = list(run.history)
    more = 0 if whole else max(0, len(every) - _FIRST - _LAST)
    rows = [_row(run, access) for access in (every[:_FIRST] + every[-_LAST:] if more else every)]
    if run.state.ended and run.outcome == "finished":
        rows.append(("result", "", show_shape(shape_of(run.state.result)), ""))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)).rstrip() for row in rows
    ]
    if more:
        lines.insert(_FIRST, f"... {more:,} more, which print(tracer) has")
    return "\n  ".join([title, *lines])


def _done(access: Access) -> str:
    return _CHANGED if access.changed else access.verb


def _row(run: Run, access: Access) -> tuple[str, str, str, str]:
    shape = show_shape(access.shape)
    if access.was is not None and access.was != access.shape:
        shape += f" (was {show_shape(access.was)})"
    step = f" in step {access.step}" if access.step else ""
    part = "" if access.part is None else f" of {access.part}"
    return _done(access), f"{run.tree.name_of(access.module, access.kind)}{part}{step}", shape, str(access.place)
