"""Finds the neurons of an MLP, by arithmetic on a small model of the same architecture.

The down projection is the module with a matrix whose output makes what the MLP adds; what it is given are the neurons'
activations. What the non-linearity is given is what, changed in one channel, changes the activations in that channel
alone, and not in proportion. What changes them in proportion is what the activation is multiplied with.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from nnsight.anatomy.layout import Layer, Part, Piece, inside
from nnsight.anatomy.mlps.inside import Matrix, Neurons
from nnsight.anatomy.trial import Call, Trial, ratio, same

_CHANNEL = 1
_BY = -2.0  # what a channel is multiplied with: both signs change, so that a ReLU is no proportion
_HALVES = (Piece(False), Piece(True), Piece(False, True), Piece(True, True))


def find_neurons(trial: Trial, layer: Layer) -> Neurons | str:
    """The inside of a layer's MLP, the widest where it has several; or why there is none."""
    found = [_of_part(trial, layer, part) for part in layer.mlp]
    neurons = [one for one in found if isinstance(one, Neurons)]
    if not neurons:
        return next(one for one in found if isinstance(one, str))
    return max(neurons, key=lambda one: trial.value(one.act).shape[-1])


def _of_part(trial: Trial, layer: Layer, part: Part) -> Neurons | str:
    into, _ = before_norms(trial, layer, part)
    value = trial.value(into)
    for call in sorted(calls_in(trial, layer), key=lambda call: -call.began):
        if not _has_matrix(call.module):
            continue
        out = part_of(call, "output")
        factor = ratio(trial.value(out), value) if call.outputs[0][1].numel() == value.numel() else None
        if factor is not None:
            return _with_pre(trial, layer, call, out, into, factor)
    return "what it adds is not the output of a module with a matrix, times a number"


def _with_pre(trial: Trial, layer: Layer, down: Call, out: Part, into: Part, factor: float) -> Neurons | str:
    act = part_of(down, "input")
    product, _ = before_norms(trial, layer, act)  # BitNet has a norm in front of its down projection
    calls = [call for call in calls_in(trial, layer) if call.ended < down.began]
    seen = _Seen(trial, product)
    modules = (part_of(call, "input") for call in reversed(calls) if not _has_matrix(call.module))
    outputs = [part for call in reversed(calls) if _has_matrix(call.module) for part in _outputs(trial, call)]
    kinds = {part: kind for part in outputs if (kind := seen.kind(part)) is not None}
    bent = [part for part, kind in kinds.items() if kind == "bent"]
    straight = [part for part, kind in kinds.items() if kind == "straight"]
    given = (part for part in modules if seen.kind(part) == "bent" and not _in_place(trial, part))
    pre = next(chain(given, bent), None)
    if pre is None:
        return f"what `{down.path}` is given is no non-linearity, neuron by neuron, of what a module has"
    made = [part for part in bent if same(trial.value(part), trial.value(pre))] or bent
    w_pre, w_up = (_matrix(trial, parts[0]) if parts else None for parts in (made, straight))
    w_in, w_gate = (w_up, w_pre) if straight else (w_pre, None)
    return Neurons(pre, act, product, out, into, factor, bool(straight), w_in, w_gate, _matrix(trial, out))


class _Seen:
    """What the product of the neurons does where something else is changed in one channel."""

    def __init__(self, trial: Trial, product: Part) -> None:
        self._trial, self._product = trial, product
        self._value = trial.value(product)

    def kind(self, part: Part) -> str | None:
        """How the product depends on it: channel by channel, "straight" (in proportion) or "bent"; None: otherwise."""
        trial, value = self._trial, self._value
        given = trial.value(part)
        if given.shape != value.shape or (part.path, part.port) == (self._product.path, self._product.port):
            return None
        new = given.clone()
        new[..., _CHANNEL] *= _BY
        made = trial.again({part: new}, self._product)
        others = torch.arange(value.shape[-1]) != _CHANNEL
        if not torch.equal(made[..., others], value[..., others]) or torch.equal(made, value):
            return None
        return "straight" if same(made[..., _CHANNEL], value[..., _CHANNEL] * _BY) else "bent"


