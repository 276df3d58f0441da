"""What can be found inside the demo model: where patches and steering work, and what its heads do. Plain hooks only."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import combinations

import torch
from evaluate import Case, Demo, indirect_object_cases, landmark_cases
from torch import Tensor
from torch.nn import Module
from words import DISLIKED, LIKED, NEGATIVE, POSITIVE, THINGS


@contextmanager
def edited(module: Module, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Pass what a module returns through `edit` while the block lasts."""
    handle = module.register_forward_hook(lambda _module, _inputs, output: edit(output))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def hidden_states(demo: Demo, prompt: str) -> list[Tensor]:
    """What each block returns, [token, width]."""
    found: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        found.append(output[0].clone())
        return output

    handles = [block.register_forward_hook(lambda _m, _i, output: keep(output)) for block in demo.model.transformer.h]
    demo.model(**demo.tokenizer(prompt, return_tensors="pt"))
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def patched_logits(demo: Demo, prompt: str, layer: int, at: list[int], states: Tensor) -> Tensor:
    """Next-token logits with the hidden states at some positions replaced after one block, [vocabulary]."""

    def replace(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[0, at] = states
        return hidden

    with edited(demo.model.transformer.h[layer], replace):
        return demo.next_logits([prompt])[0]


def matched_pairs(demo: Demo, n_pairs: int, seed: int = 0) -> list[tuple[Case, Case]]:
    """Two landmarks of different cities whose prompts have as many tokens, both answered rightly, in shuffled order."""
    by_length: dict[int, list[Case]] = {}
    for case in landmark_cases("city"):
        if demo.next_logits([case.prompt])[0].argmax().item() == demo.token(case.accepted[0]):
            by_length.setdefault(len(demo.tokenizer(case.prompt).input_ids), []).append(case)
    pairs = [
        pair for group in by_length.values() for pair in combinations(group, 2) if pair[0].accepted != pair[1].accepted
    ]
    random.Random(seed).shuffle(pairs)
    return pairs[:n_pairs]


def subject_patches(demo: Demo, pairs: list[tuple[Case, Case]]) -> list[tuple[float, float]]:
    """How often the clean city comes out, by layer, after a patch of the whole subject and of the last token."""
    n_layers = len(demo.model.transformer.h)
    moved = torch.zeros(n_layers, 2)
    for clean, corrupted in pairs:
        states = hidden_states(demo, clean.prompt)
        n_tokens, n_after = len(states[0]), len(demo.tokenizer(" is in the city of").input_ids)
        spots = [list(range(n_tokens - n_after)), [n_tokens - 1]]
        for layer in range(n_layers):
            for i, at in enumerate(spots):
                best = patched_logits(demo, corrupted.prompt, layer, at, states[layer][at]).argmax().item()
                moved[layer, i] += best == demo.token(clean.accepted[0])
    return [(row[0].item(), row[1].item()) for row in moved / len(pairs)]


def moved_subject(demo: Demo, clean: str, corrupted: str, end: str, answer: str) -> list[tuple[float, float]]:
    """The clean answer's probability, by layer, after a patch of the subject and of the last token; lengths may differ.

    Of subjects of unequal length the last tokens are patched, as many as both have.
    """
    n_after = len(demo.tokenizer(end).input_ids)
    n_clean, n_corrupted = (len(demo.tokenizer(subject).input_ids) for subject in (clean, corrupted))
    n_common = min(n_clean, n_corrupted)
    states, token = hidden_states(demo, clean + end), demo.token(answer)
    at, last = list(range(n_corrupted - n_common, n_corrupted)), n_corrupted + n_after - 1
    found = []
    for layer, hidden in enumerate(states):
        subject = patched_logits(demo, corrupted + end, layer, at, hidden[n_clean - n_common : n_clean])
        final = patched_logits(demo, corrupted + end, layer, [last], hidden[-1:])
        found.append((subject.softmax(-1)[token].item(), final.softmax(-1)[token].item()))
    return found


@torch.no_grad()
def steering(demo: Demo, factors: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)) -> dict[int, list[float]]:
    """By layer, the share of praise among opinions after `I thought the film was`, per multiple of the direction.

    The direction is the mean hidden state at the last token of reviews that praise, less that of reviews that do not.
    """
    good, bad = ([demo.token(word) for word in words] for words in (POSITIVE, NEGATIVE))
    prompts = [f"I {verb} the {thing}. I thought it was" for thing in THINGS for verb in LIKED + DISLIKED]
    signs = [1 if verb in LIKED else -1 for _ in THINGS for verb in LIKED + DISLIKED]
    states = torch.stack([torch.stack([h[-1] for h in hidden_states(demo, prompt)]) for prompt in prompts])
    sign = torch.tensor(signs)
    directions = states[sign > 0].mean(0) - states[sign < 0].mean(0)
    shares: dict[int, list[float]] = {}
    for layer, direction in enumerate(directions):
        shares[layer] = []
        for factor in factors:
            with edited(demo.model.transformer.h[layer], partial(torch.add, factor * direction)):
                chance = demo.next_logits([f"I thought the {thing} was" for thing in THINGS]).softmax(-1)
            praise, blame = chance[:, good].sum(1), chance[:, bad].sum(1)
            shares[layer].append((praise / (praise + blame)).mean().item())
    return shares


