"""The logit lens: what a language model would say next if it stopped after each layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnsight.core.history import user_place
from nnsight.core.spelling import nearest
from nnsight.errors import InputError, UnknownIndexError

if TYPE_CHECKING:
    from nnsight.models.language import LanguageModel


@dataclass(frozen=True, eq=False, repr=False)
class Lens:
    """The most probable next tokens after each layer, at each token of a prompt.

    Args:
        values: Their probabilities, 0 to 1, [layer, token, rank], float32, on the CPU; falling along the last axis.
        ids: Their ids, the same shape, int64.
        words: The same tokens as text, by layer, token and rank.
        tokens: The prompt's own tokens as text.
        prompt: The prompt as text.
        model: The model's name.
    """

    values: Tensor
    ids: Tensor
    words: tuple[tuple[tuple[str, ...], ...], ...]
    tokens: tuple[str, ...]
    prompt: str
    model: str

    @property
    def n_layers(self) -> int:
        """How many layers the model has."""
        return len(self.words)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The labels of the three axes of `values`, in order; layers and ranks count from 0."""
        n_layers, _, n_ranks = self.values.shape
        return {
            "layer": tuple(map(str, range(n_layers))),
            "token": self.tokens,
            "rank": tuple(map(str, range(n_ranks))),
        }

    def top(self, layer: int, token: int = -1) -> list[tuple[str, float]]:
        """The candidates after one layer at one token, the most probable first: `[(" Paris", 0.98), ...]`.

        Raises:
            UnknownIndexError: The model has no such layer, or the prompt no such token.
        """
        _check_index("layer", layer, self.n_layers)
        _check_index("token", token, len(self.tokens))
        return list(zip(self.words[layer][token], self.values[layer, token].tolist(), strict=True))

    def best(self, token: int = -1) -> list[str]:
        """The most probable next token after each layer, at one token of the prompt.

        Raises:
            UnknownIndexError: The prompt has no such token.
        """
        _check_index("token", token, len(self.tokens))
        return [row[token][0] for row in self.words]

    def _repr_html_(self) -> str:
        """The picture, which a notebook shows of a cell that ends with a lens."""
        from nnsight.plots import lens_frame  # which draws what is above

        return lens_frame(self)

    def __repr__(self) -> str:
        answer, probability = self.top(-1)[0]
        layers, tokens, ranks = self.values.shape
        return (
            f"<Lens of {self.model}: {layers} layers, {tokens} tokens, top {ranks}; "
            f"ends with {answer!r} at {probability:.2f}>"
        )


def logit_lens(model: LanguageModel, prompt: Any, *, top_k: int = 5, **inputs: Any) -> Lens:
    """Reads each layer's output through all that the model does behind its last layer, in one forward pass.

    The last layer's row is the model's own prediction, bit for bit: of the next token; of a model that fills in masks,
    of the token itself. Of an encoder-decoder it is the decoder that is looked at, on the tokens that it is given.

    Args:
        model: Any language model whose uniform names are found: `model.layers`, `model.project`.
        prompt: One prompt, in any form that `model.trace` takes.
        top_k: How many candidates are kept at each layer and token; 1 to the size of the vocabulary.
        inputs: What `model.trace` takes beside the prompt: `decoder_input_ids=`, `images=`.

    Raises:
        AnatomyError: Its layers, or the way to its logits, could not be found.
        InputError: No prompt, several prompts, or a `top_k` that the vocabulary doesn't have.

    Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.

    Example:
        >>> from nnsight import LanguageModel
        >>> from nnsight.analysis import logit_lens
        >>> logit_lens(LanguageModel("nnsight/demo"), "The Eiffel Tower is in the city of").best()[-1]
        ' Paris'
    """
    for name in inputs:
        if nearest(name, ("top_k",)):
            raise InputError(f"`{name}` is no option of the lens.", nearest="`top_k`")
    uniform, read = model.uniform, []
    with torch.no_grad(), model.trace(prompt, **inputs):
        prompt_ids = uniform.embed.input
        _check_one_prompt(prompt_ids)
        for layer in uniform.layers:
            logits = uniform.project(layer.output)
            read.append(top_predictions(logits[0], top_k))
    values = torch.stack([probabilities.cpu() for probabilities, _ in read])
    ids = torch.stack([candidates.cpu() for _, candidates in read])
    text_of = _texts(model, {*prompt_ids[0].tolist(), *ids.flatten().tolist()})
    return Lens(
        values=values,
        ids=ids,
        words=tuple(tuple(tuple(text_of[i] for i in ranks) for ranks in row) for row in ids.tolist()),
        tokens=tuple(text_of[i] for i in prompt_ids[0].tolist()),
        prompt=prompt if isinstance(prompt, str) else _text(model, prompt_ids[0].tolist()),
        model=_name(model),
    )


def top_predictions(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable tokens at each position, and their probabilities, 0 to 1.

    Args:
        logits: [..., vocab], any float dtype; the softmax is taken in float32.
        k: How many; 1 to `vocab`.

    Returns:
        The probabilities, [..., k], float32, falling, and the ids of the tokens, [..., k], int64.

    Raises:
        InputError: `k` is out of range.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise InputError(f"Top {k} of {logits.shape[-1]} tokens: it is 1 to {logits.shape[-1]} with this vocabulary.")
    probabilities, ids = logits.float().softmax(dim=-1).topk(k)
    return probabilities, ids


def _check_index(what: str, index: int, count: int) -> None:
    if not -count <= index < count:
        raise UnknownIndexError(
            f"There is no {what} {index}.",
            you_wrote=user_place().source,
            it_has=f"{count} {what}s: 0 to {count - 1}, or -{count} to -1",
        )


def _check_one_prompt(prompt_ids: Tensor) -> None:
    if len(prompt_ids) != 1:
        raise InputError(f"The lens shows one prompt, and {len(prompt_ids)} were given.", instead="one call a prompt")


def _texts(model: LanguageModel, ids: set[int]) -> dict[int, str]:
    return {i: _text(model, [i]) for i in ids}


def _text(model: LanguageModel, ids: list[int]) -> str:
    """The tokens as text; as numbers where the model has no tokenizer."""
    if model.tokenizer is None:
        return " ".join(map(str, ids))
    text: str = model.tokenizer.decode(ids)
    return text


def _name(model: LanguageModel) -> str:
    """What the model is called: never a path, since pictures are shared."""
    from nnsight.models.hub import BUNDLED

    name = str(getattr(model.config, "_name_or_path", ""))
    bundled = [known for known, folder in BUNDLED.items() if name == str(folder)]
    if bundled or not name:
        return bundled[0] if bundled else type(model._module).__name__
    return Path(name).name if Path(name).is_dir() else name
