"""One expert computed alone, with its products met: what each is given, what it makes, and others in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nnsight.anatomy.layout import Piece, Slab, inside, with_inside
from nnsight.anatomy.mlps.inside import Mixture, Own

_PRODUCTS = {
    functional.linear,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.mm,
    Tensor.mm,
    torch.bmm,
    Tensor.bmm,
}
_BASE = 128  # of digits: bfloat16 counts to 256
_GROUPED = "grouped_mm"  # of torch, and what transformers has where that can't be had
_FOLLOWED = {torch.squeeze, Tensor.squeeze, torch.add, Tensor.add, Tensor.__add__, Tensor.add_, Tensor.__iadd__}


@dataclass
class Computed:
    """What one expert makes, times its weight, and its products on the way there.

    Attributes:
        output: Of its own tokens alone, [own token, model].
        given: What each product is given, [own token, ...].
        made: What each makes, with its bias.
        whole: What the module returns for all experts, where one can't be computed without the others.
    """

    output: Tensor
    given: list[Tensor] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    whole: Tensor | None = None


Place = tuple[int, bool, Piece | None]
"""Where something is put: which product, whether it is what that makes, and which part of it."""


def compute(
    mixture: Mixture, experts: Callable[..., Tensor], own: Own, replaced: Mapping[Place, Tensor]
) -> Computed | None:
    """One expert on its own tokens; None where the products were not met in their order.

    Args:
        mixture: The mixture.
        experts: Computes all experts.
        own: What it is given for this one.
        replaced: What stands in the place of what products are given and make, [own token, ...].
    """
    assert own.tokens is not None
    args, kwargs = own.inputs
    if own.slab is not None:
        return _among_others(experts, own, own.slab, replaced)
    copies, tokens = _copies(mixture, experts, own), own.hidden.flatten(0, -2)[own.tokens]
    if copies is None:
        return None
    meeting = _Meet(copies, replaced)
    with meeting:
        output = experts(*args, **kwargs)
    if not meeting.given or not torch.equal(meeting.given[0], tokens[copies].to(meeting.given[0].dtype)):
        return None
    rows = _firsts(copies, len(tokens))
    return Computed(output.flatten(0, -2), [one[rows] for one in meeting.given], [one[rows] for one in meeting.made])


def _copies(mixture: Mixture, experts: Callable[..., Tensor], own: Own) -> Tensor | None:
    """Which token each row of the first product is; None where it is given other rows.

    Tokens are sorted by expert, and those of one expert come in any order then; several may be equal. So their numbers
    are given in their place, as digits that even half precision holds, to a call that ends at that product.
    """
    hidden = inside(own.inputs, mixture.hidden.at)
    count, width = hidden.shape[:-1].numel(), hidden.shape[-1]
    powers = _BASE ** torch.arange(min(width, 8), device=hidden.device)
    digits = torch.arange(count, device=hidden.device)[:, None] // powers % _BASE
    numbers = functional.pad(digits, (0, width - len(powers))).to(hidden.dtype).reshape(hidden.shape)
    args, kwargs = with_inside(own.inputs, mixture.hidden.at, numbers)
    try:
        with torch.no_grad(), _First():
            experts(*args, **kwargs)
    except _FirstProduct as first:
        if first.rows.ndim == 2 and first.rows.shape[-1] == width:
            copies = (first.rows[:, : len(powers)].long() * powers).sum(-1)
            return copies if torch.equal(copies.unique(), torch.arange(count, device=copies.device)) else None
    return None


def _among_others(
    experts: Callable[..., Tensor], own: Own, slab: Slab, replaced: Mapping[Place, Tensor]
) -> Computed | None:
    """The same where all experts are computed together, and products have an axis of experts."""
    args, kwargs = own.inputs
    meeting = _MeetBatched(slab, replaced)
    with meeting:
        output = experts(*args, **kwargs)
    if not meeting.given or not torch.equal(meeting.given[0], own.hidden.to(meeting.given[0].dtype)):
        return None
    return Computed(slab.of(output), meeting.given, meeting.made, output)


class _MeetBatched(TorchFunctionMode):
    """Meets products of [expert, token, ...] with [expert, ..., ...], and notes one expert's part of each."""

    def __init__(self, slab: Slab, replaced: Mapping[Place, Tensor]) -> None:
        super().__init__()
        self._slab, self._replaced = slab, replaced
        self.given: list[Tensor] = []
        self.made: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_product = func in _PRODUCTS and len(args) > 1 and all(self._is_batched(one) for one in args[:2])
        if not is_product:
            return func(*args, **kwargs)
        number, rows = len(self.given), self._put(args[0], len(self.given), makes=False)
        self.given.append(rows[self._slab.index])
        made = self._put(func(rows, *args[1:], **kwargs), number, makes=True)
        self.made.append(made[self._slab.index])
        return made

    def _is_batched(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim == 3 and len(value) == self._slab.count

    def _put(self, whole: Tensor, number: int, *, makes: bool) -> Tensor:
        for (where, is_made, piece), value in self._replaced.items():
            if (where, is_made) == (number, makes):
                whole = whole.clone()
                rows = whole[self._slab.index]
                (rows if piece is None else piece.of(rows))[...] = value.to(rows.dtype)
        return whole


class _Meet(TorchFunctionMode):
    """Meets products with matrices, whose rows are tokens: once each, or as often as the module is given them."""

    def __init__(self, copies: Tensor, replaced: Mapping[Place, Tensor]) -> None:
        super().__init__()
        self._copies, self._replaced = copies, replaced  # which token each row is
        self.given: list[Tensor] = []
        self.made: list[Tensor] = []
        self._last: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        at = _rows_at(func, args)
        if at is None:
            made = func(*args, **kwargs)
            if func in _FOLLOWED and args and args[0] is self._last and isinstance(made, Tensor):
                return self._makes(made)
            return made
        which, axis = at
        number, rows = len(self.given), args[which]
        if axis is not None:
            rows = rows.squeeze(axis)
        rows = self._put(rows, number, makes=False)
        self.given.append(rows)
        new = rows if axis is None else rows.unsqueeze(axis)
        made = func(*args[:which], new, *args[which + 1 :], **kwargs)
        self.made.append(made)
        return self._makes(made)

    def _makes(self, made: Tensor) -> Tensor:
        """Notes what the last product makes, also behind its bias, and puts another in its place."""
        if made.ndim == self.given[-1].ndim:
            self.made[-1] = self._put(made, len(self.made) - 1, makes=True)  # in place: a bias may be added so
        self._last = made
        return made

    def _put(self, rows: Tensor, number: int, *, makes: bool) -> Tensor:
        for (where, is_made, piece), value in self._replaced.items():
            if (where, is_made) != (number, makes):
                continue
            rows = rows if makes else rows.clone()
            (rows if piece is None else piece.of(rows))[...] = value[self._copies].to(rows.dtype)
        return rows


class _FirstProduct(Exception):
    """Ends a call where it comes to the first product."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows


class _First(TorchFunctionMode):
    """Raises what the first product is given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        at = _rows_at(func, args)
        if at is not None:
            which, axis = at
            raise _FirstProduct(args[which] if axis is None else args[which].squeeze(axis))
        return func(*args, **(kwargs or {}))


def _firsts(copies: Tensor, count: int) -> Tensor:
    """For each token the first row that it is in."""
    order = torch.arange(len(copies), device=copies.device)
    return torch.full((count,), len(copies), device=copies.device).scatter_reduce(0, copies, order, "amin")


def _rows_at(func: Any, args: Any) -> tuple[int, int | None] | None:
    """Which argument of a product has the rows, and which axis of it is one that was added; None: no such product."""
    if len(args) < 2 or not all(isinstance(one, Tensor) for one in args[:2]):
        return None
    first, second = args[:2]
    if func in _PRODUCTS:
        if first.ndim == second.ndim == 3:
            if second.shape[-1] == 1:
                return 1, -1
            return (0, -2) if first.shape[-2] == 1 else None
        return (0, None) if first.ndim == 2 else None
    is_grouped = _GROUPED in (getattr(func, "__name__", "") or "") or _GROUPED in str(func)
    return (0, None) if is_grouped and first.ndim == 2 else None
