"""Token ids for a tiny model, and what else its forward needs to run as a language model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from nnsight.anatomy.leaves import leaves
from nnsight.anatomy.meaning import Meaning, meaning

__all__ = ["tiny_ids"]

BATCH, LENGTH = 2, 7


def tiny_ids(model: nn.Module, *, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)
    table = model.get_input_embeddings()
    # A model of several codebooks has one table for each, and a row of ids for each beside the other.
    tables = list(table) if isinstance(table, nn.ModuleList) else [table]
    special = {leaf.value for leaf in leaves(model.config) if meaning(leaf.name, leaf.value) is Meaning.TOKEN}
    plain = torch.tensor([token for token in range(tables[0].weight.shape[0]) if token not in special])
    ids = plain[torch.randint(len(plain), (BATCH * len(tables), LENGTH), generator=draw)]
    return ids, needed(model, draw)


def needed(model: nn.Module, draw: torch.Generator) -> dict[str, Any]:
    asked = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    if "use_cache" in asked or ("kwargs" in asked and hasattr(model.config, "use_cache")):
        inputs["use_cache"] = False
    if "lang_ids" in asked:
        inputs["lang_ids"] = torch.zeros(BATCH, dtype=torch.int64)
    if "shared_kv_states" in asked:
        inputs |= drafted(model, draw)
    return inputs


def drafted(model: nn.Module, draw: torch.Generator) -> dict[str, Any]:
    """What a draft model reads from the model it drafts for: its hidden states beside its embeddings, and its keys and values."""
    text = model.config.get_text_config(decoder=True)
    states = {}
    for index, kind in enumerate(text.layer_types):
        layer = text.per_layer_config[index]
        shape = (BATCH, layer.num_key_value_heads, LENGTH, layer.head_dim)
        states[kind] = (torch.randn(shape, generator=draw), torch.randn(shape, generator=draw))
    width = 2 * model.config.backbone_hidden_size
    return {
        "inputs_embeds": torch.randn(BATCH, LENGTH, width, generator=draw),
        "position_ids": torch.arange(LENGTH)[None],
        "shared_kv_states": states,
    }
