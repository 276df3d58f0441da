"""Fewer layers: a config of the first few layers of a model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from nnsight.anatomy.tiny.leaves import configs
from nnsight.anatomy.tiny.meaning import Meaning, meaning

__all__ = ["keep_layers"]

# How a config names the number of its layers; a decoder's own first.
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks", "depth")


def keep_layers(config: PreTrainedConfig, n_layers: int) -> None:
    """Cut a config, and those inside it, to the first `n_layers`: counts, lists by layer, and what names a layer."""
    for one in configs(config):
        fields = vars(one)
        total = next((fields[name] for name in COUNTS if isinstance(fields.get(name), int)), None)
        if total is None or total <= n_layers:
            continue
        for name, value in list(fields.items()):
            fields[name] = _cut(name, value, total, n_layers)


def _cut(name: str, value: Any, total: int, n_layers: int) -> Any:
    if hasattr(value, "per_layer_overrides"):
        value.per_layer_overrides = {
            key: item for key, item in value.per_layer_overrides.items() if int(key) < n_layers
        }
        return value
    if isinstance(value, int) and not isinstance(value, bool) and meaning(name, value) is Meaning.LAYERS:
        # The last layers are those that share another's keys and values, and the last are cut.
        return max(0, value - (total - n_layers)) if "shared" in name else min(value, n_layers)
    if isinstance(value, (list, tuple)) and value:
        if len(value) == total:
            return value[:n_layers]
        if isinstance(value[0], int) and meaning(name, value[0]) in (Meaning.LAYER, Meaning.LAYERS):
            return type(value)(index for index in value if index < n_layers)
    return value
