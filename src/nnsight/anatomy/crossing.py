"""An encoder and a decoder: which half is which, what the one hands to the other, and what in a layer reads that."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nnsight.anatomy.given import before_norms
from nnsight.anatomy.layout import Part, Place
from nnsight.anatomy.trial import Call, Trial, same


def handed_over(
    trial: Trial, encoded: Part, layers: Sequence[Call], stream: Place
) -> tuple[Place, Part] | tuple[None, None]:
    """What an encoder hands to all layers of a decoder: where they are given it, and the output that it is.

    Args:
        trial: A recorded pass.
        encoded: The output of the encoder's last layer.
        layers: The calls of the decoder's layers.
        stream: Where those are given the residual stream.
    """
    first, *others = layers
    last = trial.calls[encoded.path]
    calls = [call for call in trial.calls.values() if call.path and last.ended <= call.ended < first.began]
    calls.sort(key=lambda call: (call.path.count("."), call.began))
    for at, tensor in first.inputs:
        if at == stream or tensor.ndim != 3 or not all(_is_given(call, at, tensor) for call in others):
            continue
        for call in calls:
            for place, output in call.outputs:
                part = Part(call.path, "output", place)
                if same(output, tensor) and _follows(trial, encoded, part):
                    return at, part
    return None, None


def _is_given(call: Call, at: Place, tensor: Tensor) -> bool:
    given = dict(call.inputs).get(at)
    return given is not None and same(given, tensor)


def _follows(trial: Trial, encoded: Part, part: Part) -> bool:
    """Whether a value is made of the last layer's output: position embeddings are given to all layers, too."""
    if part == encoded:
        return True
    value = trial.value(encoded)
    return not same(trial.again({encoded: value + 1.0 + value.abs()}, part), trial.value(part))


def reading(
    trial: Trial, given: Part, states: Part, asked: tuple[Part, ...], parts: tuple[Part, ...]
) -> tuple[Part, ...]:
    """Those of a layer's parts that depend on what the encoder handed over, with its other parts held fixed."""
    other_states = trial.value(states).clone()
    other_states += 1.0 + other_states.abs()
    held = {part: trial.value(part) for part in parts}
    stream = {given: trial.value(given)}

    def reads(part: Part) -> bool:
        rest = {other: value for other, value in held.items() if other != part}
        return not same(trial.again({**stream, states: other_states, **rest}, part), held[part])

    return tuple(part for part in asked if reads(part))


def attention_of(trial: Trial, layer: Call, part: Part, paths: Sequence[str]) -> str | None:
    """Of the modules in a layer that attend, the one nearest to where this part is made."""
    made_at = before_norms(trial, layer, trial.calls[part.path]).path.split(".")

    def in_common(path: str) -> int:
        pairs = enumerate(zip(path.split("."), made_at, strict=False))
        return next((i for i, (one, other) in pairs if one != other), len(made_at))

    return max(paths, key=in_common, default=None)


def embedding_called(trial: Trial, after: int, before: int) -> str | None:
    """The first table that ids are looked up in, between two moments."""
    calls = [call for call in [*trial.calls.values(), *trial.later] if after < call.began < before]
    for call in sorted(calls, key=lambda call: call.began):
        if isinstance(call.module, nn.Embedding) and call.outputs and call.outputs[0][1].ndim == 3:
            return call.path
    return None
