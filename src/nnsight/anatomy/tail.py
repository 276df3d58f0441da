"""What lies between the last layer and the logits: modules that are called one after the other, and arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnsight.anatomy.layout import Part, Step
from nnsight.anatomy.tiny.leaves import configs
from nnsight.anatomy.trial import Call, Trial, leaves, ratio, same
from nnsight.core.spelling import quoted
from nnsight.errors import AnatomyError

_MOST_STEPS = 8


class Tail(NamedTuple):
    steps: tuple[Step, ...] | None
    logits: Part | None


def find_tail(trial: Trial, last: Part, layer: Call, *, is_needed: bool) -> Tail:
    """The steps from the last layer's output to the logits.

    Args:
        trial: A recorded pass.
        last: The last layer's output.
        layer: Its call.
        is_needed: Whether the model says tokens. One that classifies prompts makes no logits of each token.

    Raises:
        AnatomyError: Something is done in between that is neither a module's call nor a scale or a soft cap.
    """
    if is_needed:
        return _found(trial, last, layer)
    named = next((Part("", "output", at) for at, _ in leaves(trial.output) if at == ("logits",)), None)
    try:
        return _found(trial, last, layer) if named is not None else Tail(None, None)
    except AnatomyError:
        return Tail(None, named)


def _found(trial: Trial, last: Part, layer: Call) -> Tail:
    at, logits = _logits(trial)
    calls = [call for call in [*trial.calls.values(), *trial.later] if call.began > layer.ended]
    way = _Way(trial, logits)
    steps = way.from_(trial.value(last), sorted(calls, key=lambda call: call.began), ())
    if steps is None:
        done = quoted(step.path for step in way.furthest if step.path) or "the last layer"
        raise AnatomyError(f"What the model does between {done} and its logits is neither a module's call nor a scale.")
    numbers = {name: float(one.detach()) for name, one in trial.model.named_parameters() if one.numel() == 1}
    return Tail(tuple(_learned(step, numbers) for step in steps), Part("", "output", at))


def _learned(step: Step, numbers: Mapping[str, float]) -> Step:
    """The step, with the parameter by which it multiplies, if it is one."""
    fits = (name for name, one in numbers.items() if math.isclose(one, step.scale, rel_tol=1e-3))
    by = None if step.scale == 1 else next(fits, None)
    return step if by is None else replace(step, scale=1.0, by=by)


class _Way:
    """The way from a value to the logits: along the outermost modules first, and back where one leads elsewhere.

    A pooler is given what the head is given, and nothing follows from it.
    """

    def __init__(self, trial: Trial, logits: Tensor) -> None:
        self._trial, self._logits = trial, logits
        self.furthest: tuple[Step, ...] = ()

    def from_(self, value: Tensor, calls: list[Call], steps: tuple[Step, ...]) -> tuple[Step, ...] | None:
        """The steps to here and from here on; None where no way leads on."""
        if (ending := _arithmetic(value, self._logits)) is None:
            ending = _shifted(self._trial.model, value, self._logits)
        if ending is None:
            ending = _scaled_and_capped(self._trial.model, value, self._logits)
        if ending is not None:
            return (*steps, *ending)
        if len(steps) > len(self.furthest):
            self.furthest = steps
        if len(steps) >= _MOST_STEPS:
            return None
        for scale, call in _given(value, calls):
            before = steps if scale == 1 else (*steps, Step(None, scale=scale))
            if (several := _several(self._trial, call, self._logits)) is not None:
                return (*before, several)
            later = [other for other in calls if other.began > call.ended]
            found = self.from_(call.outputs[0][1], later, (*before, Step(call.path)))
            if found is not None:
                return found
        return None


def _logits(trial: Trial) -> tuple[tuple[int | str, ...], Tensor]:
    """The logits: the first 3-D tensor of the output, behind a loss."""
    found = next(((at, tensor) for at, tensor in leaves(trial.output) if tensor.ndim == 3), None)
    if found is None:
        raise AnatomyError("This model returns no logits, [prompt, token, vocabulary].")
    return found


def _given(value: Tensor, calls: list[Call]) -> Iterator[tuple[float, Call]]:
    """The modules that are given this value, or a multiple of it, in order."""
    for call in sorted(calls, key=lambda call: len(call.inputs) > 1):  # a head that is given more can't be called alone
        if not call.outputs or not call.inputs:
            continue
        given = call.inputs[0][1]
        for part in parts_of_length(value, given):
            if (scale := ratio(part, given)) is not None:
                yield scale, call
                break


def parts_of_length(value: Tensor, like: Tensor) -> list[Tensor]:
    """A value, or its first or last tokens, where there are fewer: the model put others beside its own."""
    if value.shape == like.shape:
        return [value]
    if value.ndim != 3 or like.ndim != 3 or value.shape[::2] != like.shape[::2] or value.shape[1] < like.shape[1]:
        return []
    return [value[:, : like.shape[1]], value[:, -like.shape[1] :]]


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


def _shifted(model: nn.Module, value: Tensor, logits: Tensor) -> tuple[Step, ...] | None:
    """A buffer that is added to a value of the logits' shape, as BART's kind has one."""
    buffers = [one for one in model.named_buffers() if one[1].shape[-1:] == logits.shape[-1:]]
    fits = (name for name, buffer in buffers if value.shape == logits.shape and same(value + buffer, logits))
    return next(((Step(None, bias=name),) for name in fits), None)


def _scaled_and_capped(model: Any, value: Tensor, logits: Tensor) -> tuple[Step, ...] | None:
    """Both, where the bound is one of the numbers of the model's config."""
    if value.shape != logits.shape:
        return None
    most = float(logits.abs().max())
    numbers = {one for inner in configs(model.config) for one in vars(inner).values() if isinstance(one, float)}
    for cap in sorted(one for one in numbers if one > most):
        scale = ratio(value.double(), cap * torch.atanh(logits.double() / cap))
        if scale is not None:
            return Step(None, scale=scale), Step(None, cap=cap)
    return None


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
