"""What a layer gives to what mixes its tokens, and to its MLP: the stream behind a norm, mostly."""

from __future__ import annotations

import torch

from nnsight.anatomy.layout import Part
from nnsight.anatomy.trial import Call, Trial, same


def given_to(trial: Trial, layer: Call, parts: tuple[Part, ...], stream: torch.Size) -> Part | None:
    """The first tensor of the stream's shape that the outermost module is given in which this is computed.

    Args:
        trial: A recorded pass.
        layer: The layer's call.
        parts: What it adds; several are computed in modules of which each is given a value of its own.
        stream: The shape of the residual stream.

    Returns:
        Where that value passes; None where there are several modules, or none that is given such a value.
    """
    if len(parts) != 1:
        return None
    source = before_norms(trial, layer, trial.calls[parts[0].path])
    names = source.path[len(layer.path) + 1 :].split(".")
    for depth in range(1, len(names) + 1):
        call = trial.calls.get(".".join([layer.path, *names[:depth]]))
        if call is not None and call.count == 1:
            for at, tensor in call.inputs:
                if tensor.shape == stream:
                    return call.part("input", at)
    return None


def before_norms(trial: Trial, layer: Call, call: Call) -> Call:
    """The module whose output a norm is given, where the part is what that returns."""
    inside = [other for other in trial.calls.values() if other.path.startswith(f"{layer.path}.")]
    while call.inputs and all(weight.ndim < 2 for weight in call.module.parameters()):
        earlier = [other for other in inside if other.ended < call.began and _returned(other, call)]
        if not earlier:
            break
        call = max(earlier, key=lambda other: other.ended)
    return call


def _returned(call: Call, following: Call) -> bool:
    return any(same(tensor, following.inputs[0][1]) for _, tensor in call.outputs)
