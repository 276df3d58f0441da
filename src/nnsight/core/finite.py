"""Whether gradients are finite, found out on the way of each that is read."""

from __future__ import annotations

import warnings

import torch

from nnsight.core.origins import Asked
from nnsight.core.values import is_fake

_Tensor = torch.Tensor
_SUMMED = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128, torch.complex64))


def is_finite(gradient: torch.Tensor) -> bool:
    """Whether there is neither inf nor nan in it."""
    if type(gradient) is not _Tensor and is_fake(gradient):  # a scan's, which has no values
        return True
    if gradient.dtype in _SUMMED and not gradient.is_sparse and _is_number(gradient.sum()):
        return True
    return bool(torch.isfinite(gradient.coalesce().values() if gradient.is_sparse else gradient).all())


def all_finite(gradients: list[torch.Tensor]) -> bool:
    """The same of several. Where they are alike, an accelerator is waited for once."""
    are_plain = all(type(one) is torch.Tensor and not one.is_sparse for one in gradients)
    kinds = {(one.dtype, one.device) for one in gradients}
    if are_plain and len(kinds) == 1 and gradients[0].dtype in _SUMMED:
        return _is_number(torch.stack([one.sum() for one in gradients]).sum()) or all(map(is_finite, gradients))
    return all(map(is_finite, gradients))


def _is_number(total: torch.Tensor) -> bool:
    """Whether a sum is finite, so that all its terms are. It takes a quarter of the time that looking at each takes.

    If it is not, it may be too large a number itself.
    """
    value = total.item()
    return value - value == 0


def warn_not_finite(asked: Asked) -> None:
    """Warns at the user's line."""
    text = f"The gradient of {asked.label} is not finite: it has inf or nan."
    warnings.warn_explicit(text, RuntimeWarning, asked.place.code.co_filename, asked.place.line)
