"""Proof by numbers that the weights of heads make what passes inside attention, and what attention returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnsight.anatomy.effective import computed_in
from nnsight.anatomy.heads.find import first_of_each
from nnsight.anatomy.heads.matrices import MADE
from nnsight.anatomy.heads.weights import Heads
from nnsight.anatomy.layer import LayerNode
from nnsight.anatomy.parts import factor_of
from nnsight.anatomy.proof import Results, Trial, close
from nnsight.anatomy.uniform import Uniform
from nnsight.errors import NotOnThisLayerError


def make_what_attention_is_given(trial: Trial) -> Results:
    """Weights W_Q, W_K, W_V make q, k and v."""
    letters = [(letter, i) for letter in MADE for i in trial.some(f"attn.W_{letter.upper()}")]
    if not letters:
        raise NotOnThisLayerError(_why(trial, "q"))
    for letter, i in letters:
        heads = _heads(trial.uniform.layers[i])
        if heads.found is not None and letter in heads.found.scaled:
            yield _is_made(trial, i, letter, heads)
        else:
            yield _follows(trial, i, letter, heads)


def _is_made(trial: Trial, i: int, letter: str, heads: Heads) -> tuple[bool, str]:
    """Whether the input through the weight is q, k or v: of the first token, which rotary embedding does not turn."""
    array = trial.inside(i, letter)
    with trial.trace() as tracer:
        given: Tensor = heads.node(heads.matrix(letter), tracer.uniform.layers[i]._root).input
    made = torch.einsum("ptm,hmd->pthd", given.reshape(len(array), -1, given.shape[-1]), heads.weight(letter))
    bias = heads.bias(letter)
    made = made if bias is None else made + bias
    array = array[:, : made.shape[1], first_of_each(array)]  # the encoder's tokens may stand behind the decoder's own
    if letter != "v":
        made, array = made[:, :1], array[:, :1]
    square = (made * made).sum()
    factor = (made * array).sum() / square.where(square > 0, 1)  # q may come scaled already; a new model's may be zero
    return close(made * factor, array, f"layer {i}, {letter}{'' if letter == 'v' else ' of the first token'}: ")


def _follows(trial: Trial, i: int, letter: str, heads: Heads) -> tuple[bool, str]:
    """Where a norm stands between: whether the last head moves most where its part of the output turns about."""
    before = trial.inside(i, letter)

    def turn(_: Any, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        heads.cut(output, letter)[..., -1, :].neg_()
        return output

    handle = heads.module(heads.matrix(letter)).register_forward_hook(turn)
    try:
        moved = (trial.inside(i, letter) - before).abs().amax((0, 1, 3))
    finally:
        handle.remove()
    *others, last = moved[first_of_each(before)].tolist()
    rest = max(others, default=0.0)
    told = f"layer {i}, {letter} behind a norm: the last head turns by {last:.1e}, and others by {rest:.1e}"
    return last > 2 * rest, told  # a norm over all heads moves the others too


def make_what_attention_returns(trial: Trial) -> Results:
    """z through W_O is the attention's output."""
    if not trial.some("attn.result"):
        raise NotOnThisLayerError(_why(trial, "result"))
    for i in trial.some("attn.result"):
        heads = _heads(trial.uniform.layers[i])
        matrix = heads.projection()
        with trial.trace() as tracer:
            layer = tracer.uniform.layers[i]
            z, result = layer.attn.z, layer.attn.result
            returned: Tensor = heads.node(matrix, layer._root).output
        bias = heads.bias("o") if heads.is_plain(matrix) else heads.effective_bias("o")
        rest = torch.zeros(()) if bias is None else bias
        told = f"layer {i}{_before(trial, i, returned)}: "
        returned = returned.to(computed_in(returned))  # what is known to fewer digits is compared to as many
        yield close(result.sum(-2) + rest, returned, told)
        if heads.found is not None and heads.found.given_z:
            weight = heads.weight("o") if heads.is_plain(matrix) else heads.effective_weight("o")
            yield close(torch.einsum("pthd,hdm->ptm", z.to(weight.dtype), weight) + rest, returned, told)


def _before(trial: Trial, i: int, returned: Tensor) -> str:
    """What makes the layer's `attn.output` of what the projection returns, if it isn't that."""
    if not trial.uniform.layers[i].has("attn.output"):
        return ", before several streams are mixed"
    parts = trial.uniform.layers[i].attn.parts
    with trial.trace() as tracer:
        added: Tensor = tracer.uniform.layers[i].attn.output
    is_added = len(parts) == 1 and close(returned * factor_of(trial.uniform.raw, parts[0]), added, "")[0]
    return "" if is_added else f", before `{' + '.join(part.path for part in parts)}`"


def write_results_back(trial: Trial) -> Results:
    """Whether writing back the results that were read changes nothing."""
    if not trial.some("attn.result"):
        return

    def change(uniform: Uniform) -> None:
        for layer in uniform.layers.having("attn.result"):
            layer.attn.result = layer.attn.result

    is_same = torch.equal(trial.with_(change), trial.logits)
    yield is_same, "bit for bit" if is_same else "attn.result did"


def _heads(layer: LayerNode) -> Heads:
    return Heads(layer._root, layer._layer)


def _why(trial: Trial, letter: str) -> str:
    """Why the first layer that has attention lacks this."""
    attending = list(trial.uniform.layers.having("attn.q"))
    if not attending:
        return "no attention is computed"
    heads = _heads(attending[0])
    return heads.lacks_result() if letter == "result" else heads.lacks(letter)
