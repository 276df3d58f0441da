"""Every number of a config and of the configs inside it: read with their names, and others written in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

__all__ = ["Leaf", "configs", "leaves", "rewrite"]

# What says nothing about the model's shape: labels of a classifier, tools of a checkpoint.
NOT_SHAPE = ("id2label", "label2id", "task_specific_params", "pruned_heads", "transformers_version")


class Leaf(NamedTuple):
    """One number, and the config whose field it is, or whose field's list or dict (`rope_scaling.factor`) holds it."""

    config: PreTrainedConfig
    name: str
    value: int


def configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """This config and all inside it, from the outside in."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configs(value)


def leaves(config: PreTrainedConfig) -> list[Leaf]:
    """All numbers of a config tree."""
    found: list[Leaf] = []

    def read(leaf: Leaf) -> int:
        found.append(leaf)
        return leaf.value

    rewrite(config, read)
    return found


def rewrite(config: PreTrainedConfig, new: Callable[[Leaf], int]) -> None:
    """Put `new(leaf)` in the place of each number of a config tree, lists and dicts included."""
    for one in configs(config):
        # Fields are written to the instance's own dict: by attribute, a config of layers that differ refuses to be
        # read, and aliases would be written twice.
        fields = vars(one)
        for name, value in list(fields.items()):
            if name in NOT_SHAPE or isinstance(value, PreTrainedConfig):
                continue
            fields[name] = _rewritten(one, name, value, new)


def _rewritten(config: PreTrainedConfig, name: str, value: Any, new: Callable[[Leaf], int]) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return new(Leaf(config, name, value))
    if isinstance(value, dict):
        # A key that is a number (of a layer) names nothing.
        named = {key: f"{name}.{key}" if isinstance(key, str) and not key.isdigit() else name for key in value}
        return {key: _rewritten(config, named[key], item, new) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rewritten(config, name, item, new) for item in value)
    if hasattr(value, "per_layer_overrides"):  # transformers' own record of layers that differ from the config
        value.per_layer_overrides = _rewritten(config, name, value.per_layer_overrides, new)
    return value
