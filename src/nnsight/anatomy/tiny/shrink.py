"""Which small size each number of one config tree gets."""

from __future__ import annotations

from collections import defaultdict

from transformers import PreTrainedConfig

from nnsight.anatomy.tiny import sizes
from nnsight.anatomy.tiny.leaves import Leaf, configs, leaves
from nnsight.anatomy.tiny.meaning import Meaning, meaning
from nnsight.anatomy.tiny.part import Part

__all__ = ["Shrink"]


class Shrink:
    """Small sizes for the numbers of a config tree; `shrink(leaf)` is the one for a number.

    Args:
        config: The large config. It is only read.
        least: The smallest dim of a head. A larger one is the way out where a model needs more room in it.
        heads: How many heads there are, about.
    """

    def __init__(self, config: PreTrainedConfig, least: int, heads: int) -> None:
        self._heads = heads
        found: dict[int, list[Leaf]] = defaultdict(list)
        self.of: dict[Meaning, list[int]] = defaultdict(list)
        for leaf in leaves(config):
            found[id(leaf.config)].append(leaf)
            self.of[meaning(leaf.name, leaf.value)].append(leaf.value)
        # Ids and lengths are one line for the whole tree, since the configs inside speak of the same ids and positions.
        self.tokens = sizes.squeezed(self.of[Meaning.TOKEN])
        self.lengths = sizes.ladder(self.of[Meaning.LENGTH])
        self.parts = self._parts(config, found, least)

    def _parts(self, config: PreTrainedConfig, found: dict[int, list[Leaf]], least: int) -> dict[int, Part]:
        parts = {id(one): Part(one, found[id(one)]) for one in configs(config)}
        # The dims of configs inside move together where that keeps them small, so that a width of one that is a
        # multiple of another's stays it.
        all_dims = [dim for part in parts.values() for dim in part.dims]
        together = sizes.commensurable(all_dims, most=2)
        for part in parts.values():
            part.few = sizes.few_heads(part.heads, self._heads)
            turned = [pair for one in parts.values() if together or one is part for pair in one.turned]
            part.small_dims = sizes.small_dims(all_dims if together else part.dims, turned, least)
        text = config.get_text_config(decoder=True)
        main = parts.get(
            id(text), parts[id(config)]
        )  # an encoder-decoder's text config is a view made for the occasion
        for part in [main, *(part for part in parts.values() if part is not main)]:
            part.settle(None if part is main else main)
        known = {part.model: part.small for part in reversed([main, *parts.values()]) if part.model}
        for part in parts.values():
            part.settle_others(known)
        return parts

    def __call__(self, leaf: Leaf) -> int:
        """The small number for a large one."""
        value, part = leaf.value, self.parts[id(leaf.config)]
        match meaning(leaf.name, value):
            case Meaning.TOKEN:
                return self.tokens.get(value, value)
            case Meaning.LENGTH:
                return self.lengths.get(value, value)
            case Meaning.HEADS:
                return part.few.get(value, value)
            case Meaning.DIM:
                return part.small_dims.get(value, value)
            case Meaning.WIDTH:
                return part.widths.get(value, value)
            case Meaning.EXPERTS:
                return sizes.experts(value)
            case Meaning.EXPERT_GROUPS | Meaning.CHOSEN:
                # Two experts of four; one group of two, and both experts in it.
                return min(value, 1 if leaf.name == "topk_group" else 2)
        return value
