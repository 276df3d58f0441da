"""Whether a tensor was changed in place since it was looked at."""

from __future__ import annotations

import torch
from torch import Tensor

State = int | Tensor


def state_of(tensor: Tensor) -> State:
    """What tells it later: torch's count of such changes; in inference mode, where nothing is counted, a copy."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def was_changed(tensor: Tensor, since: State) -> bool:
    """Whether it was, since it had this state."""
    if isinstance(since, Tensor):
        return not torch.equal(tensor.nan_to_num(), since.nan_to_num())
    return bool(tensor._version != since)
