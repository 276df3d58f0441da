"""What a call's inputs looked like, without holding them: enough to call a twin of the model on fake ones later."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch


class TensorSpec(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _spec_of(tensor: torch.Tensor, new: Any = tuple.__new__) -> TensorSpec:
    spec: TensorSpec = new(TensorSpec, (tensor.shape, tensor.dtype, tensor.device))  # without a Python call
    return spec


class Weak(NamedTuple):
    """A value of some other class, held as weakly as it lets us."""

    reference: Any


Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_PLAIN = (int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device)


def describe_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    return tuple([_describe(value) for value in args]), {name: _describe(value) for name, value in kwargs.items()}


def _describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _spec_of(value)
    if isinstance(value, _PLAIN):
        return value
    if type(value) in (list, tuple):
        return type(value)([_describe(item) for item in value])
    if type(value) is dict:
        return {key: _describe(item) for key, item in value.items()}
    try:
        return Weak(weakref.ref(value))
    except TypeError:
        return Weak(lambda: None)


def shape_of(value: Any) -> Any:
    """A note of a value for the receipt that holds no tensor: shape, dtype and device, through tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return _spec_of(value)
    if isinstance(value, (tuple, list)):
        return [shape_of(item) for item in value[:8]]
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in list(value.items())[:8]}
    return type(value).__name__


def show_shape(note: Any) -> str:
    """`[1, 10, 768] float32` of what `shape_of` noted."""
    if isinstance(note, TensorSpec):
        device = "" if note.device.type == "cpu" else f" {note.device}"
        return f"{list(note.shape)} {str(note.dtype).removeprefix('torch.')}{device}"
    if isinstance(note, list):
        return "(" + ", ".join(map(show_shape, note)) + ")"
    if isinstance(note, dict):
        return "{" + ", ".join(f"{key}: {show_shape(item)}" for key, item in note.items()) + "}"
    return str(note)
