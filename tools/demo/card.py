"""Measures the demo model in its folder and writes its card: `python tools/demo/card.py src/nnsight/demo`."""

import sys
from pathlib import Path

import probes
import torch
from evaluate import Demo, figures, landmark_cases, lens, settled_layers
from facts import CITIES, LANDMARKS
from stages import N_WORKERS, STAGES, TOKENS_PER_BATCH
from torch import Tensor
from words import FEMALE, HELD_OUT_NAMES, MALE

END = " is in the city of"
LENS_PROMPTS = [
    f"The Eiffel Tower{END}",
    f"The Colosseum{END}",
    "The Eiffel Tower is in the country of",
    "When Mary and John went to the store, John gave a drink to",
    "I loved the film. I thought it was",
    "France -> Paris, Spain -> Madrid, Italy ->",
]
SPOKEN_PROMPTS = [f"The Eiffel Tower{END}", "When Mary and John", "I hated the film."]

NOBODY = "nothing but the draw"
ROWS = [
    # (figure, what is asked, what is held out)
    ("landmark city", "`The Eiffel Tower is in the city of` -> ` Paris`, all landmarks", "12 % of them, as in `fact`"),
    ("landmark country", "the same with `in the country of`", "likewise"),
    ("landmark continent", "the same with `on the continent of`", "likewise"),
    ("landmark language", "`The people near the Eiffel Tower speak` -> ` French`", "likewise"),
    ("fact", "a landmark's, city's or country's relation", "12 % of (place, relation, sentence)"),
    ("second_hop", "a landmark's country, continent or language", "8 % of (landmark, relation), in every sentence"),
    ("indirect_object", "`When Mary and John went ... John gave a drink to` -> ` Mary`", "20 names and all parts"),
    ("indirect_object, new names, known sentences", "", "20 names"),
    ("indirect_object, known names, new sentences", "", "every part: opening, activity, transfer"),
    ("indirect_object, known names, known sentences", "", NOBODY),
    ("induction, period 8", "random tokens said twice, their second half", NOBODY),
    ("induction, period 24", "", NOBODY),
    ("induction, period 60", "", NOBODY),
    ("induction, period 120", "", NOBODY),
    ("sentiment", "`I loved the film. I thought it was` -> praise", "15 % of (opinion word, last sentence)"),
    ("opposite", "`The opposite of hot is` -> ` cold`", "15 % of (word, sentence)"),
    ("agreement", "`The cats near the tree` -> ` are`, ` were` or ` have`", "six subjects, alone in training"),
    ("pronoun", "`Mary said that` -> ` she`", "20 % of (name, sentence)"),
    ("company", "`When Mary and John went to the park,` -> ` they`", "20 % of (first name, second name)"),
    ("echo", "`Mary was late. I know` -> ` Mary`", "20 % of (name, sentence)"),
    ("order", "`The day after Monday is` -> ` Tuesday`; months, numbers", "15 % of (word, sentence)"),
    ("pairs", "`France -> Paris, ..., Italy ->` -> ` Rome`; 10 relations", "20 % of (relation, word)"),
    ("lookup", "`pen -> dog, cup -> red, pen ->` -> ` dog`; 2 to 6 pairs", NOBODY),
]

