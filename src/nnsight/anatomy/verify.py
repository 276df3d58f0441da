"""Proof of the uniform names by numbers: `nnsight.verify(model)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnsight.anatomy.added import INTERIOR
from nnsight.anatomy.heads.checks import (
    make_what_attention_is_given,
    make_what_attention_returns,
    write_results_back,
)
from nnsight.anatomy.layer import LayerNode
from nnsight.anatomy.layout import Part, Stretch
from nnsight.anatomy.mlps import checks as of_mlps
from nnsight.anatomy.proof import Check, Report, distance
from nnsight.anatomy.proof import Trial as _Trial
from nnsight.anatomy.proof import close as _close
from nnsight.anatomy.tail import parts_of_length
from nnsight.anatomy.uniform import Uniform
from nnsight.anatomy.values import read, write
from nnsight.anatomy.verify_padded import as_alone
from nnsight.anatomy.verify_patterns import mix_values, sum_to_one
from nnsight.errors import Error, InputError, NotOnThisLayerError

if TYPE_CHECKING:
    from nnsight.models.transformers_model import TransformersModel

__all__ = ["Check", "Report", "distance", "verify"]


def verify(model: TransformersModel) -> Report:
    """Checks by numbers that the uniform names of a model mean what they say, on two prompts, or images.

    Its forward passes run as they are, on its own weights. Values are compared to within 1e-4 of the largest (in
    float32; 32 units of rounding in a coarser dtype), and bit for bit where the model only hands them on.

    Args:
        model: A `LanguageModel`, or another `TransformersModel`.

    Returns:
        A report that is true when every check holds, and prints a line for each.
    """
    from nnsight.models.transformers_model import TransformersModel

    if not isinstance(model, TransformersModel):
        raise InputError(
            f"`verify` checks the uniform names of a LanguageModel, or a TransformersModel, not of a "
            f"{type(model).__name__}."
        )
    name = f"{type(model._module).__name__}, {model.repo_id or 'given as a module'}"
    try:
        layout = model.uniform
    except Error as error:
        return Report(name, (Check("the layout is found", False, _first_line(error)),))
    trial = _Trial(model, layout)
    if (steady := _checked(_steady, trial)).passed is False:
        return Report(name, (steady,))
    from nnsight.anatomy.verify_halves import checks_of_halves

    return Report(name, (*(_checked(check, trial) for check in _CHECKS), *checks_of_halves(trial)))


def _steady(trial: _Trial) -> Iterator[tuple[bool, str]]:
    """Two passes give the same."""
    with trial.trace() as tracer:
        again = trial.answer(tracer)
    training = trial.model.training
    why = "it is in training mode, with dropout: model.eval()" if training else "it has randomness of its own"
    yield torch.equal(again, trial.logits), why


def _first_line(error: Exception) -> str:
    facts = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(facts[:2])[:200]


def _checked(check: Callable[[_Trial], Iterator[tuple[bool, str]]], trial: _Trial) -> Check:
    name = (check.__doc__ or "").rstrip(".")
    try:
        with torch.no_grad():
            results = list(check(trial))
    except NotOnThisLayerError as error:
        return Check(name, None, _first_line(error))
    except Exception as error:  # noqa: BLE001  whatever goes wrong in a model is what the report is for
        return Check(name, False, f"{type(error).__name__}: {_first_line(error)}"[:200])
    failed = next((detail for holds, detail in results if not holds), None)
    if failed is not None:
        return Check(name, False, failed)
    return Check(name, True, results[-1][1]) if results else Check(name, None, "there is none")


def _hand_on(trial: _Trial) -> Iterator[tuple[bool, str]]:
    """A layer's output is the next one's input."""
    outputs, inputs = [], []
    with trial.trace() as tracer:
        for layer in tracer.uniform.layers:
            inputs.append(layer.input)
            outputs.append(layer.output)
    for i, (out, into) in enumerate(zip(outputs, inputs[1:], strict=False)):
        yield torch.equal(out, into), f"{len(outputs)} layers" if torch.equal(out, into) else f"layer {i} and {i + 1}"


def _sums(trial: _Trial) -> Iterator[tuple[bool, str]]:
    """Input and what is added make the output."""
    kept = []
    with trial.trace() as tracer:
        for layer in tracer.uniform.layers:
            before = layer.input
            steps = [read(layer._root, one) if isinstance(one, Part) else one for one in layer.made]
            kept.append((layer.words, before, steps, layer.output))
    for words, before, steps, output in kept:
        made = _as_wide(before, output)
        for step in steps:
            if isinstance(step, str):
                made = trial.model._below(step)(made)
            elif isinstance(step, Stretch):
                made = step.of(trial.model._module, made)
            else:
                made = made + step if isinstance(step, Tensor) else made * step
        yield _close(made, output, f"{words}, ")


def _as_wide(stream: Tensor, output: Tensor) -> Tensor:
    """In the dtype in which a layer adds, where that is wider than what it is given, as in Mamba."""
    return stream.to(torch.promote_types(stream.dtype, output.dtype))


def _added(trial: _Trial) -> Iterator[tuple[bool, str]]:
    """Input + attn + mlp is the output."""
    plain = [layer.index for layer in trial.uniform.layers if layer.is_plain]
    if not plain:
        raise NotOnThisLayerError(f"More is done to the stream: {trial.uniform.layers[0].words}")
    with trial.trace() as tracer:
        ends = [(tracer.uniform.layers[i].input, tracer.uniform.layers[i].output) for i in plain]
    sums = [_as_wide(before, output) for before, output in ends]
    for name in ("attn", "cross_attn", "mlp"):  # in a run each: a layer may have several of both, one after the other
        with trial.trace() as tracer:
            for at, i in enumerate(plain):
                if tracer.uniform.layers[i].has(name):
                    sums[at] = sums[at] + getattr(tracer.uniform.layers[i], name).output
    for i, made, (_, output) in zip(plain, sums, ends, strict=True):
        yield _close(made, output, f"layer {i}: ")


def _roles(trial: _Trial) -> Iterator[tuple[bool, str]]:
    """Attention mixes tokens, the MLP doesn't."""
    kinds = {layer.words: layer.index for layer in reversed(list(trial.uniform.layers))}
    for i in sorted({*trial.some("input"), *kinds.values()}):
        with trial.trace() as tracer:
            layer = tracer.uniform.layers[i]
            stream = layer.input.clone()
            values = {one: read(layer._root, one).clone() for one in layer.made if isinstance(one, Part)}
        added = trial.uniform.layers[i]
        ramp = torch.linspace(1, 2, stream.shape[-1]).to(stream)  # norms take away what is the same everywhere
        stream[:, 0] += ramp * (1 + stream[:, 0].abs())
        for name in ("attn", "mlp"):
            for part in values.keys() & getattr(added, name).parts if added.has(name) else ():
                with trial.trace() as tracer:
                    layer = tracer.uniform.layers[i]
                    layer.input = stream
                    for other, value in values.items():  # in the order in which the model comes by
                        if other == part:
                            break
                        write(layer._root, other, value)
                    made = read(layer._root, part)
                mixes = not _close(made[:, 1:], values[part][:, 1:], "", units=2)[0]
                told = f"layer {i}: `{part}` {'mixes' if mixes else 'does not mix'} tokens"
                if name == "attn" and not mixes and _mixes_others(trial, i, part, values, stream):
                    mixes, told = True, f"layer {i}: `{part}` mixes tokens, by keys and values of a layer before"
                yield mixes is (name == "attn"), told


