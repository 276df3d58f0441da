"""Which matrices make q, k and v, and which one z goes through, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

MADE = ("q", "k", "v")
Order = tuple[str | None, ...]


class Sizes(NamedTuple):
    """How many heads of queries and of keys there are, and the width of one: in q and k, and in v and z."""

    heads: int
    kv_heads: int
    d_head: int
    d_value: int


@dataclass(frozen=True)
class Matrix:
    """A module that multiplies by one matrix, and may add a bias.

    Attributes:
        path: The module, below the layer.
        kind: Its class. Where a model has another one there, the weights are quantized or adapted.
        weight: The parameter's name.
        bias: That of the bias, if there is one.
        out_first: Whether the weight is [out, in], as a Linear's is; else it is [in, out].
        order: What its outputs are, one after the other: "q", "k", "v", and None for anything else.
        groups: How often that order comes: "once", "kv_heads" times or "heads" times.
    """

    path: str
    kind: type
    weight: str
    bias: str | None
    out_first: bool
    order: Order = ()
    groups: str = "once"


@dataclass(frozen=True)
class Projections:
    """The matrices of one layer's attention, found on a tiny model.

    Attributes:
        sizes: Of the tiny model.
        numbers: The whole numbers that its attention module and its config have, by their names.
        made: The matrix that makes each of "q", "k" and "v".
        output: The one that z goes through.
        given_z: Whether that is given z as it is; else z behind a gate or a norm.
        scaled: Which of q, k and v are what their matrix makes, times one number, at the first token: no norm comes
            between, and rotary embedding turns none of it.
        lacks: Why there is none for the others of "q", "k", "v" and "o".
    """

    sizes: Sizes
    numbers: Mapping[str, int]
    made: Mapping[str, Matrix] = field(default_factory=dict)
    output: Matrix | None = None
    given_z: bool = False
    scaled: frozenset[str] = frozenset()
    lacks: Mapping[str, str] = field(default_factory=dict)

    def matrix(self, name: str) -> Matrix | None:
        return self.output if name == "o" else self.made.get(name)


class Stretch(NamedTuple):
    """Where the heads of q, k or v stand along the outputs of a matrix.

    Attributes:
        start: Where the first begins.
        step: How far the next one begins behind it.
        n_heads: How many there are.
        width: Of each.
    """

    start: int
    step: int
    n_heads: int
    width: int


def stretch_of(matrix: Matrix, name: str, sizes: Sizes, n_out: int) -> Stretch | None:
    """Where heads stand in a matrix of so many outputs; None where they don't fit in, or not at equal distances."""
    groups = {"once": 1, "kv_heads": sizes.kv_heads, "heads": sizes.heads}[matrix.groups]
    counts = {"q": sizes.heads, "k": sizes.kv_heads, "v": sizes.kv_heads}
    widths = {"q": sizes.d_head, "k": sizes.d_head, "v": sizes.d_value}
    if n_out % groups or any(one is not None and counts[one] % groups for one in matrix.order):
        return None
    lengths = {one: counts[one] // groups * widths[one] for one in matrix.order if one is not None}
    left = n_out // groups - sum(lengths.values())
    if (left > 0) is not (None in matrix.order) or left < 0:
        return None
    start = 0
    for one in matrix.order:
        if one == name:
            break
        start += left if one is None else lengths[one]
    in_group = counts[name] // groups
    if groups > 1 and in_group > 1:
        return None
    return Stretch(start, n_out // groups if groups > 1 else widths[name], counts[name], widths[name])
