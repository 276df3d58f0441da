"""A model without weights: a copy whose tensors have a shape, a dtype and a device, and no values.

torch's fake tensors do the arithmetic. Where a line needs a value all the same, it gets an error of ours, in the block,
in the model and after both.
"""

from __future__ import annotations

import copy
import linecache
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)

from nnsight.core.recording import through
from nnsight.errors import FakeValueError, ModelError

_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LIBRARIES = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


class ValuelessMode(FakeTensorMode):
    """torch's fake mode; whoever asks one of its tensors for a value learns what it is."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise _no_value(func) from None


def _no_value(func: Any) -> FakeValueError:
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    file, line = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(file, line).strip()
    number = "_local_scalar_dense" in str(func)
    return FakeValueError(
        f"A scan's tensors have shapes and no values, and this line needs {'one' if number else 'them'}.",
        at=f"{Path(file).name}:{line}" + (f": {text}" if text else ""),
        it_asked_for="a number, or yes or no" if number else f"a shape that depends on values ({func})",
        instead="model.trace(...), which runs the model on its weights",
    )


class FakeModel:
    """A fake copy of a module tree.

    Args:
        root: Never changed, nor are its weights read.
        device: Where tensors on `meta` are said to be; None: on `meta`.

    Raises:
        ModelError: The module can't be copied.
    """

    def __init__(self, root: nn.Module, device: torch.device | None) -> None:
        self.mode = ValuelessMode()
        self._device = device
        self._original = root  # what is looked up by its id must stay
        self._copies: dict[int, Any] = {}
        for module in root.modules():
            place = getattr(vars(module).get("_hf_hook"), "execution_device", None)  # accelerate keeps them on `meta`
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is not None and tensor.is_meta and id(tensor) not in self._copies:
                    self._copies[id(tensor)] = self._placed(tensor, device if place is None else torch.device(place))
        try:
            with FakeCopyMode(self.mode):
                self.root = copy.deepcopy(root, self._copies)
        except Exception as error:
            raise ModelError(
                f"This {type(root).__name__} can't be scanned: it can't be copied ({type(error).__name__}: {error})."
            ) from error
        for part in self.root.modules():
            for table in _HOOK_TABLES:
                getattr(part, table).clear()
            if vars(part).pop("_hf_hook", None) is not None:
                vars(part).pop("forward", None)

    def copy_of(self, thing: Any) -> Any:
        """The copy of a module or tensor of the tree; None if it has none."""
        return self._copies.get(id(thing))

    def inputs(self, *values: Any) -> Any:
        """Fake copies of the inputs, on the model's device."""
        with FakeCopyMode(self.mode):
            copies = copy.deepcopy(values)
        if self._device is None:
            return copies
        with self.mode:
            return through(copies, lambda tensor: tensor.to(self._device))

    def _placed(self, tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
        with self.mode:
            new = torch.empty_strided(
                tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device if device is None else device
            )
            if isinstance(tensor, nn.Parameter):
                return nn.Parameter(new, requires_grad=tensor.requires_grad)
        return new