def _mixes_others(trial: _Trial, i: int, part: Part, values: dict[Part, Tensor], stream: Tensor) -> bool:
    """Whether the first token's values reach later tokens, where keys are a layer's before, as in Gemma 4."""
    if not trial.uniform.layers[i].has("attn.v"):
        return False
    with trial.trace() as tracer:
        tracer.uniform.layers[i].input = stream
        q, k = tracer.uniform.layers[i].attn.q, tracer.uniform.layers[i].attn.k
    if _close(q, trial.inside(i, "q"), "")[0] or not _close(k, trial.inside(i, "k"), "")[0]:
        return False
    with trial.trace() as tracer:
        layer = tracer.uniform.layers[i]
        v = layer.attn.v.clone()
        v[:, 0] += 1 + v[:, 0].abs()
        layer.attn.v = v
        for other, value in values.items():
            if other == part:
                break
            write(layer._root, other, value)
        made = read(layer._root, part)
    return not _close(made[:, 1:], values[part][:, 1:], "")[0]


def _projects(trial: _Trial) -> Iterator[tuple[bool, str]]:
    """The last output projects to the logits."""
    if trial.uniform._layout.tail is None and not trial.says_tokens:
        raise NotOnThisLayerError("It makes no logits of each token.")
    with trial.trace() as tracer:
        last, logits = tracer.uniform.layers[-1].output, tracer.uniform.logits
    made = trial.uniform.project(last)
    same = (_close(one, logits, "") for one in parts_of_length(made, logits))
    yield next((found for found in same if found[0]), _close(made, logits, ""))


