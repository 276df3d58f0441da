"""What was replaced by the write of one row, while other rows had parts of it: theirs are of what was there before."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnsight.core.changed import State, state_of, was_changed
from nnsight.core.values import leaves_of


class Replaced:
    """Tensors that copies took the places of, and these copies, each with what it was like then.

    By that, it is told which of the two was changed in place since: what rows have of the old one, or the copy, which
    the others see and the model goes on with.
    """

    def __init__(self) -> None:
        self._old: dict[int, tuple[Tensor, State]] = {}
        self._copies: dict[str, dict[int, tuple[Tensor, State]]] = {}  # of "input" and "output": those there are now

    def __bool__(self) -> bool:
        return bool(self._old)

    def __contains__(self, tensor: Any) -> bool:
        return id(tensor) in self._old

    def note(self, kind: str, had: list[Any], value: Any) -> None:
        """`had`: the tensors that rows have parts of; `value`: what is there now."""
        now = {id(leaf): leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)}
        for old in had:
            if isinstance(old, Tensor) and id(old) not in now and old not in self:
                self._old[id(old)] = old, state_of(old)
        self._copies[kind] = {key: (leaf, state_of(leaf)) for key, leaf in now.items()}

    def is_as_left(self, old: Any) -> bool:
        """Whether a tensor is as it was when it was replaced, so that the copy has all of it."""
        return old in self and not was_changed(*self._old[id(old)])

    def is_changed(self, copy: Any) -> bool:
        """Whether a copy was changed in place since."""
        return any(id(copy) in copies and was_changed(*copies[id(copy)]) for copies in self._copies.values())

    def settled(self, copy: Tensor) -> None:
        """What rows changed in the old one is in this copy now."""
        for copies in self._copies.values():
            if id(copy) in copies:
                copies[id(copy)] = copy, state_of(copy)

    def all_settled(self) -> None:
        self._old = {key: (old, state_of(old)) for key, (old, _) in self._old.items()}
