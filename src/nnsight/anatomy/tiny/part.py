"""The heads, dims and widths of one config, and the relations among them that its small copy keeps."""

from __future__ import annotations

import math
import re

from transformers import PreTrainedConfig

from nnsight.anatomy.tiny import sizes
from nnsight.anatomy.tiny.leaves import Leaf
from nnsight.anatomy.tiny.meaning import SMALL, WIDE_WORDS, Meaning, meaning

__all__ = ["Part"]

# The names of a model's width, in the order in which they are looked for: of two, the first is the stream's.
MODEL_WIDTH = ("hidden_size", "d_model", "n_embd", "emb_dim", "embed_dim", "embedding_dim", "dim")
MAIN_HEADS = (
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads"
).split()
MAIN_DIMS = ("head_dim", "d_head", "dim_head", "d_kv", "kv_channels", "attention_head_size")
FRACTIONS = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
# The inner width of an MLP is as free as it is large: four times the model's may become twice.
INNER = re.compile(r"intermediate|ffn|inner|mlp|feed_forward|dff|dim_ff")
# A model is at least so wide.
NARROWEST = 32


class Part:
    """What one config counts. `few`, `small_dims` and `widths` say what becomes of it, once they are settled."""

    def __init__(self, config: PreTrainedConfig, found: list[Leaf]) -> None:
        self.fields = {leaf.name: leaf.value for leaf in reversed(found)}
        self.named = {what: [leaf for leaf in found if meaning(leaf.name, leaf.value) is what] for what in Meaning}
        self.heads = self._values(Meaning.HEADS)
        self.count = self._first(MAIN_HEADS) or max(self.heads, default=0)
        self.model = self._first(MODEL_WIDTH) or self._unknown_width()
        self.dim = self._first(MAIN_DIMS)
        if not self.dim and self.count and self.model % self.count == 0:
            self.dim = self.model // self.count
        self.dims = [*self._values(Meaning.DIM), *([self.dim] if self.dim else [])]
        turned = [self.dim, *(leaf.value for leaf in self.named[Meaning.DIM] if leaf.name.split(".")[-1] == "head_dim")]
        self.shares = _fractions(config)
        self.turned = [(dim, share) for dim in turned for share in self.shares]
        self.few: dict[int, int] = {}
        self.small_dims: dict[int, int] = {}
        self.widths: dict[int, int] = {}
        self.small = 0

    def settle(self, main: Part | None) -> None:
        """Widths that are products, and the model's own."""
        for leaf in self.named[Meaning.WIDTH]:
            self._product(leaf)
        if not self.model and main:
            self.model, self.small = main.model, main.small
        elif self.model:
            self.small = self.widths.get(self.model) or self._model_width(main)
            self.widths.setdefault(self.model, self.small)
        self._expansion()

    def settle_others(self, known: dict[int, int]) -> None:
        """The other widths: that of a config beside this one, or in proportion."""
        taken = {self.small, *self.widths.values()}
        inner = {leaf.value for leaf in self.named[Meaning.WIDTH] if INNER.search(leaf.name)}
        for value in sorted(set(self._values(Meaning.WIDTH))):
            if value in self.widths or value <= SMALL:
                continue
            if value in known:
                self.widths[value] = known[value]
            elif self.model:
                self.widths[value] = sizes.width(value, self.model, self.small, 2 if value in inner else 8, taken)
            else:
                self.widths[value] = min(value, NARROWEST // 2)
            taken.add(self.widths[value])

    def _unknown_width(self) -> int:
        """The model's width in a config that calls it as nobody else does: the first that heads share evenly."""
        names = (leaf.name for leaf in self.named[Meaning.WIDTH] if WIDE_WORDS.search(leaf.name))
        widths = (self.fields[name] for name in names if name in self.fields and not INNER.search(name))
        return next((width for width in widths if self.count and not width % self.count), 0)

    def _values(self, what: Meaning) -> list[int]:
        return [leaf.value for leaf in self.named[what]]

    def _first(self, names: list[str] | tuple[str, ...]) -> int:
        return next((self.fields[name] for name in names if self.fields.get(name)), 0)

    def _product(self, width: Leaf) -> None:
        """A width that is heads times a dim stays it."""
        dims = [(leaf.value, leaf.name) for leaf in self.named[Meaning.DIM]] + [(self.dim, "")]
        pairs = [
            (leaf.name, leaf.value, name, dim)
            for leaf in self.named[Meaning.HEADS]
            for dim, name in dims
            if leaf.value > 1 and leaf.value * dim == width.value
        ]
        if pairs:
            _, count, _, dim = min(pairs, key=lambda pair: self._strangers(width.name, pair))
            self.widths[width.value] = self.few[count] * self.small_dims[dim]

    def _strangers(self, width: str, pair: tuple[str, int, str, int]) -> tuple[bool, bool]:
        """Some fit by accident: those whose names share a word (`mamba`) come first, then the attention's own."""
        heads, count, dims, dim = pair
        alike = set(width.split("_")) & set(heads.split("_")) & set(dims.split("_")) - {"d", "n", "num"}
        return not alike, (count, dim) != (self.count, self.dim)

    def _model_width(self, main: Part | None) -> int:
        if main and self.model in main.widths:
            return main.widths[self.model]
        step = math.lcm(8, self.few.get(self.count, 1))
        small = -(-NARROWEST // step) * step
        # A width that isn't heads times a dim must not become it: a test by shape or by numbers would take one for
        # the other.
        products = {few * dim for few in self.few.values() for dim in self.small_dims.values()}
        while small in products:
            small += step
        return min(small, self.model)

    def _expansion(self) -> None:
        """Where heads times a dim is the model's width times an `expand`, the dim follows: the model computes both."""
        for name, times in self.fields.items():
            if "expand" not in name:
                continue
            for count, few in self.few.items():
                for dim in self.small_dims:
                    if count > 1 and count * dim == times * self.model and times * self.small % few == 0:
                        self.small_dims[dim] = times * self.small // few


def _fractions(config: PreTrainedConfig) -> list[float]:
    """The parts of a head that rotary embeddings turn, wherever the config says so."""
    found: list[float] = []
    stack: list[object] = [vars(config)]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            found += [part for name, part in value.items() if name in FRACTIONS and isinstance(part, float)]
            stack += [item for item in value.values() if isinstance(item, dict)]
    return found
