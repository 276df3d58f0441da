"""Proof by numbers of what is inside MLPs and mixtures of experts: checks that `nnsight.verify` makes too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnsight.anatomy.layer import LayerNode
from nnsight.anatomy.mlps.inside import Mixture, Neurons
from nnsight.anatomy.parts import factor_of, module_at
from nnsight.anatomy.proof import Results, Trial, close
from nnsight.anatomy.values import read

# What is written, each in a run of its own, in "each write reaches the logits".
WRITTEN = ("mlp.pre", "mlp.act", "mlp.router_logits", "mlp.chosen", "mlp.routing_weights", "mlp.experts", "mlp.shared")
_CHANNEL, _BY = 1, -2.0
_FAR = 4.0  # from zero, near which what bends is all but straight


def _neurons(layer: LayerNode) -> Neurons:
    found = layer.mlp.inside.neurons
    assert found is not None
    return found


def _mixture(layer: LayerNode) -> Mixture:
    found = layer.mlp.inside.mixture
    assert found is not None
    return found


def _down(trial: Trial) -> Results:
    """Act through down projection is mlp.output."""
    for i in trial.some("mlp.act"):
        layer = trial.uniform.layers[i]
        neurons, parts = _neurons(layer), layer.mlp.parts
        part = parts[0] if len(parts) == 1 else next(one for one in parts if one.path == neurons.into.path)
        with trial.trace() as tracer:
            act = tracer.uniform.layers[i].mlp.act.clone()
            output = read(tracer.uniform.layers[i]._root, part)
        down: Any = module_at(trial.uniform.raw, neurons.act.path)
        made = down(act)
        if neurons.w_out is not None and neurons.w_out.is_plain(trial.uniform.raw._module):
            yield close(act @ layer.mlp.W_out, made - down(torch.zeros_like(act)), f"layer {i}: W_out, ")
        made, words = (made * neurons.factor).reshape(output.shape), ""
        if neurons.into.port == "input":
            norm: Any = module_at(trial.uniform.raw, neurons.into.path)
            made, words = norm(made), f"through `{neurons.into.path}`, "
        yield close(made * factor_of(trial.uniform.raw, part), output, f"layer {i}: {words}")


def _bends(trial: Trial) -> Results:
    """Act is pre through the non-linearity."""
    for i in trial.some("mlp.pre"):
        product = _neurons(trial.uniform.layers[i]).product
        found = []
        for number in (_FAR, _BY * _FAR):
            with trial.trace() as tracer:
                pre = tracer.uniform.layers[i].mlp.pre.clone()
                pre[..., _CHANNEL] = number
                tracer.uniform.layers[i].mlp.pre = pre
                found.append(read(tracer.uniform.layers[i]._root, product).clone())
        before, after = found
        others = torch.arange(before.shape[-1], device=before.device) != _CHANNEL
        yield torch.equal(after[..., others], before[..., others]), f"layer {i}: other neurons are the same"
        changed, in_proportion = after[..., _CHANNEL], before[..., _CHANNEL] * _BY
        bent = not torch.equal(changed, before[..., _CHANNEL]) and not close(changed, in_proportion, "")[0]
        yield bent, f"layer {i}: {'its own is, and not in proportion' if bent else 'its own is not, or in proportion'}"


def _experts_add_up(trial: Trial) -> Results:
    """Experts and shared add up to mlp.output."""
    for i in trial.some("mlp.experts"):
        mixture = _mixture(trial.uniform.layers[i])
        with trial.trace() as tracer:
            layer = tracer.uniform.layers[i]
            used = layer.mlp.chosen.unique().tolist() if layer.has("mlp.chosen") else range(len(layer.mlp.experts))
            total = sum(layer.mlp.experts[number].output for number in used)
            output = layer.mlp.output if mixture.norm is None else read(layer._root, mixture.into)
        if mixture.shared:
            with trial.trace() as tracer:
                total = total + tracer.uniform.layers[i].mlp.shared.output
        count = len(trial.uniform.layers[i].mlp.experts)
        words = "" if mixture.norm is None else f", given to `{mixture.norm}`"
        yield close(total, output, f"layer {i}: {count} experts{words}, ")


def _neurons_of_experts(trial: Trial) -> Results:
    """An expert's act makes its output."""
    for i in trial.some("mlp.experts.0.act"):
        mixture = _mixture(trial.uniform.layers[i])
        with trial.trace() as tracer:
            mlp = tracer.uniform.layers[i].mlp
            if mixture.is_stacked:  # each has every token, times a score before it
                number, weights = _largest(mlp)
            else:
                number = _most_used(trial.uniform.layers[i], mlp.chosen)
                weights = (mlp.routing_weights * (mlp.chosen == number)).sum(-1)
            act, output = mlp.experts[number].act.clone(), mlp.experts[number].output.clone()
        goes = weights != 0
        changed = trial.with_(lambda uniform, i=i, number=number: _double(uniform.layers[i], number))  # type: ignore[misc]
        yield not torch.equal(changed, trial.logits), f"layer {i}, expert {number}: a write does not reach the logits"
        yield from _expert_bends(trial, i, number, goes)
        yield not bool(act[~goes].any()), f"layer {i}: other tokens have none"
        if trial.uniform.layers[i].has(f"mlp.experts.{number}.W_out"):
            made = act[goes] @ trial.uniform.layers[i].mlp.experts[number].W_out
            bias = (output[goes] / (mixture.factor * weights[goes, None]) - made).median(0).values
            words = "" if close(made + bias, made, "")[0] else ", one bias for all"
            made = (made + (bias if words else 0)) * weights[goes, None] * mixture.factor
            told = "" if mixture.is_stacked else "times its weight"
            yield close(made, output[goes], f"layer {i}, expert {number}: {told}{words}, ".replace(": ,", ":"))


