"""A model without weights: a copy whose tensors have a shape, a dtype and a device, and no values.

torch's fake tensors do the arithmetic. Where a line needs a value all the same, it gets an error of ours, in the block,
in the model and after both.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn.parameter import is_lazy

from nnsight.core.copies import fake_copy, quiet
from nnsight.core.history import PACKAGE, TORCH, Place
from nnsight.core.values import through
from nnsight.errors import FakeValueError, ModelError

_INSTALLED = str(Path(torch.__file__).parents[1])
_WRAPPERS = str(Path("transformers", "utils"))  # around a forward: the lines of the models are behind them


class ValuelessMode(FakeTensorMode):
    """torch's fake mode; whoever asks one of its tensors for a value learns what it is."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            _check_written(func._schema.arguments, args, kwargs or {})
        try:
            with quiet:
                return super().__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise _no_value(func) from None


def _check_has_shapes(root: nn.Module) -> None:
    """Refuses torch's lazy modules before their first call."""
    for name, weight in (*root.named_parameters(), *root.named_buffers()):
        if is_lazy(weight):
            raise ModelError(
                f"This {type(root).__name__} can't be scanned: `{name}` has no shape yet. torch's lazy modules choose "
                "theirs in their first call.",
                instead="model.trace(...), once, and then the scan",
            )


def _check_written(arguments: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses what would be lost: a scan's tensor that is written into one with values."""
    given = {**{argument.name: value for argument, value in zip(arguments, args, strict=False)}, **kwargs}
    written = [given.get(one.name) for one in arguments if one.alias_info is not None and one.alias_info.is_write]
    for value in written:
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, FakeTensor):
                raise FakeValueError(
                    "A scan's tensors have shapes and no values, and this line writes one into a tensor with values.",
                    **_lines(),
                    instead="a list for what the block reads, or model.trace(...)",
                )


def _no_value(func: Any) -> FakeValueError:
    number = "_local_scalar_dense" in str(func)
    return FakeValueError(
        f"A scan's tensors have shapes and no values, and this line needs {'one' if number else 'them'}.",
        **_lines(),
        it_asked_for="a number, or yes or no" if number else f"a shape that depends on values ({func})",
        instead="model.trace(...), which runs the model on its weights",
    )


def _lines() -> dict[str, str]:
    """The line that asked, of the block or the model; of the block, too, where that called a package which asked."""
    asks = _left(sys._getframe(1), _is_plumbing)
    facts = {"at": Place(asks.f_code, asks.f_lineno).quoted}
    if asks.f_code.co_filename.startswith(_INSTALLED):
        frame = _left(asks, lambda file: file.startswith(_INSTALLED) or _is_plumbing(file))
        if not frame.f_code.co_filename.startswith((_INSTALLED, PACKAGE, TORCH)):  # on the model's stack, there is none
            return {"you_wrote": Place(frame.f_code, frame.f_lineno).quoted, **facts}
    return facts


def _left(frame: FrameType, within: Callable[[str], bool]) -> FrameType:
    """The first frame from here outwards whose file is not one of those; the outermost, if all are."""
    while frame.f_back is not None and within(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def _is_plumbing(file: str) -> bool:
    return file.startswith((PACKAGE, TORCH)) or _WRAPPERS in file


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
        self._originals: dict[Any, nn.Module] | None = None
        _check_has_shapes(root)
        try:
            self.root, self._copies = fake_copy(root, self.mode, device)
        except Exception as error:
            raise ModelError(
                f"This {type(root).__name__} can't be scanned: it can't be copied ({type(error).__name__}: {error})."
            ) from error

    def original_of(self, part: nn.Module) -> nn.Module:
        """The module that this is the copy of; itself, if it is none."""
        if self._originals is None:
            self._originals = {self.copy_of(module): module for module in self._original.modules()}
        return self._originals.get(part, part)

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
