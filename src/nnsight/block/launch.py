"""A run whose inputs are known, and that is not made yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nnsight.block.rows import Rows
from nnsight.block.steps import Plan
from nnsight.core.run import Run


@dataclass
class Launch:
    """A run whose inputs are known, and that is not made yet.

    Args:
        make_run: Makes it; `kind=` is its class.
        make_rows: Finds its rows in its inputs.
        plan: How many steps it will have.
        samples: Whether what it does depends on random numbers.
    """

    make_run: Callable[..., Run]
    make_rows: Callable[[Run], Rows]
    plan: Plan
    samples: bool = False
