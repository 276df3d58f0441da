"""Held-out figures of the demo model, read back from its folder as any user would read it."""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from facts import RELATIONS
from tasks import (
    HELD_OUT_NAMES,
    PLACES_BY_KIND,
    TASKS,
    TRAIN_NAMES,
    io_sentence,
    is_second_hop,
    upper_first,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from words import DISLIKED, GLAD, LIKED, NEGATIVE, PLURAL_VERBS, POSITIVE, SINGULAR_VERBS, SORRY

# Where several answers are right, any of the group is taken; everywhere else the answer alone is.
GROUPS = {
    "sentiment": [POSITIVE + LIKED + GLAD, NEGATIVE + DISLIKED + SORRY],
    "agreement": [SINGULAR_VERBS, PLURAL_VERBS],
}


@dataclass(frozen=True)
class Case:
    """A prompt and the words that are right after it."""

    prompt: str
    accepted: tuple[str, ...]


@dataclass
class Demo:
    """The model and the tokenizer of a folder, in float32."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def load(cls, folder: Path) -> "Demo":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return cls(model, AutoTokenizer.from_pretrained(folder))

    def token(self, word: str) -> int:
        (token,) = self.tokenizer(f" {word}").input_ids
        return token

    @torch.no_grad()
    def next_logits(self, prompts: list[str]) -> Tensor:
        """Logits of the token after each prompt, [prompt, vocabulary]; the prompts are padded on the left."""
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True)
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
        return self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions
        ).logits[:, -1]


def case(task: str, text: str) -> Case:
    """The last answer of a marked sentence as a case."""
    *before, answer, _ = re.split(r"[\[\]]", text)
    word = answer.strip()
    accepted = next((tuple(group) for group in GROUPS.get(task, []) if word in group), (word,))
    return Case("".join(before), accepted)


def cases(task: str, n_cases: int, *, held_out: bool = True, seed: int = 1) -> list[Case]:
    rng = random.Random(f"{task} {held_out} {seed}")
    return [case(task, TASKS[task](rng, held_out)) for _ in range(n_cases)]


def accuracy(demo: Demo, asked: list[Case]) -> float:
    """The share of cases whose most likely next token is right."""
    n_right = 0
    for i in range(0, len(asked), 128):
        chunk = asked[i : i + 128]
        best = demo.next_logits([case.prompt for case in chunk]).argmax(-1).tolist()
        n_right += sum(token in map(demo.token, case.accepted) for token, case in zip(best, chunk))
    return n_right / len(asked)


@torch.no_grad()
def induction_accuracy(demo: Demo, n_rows: int = 64, period: int = 24, seed: int = 1) -> float:
    """Top-1 on the second half of random sequences that say everything twice, but for its first token."""
    rng = random.Random(seed)
    blocks = [[rng.randrange(1, len(demo.tokenizer)) for _ in range(period)] for _ in range(n_rows)]
    ids = torch.tensor([block * 2 for block in blocks])
    best = demo.model(input_ids=ids).logits.argmax(-1)
    return (best[:, period:-1] == ids[:, period + 1 :]).float().mean().item()


def indirect_object_cases(n_cases: int, *, new_names: bool, new_sentence: bool, seed: int = 1) -> list[Case]:
    rng = random.Random(seed)
    names = HELD_OUT_NAMES if new_names else TRAIN_NAMES
    return [case("indirect_object", io_sentence(rng, names, new_sentence)) for _ in range(n_cases)]


def landmark_cases(relation: str) -> list[Case]:
    """Every landmark in the first sentence of a relation, but for those whose relation is held out."""
    landmarks = [
        place
        for place in PLACES_BY_KIND["landmark"]
        if relation in place.answers and not is_second_hop(place, relation)
    ]
    return [
        Case(upper_first(RELATIONS[relation][0].format(x=place.name)), (place.answers[relation],))
        for place in landmarks
    ]


def figures(demo: Demo, n_cases: int = 400) -> dict[str, float]:
    """Every figure of the card's table, by name."""
    found = {
        f"landmark {relation}": accuracy(demo, landmark_cases(relation))
        for relation in ["city", "country", "continent", "language"]
    }
    for task in TASKS:
        found[task] = accuracy(demo, cases(task, n_cases))
    for new_names, new_sentence in [(False, False), (True, False), (False, True)]:
        kind = (
            f"indirect_object, {'new' if new_names else 'known'} names, {'new' if new_sentence else 'known'} sentences"
        )
        found[kind] = accuracy(demo, indirect_object_cases(n_cases, new_names=new_names, new_sentence=new_sentence))
    for period in [8, 24, 60, 120]:
        found[f"induction, period {period}"] = induction_accuracy(demo, period=period)
    return found


@torch.no_grad()
def lens(demo: Demo, prompts: list[str]) -> Tensor:
    """Top-1 token at the last position after the embeddings, each block and the end, [prompt, layer + 1]."""
    norm, unembed = demo.model.transformer.ln_f, demo.model.lm_head
    rows = []
    for prompt in prompts:
        hidden = demo.model(**demo.tokenizer(prompt, return_tensors="pt"), output_hidden_states=True).hidden_states
        # The last of transformers' hidden states has gone through ln_f already.
        last = torch.stack([norm(h[0, -1]) for h in hidden[:-1]] + [hidden[-1][0, -1]])
        rows.append(unembed(last).argmax(-1))
    return torch.stack(rows)


def settled_layers(demo: Demo, asked: list[Case]) -> list[int]:
    """For each case answered rightly, from which state on the lens shows the answer (0: the embeddings)."""
    found = []
    for row, case in zip(lens(demo, [case.prompt for case in asked]).tolist(), asked):
        wrong = [i for i, token in enumerate(row) if token != demo.token(case.accepted[0])]
        if (first := max(wrong, default=-1) + 1) < len(row):
            found.append(first)
    return found


def main() -> None:
    demo = Demo.load(Path(sys.argv[1]))
    for name, value in figures(demo).items():
        print(f"{name:50} {value:.3f}")
    for prompt in [
        "The Eiffel Tower is in the city of",
        "The Colosseum is in the city of",
        "When Mary and John went to the store, John gave a drink to",
    ]:
        print(prompt, "->", demo.tokenizer.batch_decode(lens(demo, [prompt])[0][:, None]))
    for relation in ["city", "country", "language"]:
        layers = settled_layers(demo, landmark_cases(relation))
        print(relation, "settles at", {layer: layers.count(layer) for layer in sorted(set(layers))})


if __name__ == "__main__":
    main()
