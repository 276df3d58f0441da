"""What a layer gives to what mixes its tokens, and to its MLP: the stream behind a norm, mostly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nnsight.anatomy.layout import Part
from nnsight.anatomy.trial import Call, Trial, same
from nnsight.core.tree import is_below

Givens = dict[Any, "Part | None"]  # with the module's path below its layer


def given_to(
    trial: Trial, layer: Call, stream: Part, parts: tuple[Part, ...], added: tuple[Part, ...], known: Givens
) -> Part | None:
    """What the module is given in which a part is computed, and nothing else: the outermost one.

    Args:
        trial: A recorded pass.
        layer: The layer's call.
        stream: The residual stream behind it.
        parts: Of what the layer adds, what is asked about; several are computed in modules of which each is given a
            value of its own.
        added: All that it adds.
        known: What was found of other layers. Those of one kind are looked at once.

    Returns:
        Where that value passes; None where there are several modules, or none that is given such a value.
    """
    if len(parts) != 1:
        return None
    below = len(layer.path)
    kinds = [(name, type(module)) for name, module in layer.module.named_modules()]
    key = (parts[0].path[below:], type(layer.module), *kinds)
    if key not in known:
        found = next(_leading_to(trial, layer, stream, parts[0], added), None)
        if found is not None:
            found = replace(found, path=found.path[below:], shared=trial.is_shared(found, stream))
        known[key] = found
    of_kind = known[key]
    return None if of_kind is None else replace(of_kind, path=f"{layer.path}{of_kind.path}")


def _leading_to(trial: Trial, layer: Call, stream: Part, part: Part, added: tuple[Part, ...]) -> Iterator[Part]:
    """Inputs of the stream's shape on which the part depends, and nothing else that the layer does.

    What is given to the modules around the part may be added in them, too: in BERT, the one around attention does so.
    """
    whole, value = trial.value(stream), trial.value(part)
    held = {other: trial.value(other) for other in added if other != part}
    for call in _in_question(trial, layer, part):
        for at, tensor in call.inputs:
            if not _is_stream(tensor, whole.shape):
                continue
            given = Part(call.path, "input", at, flat=tensor.ndim == 2)
            changed = {given: tensor + 1.0 + tensor.abs(), **held}
            leads_elsewhere = not same(trial.again({**changed, part: value}, stream), whole)
            if not leads_elsewhere and not same(trial.again(changed, part), value):
                yield given


def _in_question(trial: Trial, layer: Call, part: Part) -> Iterator[Call]:
    """The outermost module around the part, and then all others in the layer that have matrices, in order."""
    inside = [call for call in trial.calls.values() if call.path.startswith(f"{layer.path}.") and call.count == 1]
    inside.sort(key=lambda call: call.began)
    source = before_norms(trial, layer, trial.calls[part.path]).path
    around = [call for call in inside if is_below(source, call.path)]
    shape = trial.value(part).shape
    outermost = next((call for call in around if any(_is_stream(tensor, shape) for _, tensor in call.inputs)), None)
    if outermost is not None:
        yield outermost
    for call in inside:
        if call is not outermost and any(weight.ndim > 1 for weight in call.module.parameters()):
            yield call


def _is_stream(tensor: Tensor, shape: torch.Size) -> bool:
    """Whether it is of the stream's shape, or has its prompts and tokens on one axis."""
    return tensor.shape in (shape, (shape[0] * shape[1], shape[2]))


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
