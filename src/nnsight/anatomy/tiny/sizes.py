"""Small sizes for a config's large ones, such that what held among the large ones holds among the small.

Heads go to powers of two that keep who divides whom, the dims of a head are divided by one number (so their sums and
ratios last), a width that was heads times a dim is that product again, and the other widths are scaled as the model's
own width is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["commensurable", "experts", "few_heads", "ladder", "small_dims", "squeezed", "width"]

# Ids and vocabularies keep their order and every small difference; longer gaps between them are cut to this.
LONGEST_GAP = 64


def squeezed(values: Iterable[int]) -> dict[int, int]:
    """Numbers of one line, moved together: order, equality and small differences stay."""
    small: dict[int, int] = {}
    before, moved = 0, 0
    for value in sorted({value for value in values if value >= 0}):
        moved += min(value - before, LONGEST_GAP)
        small[value], before = moved, value
    return small


def ladder(values: Iterable[int], first: int = 16) -> dict[int, int]:
    """Lengths: up to 8 as they are, the others 16, 32, 64 and so on, so that each divides the next."""
    small: dict[int, int] = {}
    for value in sorted(set(values)):
        if value > 8:
            small[value], first = min(first, value), first * 2
    return small


def few_heads(values: Iterable[int], most: int) -> dict[int, int]:
    """Counts of heads: 1 stays, the others become the smallest that keep who divides whom, and ratios up to 3.

    Args:
        values: The counts.
        most: What one that stands alone becomes; half of it, where it divides another.
    """
    counts = sorted(set(values))
    many = [count for count in counts if count > 1]
    small = {count: count for count in counts if count <= 1}
    for count in many:
        inside = [other for other in many if other < count and count % other == 0]
        if inside:
            # A ratio of 2 or 3 stays; from a larger one any factor will do, and 2 is the smallest.
            ratio = count // max(inside)
            small[count] = math.lcm(*(small[other] for other in inside)) * (ratio if ratio <= 3 else 2)
        else:
            shared = any(other > count and other % count == 0 for other in many)
            small[count] = min(count, most // 2 if shared else most)
    return small


def commensurable(dims: Iterable[int], most: int = 8) -> bool:
    """Whether the dims are few times one number, so that dividing by it leaves all relations among them."""
    dims = [dim for dim in dims if dim > 1]
    return not dims or max(dims) // math.gcd(*dims) <= most


def small_dims(values: Iterable[int], turned: Iterable[tuple[int, float]], least: int) -> dict[int, int]:
    """Dims of a head, divided by one number, all even.

    Args:
        values: The dims.
        turned: The dims of which a rotary embedding turns a part, and that part, which has to become even too.
        least: What the smallest becomes, or half of it where they reach far apart.
    """
    dims = sorted({value for value in values if value > 1})
    if not dims:
        return {}
    common = math.gcd(*dims)
    parts = {dim: dim // common for dim in dims}
    if not commensurable(dims):  # their order is all that stays
        parts = {dim: place for place, dim in enumerate(dims, 1)}
    shares = [*((dim, 1.0) for dim in dims), *((dim, share) for dim, share in turned if dim in parts)]
    for unit in range(least if len(dims) == 1 else least // 2, 65):
        sizes = [int(parts[dim] * unit * share) for dim, share in shares]
        if all(size >= 2 and size % 2 == 0 for size in sizes):
            return {dim: min(part * unit, dim) for dim, part in parts.items()}
    return {dim: dim for dim in dims}


def experts(value: int) -> int:
    """Four experts are enough to be chosen among, and split into two groups of two."""
    return min(value, 4)


def width(value: int, large: int, small: int, most: int, taken: set[int]) -> int:
    """A width where `large` became `small`: in proportion if that is a good size, else a multiple of 8 of its own.

    Args:
        value: The width.
        large: The model's width.
        small: What it becomes.
        most: How many times `small` a proportional one may be.
        taken: Widths that others have. One that is equal to another by accident would be mistaken for it.
    """
    size, rest = divmod(value * small, large)
    # Grouped matrix products of experts need rows of 16 bytes; a part of the width (`time_step_rank`, a sixteenth)
    # stays that part.
    if not rest and 2 <= size <= most * small and (size % 4 == 0 or large % value == 0):
        return size
    size = max(8, min(round(value * small / large / 8) * 8, 2 * small))
    while size in taken:
        size += 8
    return min(size, value)
