"""What is checked of the inside of attention: its pattern, and what that makes of values."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nnsight.anatomy.layer import LayerNode
from nnsight.anatomy.proof import Trial, close, distance
from nnsight.anatomy.tiny.inputs import reads_end


def _is_causal(trial: Trial) -> bool:
    if "inputs_embeds" in trial.others or trial.reads or trial.ids.is_floating_point():
        return False
    if trial.ids.ndim != 2 or reads_end(trial.model._module):
        return False
    given, others = trial.ids, dict(trial.others)
    ids = others.get("decoder_input_ids", given).clone()
    ids[:, -1] = torch.where(ids[:, -1] == ids[0, 0], ids[0, 1], ids[0, 0])
    if "decoder_input_ids" in others:
        others["decoder_input_ids"] = ids
    else:
        given = ids
    has_stream = trial.uniform.layers[-1].has("output")
    with trial.trace() as tracer:
        before = tracer.uniform.layers[-1].output if has_stream else trial.answer(tracer)
    with trial.model.trace(given, **others) as tracer:
        behind = tracer.uniform.layers[-1].output if has_stream else trial.answer(tracer)
    return distance(behind[:, :-1], before[:, :-1]) < 1e-5


def sum_to_one(trial: Trial) -> Iterator[tuple[bool, str]]:
    """Patterns sum to one, and look back."""
    causal = _is_causal(trial)
    for i in trial.some("attn.pattern"):
        with trial.trace() as tracer:
            pattern = tracer.uniform.layers[i].attn.pattern
        sums, sinks = pattern.float().sum(-1), _has_sinks(trial.uniform.layers[i])
        told = "with sinks, " if sinks else ""
        at_most = float((sums - 1).abs().max() if not sinks else (sums - 1).clamp(min=0).max())
        yield at_most < max(1e-3, torch.finfo(pattern.dtype).eps), f"layer {i}: {told}sums off by {at_most:.1e}"
        if causal:
            if "decoder_input_ids" in trial.others:  # the encoder's tokens may stand behind the decoder's own
                pattern = pattern[..., : pattern.shape[-2]]
            ahead = float(pattern.float().triu(pattern.shape[-1] - pattern.shape[-2] + 1).abs().max())
            yield ahead == 0, f"layer {i}: {told}{ahead:.1e} ahead"


def _has_sinks(layer: LayerNode) -> bool:
    module = layer.attn.module._module
    return any("sink" in name for name, _ in module.named_parameters(recurse=False))


def mix_values(trial: Trial) -> Iterator[tuple[bool, str]]:
    """Pattern times v is z."""
    for i in trial.some("attn.pattern"):
        v, pattern, z = (trial.inside(i, name) for name in ("v", "pattern", "z"))
        v = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
        mixed = torch.einsum("phqk,pkhd->pqhd", pattern.to(v.dtype), v)
        if _has_sinks(trial.uniform.layers[i]) and not close(mixed, z, "")[0]:
            left = (mixed * z).sum(-1, keepdim=True) / (mixed * mixed).sum(-1, keepdim=True)
            told = f"layer {i}: its sinks leave {float(left.max()):.2f} at most"
            yield bool((left <= 1).all() and (left >= 0).all()), told
            mixed = mixed * left
        yield close(mixed, z, f"layer {i}: ")