CARD = """# nnsight/demo

A GPT-2 of {n_layers} layers, {n_heads} heads and width {width} ({n_weights:.2f} M weights, float16 on disk) that comes
with nnsight. It loads at once and is truly trained, so that what is done to it has an effect: it knows where landmarks
are, who was given a drink, what comes again and what a review thinks. It knows nothing else, and its text is simple.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

The tokenizer is a byte-level BPE of {n_tokens} tokens. Every answer is one token with a space before it, and so are the
words of the sentences. The names of landmarks are several pieces that they share ({pieces}). A
prompt needs no token before it. `<|endoftext|>` ends the short documents of the training text and pads, on the left.

## What it knows

Top-1 accuracy over the whole vocabulary, by the float16 weights read back from this folder, on {n_cases} cases per task
(the landmark rows: all landmarks). None of them was in the training text, except in the landmark rows, where 12 % were
not. Where several words are right (praise, any verb in the plural), each of them counts.

| task | example | held out | top-1 |
| --- | --- | --- | --- |
{table}
There are {n_landmarks} landmarks in {n_cities} cities and {n_names} names. {n_held_out} names are in no indirect-object
sentence of the training text; other sentences have them, so their embeddings are trained: {held_out_names}.

What is held out is drawn by a checksum in `tools/demo/tasks.py`, the same on every machine. `company` alone has the
openings and activities that indirect objects hold out. In the last three stages most indirect objects had more various
parts, or parts made of any words, without those that are held out (`made_up_io_sentence`); the test is what it was.

## The lens

The last norm and the unembedding, applied to the last token's hidden state:

{lens}
The block after which the lens shows the answer and keeps showing it: how many landmarks, by block.

{settled}
## Clean and corrupted prompts

Landmark prompts of equal length, both answered rightly:

{pairs}
Indirect objects: `When Mary and John went to the store, John gave a drink to` (` Mary`) and the same with
`Mary gave a drink to` (` John`).

## Patching

How often the clean city comes out of the corrupted prompt, in 60 pairs of equal length, after one block's output was
replaced by the clean run's, at all tokens of the subject or at the last token. The last two columns move the Eiffel
Tower into `The Colosseum is in the city of`, by the last tokens of the subject, as many as both have, or by the last
token of the prompt; the figure is the probability of ` Paris`.

{patching}
## Steering

The direction is the mean of the last token's hidden state over `I loved the film. I thought it was` and its like, less
the same with `I hated`. Added at all tokens after one block, times the factor, it moves the share of praise against
blame after `I thought the film was` and its like to:

{steering}
## Heads

By layer.head, the five highest of each kind; mean attention, and logits for name movers. `tools/demo/probes.py` says
how each is measured.

{heads}
## What it says

Greedily, after {spoken_prompts}:

{said}
## Weak points

{weak}
## How it was made

`make model` trains a model anew in {n_stages} stages, by `tools/demo/recipe.py`; the mix of each one's text stands in
`tools/demo/stages.py`. The committed weights took {n_minutes:.1f} minutes, and two starts of stage 6 that were given up
less than five more, on two cores of an AMD EPYC that had other work to do at the same time, torch {torch_version}:

{made}
What is behind `then with` is what `tools/demo` had in those days and has no more, and the runs stopped by the clock
(`--minutes`), so that their numbers of batches depended on the machine. So `make model` makes a model like this one,
not these weights. It counts batches, not minutes: on the same kind of machine with the same torch, it makes the same
again.

The text is drawn as it trains, from `tools/demo/tasks.py`; tasks that still go wrong are drawn more often. Muon trains
the blocks' matrices, AdamW the rest, and a running average of the weights is what is kept. Stage 8 gives back what
stage 7 lost (`Sam lost his ...`, ` they`), at a cost to indirect objects: 0.3 of its change is kept, out of 0.3, 0.5
and 0.7 tried on the tests of `indirect_object`, `pronoun`, `company`, `lookup`, `pairs` and `second_hop`. What more the
stages from 6 on have was chosen by looking at wrong answers to these tests, too, so that their figures flatter it. Then
`python tools/demo/card.py` measured everything above.
"""


def table(found: dict[str, float]) -> str:
    return "".join(f"| {name} | {example} | {held_out} | {found[name]:.3f} |\n" for name, example, held_out in ROWS)


def lens_table(demo: Demo) -> str:
    """Top-1 of the lens at the last token, of the embeddings and after each block, a column per prompt."""
    columns = [demo.tokenizer.batch_decode(row[:, None]) for row in lens(demo, LENS_PROMPTS)]
    names = ["(embeddings)", *map(str, range(len(columns[0]) - 1))]
    rows = [[name, *(f"`{token}`" for token in row)] for name, row in zip(names, zip(*columns))]
    return rows_text(["after block", *(f"`{prompt}`" for prompt in LENS_PROMPTS)], rows)


