"""Small sizes for a config's large ones, such that what held among the large ones holds among the small.

Heads go to powers of two that keep who divides whom, the dims of a head are divided by one number (so their sums and ratios last), a
width that was heads times a dim is that product again, and the other widths are scaled as the model's own width is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["experts", "few_heads", "ladder", "small_dims", "squeezed", "width"]

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


def few_heads(values: Iterable[int]) -> dict[int, int]:
    """Counts of heads: 1 stays, the others become the smallest that keep who divides whom, and ratios up to 3."""
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
            small[count] = min(count, 2 if len(many) > 1 else 4)
    return small


def small_dims(values: Iterable[int], fractions: Iterable[float], least: int = 8) -> dict[int, int]:
    """Dims of a head, divided by one number, all even, and even too in the fraction of them that a rotary embedding turns."""
    dims = sorted({value for value in values if value > 1})
    if not dims:
        return {}
    common = math.gcd(*dims)
    parts = [dim // common for dim in dims]
    if parts[-1] > 8:  # no common measure: their order is all that stays
        parts = list(range(1, len(dims) + 1))
    shares = list(fractions)
    for unit in range(least if len(dims) == 1 else least // 2, 65, 2):
        turned = [int(part * unit * share) for part in parts for share in shares]
        if all(size >= 2 and size % 2 == 0 for size in turned):
            return {dim: min(part * unit, dim) for dim, part in zip(dims, parts, strict=True)}
    return dict(zip(dims, dims, strict=True))


def experts(value: int) -> int:
    """Four experts are enough to be chosen among, and split into two groups of two."""
    return min(value, 4)


def width(value: int, large: int, small: int, taken: set[int]) -> int:
    """A width where `large` became `small`: in proportion if that is whole, else a multiple of 8 that no other width has."""
    if value * small % large == 0 and 2 <= value * small // large <= 4 * small:
        return value * small // large
    size = max(8, min(round(value * small / large / 8) * 8, 4 * small))
    while size in taken:
        size += 8
    return min(size, value)
