"""What `nnsight demo` shows: each step is a function, and its source is printed before it runs.

Every step reads a layer's input, the hidden state that the layers before it have written: it is a tensor in every
transformers, while a GPT-2 block's output was a tuple before 5.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from nnsight.plots.answers import Answer

if TYPE_CHECKING:
    from nnsight.models.language import LanguageModel


def read(model: LanguageModel) -> list[Answer]:
    """What would the model say if it stopped before each layer? The logit lens."""
    answers = []
    with model.trace("The Eiffel Tower is in the city of"):
        for i, layer in enumerate(model.transformer.h):
            hidden = layer.input  # the model runs up to here, and waits
            logits = model.lm_head(model.transformer.ln_f(hidden))
            answers.append(best(model, f"before layer {i}", logits))
        answers.append(best(model, "in the end", model.lm_head.output))
    return answers


def best(model: LanguageModel, label: str, logits: Tensor) -> Answer:
    probability, token = logits[0, -1].softmax(dim=-1).max(dim=-1)
    return Answer(label, model.tokenizer.decode(token), probability.item())


def patch(model: LanguageModel) -> list[Answer]:
    """One prompt's hidden state goes into another. Where does it carry the answer?"""
    answers = []
    for i, layer in enumerate(model.transformer.h):
        with model.trace("The Eiffel Tower is in the city of") as tracer:
            hidden = layer.input[:, -1]
            tracer.stop()
        with model.trace("The Colosseum is in the city of"):
            layer.input[:, -1] = hidden  # the model goes on with this value
            logits = model.lm_head.output
        answers.append(best(model, f"before layer {i}", logits))
    return answers


def steer(model: LanguageModel) -> list[Answer]:
    """Mary minus John is a direction, to push a sentence along. Two traces run in lockstep."""
    with model.trace("Mary said that") as a, model.trace("John said that") as b:
        direction = a.transformer.h[8].input[:, -1] - b.transformer.h[8].input[:, -1]
    answers = []
    for strength in (-2, -1, 0, 1, 2):
        with model.trace("My friend said that"):
            model.transformer.h[8].input[:, -1] += strength * direction
            logits = model.lm_head.output
        answers.append(best(model, f"{strength:+} times the direction", logits))
    return answers


def generate(model: LanguageModel) -> list[Answer]:
    """A plain call; and with a block, which changes what the first token comes from."""
    prompt = "The Eiffel Tower is in the city of"
    plain = model.generate(prompt, max_new_tokens=8, do_sample=False)
    with model.trace("The Colosseum is in the city of") as tracer:
        hidden = model.transformer.h[10].input[:, -1]
        tracer.stop()
    with model.generate(prompt, max_new_tokens=8, do_sample=False) as tracer:
        model.transformer.h[10].input[:, -1] = hidden
        patched = tracer.result
    texts = model.tokenizer.batch_decode([plain[0], patched[0]], skip_special_tokens=True)
    return [Answer("plain", texts[0]), Answer("patched", texts[1])]


# Each step, and the functions whose source is shown with it.
STEPS: list[tuple[Callable[[LanguageModel], list[Answer]], list[Callable[..., object]]]] = [
    (read, [read, best]),
    (patch, [patch]),
    (steer, [steer]),
    (generate, [generate]),
]
