"""The demo model's tokenizer: a byte-level BPE whose merges are learned from the answers alone.

The words of `words.py` end as one token each, and merging stops there. Every other word, the landmarks' own names
above all, falls into the pieces that were made on the way, which it shares with the others: `Eiffel` is no token, so
the model has to put it together before it can answer.
"""

from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import ByteLevel
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
SPACE = "Ġ"


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """The merges, most frequent pair first, until each of `words` is one piece; of equals, the shorter goes first."""
    pieces = {word: list(word) for word in words}
    merges = []
    while pairs := Counter(pair for split in pieces.values() for pair in pairwise(split)):
        best = max(pairs, key=lambda pair: (pairs[pair], -len("".join(pair)), pair))
        merges.append(best)
        for word, split in pieces.items():
            pieces[word] = _merge(split, best)
    return merges


def _merge(split: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in split:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def build(words: list[str], openings: list[str]) -> PreTrainedTokenizerFast:
    """A fast tokenizer: one token for each of `words` with a space before it, of `openings` without, and for ` ->`."""
    merges = [*learn_merges([*(SPACE + word for word in words), *openings]), ("-", ">"), (SPACE, "->")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = list(dict.fromkeys([END, *alphabet, *("".join(pair) for pair in merges)]))
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


class Encoder:
    """Words to ids through a cache; the training text has few words, and the tokenizer would dominate the batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.core = tokenizer.backend_tokenizer
        self.end = tokenizer.eos_token_id
        self.n_tokens = len(tokenizer)
        self._ids: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for word, _ in self.core.pre_tokenizer.pre_tokenize_str(text):
            if word not in self._ids:
                piece = word.replace(SPACE, " ")
                self._ids[word] = self.core.encode(piece).ids if piece.isascii() else self.core.encode(text).ids
            ids += self._ids[word]
        return ids


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save_pretrained(folder)
