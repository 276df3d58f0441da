"""Which axes of a run's values are rows and which are tokens, or why it isn't known. Measured in measuring.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from nnsight.core.specs import TensorSpec
from nnsight.core.tree import Attached

Axis = Literal["", "row", "token", "row*token", "token*row", "answer"]  # answer: a decoder's tokens, beside an encoder
Axes = tuple[Axis, ...]
Path = tuple[Any, ...]  # of keys and indices, from a value to a tensor in it
Where = Any  # a module, or an operation's place: the module whose forward it is in, and its path there
Place = tuple[Where, str]  # that, and "input", "output" or "result"

_NESTED = (
    "it is a nested tensor; torch.backends.mha.set_fastpath_enabled(False) keeps torch from making one of padded rows"
)


@dataclass(frozen=True)
class Unknown:
    """Why the rows of a tensor aren't known.

    `unpadded`: what they are in a batch without padding, where that alone is in the way.
    """

    why: str
    unpadded: Axes | None = None


@dataclass
class Measured:
    """What a forward pass on inputs of one kind showed. `failed`: why the twin did not run to its end, if it didn't."""

    axes: dict[Place, dict[Path, Axes | Unknown]] = field(default_factory=dict)
    failed: str = ""
    shapes: dict[tuple[Any, str, Path], list[torch.Size]] = field(default_factory=dict)  # in each call

    @cached_property
    def inside(self) -> set[nn.Module]:
        """The modules in which something was seen."""
        return {where[0] for where, _ in self.axes if isinstance(where, tuple)}

    def of(
        self, module: nn.Module, kind: str, path: Path, tensor: torch.Tensor | TensorSpec, step: int
    ) -> Axes | Unknown:
        """The axes of a tensor in a module's input or output; where no rows are, it has the size that was measured."""
        if isinstance(tensor, torch.Tensor):
            if tensor.is_nested:
                return Unknown(_NESTED)
            if tensor.layout is not torch.strided:
                return Unknown(f"its layout is {tensor.layout}, of which no part can be a view")
        where = module.place if isinstance(module, Attached) else module
        found = self.axes.get((where, kind), {}).get(path)
        if found is None:
            return Unknown(
                self.failed or "it was not there when a copy of the model ran, without edits, to measure axes"
            )
        if isinstance(found, tuple) and len(found) != len(tensor.shape):
            return Unknown(f"it has {len(tensor.shape)} axes, and had {len(found)} when they were measured")
        if isinstance(found, tuple):
            unlike = [_unlike(found, shape, tensor.shape, step) for shape in self.shapes[where, kind, path]]
            if None not in unlike:
                return OtherSize(f"{unlike[0]}: the model behaves differently at this batch size")
        return found


@dataclass(frozen=True)
class OtherSize(Unknown):
    """An axis without rows and tokens has another size than was measured, where the inputs may have had others too."""


def _unlike(axes: Axes, measured: torch.Size, shape: torch.Size, step: int) -> str | None:
    for at, (axis, before, now) in enumerate(zip(axes, measured, shape, strict=True)):
        if axis == "" and now not in (before, before + step):  # one more in each step: a decoder's own tokens
            return f"its axis {at} is {now} long, and was {before} when it was measured"
    return None


class Axial:
    """The axes of all values of one run.

    Measured anew where another size shows that the run's own inputs have other sizes than those that were measured.
    """

    def __init__(self, measure: Callable[[bool], Measured]) -> None:
        self._measure, self._measured = measure, measure(False)

    def of(
        self, module: nn.Module, kind: str, path: Path, tensor: torch.Tensor | TensorSpec, step: int
    ) -> Axes | Unknown:
        found = self._measured.of(module, kind, path, tensor, step)
        if isinstance(found, OtherSize):
            self._measured = self._measure(True)
            found = self._measured.of(module, kind, path, tensor, step)
        return found
