"""What is done to a residual stream by a layer's own vectors and numbers, found from what comes of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nnsight.anatomy.layout import Stretch
from nnsight.anatomy.trial import same


class Vectors:
    """The parameters of a layer that are one number for each channel of the stream, or one for all of them."""

    def __init__(self, path: str, layer: nn.Module, width: int) -> None:
        own = {f"{path}.{name}": one.detach().double() for name, one in layer.named_parameters()}
        self._all = {name: one for name, one in own.items() if one.shape == (width,)}
        self._numbers = {name: float(one) for name, one in own.items() if one.numel() == 1}

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Each with its name, in single precision."""
        for name, one in self._all.items():
            yield name, one.float()

    def number(self, factor: float) -> str | None:
        """The parameter that is this number."""
        fits = (name for name, one in self._numbers.items() if math.isclose(one, factor, rel_tol=1e-3))
        return next(fits, None)

    def stretch(self, stream: Tensor, value: Tensor) -> Stretch | None:
        """How `value` is made of the stream by two of them, or one."""
        x, y = stream.flatten(0, -2).double(), value.flatten(0, -2).double()
        x_mean, y_mean = x.mean(0), y.mean(0)
        scale = ((x - x_mean) * (y - y_mean)).sum(0) / ((x - x_mean) ** 2).sum(0)
        bias = y_mean - scale * x_mean
        if not same(scale * x + bias, y):
            return None
        size = 1e-4 * float(y.abs().max())
        by = None if same(scale, torch.ones_like(scale)) else self._name_of(scale)
        if by is None and not same(scale, torch.ones_like(scale)):
            return None
        if float(bias.abs().max()) < size:
            return None if by is None else Stretch(by, None)
        behind, before = self._name_of(bias), self._name_of(bias, scale)
        if behind is None and before is None:
            return None
        return Stretch(by, behind) if behind is not None else Stretch(by, before, bias_first=True)

    def _name_of(self, vector: Tensor, times: Tensor | float = 1.0) -> str | None:
        fits = (name for name, one in self._all.items() if torch.allclose(one * times, vector, rtol=1e-3, atol=1e-4))
        return next(fits, None)