def _most_used(layer: LayerNode, chosen: Tensor) -> int:
    numbers, counts = chosen.unique(return_counts=True)
    used: list[int] = numbers[counts.argsort(descending=True)].tolist()
    return next(number for number in used if layer.has(f"mlp.experts.{number}.act"))


def _largest(mlp: Any) -> tuple[int, Tensor]:
    """The expert that adds something to most tokens, and which these are, as weights of 1 and 0."""
    adds = [expert.output.any(-1).float() for expert in mlp.experts]
    number = max(range(len(adds)), key=lambda at: float(adds[at].sum()))
    return number, adds[number]


def _double(layer: LayerNode, number: int) -> None:
    layer.mlp.experts[number].act *= -2


def _expert_bends(trial: Trial, i: int, number: int, goes: Tensor) -> Results:
    """Whether act is pre through the non-linearity, for each neuron alone."""
    if not trial.uniform.layers[i].has(f"mlp.experts.{number}.pre"):
        return
    acts = []
    for value in (_FAR, _BY * _FAR):
        with trial.trace() as tracer:
            expert = tracer.uniform.layers[i].mlp.experts[number]
            pre = expert.pre.clone()
            pre[..., _CHANNEL] = value * goes
            expert.pre = pre
            acts.append(expert.act[goes].clone())
    others = torch.arange(acts[0].shape[-1]) != _CHANNEL
    yield torch.equal(acts[0][:, others], acts[1][:, others]), f"layer {i}, expert {number}: other neurons are the same"
    before, after = (one[:, _CHANNEL] for one in acts)
    bent = not torch.equal(after, before) and not close(after, before * _BY, "")[0]
    yield bent, f"layer {i}, expert {number}: act is {'not ' * (not bent)}pre through a non-linearity"


def _chosen_are_largest(trial: Trial) -> Results:
    """Chosen experts have the largest logits."""
    for i in (i for i in trial.some("mlp.router_logits") if trial.uniform.layers[i].has("mlp.chosen")):
        logits, chosen = _routing(trial, i)
        if _is_top(logits, chosen):
            yield True, f"layer {i}: {chosen.shape[-1]} of {logits.shape[-1]}"
        elif _is_plain(trial, i, logits, chosen):
            yield False, f"layer {i}: others are chosen"
        else:
            more, fewer = (_count_going(trial, i, logits, raised) for raised in (True, False))
            told = f"{more} tokens go to an expert whose logits are raised, {fewer} where they are lowered"
            yield more > fewer, f"layer {i}: not alone: a bias, or groups; {told}"


def _routing(trial: Trial, i: int, new: Tensor | None = None) -> tuple[Tensor, Tensor]:
    with trial.trace() as tracer:
        mlp = tracer.uniform.layers[i].mlp
        if new is not None:
            mlp.router_logits = new
        return mlp.router_logits.clone(), mlp.chosen.clone()


def _is_top(logits: Tensor, chosen: Tensor) -> bool:
    top = logits.topk(chosen.shape[-1], dim=-1).indices
    return torch.equal(top.sort(-1).values, chosen.to(top.dtype).sort(-1).values)


def _is_plain(trial: Trial, i: int, logits: Tensor, chosen: Tensor) -> bool:
    """Whether experts are chosen by their logits alone: no bias and no group is given to any of them.

    Exchanging the logits of two experts, and of all, exchanges the experts then.
    """
    turned = logits.roll(1, -1)
    _, after = _routing(trial, i, turned)
    moved = (chosen + 1) % logits.shape[-1]
    return torch.equal(after.sort(-1).values, moved.to(after.dtype).sort(-1).values)


def _count_going(trial: Trial, i: int, logits: Tensor, raised: bool) -> int:
    """How many tokens go to the last expert, where its logits are above all others', or below."""
    new, most = logits.clone(), 2 * float(logits.abs().max()) + 1
    new[..., -1] = most if raised else -most
    _, chosen = _routing(trial, i, new)
    return int((chosen == logits.shape[-1] - 1).sum())


def nudge(layer: LayerNode, name: str) -> bool:
    """Changes what is no tensor of numbers that can be added to. Whether it was such a name."""
    mlp = layer.mlp
    if name == "mlp.chosen":
        mlp.chosen = (mlp.chosen + 1) % len(mlp.experts)
    elif name == "mlp.experts":
        expert = mlp.experts[0]
        expert.output = expert.output * 2 + 1
    elif name == "mlp.shared":
        mlp.shared.output = mlp.shared.output * 2 + 1
    else:
        return False
    return True


def has_choice(layer: LayerNode, name: str) -> bool:
    """Whether a write can make a difference: with one expert, routing to it can't."""
    return name not in ("mlp.router_logits", "mlp.chosen") or len(layer.mlp.experts) > 1


def write_back(layer: LayerNode, name: str) -> None:
    """Assigns what was read: all inside the MLP, "inside", or what the experts share, "shared"."""
    mlp: Any = layer.mlp
    if name == "shared":
        if layer.has("mlp.shared"):
            mlp.shared.output = mlp.shared.output
        return
    for one in ("pre", "act", "router_logits", "chosen", "routing_weights"):
        if layer.has(f"mlp.{one}"):
            setattr(mlp, one, getattr(mlp, one))
    if layer.has("mlp.experts"):
        for expert in list(mlp.experts)[:4]:
            for one in ("pre", "act", "output"):
                if one == "output" or layer.has(f"mlp.experts.{expert.number}.{one}"):
                    setattr(expert, one, getattr(expert, one))


CHECKS = (_down, _bends, _experts_add_up, _neurons_of_experts, _chosen_are_largest)
