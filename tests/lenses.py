"""What the tests of the lens, its pictures and the commands start from: a tiny GPT-2, and a lens written by hand."""

import pathlib
import sys

import torch

MODELS = str(pathlib.Path(__file__).parent / "models")
if MODELS not in sys.path:
    sys.path.insert(0, MODELS)

import tiny  # noqa: E402

from nnsight import LanguageModel  # noqa: E402
from nnsight.analysis import Lens  # noqa: E402

PROMPT = tiny.PROMPT


def tiny_gpt2():
    return LanguageModel(tiny.build("gpt2"), tokenizer=tiny.make_tokenizer())


def written(cells, tokens, *, probability=0.5, prompt=None, model="a model"):
    """A lens that says `cells`, [layer][token], each at `probability`, and "other" at half of it."""
    values = torch.tensor([probability, probability / 2]).expand(len(cells), len(tokens), 2)
    return Lens(
        values=values,
        ids=torch.zeros_like(values, dtype=torch.int64),
        words=tuple(tuple((word, "other") for word in row) for row in cells),
        tokens=tuple(tokens),
        prompt="".join(tokens) if prompt is None else prompt,
        model=model,
    )
