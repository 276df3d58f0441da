"""What is checked besides, where an encoder reads and a decoder answers: its layers, and what crosses over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnsight.anatomy.added import INTERIOR
from nnsight.anatomy.halves import Half
from nnsight.anatomy.layout import Part
from nnsight.anatomy.proof import Check, distance
from nnsight.anatomy.proof import Trial as _Trial
from nnsight.anatomy.proof import close as _close
from nnsight.anatomy.tiny.inputs import reads_end
from nnsight.anatomy.uniform import Uniform
from nnsight.anatomy.values import read, write
from nnsight.anatomy.verify import _OF_LAYERS, _checked, _nudge
from nnsight.errors import NotOnThisLayerError

Results = Iterator[tuple[bool, str]]


def checks_of_halves(trial: _Trial) -> Iterator[Check]:
    """The checks of a model that has an encoder; none, where it has none."""
    if trial.uniform._layout.encoder is None:
        return
    reads = _Reads(trial.model, trial.uniform)
    for check in (*_OF_LAYERS, _padded):
        found = _checked(check, reads)
        yield Check(f"Encoder: {found.name[0].lower()}{found.name[1:]}", found.passed, found.detail)
    for crossing in (_read_by_cross_attention, _patterns, _mixes_values, _reach):
        yield _checked(crossing, trial)


class _Names(NamedTuple):
    """A half, in the place of the whole model."""

    half: Half
    whole: Uniform

    @property
    def layers(self) -> Any:
        return self.half.layers

    @property
    def raw(self) -> Any:
        return self.whole.raw

    @property
    def logits(self) -> Tensor:
        return self.whole.logits


class _Traced(NamedTuple):
    uniform: _Names
    tracer: Any

    @property
    def model(self) -> Any:
        return self.tracer.model

    @property
    def result(self) -> Any:
        return self.tracer.result


class _Reads(_Trial):
    """The model, with its encoder's layers for its layers."""

    reads = True

    def __init__(self, model: Any, uniform: Any) -> None:
        super().__init__(model, uniform)
        self.uniform: Any = _Names(uniform.encoder, uniform)

    @contextmanager
    def trace(self) -> Iterator[Any]:
        with super().trace() as tracer:
            yield _Traced(_Names(tracer.uniform.encoder, tracer.uniform), tracer)


def _padded(trial: _Trial) -> Results:
    """A padded prompt is read as alone."""
    if trial.ids.is_floating_point() or reads_end(trial.model._module):
        return
    prompts = [trial.ids[0].tolist(), trial.ids[1, :4].tolist()]
    with trial.model.trace(prompts, **trial.others) as tracer:
        states = tracer.uniform.encoder.output
    for i, prompt in enumerate(prompts):
        with trial.model.trace([prompt], **trial.alone(i)) as tracer:
            own = tracer.uniform.encoder.output
        yield _close(states[i : i + 1, : len(prompt)], own, f"prompt {i}: ")


def _read_by_cross_attention(trial: _Trial) -> Results:
    """Only cross-attention reads the encoder."""
    for i in trial.some("input"):
        with trial.trace() as tracer:
            states = tracer.uniform.encoder.output.clone()
            stream = tracer.uniform.layers[i].input.clone()
            made = tracer.uniform.layers[i].made
            values = {one: read(tracer.model, one).clone() for one in made if isinstance(one, Part)}
        node = trial.uniform.layers[i]
        if not node.has("cross_attn"):
            continue
        for part, value in values.items():
            with trial.trace() as tracer:
                tracer.uniform.encoder.output = states + 1 + states.abs()
                tracer.uniform.layers[i].input = stream
                for other, held in values.items():  # in the order in which the model comes by
                    if other == part:
                        break
                    write(tracer.model, other, held)
                now = read(tracer.model, part)
            reads = not _close(now, value, "")[0]
            crosses, mixes = part in node.cross_attn.parts, part in (node.attn.parts if node.has("attn") else ())
            yield reads is crosses or mixes, f"layer {i}: `{part}` {'reads' if reads else 'does not read'} the encoder"


def _patterns(trial: _Trial) -> Results:
    """Cross-attention's patterns sum to one."""
    for i in trial.some("cross_attn.pattern"):
        with trial.trace() as tracer:
            n_read = tracer.uniform.encoder.output.shape[1]
            pattern = tracer.uniform.layers[i].cross_attn.pattern
        off = float((pattern.float().sum(-1) - 1).abs().max())
        told = f"layer {i}: sums over the encoder's {n_read} tokens off by {off:.1e}"
        yield off < 1e-3 and pattern.shape[-1] == n_read, told


def _mixes_values(trial: _Trial) -> Results:
    """Cross-attention's pattern times v is z."""
    for i in trial.some("cross_attn.pattern"):
        v, pattern, z = (_inside(trial, i, name) for name in ("v", "pattern", "z"))
        v = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
        yield _close(torch.einsum("phqk,pkhd->pqhd", pattern.to(v.dtype), v), z, f"layer {i}: ")


def _inside(trial: _Trial, layer: int, name: str) -> Tensor:
    with trial.trace() as tracer:
        value: Tensor = getattr(tracer.uniform.layers[layer].cross_attn, name)
    return value


def _reach(trial: _Trial) -> Results:
    """Writes that cross over reach the logits."""
    count = 0

    def nudge(name: str, i: int, uniform: Uniform) -> None:
        if name == "encoder":
            uniform.encoder.output = uniform.encoder.output + 0.5
        else:
            _nudge(uniform.layers[i], f"cross_attn.{name}")

    for name in ("encoder", "output", *INTERIOR):
        for i in [0] if name == "encoder" else trial.some(f"cross_attn.{name}"):
            try:
                logits = trial.with_(partial(nudge, name, i))
            except NotOnThisLayerError:
                continue
            count += 1
            holds = distance(logits, trial.logits) > 0
            yield holds, f"{count} writes" if holds else f"{name} of layer {i} did not"