def _reach(trial: _Trial) -> Iterator[tuple[bool, str]]:
    """Each write reaches the logits."""
    count = 0
    attn = (f"attn.{one}" for one in (*INTERIOR, "result"))
    for name in ("input", "output", "attn.output", "mlp.output", *attn, *of_mlps.WRITTEN):
        for i in (i for i in trial.some(name) if of_mlps.has_choice(trial.uniform.layers[i], name)):
            logits = trial.with_(lambda uniform, i=i, name=name: _nudge(uniform.layers[i], name))  # type: ignore[misc]
            count += 1
            holds = distance(logits, trial.logits) > 0
            yield holds, f"{count} writes" if holds else f"{name} of layer {i} did not"


def _nudge(layer: LayerNode, name: str) -> None:
    if of_mlps.nudge(layer, name):
        return
    node: Any = layer
    *path, last = name.split(".")
    for step in path:
        node = getattr(node, step)
    value = getattr(node, last)
    draw = torch.Generator(device="cpu").manual_seed(0)
    noise = torch.rand(value.shape, generator=draw).to(value)
    finite = torch.isfinite(value)
    setattr(node, last, torch.where(finite, value + noise + 0.5, value) if last != "pattern" else value * noise)


def _write_back(trial: _Trial) -> Iterator[tuple[bool, str]]:
    """Writing back what was read changes nothing."""

    def change(name: str, uniform: Uniform) -> None:
        for layer in uniform.layers:
            if name == "stream" and layer.has("output"):
                layer.input = layer.input
                layer.output = layer.output
            elif name in ("inside", "shared"):
                of_mlps.write_back(layer, name)
            elif name != "stream" and layer.has(f"{name}.output"):
                getattr(layer, name).output = getattr(layer, name).output

    for name in ("stream", "attn", "mlp", "inside", "shared"):
        changed = trial.with_(partial(change, name))
        yield torch.equal(changed, trial.logits), "bit for bit" if torch.equal(changed, trial.logits) else f"{name} did"
    yield from write_results_back(trial)


_INSIDE = (make_what_attention_is_given, make_what_attention_returns, *of_mlps.CHECKS)
_OF_LAYERS = (_hand_on, _sums, _added, _roles, sum_to_one, mix_values, *_INSIDE, _reach, _write_back)
_CHECKS = (
    *(_hand_on, _sums, _added, _roles, _projects, sum_to_one, mix_values),
    *(*_INSIDE, _reach, _write_back, as_alone),
)
