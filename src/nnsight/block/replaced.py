"""What was replaced by the write of one row, while other rows had parts of it: theirs are of what was there before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnsight.core.values import leaves_of


class Replaced:
    """Tensors that copies took the places of, and these copies, each with what it was like then.

    By that, it is told which of the two was changed in place since: what rows have of the old one, or the copy, which
    the others see and the model goes on with.
    """

    def __init__(self) -> None:
        self._old: dict[int, tuple[Tensor, int | Tensor]] = {}
        self._copies: dict[int, tuple[Tensor, int | Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._old)

    def __contains__(self, tensor: Any) -> bool:
        return id(tensor) in self._old

    def note(self, had: list[Any], value: Any) -> None:
        """`had`: the tensors that rows have parts of; `value`: what is there now."""
        now = {id(leaf): leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)}
        for old in had:
            if isinstance(old, Tensor) and id(old) not in now and old not in self:
                self._old[id(old)] = old, _state(old)
        self._copies.update({key: (leaf, _state(leaf)) for key, leaf in now.items()})

    def is_as_left(self, old: Any) -> bool:
        """Whether a tensor is as it was when it was replaced, so that the copy has all of it."""
        return old in self and _is_still(*self._old[id(old)])

    def is_changed(self, copy: Any) -> bool:
        """Whether a copy was changed in place since."""
        return id(copy) in self._copies and not _is_still(*self._copies[id(copy)])

    def settled(self, copy: Tensor) -> None:
        """What rows changed in the old one is in this copy now."""
        self._copies[id(copy)] = copy, _state(copy)

    def all_settled(self) -> None:
        self._old = {key: (old, _state(old)) for key, (old, _) in self._old.items()}


def _state(tensor: Tensor) -> int | Tensor:
    """What tells later whether a tensor was changed in place: torch's count, and in inference mode a copy."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def _is_still(tensor: Tensor, then: int | Tensor) -> bool:
    if isinstance(then, Tensor):
        return torch.equal(tensor.nan_to_num(), then.nan_to_num())
    return bool(tensor._version == then)