def calls_in(trial: Trial, layer: Layer, *, leaves: bool = True) -> list[Call]:
    """The calls of the layer's modules that are called once, with one row for each token, in order."""
    rows = trial.value(layer.input).shape[:-1].numel()
    inner = [call for call in trial.calls.values() if call.path.startswith(f"{layer.path}.") and call.count == 1]
    inner = [call for call in inner if call.inputs and call.outputs and not (leaves and call.module._modules)]
    inner = [call for call in inner if rows_of(call.inputs[0][1]) == rows_of(call.outputs[0][1]) == rows]
    return sorted(inner, key=lambda call: call.began)


def rows_of(tensor: Tensor) -> int:
    """How many tokens there are, where the last axis is the channels."""
    return tensor.shape[:-1].numel()


def before_norms(trial: Trial, layer: Layer, part: Part) -> tuple[Part, str | None]:
    """What is given to the norm that makes this, or to the norm before that; and the last norm. The part, if none."""
    value, last = trial.value(part), None
    for call in reversed(calls_in(trial, layer)):
        if not is_norm(call.module, value.shape[-1]):
            continue
        given, made = part_of(call, "input"), part_of(call, "output")
        if trial.value(made).shape != value.shape or not same(trial.value(made), value):
            continue
        if not same(trial.value(given), value):
            part, last = given, call.path
            value = trial.value(part)
    return part, last


def is_norm(module: nn.Module, width: int) -> bool:
    """Whether its parameters are one number for each channel."""
    weights = list(module.parameters())
    return bool(weights) and all(weight.shape == (width,) for weight in weights)


def part_of(call: Call, port: str) -> Part:
    at, tensor = (call.inputs if port == "input" else call.outputs)[0]
    return Part(call.path, port, at, flat=tensor.ndim == 2)


def _outputs(trial: Trial, call: Call) -> Iterator[Part]:
    """A module's output, and its halves."""
    whole = part_of(call, "output")
    changes = (call.path, whole.at) in trial.changed
    for piece in (None, *_HALVES):
        yield Part(whole.path, "output", whole.at, changes=changes, flat=whole.flat, piece=piece)


def _in_place(trial: Trial, part: Part) -> bool:
    """Whether the module changes what it is given."""
    given: list[Tensor] = []
    changed: list[bool] = []

    def before(_: Any, args: Any, kwargs: Any) -> None:
        tensor = inside((args, kwargs), part.at)
        given[:] = tensor, tensor.clone()

    def after(*_: Any) -> None:
        changed.append(not torch.equal(*given))

    module = trial.model.get_submodule(part.path)
    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        trial.run()
    finally:
        for handle in handles:
            handle.remove()
    return any(changed)


def _has_matrix(module: nn.Module) -> bool:
    return any(weight.ndim > 1 for weight in module.parameters())


def _matrix(trial: Trial, part: Part) -> Matrix | None:
    """The weight with which a module makes this of what it is given."""
    call = trial.calls[part.path]
    weight = getattr(call.module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    n_in, n_out = call.inputs[0][1].shape[-1], call.outputs[0][1].shape[-1]
    if tuple(weight.shape) not in ((n_in, n_out), (n_out, n_in)):
        return None
    turned = not _multiplies(call, weight)
    return Matrix(part.path, turned, type(call.module), part.piece)


def _multiplies(call: Call, weight: Tensor) -> bool:
    """Whether the output is the input times this, but for a bias."""
    given, made = call.inputs[0][1].flatten(0, -2), call.outputs[0][1].flatten(0, -2)
    if weight.shape[0] != given.shape[-1]:
        return False
    rest = made - given @ weight.detach()
    return same(rest, rest[:1].expand_as(rest)) if float(rest.abs().max()) > 1e-5 else True
