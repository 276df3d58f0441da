"""A twin with values: for a model that can't run on fake tensors, since what it does depends on its values.

A mixture that picks the tokens of each expert, a branch on a maximum. It is a copy with the model's weights, and runs
on small random inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import nn

from nnsight.core.compiled import is_compiled
from nnsight.core.copies import weighted_copy
from nnsight.core.specs import Inputs, TensorSpec
from nnsight.core.twin import awake
from nnsight.core.values import mapped

_MOST_COPIED = 2**30  # bytes


def valued_twin(module: nn.Module) -> ValuedTwin | None:
    """The twin, where it can be run with no effect on the module or on other processes, and without much memory."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed or any("_hf_hook" in vars(part) or is_compiled(part) for part in module.modules()):
        return None
    tensors = (*module.parameters(), *module.buffers())
    if not all(type(tensor) in (nn.Parameter, torch.Tensor) and not tensor.is_meta for tensor in tensors):
        return None
    if any(part.training for part in module.modules()) and sum(tensor.nbytes for tensor in tensors) > _MOST_COPIED:
        return None
    try:
        return ValuedTwin(module)
    except Exception:  # noqa: BLE001  any model may refuse to be copied in any way, and then we just know less
        return None


class ValuedTwin:
    """A copy of a module with its weights. `parts` pairs the modules with their copies."""

    has_values: ClassVar[bool] = True
    sorting: ClassVar[frozenset[nn.Module]] = frozenset()  # it computes just as the module does

    def __init__(self, module: nn.Module) -> None:
        self._module = weighted_copy(module)
        self.parts = list(zip(module.modules(), self._module.modules(), strict=True))
        embeddings = (part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding))
        self._count = min(embeddings, default=2)  # of the numbers that all of its tables have
        self._generator = torch.Generator().manual_seed(0)

    def run(self, inputs: Inputs, fn: str | None = None) -> Any:
        """Calls the copy, or its method `fn`, on random inputs that look like `inputs`: on others in each call."""
        args, kwargs = copy.deepcopy([awake(value) for value in inputs])
        call = getattr(self._module, fn) if fn else self._module
        with torch.no_grad(), _same_random_state(self._module):
            return call(*self._drawn(args), **self._drawn(kwargs))

    def _drawn(self, value: Any, name: Any = None) -> Any:
        if not isinstance(value, TensorSpec):
            new = mapped(value, lambda key, item: self._drawn(item, key if isinstance(value, Mapping) else name))
            return value if new is None else new
        shape, dtype, generator = value.shape, value.dtype, self._generator
        if dtype is torch.bool or "mask" in str(name):  # all is shown
            return torch.ones(shape, dtype=dtype, device=value.device)
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape, dtype=dtype, generator=generator).to(value.device)
        return torch.randint(self._count, shape, dtype=dtype, generator=generator).to(value.device)


def _same_random_state(module: nn.Module) -> ExitStack:
    """Has what is drawn here leave the random numbers of the block and the model as they are."""
    stack = ExitStack()
    stack.enter_context(torch.random.fork_rng(devices=()))
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers()) if tensor.device.type != "cpu"}
    for kind in {device.type for device in devices}:
        own = sorted(device.index or 0 for device in devices if device.type == kind)
        stack.enter_context(torch.random.fork_rng(devices=own, device_type=kind))
    return stack
