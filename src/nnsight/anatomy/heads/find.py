"""Finds which matrices make q, k and v, and which one z goes through, by what answers to what on a tiny model.

An entry of q that goes up and down, over many prompts, with one of the numbers that a matrix was made to return, is
that output of that matrix: a scale, a norm, a clip leave it so, and at the first token rotary embedding turns nothing.
Where the entries of all heads stand tells how the matrix is laid out. No names are looked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnsight.anatomy.heads.drawn import Drawn
from nnsight.anatomy.heads.matrices import MADE, Matrix, Order, Projections, Sizes
from nnsight.anatomy.heads.sizes import numbers_of
from nnsight.anatomy.layout import Layer
from nnsight.anatomy.trial import same

_ALIKE = 0.7  # how far an entry and its source correlate at least, where a norm stands between
_GATED = 0.5


class _Answer(NamedTuple):
    """The matrix that an array answers to, and with which of its outputs each entry, [head, d_head]."""

    path: str
    at: Tensor


def find_projections(model: nn.Module, layers: list[Layer], others: list[Layer]) -> list[Projections | None]:
    """The matrices of the attention of some layers of a tiny model; None where it can't be looked into.

    Args:
        model: A tiny model.
        layers: Those layers.
        others: Layers of it that have no attention.
    """
    drawn = Drawn(model, layers, others)
    return [_of_layer(drawn, layer) for layer in layers]


def _of_layer(drawn: Drawn, layer: Layer) -> Projections | None:
    path = str(layer.attention)
    inside = drawn.inside[path]
    if not {*MADE, "z"} <= inside.keys():
        return None
    z = inside["z"]
    arrays = {name: inside[name][:, first_of_each(inside[name])] for name in MADE}
    sizes = Sizes(arrays["q"].shape[1], arrays["k"].shape[1], arrays["q"].shape[2], z.shape[2])
    normed = {one: _normed(drawn.drawn[one]) for one in drawn.matrices[layer.path] if one in drawn.drawn}
    answers = {name: _answer(array, normed) for name, array in arrays.items()}
    made, lacks = dict[str, Matrix](), dict[str, str]()
    for name in MADE:
        found = _matrix_of(name, answers, sizes, drawn, layer)
        if isinstance(found, Matrix):
            made[name] = found
        else:
            lacks[name] = found
    scaled = frozenset(name for name in made if _is_multiple(arrays[name], drawn, answers[name]))
    numbers = numbers_of(drawn.model, drawn.model.get_submodule(path))
    output = _output_of(z, drawn, layer)
    if not isinstance(output, Matrix):
        return Projections(sizes, numbers, made, None, False, scaled, {**lacks, "o": output})
    given_z = same(drawn.given[f"{layer.path}.{output.path}"], z.flatten(1))
    return Projections(sizes, numbers, made, output, given_z, scaled, lacks)


def first_of_each(array: Tensor) -> list[int]:
    """The heads that differ, of [..., head, d_head]: keys and values may come repeated for each head of queries."""
    found: list[int] = []
    for head in range(array.shape[-2]):
        if not any(torch.equal(array[..., head, :], array[..., known, :]) for known in found):
            found.append(head)
    return found


def _normed(array: Tensor) -> Tensor:
    array = array - array.mean(0)
    return array / array.norm(dim=0).clamp(min=1e-12)


def _answer(array: Tensor, normed: Mapping[str, Tensor]) -> _Answer | None:
    flat = _normed(array.flatten(1))
    for path, one in normed.items():
        most, at = (flat.T @ one).abs().max(1)
        if bool((most > _ALIKE).all()):
            return _Answer(path, at.reshape(array.shape[1:]))
    return None


def _matrix_of(
    name: str, answers: Mapping[str, _Answer | None], sizes: Sizes, drawn: Drawn, layer: Layer
) -> Matrix | str:
    """The matrix that makes q, k or v, or why there is none."""
    answer = answers[name]
    if answer is None:
        return f"no single matrix of this attention makes `{name}`"
    shown = answer.path.removeprefix(f"{layer.path}.")
    if not _is_given(answer.path, drawn, layer):
        return f"`{shown}`, which makes `{name}`, is not given the stream itself, but something made of it"
    matrix = _matrix(drawn, answer.path, layer)
    if matrix is None:
        return f"`{shown}` does more than to multiply by a matrix"
    marks: list[tuple[str, int, int] | None] = [None] * drawn.drawn[answer.path].shape[1]
    for other, one in answers.items():
        for head, row in enumerate(one.at.tolist() if one is not None and one.path == answer.path else ()):
            for d, at in enumerate(row):
                if marks[at] is not None:
                    return f"one output of `{shown}` stands in several heads"
                marks[at] = (other, head, d)
    order = _order(marks, sizes)
    if order is None:
        return f"the heads don't stand one after the other, or at equal distances, in the outputs of `{shown}`"
    found = replace(matrix, order=order[0], groups=order[1])
    if name == "q" and found.groups == "kv_heads" and 1 < sizes.kv_heads < sizes.heads:
        return f"the heads of q don't stand at equal distances in the outputs of `{shown}`: those of k are in between"
    return found


def _is_given(path: str, drawn: Drawn, layer: Layer) -> bool:
    """Whether a matrix is given what the attention module is, or that behind a norm."""
    width, given = _width(drawn, layer), drawn.given[path]
    norms = [one for one in drawn.norms[layer.path] if one in drawn.returned]
    return any(  # cross-attention is given two
        same(given, stream) or any(same(drawn.given[one], stream) and same(drawn.returned[one], given) for one in norms)
        for stream in drawn.inputs.get(str(layer.attention), [])
        if stream.shape[1] == width
    )


def _width(drawn: Drawn, layer: Layer) -> int:
    """How wide the stream is; of several that are mixed, what attention is given of them."""
    return drawn.given[layer.path if layer.streams == 1 else str(layer.attention)].shape[1]


def _order(marks: list[Any], sizes: Sizes) -> tuple[Order, str] | None:
    """How the outputs of a matrix are ordered: once, or in equal groups."""
    for groups, count in (("once", 1), ("kv_heads", sizes.kv_heads), ("heads", sizes.heads)):
        size, rest = divmod(len(marks), count)
        if rest:
            continue
        each = [_runs(marks[start : start + size]) for start in range(0, len(marks), size)]
        order = tuple(name for name, _ in each[0])
        if len({*order}) < len(order) or any(tuple(name for name, _ in one) != order for one in each):
            continue
        if all(_are_ordered([one for run in each for one in dict(run)[name]], name, sizes) for name in order if name):
            return order, groups
    return None


def _runs(marks: list[Any]) -> list[tuple[str | None, list[Any]]]:
    """Stretches of one array each."""
    return [(name, list(run)) for name, run in groupby(marks, key=lambda mark: None if mark is None else mark[0])]


def _are_ordered(marks: list[Any], name: str, sizes: Sizes) -> bool:
    """Whether all heads come in order, each in one piece; that of v in the order that it has in z."""
    count, width = (sizes.heads if name == "q" else sizes.kv_heads), (sizes.d_value if name == "v" else sizes.d_head)
    if [head for _, head, _ in marks] != [head for head in range(count) for _ in range(width)]:
        return False
    # Some rotary embeddings put pairs of q and k next to one another: their order in a head is the matrix's own.
    return name != "v" or [d for *_, d in marks] == [*range(width)] * count


def _is_multiple(array: Tensor, drawn: Drawn, answer: _Answer | None) -> bool:
    """Whether an array is what the matrix returned, in its order, times one number."""
    assert answer is not None
    if bool((answer.at.diff(dim=1) != 1).any()):
        return False
    wanted = drawn.drawn[answer.path][:, answer.at.flatten()].reshape(array.shape)
    return same(wanted * (array * wanted).sum() / (wanted * wanted).sum(), array)


def _matrix(drawn: Drawn, path: str, layer: Layer) -> Matrix | None:
    """How a module multiplies, told by its numbers."""
    module = drawn.model.get_submodule(path)
    named = {name: one.detach() for name, one in module.named_parameters()}
    weight = next(name for name, one in named.items() if one.ndim == 2)
    given, returned = drawn.given[path], drawn.returned[path]
    for bias in (None, *(name for name, one in named.items() if one.ndim == 1)):
        for out_first in (True, False):
            times = named[weight].T if out_first else named[weight]
            if times.shape != (given.shape[1], returned.shape[1]):
                continue
            if same(given @ times + (0 if bias is None else named[bias]), returned):
                return Matrix(path.removeprefix(f"{layer.path}."), type(module), weight, bias, out_first)
    return None


def _is_gated(array: Tensor, given: Tensor) -> bool:
    """Whether each entry follows its own: behind a gate, which leaves the sign, or a norm."""
    signs = (array.sign() * given.sign()).mean(0)
    return bool((torch.maximum((_normed(given) * _normed(array)).sum(0), signs) > _GATED).all())


def _output_of(z: Tensor, drawn: Drawn, layer: Layer) -> Matrix | str:
    """The matrix that is given z, its heads beside one another, or z behind a gate or a norm; or why there is none."""
    flat, n_model = z.flatten(1), _width(drawn, layer)
    among = [path for path in drawn.matrices[layer.path] if path in drawn.given and path in drawn.returned]
    among = [path for path in among if drawn.given[path].shape == flat.shape]
    found = [path for path in among if same(drawn.given[path], flat)]
    found += [path for path in among if _is_gated(flat, drawn.given[path])]
    if not found:
        return "no matrix in this layer is given `z`"
    found.sort(key=lambda path: drawn.returned[path].shape[1] != n_model)
    shown = found[0].removeprefix(f"{layer.path}.")
    matrix = _matrix(drawn, found[0], layer)
    if matrix is None:
        return f"`{shown}` does more than to multiply by a matrix"
    if drawn.returned[found[0]].shape[1] != n_model:
        return f"`{shown}` does not lead to the residual stream"
    return matrix
