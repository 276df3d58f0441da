"""The runs that are open in this context: what a line asks when it names a model, and no run."""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from nnsight.core.context import put

if TYPE_CHECKING:
    from nnsight.core.run import Run
    from nnsight.core.tree import Tree

OPEN: ContextVar[tuple[weakref.ref[Run], ...]] = ContextVar("open_runs", default=())


def _is_open(reference: weakref.ref[Run]) -> bool:
    run = reference()
    return run is not None and run.is_open


def add_open(reference: weakref.ref[Run]) -> None:
    """Notes a run as open in this context, and forgets those that no longer are."""
    before = OPEN.get()
    if len(before) == 1 and before[0]() is None:  # most often the run before, which is gone
        before = ()
    put(OPEN, (*filter(_is_open, before), reference) if before else (reference,))


def open_run(tree: Tree) -> Any:
    """What the Envoys of this tree ask: the run of it that was entered last in this context and is still open.

    Without one, a run of an edited view of it: `model.h[5]` in `with edited.trace(...)`; else None.
    """
    for reference in reversed(OPEN.get()):
        run = reference()
        if run is not None and run.outer is tree and run.is_open:
            return run.asked()
    for reference in reversed(OPEN.get()):
        run = reference()
        if run is not None and run.is_open and run.outer.is_view_of(tree):
            return run.asked()
    return None
