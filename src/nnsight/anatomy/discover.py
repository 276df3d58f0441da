"""Finds where a language model has what all have, by arithmetic on a small model of the same architecture.

No names are looked for. The layers are the list of modules of which each is given what the one before returned. What a
layer adds to the residual stream are those of its inner modules' outputs whose sum is its output less its input. What
mixes tokens among them is found by changing one token, and looking at another.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnsight.anatomy.crossing import attention_of, embedding_called, handed_over, reading
from nnsight.anatomy.given import Givens, given_to
from nnsight.anatomy.interface import interface_of
from nnsight.anatomy.layout import Encoder, Layer, Layout, Made, Part, Place, Stretch
from nnsight.anatomy.roles import Roles, split
from nnsight.anatomy.stacks import Stack, find_several, find_stacks
from nnsight.anatomy.tail import find_tail
from nnsight.anatomy.tiny.inputs import BATCH, LENGTH, embedding_of
from nnsight.anatomy.trial import Call, Trial, leaves, same
from nnsight.anatomy.vectors import Vectors
from nnsight.core.turns import Counted, Turn
from nnsight.errors import AnatomyError

_MOST_PARTS = 6
_MOST_SUMS = 5000  # that are tried for one value
_MOST_NORMS = 3


def discover(trial: Trial) -> Layout:
    """The layout of a model, from a recorded pass.

    Raises:
        AnatomyError: It has no list of layers that hand a residual stream on, or one of them adds something that none
            of its modules returns.
    """
    try:
        stack, reader = find_stacks(trial)
    except AnatomyError:
        if (several := find_several(trial)) is None:
            raise
        return _of_streams(trial, several)
    encoder, states = (None, None) if reader is None else _encoder(trial, reader, stack)
    known = _Known({}, {}, set())
    if len({call.path for call in stack.calls}) < len(stack.calls):
        layers, last = _layers_again(trial, stack, known)
    else:
        layers, last = tuple(_layer(trial, call, stack, known, states) for call in stack.calls), trial
    path = _path_of(trial.model)
    unembed = path(getattr(trial.model, "get_output_embeddings", lambda: None)())
    tail = find_tail(last, layers[-1].output, stack.calls[-1], is_needed=unembed is not None)
    steps = [step.path for step in tail.steps or () if step.path is not None]
    norms = _norms_behind(last, layers[-1], stack.calls[-1])
    if unembed is not None:
        norms = [step for step in steps[:1] if _scales_only(trial.calls[step].module)]
    embed = path(embedding_of(trial.model)) or ""
    if reader is not None:
        embed = embedding_called(trial, reader.calls[-1].ended, stack.calls[0].began) or embed
    return Layout(
        layers=layers,
        embed=embed,
        norm=next(iter(norms), None),
        unembed=unembed or (steps[-1] if steps else None),
        logits=tail.logits,
        tail=tail.steps,
        encoder=encoder,
    )


def _of_streams(trial: Trial, stack: Stack) -> Layout:
    """A model whose layers mix several residual streams: the layers, what attends in them, and its ends."""
    shape = dict(stack.calls[0].outputs)[stack.output].shape
    (streams,) = {shape[0], shape[2]} - {BATCH, LENGTH} or {shape[0]}
    layers: list[Layer] = []
    for call in stack.calls:
        inside = [path for path in trial.attending if path.startswith(f"{call.path}.")]
        # What mixes streams has a softmax, too, over them and not over tokens: only what asks for attention is taken.
        attending = (path for path in inside if interface_of(type(trial.model.get_submodule(path))) is not None)
        attention = next(attending, None)
        given, made = call.part("input", stack.input), call.part("output", stack.output)
        layers.append(Layer(call.path, given, made, (), (), attention, (), streams=streams))
    path = _path_of(trial.model)
    unembed = path(getattr(trial.model, "get_output_embeddings", lambda: None)())
    before = trial.calls[unembed].inputs[0][1] if unembed in trial.calls else None
    behind = [one for one in trial.calls.values() if one.began > stack.calls[-1].ended and _scales_only(one.module)]
    norms = [one.path for one in behind if before is not None and one.outputs and same(one.outputs[0][1], before)]
    logits = next((Part("", "output", at) for at, _ in leaves(trial.output) if at == ("logits",)), None)
    embed = path(embedding_of(trial.model)) or ""
    return Layout(tuple(layers), embed, next(iter(norms), None), unembed, logits, tail=None)


def _layers_again(trial: Trial, stack: Stack, known: _Known) -> tuple[tuple[Layer, ...], Trial]:
    """The layers where several are calls of one module, and the pass as the last of them is seen in it."""
    first = stack.calls[0]
    once = [call for call in trial.calls.values() if call.count == 1]
    before = frozenset(
        [(call.path, "input") for call in once if call.began < first.began]
        + [(call.path, "output") for call in once if call.ended < first.began]
    )
    counted = Counted(tuple(dict.fromkeys(call.path for call in stack.calls)), before)
    layers: list[Layer] = []
    of_one = trial
    for index, call in enumerate(stack.calls):
        turn = Turn(call.path, sum(layer.path == call.path for layer in layers), f"layers[{index}]", counted)
        of_one = trial.in_call(call)
        layers.append(replace(_layer(of_one, of_one.calls[call.path], stack, known), turn=turn))
    return tuple(layers), of_one


def _encoder(trial: Trial, reads: Stack, answers: Stack) -> tuple[Encoder | None, Place | None]:
    """The half that reads, and where the layers of the other half are given what comes of it."""
    last, first = reads.calls[-1], answers.calls[0]
    states, output = handed_over(trial, last.part("output", reads.output), answers.calls, answers.input)
    if output is None:
        return None, None
    known = _Known({}, {}, set())
    layers = tuple(_layer(trial, call, reads, known) for call in reads.calls)
    norms = _norms_behind(trial, layers[-1], last, before=first.began)
    embed = embedding_called(trial, 0, reads.calls[0].began)
    return Encoder(layers, embed, next(iter(norms), None), output), states


def _norms_behind(trial: Trial, layer: Layer, call: Call, *, before: float = math.inf) -> list[str]:
    """The modules without a matrix that are given what the last layer returns, before some moment."""
    value = trial.value(layer.output)
    behind = [other for other in trial.calls.values() if call.ended < other.began < before and other.inputs]
    norms = [other for other in behind if _scales_only(other.module) and same(other.inputs[0][1], value)]
    return [norm.path for norm in norms if not same(norm.outputs[0][1], value)]  # dropout is none


def _path_of(model: nn.Module) -> Any:
    paths = {module: path for path, module in reversed(list(model.named_modules()))}
    return paths.get


# What a layer adds.


class _Known(NamedTuple):
    """What was found of layers of a kind.

    Attributes:
        multiplied: Those in which what is added is multiplied with vectors of the layer's own.
    """

    roles: dict[Any, Roles]
    given: Givens
    multiplied: set[type]


def _layer(trial: Trial, call: Call, stack: Stack, known: _Known, states: Place | None = None) -> Layer:
    given, made = call.part("input", stack.input), call.part("output", stack.output)
    before = dict(call.inputs).get(stack.input)
    after = trial.value(made)
    if before is None:
        raise AnatomyError(f"`{call.path}` is not given the residual stream as the other layers are.")
    inner = _Inner(trial, call, after)
    looked_at = len(inner.parts)
    found, kind = None, type(call.module)
    if kind not in known.multiplied:
        found = inner.explain(after, before)
    if found is None:
        inner.add_multiplied(after, before)
        found = inner.explain(after, before)
        if found is not None:
            known.multiplied.add(kind)
    if found is None:
        raise AnatomyError(
            f"What `{call.path}` adds is no sum of what its modules return.",
            because=_is_wider(trial, after) or _rearranged(trial, call, after) or inner.lacks_number,
            looked_at=f"{looked_at} values of its shape",
        )
    added = tuple(one for one in found if isinstance(one, Part))
    attn, mlp = split(trial, given, added, known.roles)
    cross = () if states is None else reading(trial, given, call.part("input", states), mlp, added)
    mlp = tuple(part for part in mlp if part not in cross)
    attending = [path for path in trial.attending if path.startswith(f"{call.path}.")]
    crossing = attention_of(trial, call, cross[0], attending) if cross else None
    attention = next((path for path in attending if path != crossing), None)
    of_attn, of_mlp, of_cross = (given_to(trial, call, made, parts, added, known.given) for parts in (attn, mlp, cross))
    return Layer(call.path, given, made, attn, mlp, attention, found, of_attn, of_mlp, cross, crossing, of_cross)


def _is_wider(trial: Trial, stream: Tensor) -> str | None:
    """What to say of a stream that is several times as wide as the embedding: there, several are mixed (Qwen4)."""
    width: int | None = getattr(embedding_of(trial.model), "embedding_dim", None)
    if not width or stream.shape[-1] == width or stream.shape[-1] % width:
        return None
    return f"it hands {stream.shape[-1] // width} residual streams on, side by side, that are mixed in each layer"


def _rearranged(trial: Trial, layer: Call, stream: Tensor) -> str | None:
    """What to say of a layer that attends to tokens in another order than the stream has them, as TimeSformer does."""
    attending = [trial.calls[path] for path in trial.attending if path.startswith(f"{layer.path}.")]
    shapes = {call.path: [*call.outputs[0][1].shape] for call in attending if call.outputs}
    others = [f"`{path}` returns {shape}" for path, shape in shapes.items() if shape != [*stream.shape]]
    if not others or any(shape[-1] != stream.shape[-1] for shape in shapes.values()):
        return None
    return f"{' and '.join(others)}, where the stream is {[*stream.shape]}: tokens are rearranged on their way to it"


class _Inner:
    """What stands inside a layer: values of the stream's shape, each once, by the outermost module that returns it."""

    def __init__(self, trial: Trial, layer: Call, like: Tensor) -> None:
        prefix = f"{layer.path}."
        calls = [call for call in trial.calls.values() if call.path.startswith(prefix) and call.count == 1]
        calls.sort(key=lambda call: (call.path.count("."), call.began))
        self.parts: list[tuple[Part, Tensor]] = []
        for call in calls:
            for at, tensor in call.outputs:
                flat = tensor.shape == (like.shape[0] * like.shape[1], like.shape[2])
                if flat:
                    tensor = tensor.reshape(like.shape)
                if tensor.shape != like.shape or torch.equal(tensor, like):  # a sum of one is no explanation
                    continue
                if not any(torch.equal(tensor, known) for _, known in self.parts):
                    part = Part(call.path, "output", at, changes=(call.path, at) in trial.changed, flat=flat)
                    self.parts.append((part, tensor))
        self.parts.sort(key=lambda pair: trial.calls[pair[0].path].began)
        self._vectors = Vectors(layer.path, layer.module, like.shape[-1])
        later = [call for call in trial.later if call.path.startswith(prefix)]
        first = [call for call in trial.calls.values() if call.path.startswith(prefix)]
        self.lacks_number: str | None = None  # why there is no sum, where numbers below 0 make one
        self._norms = sorted(filter(partial(self._is_norm, like), [*first, *later]), key=lambda call: call.began)

    @staticmethod
    def _is_norm(like: Tensor, call: Call) -> bool:
        shapes = [tensor.shape for _, tensor in call.inputs], [tensor.shape for _, tensor in call.outputs]
        if call.module._modules or shapes != ([like.shape], [like.shape]):
            return False
        return _scales_only(call.module) and not same(call.inputs[0][1], call.outputs[0][1])

    def explain(self, value: Tensor, before: Tensor, depth: int = 0) -> Made | None:
        """How `value` is made of what came into the layer, `before`."""
        if depth and same(value, before):
            return ()
        whole = [norm for norm in self._norms if same(norm.outputs[0][1], value)]
        if not whole and (found := self._from(value, before)) is not None:
            return found
        if depth < _MOST_NORMS:
            for norm in whole or reversed(self._norms):
                added = () if whole else self._from(value, norm.outputs[0][1])
                if added is not None and (earlier := self.explain(norm.inputs[0][1], before, depth + 1)) is not None:
                    return (*earlier, norm.path, *added)
            for stream in () if whole else self._streams():
                made = None if same(stream, value) else self._from(value, stream)
                if made is not None and (earlier := self.explain(stream, before, depth + 1)) is not None:
                    return (*earlier, *made)
        return None

    def add_multiplied(self, value: Tensor, before: Tensor) -> None:
        """Has parts found, too, that are multiplied with a vector of the layer's own on their way, as in BEiT.

        Only those that lead from one place of the stream to another by themselves.
        """
        steps = [b - a for a, b in itertools.permutations([before, *self._streams(), value], 2)]
        for (part, tensor), (name, vector) in itertools.product(list(self.parts), self._vectors.named()):
            if any(same(step, tensor * vector) for step in steps):
                self.parts.append((replace(part, by=name), tensor * vector))

    def _streams(self) -> list[Tensor]:
        """What the norms inside are given: the stream as it stands in the middle of the layer."""
        return [norm.inputs[0][1] for norm in reversed(self._norms)]

    def _from(self, value: Tensor, stream: Tensor) -> Made | None:
        """What is added to the stream to make `value`, where the stream may be multiplied by a number before that."""
        if (parts := self._parts_of(value - stream)) is not None:
            return parts
        self.parts.append((_STREAM, stream))
        try:
            parts = self._parts_of(value)
        finally:
            self.parts.pop()
        if parts is not None and parts[-1].path == _STREAM.path:
            *added, times = parts
            return (times.scale if times.by is None else Stretch(times.by, None), *added)
        return self._stretched(value, stream)

    def _stretched(self, value: Tensor, stream: Tensor) -> Made | None:
        """The same, where each channel of the stream has a number of its own, which the layer has as parameters."""
        plain = [pair for pair in self.parts if pair[0].by is None]
        for count in range(_MOST_BESIDE + 1):
            for chosen in itertools.combinations(plain, count):
                rest = value - sum(tensor for _, tensor in chosen)
                stretch = self._vectors.stretch(stream, rest)
                if stretch is not None:
                    return (stretch, *(part for part, _ in chosen))
        return None

    def _parts_of(self, added: Tensor) -> tuple[Part, ...] | None:
        """The few values of which `added` is a sum, each times a number."""
        wanted = added.flatten().double()
        size = float(wanted.norm())
        if size == 0:
            return None
        columns = [tensor.flatten().double() for _, tensor in self.parts]
        for count in range(1, _MOST_PARTS + 1):
            tried = math.comb(len(columns), count)
            for chosen in itertools.combinations(range(len(columns)), count) if tried <= _MOST_SUMS else ():
                matrix = torch.stack([columns[i] for i in chosen], dim=1)
                gram, moment = matrix.T @ matrix, matrix.T @ wanted
                factors, failed = torch.linalg.solve_ex(gram, moment)
                if int(failed) or float((matrix @ factors - wanted).norm()) > 1e-4 * size:
                    continue
                scaled = [self._scaled(self.parts[i][0], float(f)) for i, f in zip(chosen, factors, strict=True)]
                parts = tuple(part for part in scaled if part is not None)
                if len(parts) == count:
                    return parts
        return None

    def _scaled(self, part: Part, factor: float) -> Part | None:
        """The part times a number: a parameter of the layer, or one that is the same whatever the model has learned."""
        if abs(factor - 1) < 1e-4:
            return part
        if part.by is None and (by := self._vectors.number(factor)) is not None:
            return replace(part, by=by)
        if factor > 1e-4:
            return replace(part, scale=factor)
        self.lacks_number = (
            f"`{part.path}.output` is multiplied by {factor:.3g}, which is none of the layer's own numbers"
        )
        return None


_MOST_BESIDE = 2  # parts that are added to a stretched stream at once
_STREAM = Part("(stream)", "input")


def _scales_only(module: nn.Module) -> bool:
    """Whether a module has no matrix, as norms have none."""
    return all(weight.ndim < 2 for weight in module.parameters())
