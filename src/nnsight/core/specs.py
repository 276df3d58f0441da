"""What a call's inputs looked like, without holding them: enough to call a twin of the model on fake ones later."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from nnsight.core.hidden import Hidden
from nnsight.core.values import DEEPEST, mapped


class TensorSpec(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def spec_of(tensor: torch.Tensor, new: Any = tuple.__new__) -> TensorSpec:
    try:
        spec: TensorSpec = new(TensorSpec, (tensor.shape, tensor.dtype, tensor.device))  # without a Python call
    except RuntimeError:
        spec = TensorSpec(_nested_shape(tensor), tensor.dtype, tensor.device)
    return spec


def _nested_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape of a nested tensor, which has no `shape`; -1 where its rows differ."""
    sizes: torch.Tensor = tensor._nested_tensor_size()  # [row, axis]
    rows, *axes = len(sizes), *sizes.T.tolist()
    return torch.Size([rows, *(axis[0] if len({*axis}) == 1 else -1 for axis in axes)])


class Weak(NamedTuple):
    """A value of some other class, held as weakly as it lets us."""

    reference: Any
    kind: str


Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_PLAIN = (int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device)


def describe_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    return tuple([_describe(value) for value in args]), {name: _describe(value) for name, value in kwargs.items()}


def _describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return spec_of(value)
    if isinstance(value, _PLAIN):
        return value
    if (new := mapped(value, lambda _, item: _describe(item))) is not None:
        return new
    try:
        return Weak(weakref.ref(value), type(value).__name__)
    except TypeError:
        return Weak(lambda: None, type(value).__name__)


def specs_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], TensorSpec]]:
    """The tensors in what `describe_inputs` made, with their paths, through tuples, lists and dicts."""
    if isinstance(value, TensorSpec):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from specs_in(item, (*path, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from specs_in(item, (*path, key))


def shape_of(value: Any, depth: int = 0) -> Any:
    """A note of a value for the receipt that holds no tensor: shape, dtype and device, through tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return spec_of(value)
    if isinstance(value, (tuple, list)) and depth < DEEPEST:
        return [shape_of(item, depth + 1) for item in value[:8]]
    if isinstance(value, dict) and depth < DEEPEST:
        return {key: shape_of(item, depth + 1) for key, item in list(value.items())[:8]}
    return value._kind if isinstance(value, Hidden) else type(value).__name__


def show_shape(note: Any, on_cpu: str = "") -> str:
    """`[1, 10, 768] float32` of what `shape_of` noted; `on_cpu`: what is said of a tensor that is on the CPU."""
    if isinstance(note, TensorSpec):
        device = on_cpu if note.device.type == "cpu" else f" {note.device}"
        return f"{list(note.shape)} {str(note.dtype).removeprefix('torch.')}{device}"
    if isinstance(note, list):
        return "(" + ", ".join(show_shape(item, on_cpu) for item in note) + ")"
    if isinstance(note, dict):
        return "{" + ", ".join(f"{key}: {show_shape(item, on_cpu)}" for key, item in note.items()) + "}"
    return str(note)


def show_both(one: Any, other: Any) -> tuple[str, str]:
    """Two notes that are to be compared, with their devices where any is not the CPU."""
    on_cpu = " cpu" if any(spec.device.type != "cpu" for _, spec in specs_in([one, other])) else ""
    return show_shape(one, on_cpu), show_shape(other, on_cpu)
