"""What a block did to its model, as text."""

from __future__ import annotations

from nnsight.core.history import Access
from nnsight.core.run import Run
from nnsight.core.specs import shape_of, show_shape


def receipt(run: Run) -> str:
    """One line on how the run ended, then a line for each thing read, written and skipped, with its shape and line.

    What was written is what was assigned. A value that was read and then changed in place is listed as read: to know
    better, each read would have to look at all tensors again when the model goes on.
    """
    counts = [f"{n} {verb}" for verb in ("read", "wrote", "skipped") if (n := sum(a.verb == verb for a in run.history))]
    title = f"<trace of {type(run.module).__name__}, {run.outcome}: {', '.join(counts) or 'nothing asked'}>"
    rows = [_row(run, access) for access in run.history]
    if run.state.ended and run.outcome == "finished":
        rows.append(("result", "", show_shape(shape_of(run.state.result)), ""))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)).rstrip() for row in rows
    ]
    return "\n  ".join([title, *lines])


def _row(run: Run, access: Access) -> tuple[str, str, str, str]:
    shape = show_shape(access.shape)
    if access.was is not None and access.was != access.shape:
        shape += f" (was {show_shape(access.was)})"
    step = f" in step {access.step}" if access.step else ""
    part = "" if access.part is None else f" of {access.part}"
    return access.verb, f"{run.tree.name_of(access.module, access.kind)}{part}{step}", shape, str(access.place)
