"""What lies between the last layer and the logits: modules that are called one after the other, and arithmetic."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnsight.anatomy.layout import Part, Step
from nnsight.anatomy.trial import Call, Trial, leaves, ratio, same
from nnsight.errors import AnatomyError

_MOST_STEPS = 8


class Tail(NamedTuple):
    steps: tuple[Step, ...]
    logits: Part


def find_tail(trial: Trial, last: Part, layer: Call) -> Tail:
    """The steps from the last layer's output to the logits.

    Raises:
        AnatomyError: Something is done in between that is neither a module's call nor a scale or a soft cap.
    """
    at, logits = _logits(trial)
    value, steps = trial.value(last), list[Step]()
    calls = [call for call in [*trial.calls.values(), *trial.later] if call.began > layer.ended]
    while len(steps) < _MOST_STEPS:
        if (ending := _arithmetic(value, logits)) is not None:
            return Tail((*steps, *ending), Part("", "output", at))
        found = _next(value, calls)
        if found is None:
            break
        scale, call = found
        if scale != 1:
            steps.append(Step(None, scale=scale))
        if (several := _several(trial, call, logits)) is not None:
            return Tail((*steps, several), Part("", "output", at))
        steps.append(Step(call.path))
        value = call.outputs[0][1]
        calls = [other for other in calls if other.began > call.ended]
    done = ", ".join(f"`{step.path}`" for step in steps if step.path) or "the last layer"
    raise AnatomyError(f"What the model does between {done} and its logits is neither a module's call nor a scale.")


def _logits(trial: Trial) -> tuple[tuple[int | str, ...], Tensor]:
    """The logits: the first 3-D tensor of the output, behind a loss."""
    found = next(((at, tensor) for at, tensor in leaves(trial.output) if tensor.ndim == 3), None)
    if found is None:
        raise AnatomyError("This model returns no logits, [prompt, token, vocabulary].")
    return found


def _next(value: Tensor, calls: list[Call]) -> tuple[float, Call] | None:
    """The outermost module that is given this value, or a multiple of it, first."""
    for call in sorted(calls, key=lambda call: call.began):
        if not call.outputs or not call.inputs:
            continue
        given = call.inputs[0][1]
        if given.shape == value.shape and (scale := ratio(value, given)) is not None:
            return scale, call
    return None


def _several(trial: Trial, call: Call, logits: Tensor) -> Step | None:
    """A list of modules, this call's first, where all are given the same and their outputs together are the logits."""
    path = call.path.rpartition(".")[0]
    parent = trial.model.get_submodule(path)
    heads = [trial.calls.get(f"{path}.{name}") for name in parent._modules] if isinstance(parent, nn.ModuleList) else []
    outputs = [head.outputs[0][1] for head in heads if head is not None and same(head.inputs[0][1], call.inputs[0][1])]
    if len(outputs) < 2 or len(outputs) < len(heads):
        return None
    return Step(path, each=True) if same(torch.stack(outputs, dim=1).flatten(0, 1), logits) else None


def _arithmetic(value: Tensor, logits: Tensor) -> tuple[Step, ...] | None:
    """How the logits are made of a value of their shape: not at all, by a scale, by a soft cap."""
    if value.shape != logits.shape:
        return None
    if (scale := ratio(value, logits)) is not None:
        return () if scale == 1 else (Step(None, scale=scale),)
    cap = _cap(value.double(), logits.double())
    return None if cap is None else (Step(None, cap=cap),)


def _cap(value: Tensor, logits: Tensor) -> float | None:
    """The bound of a soft cap: from small values, where x - y is about x³ / (3 cap²), and then exactly."""
    low, high, cap = float(logits.abs().max()), 1e6, 0.0
    if not low or bool((logits.abs() > value.abs() * (1 + 1e-6)).any()):
        return None
    for _ in range(200):
        cap = (low * high) ** 0.5
        if float((cap * torch.tanh(value / cap)).abs().sum()) < float(logits.abs().sum()):
            low = cap
        else:
            high = cap
    return round(cap, 4) if same(cap * torch.tanh(value / cap), logits) else None
