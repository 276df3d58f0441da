"""Finds the layers of a model: the list of modules of which each is given what the one before returned."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import nn

from nnsight.anatomy.layout import Place
from nnsight.anatomy.tiny.inputs import has_encoder
from nnsight.anatomy.trial import Call, Trial
from nnsight.errors import AnatomyError


class Stack(NamedTuple):
    """The layers' calls, and where the residual stream is in what they are given and return."""

    calls: list[Call]
    input: Place
    output: Place


def find_stacks(trial: Trial) -> tuple[Stack, Stack | None]:
    """The layers, and those of an encoder that reads for them: what is called last, and the longest before that.

    Raises:
        AnatomyError: There is no such list.
    """
    found, alone = _lists(trial)
    if not has_encoder(trial.model):
        return _longest(trial, found, alone), None
    lists = {**alone, **found}
    outermost = [one for path, one in lists.items() if not any(path.startswith(f"{other}.") for other in lists)]
    if not outermost:
        raise _no_layers(trial)
    answers = max(outermost, key=lambda stack: stack.calls[0].began)
    before = [stack for stack in outermost if stack.calls[-1].ended < answers.calls[0].began]
    return answers, max(before, key=lambda stack: len(stack.calls), default=None)


def _longest(trial: Trial, found: dict[str, Stack], alone: dict[str, Stack]) -> Stack:
    """The longest list of modules that hand something on, outermost first; else the calls of modules that are called
    again and again; else the first list of one module.
    """
    if found:
        return max(found.values(), key=lambda stack: len(stack.calls))
    again = _called_again(trial)
    if again is None and not alone:
        raise _no_layers(trial)
    return next(iter(alone.values())) if again is None else again


def _called_again(trial: Trial) -> Stack | None:
    """The longest row of calls of modules of one class, some of which are called more than once: ALBERT's layer.

    Of several as long, the innermost, which the others call.
    """
    every = sorted([*trial.calls.values(), *trial.later], key=lambda call: call.began)
    again = dict.fromkeys(type(call.module) for call in trial.calls.values() if call.count > 1 and call.module._modules)
    found: Stack | None = None
    for kind in again:
        calls = [call for call in every if type(call.module) is kind]
        link = _link(calls)
        if link is not None and (found is None or len(calls) >= len(found.calls)):
            found = Stack(calls, *link)
    return found


def _no_layers(trial: Trial) -> AnatomyError:
    """Also for modules that are called again with something else."""
    what = "This model has no list of layers of which each is given what the one before returned."
    again = [call for call in trial.calls.values() if call.count > 1 and call.module._modules]
    if not again:
        return AnatomyError(what)
    module = min(again, key=lambda call: call.path.count("."))
    return AnatomyError(
        f"{what} One module is called {module.count} times instead, and is given something else than it returned.",
        module=f"`{module.path}`",
        instead=f"model.get({module.path!r}).output, and .next() for the call after it",
    )


def find_several(trial: Trial) -> Stack | None:
    """The layers where what they hand on has one axis more than a residual stream: hyper-connections."""
    for path, module in trial.model.named_modules():
        if isinstance(module, nn.ModuleList):
            calls = [trial.calls[name] for child in module._modules if (name := f"{path}.{child}") in trial.calls]
            if len(calls) > 1 and all(call.count == 1 for call in calls) and (link := _link(calls, 4)) is not None:
                return Stack(calls, *link)
    return None


def _lists(trial: Trial) -> tuple[dict[str, Stack], dict[str, Stack]]:
    """The lists of modules that hand something on, by path, and those of one module."""
    found: dict[str, Stack] = {}
    alone: dict[str, Stack] = {}
    for path, module in trial.model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            continue
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        calls = [trial.calls[name] for child in module._modules if (name := f"{path}.{child}") in trial.calls]
        if isinstance(module, nn.Sequential):
            calls = _between_ends(calls)
        if len(calls) > 1 and all(call.count == 1 for call in calls) and (link := _link(calls)) is not None:
            found[path] = Stack(calls, *link)
        if len(calls) == len(module._modules) == 1 and calls[0].count == 1 and (link := _through(calls[0])) is not None:
            alone[path] = Stack(calls, *link)
    return found, alone


def _between_ends(calls: list[Call]) -> list[Call]:
    """Without what stands in one row with the layers: an embedding before them, a norm and an unembedding behind."""
    whole = [at for at, call in enumerate(calls) if call.module._modules]
    return calls[whole[0] : whole[-1] + 1] if whole else calls


def _link(calls: list[Call], n_axes: int = 3) -> tuple[Place, Place] | None:
    """Where in a layer's inputs that is which the one before returned, and where in its output it is."""
    first, second = calls[0], calls[1]
    for (out_at, out), (in_at, into) in itertools.product(first.outputs, second.inputs):
        if out.ndim != n_axes or not torch.equal(out, into):
            continue
        if all(_hands_on(one, following, out_at, in_at) for one, following in itertools.pairwise(calls)):
            return in_at, out_at
    return None


def _through(call: Call) -> tuple[Place, Place] | None:
    """The same for a layer that stands alone: the first tensor that it is given, and returns another for."""
    for (in_at, into), (out_at, out) in itertools.product(call.inputs, call.outputs):
        if out.ndim == 3 and out.shape == into.shape and not torch.equal(out, into):
            return in_at, out_at
    return None


def _hands_on(one: Call, following: Call, out_at: Place, in_at: Place) -> bool:
    """Whether a layer is given what the one before returned, which is another value of the same shape than it got."""
    out, into = dict(one.outputs).get(out_at), dict(following.inputs).get(in_at)
    if out is None or into is None or out.shape != into.shape or not torch.equal(out, into):
        return False
    before = dict(one.inputs).get(in_at)
    return before is None or (before.shape == out.shape and not torch.equal(before, out))