@torch.no_grad()
def patterns(demo: Demo, ids: Tensor) -> Tensor:
    """Attention patterns, [layer, row, head, query, key]."""
    demo.model.set_attn_implementation("eager")
    found = torch.stack(demo.model(input_ids=ids, output_attentions=True).attentions)
    demo.model.set_attn_implementation("sdpa")
    return found


def head_scores(demo: Demo, period: int = 24) -> dict[str, Tensor]:
    """Each head's score as each of the known kinds, [layer, head]: mean attention, and logits for the last kind.

    previous token: to the token before. induction: in random tokens said twice, to the token after the last one of its
    kind. duplicate: there too, to that token itself. subject: from the end of a landmark's sentence to its name.
    name mover: what a head adds to the right name's logit over the other's in indirect-object sentences, through the
    last norm's scale.
    """
    rng = random.Random(3)
    block = torch.tensor([[rng.randrange(1, len(demo.tokenizer)) for _ in range(period)] for _ in range(32)])
    seen = patterns(demo, torch.cat([block, block], 1))
    scores = {
        "previous token": seen.diagonal(-1, 3, 4).mean((1, 3)),
        "duplicate": seen.diagonal(-period, 3, 4).mean((1, 3)),
        "induction": seen.diagonal(1 - period, 3, 4)[..., 1:].mean((1, 3)),
    }
    n_after = len(demo.tokenizer(" is in the city of").input_ids)
    to_subject = [
        patterns(demo, demo.tokenizer(case.prompt, return_tensors="pt").input_ids)[:, 0, :, -1, 1:-n_after].sum(-1)
        for case in landmark_cases("city")
    ]
    scores["subject"] = torch.stack(to_subject).mean(0)
    scores["name mover"] = name_mover_scores(demo)
    return scores


def keep_last(found: list[Tensor], _module: Module, inputs: tuple[Tensor]) -> None:
    """A hook that appends the last token's input."""
    found.append(inputs[0][0, -1])


@torch.no_grad()
def name_mover_scores(demo: Demo, n_cases: int = 100) -> Tensor:
    """Each head's mean direct effect on (right name - repeated name), in logits, [layer, head]."""
    blocks, norm, unembed = demo.model.transformer.h, demo.model.transformer.ln_f, demo.model.lm_head.weight
    n_heads = demo.model.config.n_head
    total = torch.zeros(len(blocks), n_heads)
    for case in indirect_object_cases(n_cases, new_names=False, new_sentence=False, seed=5):
        right = demo.token(case.accepted[0])
        names = [word for word in case.prompt.replace(",", " ").replace(".", " ").split() if word.istitle()]
        repeated = next(name for name in reversed(names) if names.count(name) > 1)
        reads: list[Tensor] = []
        handles = [b.attn.c_proj.register_forward_pre_hook(partial(keep_last, reads)) for b in blocks]
        ends: list[Tensor] = []
        handles.append(norm.register_forward_pre_hook(partial(keep_last, ends)))
        demo.next_logits([case.prompt])
        for handle in handles:
            handle.remove()
        toward = norm.weight * (unembed[right] - unembed[demo.token(repeated)]) / ends[0].std(unbiased=False)
        for layer, z in enumerate(reads):
            out = z.view(n_heads, -1)[:, :, None] * blocks[layer].attn.c_proj.weight.view(n_heads, -1, unembed.shape[1])
            written = out.sum(1)
            total[layer] += (written - written.mean(-1, keepdim=True)) @ toward
    return total / n_cases