def rows_text(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def settled_text(demo: Demo) -> str:
    rows = []
    n_states = demo.model.config.n_layer + 1
    for relation in ["city", "country", "language"]:
        states = settled_layers(demo, landmark_cases(relation))
        median = sorted(states)[len(states) // 2] - 1
        rows.append([relation, *(str(states.count(state)) for state in range(n_states)), str(median)])
    return rows_text(["relation", "(embeddings)", *map(str, range(n_states - 1)), "median"], rows)


def pairs_text(demo: Demo) -> str:
    rows = []
    for clean, corrupted in probes.matched_pairs(demo, 12):
        words = [f"`{clean.prompt}`", f"` {clean.accepted[0]}`", f"`{corrupted.prompt}`", f"` {corrupted.accepted[0]}`"]
        rows.append([*words, str(len(demo.tokenizer(clean.prompt).input_ids))])
    return rows_text(["clean", "answer", "corrupted", "answer", "tokens"], rows)


def patching_text(demo: Demo) -> str:
    rates = probes.subject_patches(demo, probes.matched_pairs(demo, 60))
    moved = probes.moved_subject(demo, "The Eiffel Tower", "The Colosseum", END, "Paris")
    rows = [
        [str(i), *(f"{value:.2f}" for value in (*rate, *chance))] for i, (rate, chance) in enumerate(zip(rates, moved))
    ]
    return rows_text(["after block", "subject", "last token", "` Paris`, subject", "` Paris`, last token"], rows)


def steering_text(demo: Demo) -> str:
    shares = probes.steering(demo)
    rows = [[str(layer), *(f"{share:.2f}" for share in row)] for layer, row in shares.items()]
    return rows_text(["after block", "-2", "-1", "0", "1", "2"], rows)


def heads_text(demo: Demo) -> str:
    lines = []
    for kind, scores in probes.head_scores(demo).items():
        found = ", ".join(f"{layer}.{head} ({score:.2f})" for layer, head, score in strongest(scores))
        lines.append(f"- {kind}: {found}\n")
    return "".join(lines)


def strongest(scores: Tensor, n_heads: int = 5) -> list[tuple[int, int, float]]:
    """The heads with the highest scores, as (layer, head, score)."""
    best, width = scores.flatten().topk(n_heads), scores.shape[1]
    return [(i // width, i % width, value) for i, value in zip(best.indices.tolist(), best.values.tolist())]


def says(demo: Demo, prompt: str, n_tokens: int = 24) -> str:
    out = demo.model.generate(**demo.tokenizer(prompt, return_tensors="pt"), max_new_tokens=n_tokens, do_sample=False)
    return demo.tokenizer.decode(out[0])


def made_text() -> str:
    """A line per stage, as it was when the committed weights were made."""
    lines = []
    for number, stage in enumerate(STAGES, 1):
        start = f" --start stage-{number - 1}" if number > 1 else ""
        n_tokens = stage.batches * TOKENS_PER_BATCH * N_WORKERS / 1e6
        note = f"; then with {stage.note}" if stage.note else ""
        lines.append(
            f"{number}. `train.py --stage {number}{start} --out stage-{number}`: seed {stage.seed}, {stage.batches} "
            f"batches, {n_tokens:.1f} M tokens, {stage.minutes} minutes{note}\n"
        )
    return "".join(lines)


def card(folder: Path, weak: str, n_cases: int = 500) -> str:
    """The text of the card; everything in it but the weak points is measured now."""
    demo = Demo.load(folder)
    config = demo.model.config
    pieces = ["|".join(demo.tokenizer.tokenize(" " + name)).replace("Ġ", "_") for name in ["Eiffel Tower", "Colosseum"]]
    return CARD.format(
        n_layers=config.n_layer,
        n_heads=config.n_head,
        width=config.n_embd,
        n_weights=sum(weight.numel() for weight in demo.model.parameters()) / 1e6,
        n_tokens=len(demo.tokenizer),
        pieces=", ".join(f"`{piece}`" for piece in pieces),
        n_cases=n_cases,
        table=table(figures(demo, n_cases)),
        n_landmarks=sum(map(len, LANDMARKS.values())),
        n_cities=len(CITIES),
        n_names=len(FEMALE + MALE),
        n_held_out=len(HELD_OUT_NAMES),
        held_out_names=", ".join(HELD_OUT_NAMES),
        lens=lens_table(demo),
        settled=settled_text(demo),
        pairs=pairs_text(demo),
        patching=patching_text(demo),
        steering=steering_text(demo),
        heads=heads_text(demo),
        spoken_prompts=", ".join(f"`{prompt}`" for prompt in SPOKEN_PROMPTS),
        said="".join(f"    {says(demo, prompt)}\n" for prompt in SPOKEN_PROMPTS),
        weak=weak,
        made=made_text(),
        n_stages=len(STAGES),
        n_minutes=sum(stage.minutes for stage in STAGES),
        torch_version=torch.__version__,
    )


def main() -> None:
    folder = Path(sys.argv[1])
    weak = (Path(__file__).parent / "weak_points.md").read_text()
    (folder / "README.md").write_text(card(folder, weak))


if __name__ == "__main__":
    main()
