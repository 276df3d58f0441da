"""Which of what a layer adds mixes tokens, found by changing one token and looking at another."""

from __future__ import annotations

from typing import Any

from nnsight.anatomy.layout import Part
from nnsight.anatomy.trial import Trial, same

Roles = dict[str, bool]  # of a part's path below its layer: whether it mixes tokens


def split(
    trial: Trial, given: Part, parts: tuple[Part, ...], known: dict[Any, Roles]
) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts that mix tokens, and the others. Layers of one kind are looked at once."""
    below = len(given.path) + 1
    modules = [trial.calls[part.path].module for part in parts]
    kind = tuple((part.path[below:], type(module)) for part, module in zip(parts, modules, strict=True))
    key = (type(trial.calls[given.path].module), kind)
    if key not in known:
        known[key] = {part.path[below:]: _mixes(trial, given, part, parts) for part in parts}
    roles = known[key]
    mixing = tuple(part for part in parts if roles[part.path[below:]])
    return mixing, tuple(part for part in parts if part not in mixing)


def _mixes(trial: Trial, given: Part, part: Part, parts: tuple[Part, ...]) -> bool:
    """Whether a part's value at later tokens depends on the stream at the first, with the other parts held fixed."""
    stream = trial.value(given).clone()
    stream[:, 0] += 1.0 + stream[:, 0].abs()
    others = {other: trial.value(other) for other in parts if other != part}
    value = trial.again({given: stream, **others}, part)
    return not same(value[:, 1:], trial.value(part)[:, 1:])
