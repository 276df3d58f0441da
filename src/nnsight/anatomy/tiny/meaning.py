"""What an integer of a config counts, told from its name: tokens, heads, widths, lengths, experts, layers, or else.

Configs of transformers name the same few things in some three hundred ways (`n_embd`, `d_model`, `hidden_size`), and
a type that comes tomorrow names them in much the same words. So the words decide, not a list of types. The order of
the table matters: the first line that fits decides (`num_attention_heads_per_layer` are heads, although "layer" is in
it).
"""

from __future__ import annotations

import re
from enum import Enum

__all__ = ["Meaning", "meaning"]


class Meaning(Enum):
    """What a number counts. Numbers of one meaning are made small together, so that relations among them last."""

    KEPT = "kept"  # kernels, periods, scales, counts of parts
    TOKEN = "token"  # vocabularies, ids and offsets into them
    DIM = "dim"  # the width of one head, or a part of it
    HEADS = "heads"  # heads, and groups of heads
    EXPERTS = "experts"
    EXPERT_GROUPS = "expert groups"
    CHOSEN = "chosen"  # experts, or groups of experts, that a token goes to
    LENGTH = "length"  # positions, windows, chunks
    LAYERS = "layers"  # how many there are
    LAYER = "layer"  # the index of one
    WIDTH = "width"


WORDS = [
    (
        Meaning.KEPT,
        r"theta|multipl|scalar|scale|divisible|buckets|interval|period|freq|every|pattern|floor|max_distance|_step$|seed",
    ),
    (
        Meaning.KEPT,
        r"num_labels|chunk_size_feed_forward|layer_group|model_base|tokens_per|samples_per|hop_length|_rate|ratios",
    ),
    (
        Meaning.KEPT,
        r"kernel|filter_width|stride|image_(size|seq)|patch_size|crop_size|num_(mel|patches|position_embeddings)",
    ),
    (
        Meaning.TOKEN,
        r"token_(id|index)|^(pad|bos|eos|eod|unk|mask|sep|cls|lang)_(id|index|idx)|suppress_tokens|vocab|codebook_size",
    ),
    (Meaning.DIM, r"head_?(dim|size)|(^|_)d(im)?_head$|^d_kv$|kv_channels|rotary_n?dims?"),
    (Meaning.EXPERT_GROUPS, r"^n_group$|expert_groups?$"),
    (Meaning.CHOSEN, r"experts_per_tok|(moe|num|expert)s?_top_?k$|^top_?k$|^moe_k$|topk_group"),
    (Meaning.KEPT, r"shared_experts?$"),
    (Meaning.EXPERTS, r"(^|_)experts?$|expert_num|num_experts?$"),
    (Meaning.HEADS, r"heads?($|_per_layer$)|(^|_)n_?groups$|(query|o|norm)_groups$"),
    (Meaning.LAYERS, r"(?<!attention_)layers?$|(^|_)num_blocks$|^depth$"),
    (Meaning.LAYER, r"layers?_(ids|idx|idxs|indices|index)|attn_(ids|idxs|indexes|indices)|_layers$"),
    (Meaning.WIDTH, r"hidden_size|intermediate_size|embed_dim|hidden_dim|lora_rank|feed_forward_size"),
    (
        Meaning.LENGTH,
        r"position|(^|_)ctx$|seq_len|length|window|chunk|block_size|mem_len|rel_extent|index_topk|local_attention",
    ),
]
TABLE = [(what, re.compile(pattern)) for what, pattern in WORDS]

# A number up to the first is small enough as it is. An unknown one up to the second is a count of something (channels
# of an image, a kernel); above, it is taken for a width, since one that stays makes the model large.
SMALL, SURELY_WIDE = 8, 64
WIDE_WORDS = re.compile(r"size$|dims?$|width|d_model|embd?$|inner|dff|dim_ff|rank$|state|d_ssm|channels?$|filters$")


def meaning(name: str, value: int) -> Meaning:
    """What the number `value` of a config's field `name` (or `field.key`, whose key speaks first) counts."""
    for part in reversed(name.split(".")):
        for what, words in TABLE:
            if words.search(part):
                return what
    return Meaning.WIDTH if value > (SMALL if WIDE_WORDS.search(name) else SURELY_WIDE) else Meaning.KEPT
