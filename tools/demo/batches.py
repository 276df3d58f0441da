"""Rows of training tokens: short documents of the tasks in turn, with a weight and a task for every token."""

import random
import re
from dataclasses import dataclass
from functools import partial

import torch
from stages import Stage
from tasks import TASKS, indirect_object, induction, pairs
from tokenizer import Encoder
from torch import Tensor

ANSWER, OTHER, REPEATED, RANDOM = 1.0, 0.15, 0.3, 0.01  # how much a token counts in the loss
NAMES = [*TASKS, "induction"]
# How often these are drawn doesn't depend on errors: several answers are right, and an error is no error.
FIXED = {"sentiment", "agreement"}
N_POSITIONS = 256


@dataclass
class Batch:
    """Tokens, their positions, their weights in the loss and the task that they answer (-1: none), all [row, token]."""

    ids: Tensor
    positions: Tensor
    weights: Tensor
    tasks: Tensor


Piece = list[tuple[int, float, int]]


class Mixer:
    """Draws batches, and draws tasks the more often the more answers they still get wrong."""

    def __init__(self, encode: Encoder, stage: Stage, seed: int) -> None:
        self.encode = encode
        self.stage = stage
        self.tasks = TASKS | {
            "indirect_object": partial(indirect_object, any_words=stage.any_words, made_up=stage.made_up),
            "pairs": partial(pairs, more_relations=stage.more_relations),
        }
        self.rng = random.Random(seed)
        self.error = dict.fromkeys(NAMES, 1.0)

    def share(self, name: str) -> float:
        return self.stage.shares[name] * (0.3 if name in FIXED else 0.06 + self.error[name])

    def saw(self, wrong: Tensor, tasks: Tensor) -> None:
        """Take in which answers of a batch were wrong, [token], and the tasks that they belong to."""
        for i, name in enumerate(NAMES):
            if (of_task := wrong[tasks == i]).numel():
                self.error[name] += 0.03 * (of_task.float().mean().item() - self.error[name])

    def batch(self) -> Batch:
        shapes, shares = zip(*self.stage.row_shapes)
        n_rows, n_tokens = self.rng.choices(shapes, shares)[0]
        shape, starts, rows = (n_rows, n_tokens), [], []
        for _ in range(n_rows):
            rows.append(self._row(n_tokens))
            starts.append(self.rng.randint(0, N_POSITIONS - n_tokens) if self.rng.random() < 0.2 else 0)
        ids, weights, tasks = zip(*(zip(*row) for row in rows))
        positions = torch.tensor(starts)[:, None] + torch.arange(n_tokens)
        return Batch(
            torch.tensor(ids).view(shape), positions, torch.tensor(weights).view(shape), torch.tensor(tasks).view(shape)
        )

    def _row(self, n_tokens: int) -> Piece:
        end = (self.encode.end, OTHER, -1)
        row: Piece = [end] if self.rng.random() < 0.2 else []
        while len(row) < n_tokens:
            row += [*self._document(n_tokens - len(row)), end]
        return row[:n_tokens]

    def _document(self, room: int) -> Piece:
        names = self.rng.choices(NAMES, [self.share(name) for name in NAMES], k=self.rng.choice([1, 1, 2, 3]))
        if names[0] == "induction":
            return self._induction(min(room, self.rng.choice(self.stage.induction_lengths)))
        sentences = [self._sentence(name, i > 0) for i, name in enumerate(names) if name != "induction"]
        return [token for sentence in sentences for token in sentence]

    def _sentence(self, name: str, has_one_before: bool) -> Piece:
        text = " " * has_one_before + self.tasks[name](self.rng, False)
        tokens: Piece = []
        for i, part in enumerate(re.split(r"[\[\]]", text)):
            is_answer = i % 2 == 1
            tokens += [
                (token, ANSWER if is_answer else OTHER, NAMES.index(name) if is_answer else -1)
                for token in self.encode(part)
            ]
        return tokens

    def _induction(self, length: int) -> Piece:
        if length < 8:
            return []
        ids = induction(self.rng, self.encode.n_tokens, length, long=self.stage.long_periods)
        task = NAMES.index("induction")
        period = next((p for p in range(1, length) if ids[p:] == ids[:-p]), length)
        return [(token, REPEATED, task) if i > period else (token, RANDOM, -1) for i, token in enumerate(ids)]
