"""Which small size each number of one config tree gets."""

from __future__ import annotations

from collections import defaultdict

from transformers import PreTrainedConfig

from nnsight.anatomy import sizes
from nnsight.anatomy.leaves import Leaf, leaves
from nnsight.anatomy.meaning import Meaning, meaning

__all__ = ["Shrink"]

# The names of a model's width, in the order in which they are looked for: where a config has two, the first is the stream's.
MODEL_WIDTH = ("hidden_size", "d_model", "n_embd", "emb_dim", "embed_dim", "embedding_dim", "dim")
MAIN_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads", "attention_heads")
MAIN_DIMS = ("head_dim", "d_head", "dim_head", "d_kv", "kv_channels", "attention_head_size")
FRACTIONS = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")


class Shrink:
    """Small sizes for the numbers of a config tree; `shrink(leaf)` is the one for a number.

    Args:
        config: The large config. It is only read.
        least: The smallest dim of a head. A larger one is the way out where a model needs more room in it.
    """

    def __init__(self, config: PreTrainedConfig, least: int = 8) -> None:
        self.least = least
        self.by_config: dict[int, list[Leaf]] = defaultdict(list)
        self.of_meaning: dict[Meaning, list[int]] = defaultdict(list)
        for leaf in leaves(config):
            self.by_config[id(leaf.config)].append(leaf)
            self.of_meaning[meaning(leaf.name, leaf.value)].append(leaf.value)
        # Ids and lengths are one line for the whole tree, since the configs inside speak of the same ids and positions.
        self.tokens = sizes.squeezed(self.of_meaning[Meaning.TOKEN])
        self.lengths = sizes.ladder(self.of_meaning[Meaning.LENGTH])
        self.parts: dict[int, _Part] = {}
        text = config.get_text_config(decoder=True)
        main = _Part(text, self.by_config[id(text)], least, None)
        self.parts = {key: _Part(found[0].config, found, least, main) for key, found in self.by_config.items()}
        self.parts[id(text)] = main

    def __call__(self, leaf: Leaf) -> int:
        """The small number for a large one."""
        what, value = meaning(leaf.name, leaf.value), leaf.value
        part = self.parts[id(leaf.config)]
        if what is Meaning.TOKEN:
            return self.tokens.get(value, value)
        if what is Meaning.LENGTH:
            return self.lengths.get(value, value)
        if what is Meaning.HEADS:
            return part.heads.get(value, value)
        if what is Meaning.DIM:
            return part.dims.get(value, value)
        if what is Meaning.EXPERTS:
            return sizes.experts(value)
        if what in (Meaning.CHOSEN, Meaning.EXPERT_GROUPS):
            return self.chosen(leaf)
        if what is Meaning.WIDTH:
            return part.widths.get(value, value)
        return value

    def chosen(self, leaf: Leaf) -> int:
        """Two experts of four, one group of two."""
        return min(leaf.value, 1 if leaf.name == "topk_group" else 2)


class _Part:
    """The heads, dims and widths of one config. A config inside follows the text's for the widths that are the text's."""

    def __init__(self, config: PreTrainedConfig, found: list[Leaf], least: int, main: _Part | None) -> None:
        self.fields = {leaf.name: leaf.value for leaf in reversed(found)}
        of: dict[Meaning, list[int]] = defaultdict(list)
        for leaf in found:
            of[meaning(leaf.name, leaf.value)].append(leaf.value)
        self.heads = sizes.few_heads(of[Meaning.HEADS])
        self.model = _first(self.fields, MODEL_WIDTH) or (main.model if main else 0)
        self.count = _first(self.fields, MAIN_HEADS)
        self.dim = _first(self.fields, MAIN_DIMS)
        if not self.dim and self.count and self.model % self.count == 0:
            self.dim = self.model // self.count
        self.dims = sizes.small_dims([*of[Meaning.DIM], self.dim], _fractions(config), least)
        self.widths = {}
        for value in of[Meaning.WIDTH]:
            self._product(value)
        self.small = self.widths.get(self.model) or self._model_width(main)
        self._expansion()
        self._others(sorted(set(of[Meaning.WIDTH])), main)

    def _product(self, value: int) -> None:
        """A width that is heads times a dim stays it; the attention's own come first, since others may fit by accident."""
        heads = sorted(self.heads, key=lambda count: count != self.count)
        dims = sorted(self.dims, key=lambda dim: dim != self.dim)
        for count in heads:
            for dim in dims:
                if count > 1 and count * dim == value:
                    self.widths[value] = self.heads[count] * self.dims[dim]
                    return

    def _model_width(self, main: _Part | None) -> int:
        if main and self.model in main.widths:
            return main.widths[self.model]
        step = self.heads.get(self.count, 1)
        small = min(self.model, -(-32 // step) * step)
        if self.model in self.widths.values():
            small += step
        return small

    def _expansion(self) -> None:
        """Where heads times a dim was the model's width times an `expand`, the dim follows: such a model multiplies both ways."""
        for name, times in self.fields.items():
            if "expand" not in name:
                continue
            for count, few in self.heads.items():
                for dim in self.dims:
                    if count > 1 and count * dim == times * self.model and times * self.small % few == 0:
                        self.dims[dim] = times * self.small // few

    def _others(self, values: list[int], main: _Part | None) -> None:
        taken = {self.small, *self.widths.values()}
        if self.model:
            self.widths.setdefault(self.model, self.small)
        for value in values:
            if value in self.widths or value <= 8:
                continue
            if main and value in main.widths:
                self.widths[value] = main.widths[value]
            elif self.model:
                self.widths[value] = sizes.width(value, self.model, self.small, taken)
            else:
                self.widths[value] = min(value, 16)
            taken.add(self.widths[value])


def _first(fields: dict[str, int], names: tuple[str, ...]) -> int:
    return next((fields[name] for name in names if fields.get(name)), 0)


def _fractions(config: PreTrainedConfig) -> list[float]:
    """The parts of a head that rotary embeddings turn, wherever the config says so."""
    found = [1.0]
    stack: list[object] = [vars(config)]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            found += [part for name, part in value.items() if name in FRACTIONS and isinstance(part, float)]
            stack += [item for item in value.values() if isinstance(item, dict)]
    return found
