"""The prompts of a pipeline's run, and where each one's rows are in what its parts work on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnsight.block.cuts import Batch, Knife
from nnsight.block.rows import Rows
from nnsight.block.shares import Shares
from nnsight.core.axes import Axes, Axial, Path
from nnsight.core.history import user_place
from nnsight.core.measuring import measure
from nnsight.core.run import Run
from nnsight.core.specs import Inputs, specs_in
from nnsight.core.stages import Stages
from nnsight.core.state import Visit
from nnsight.core.values import mapped
from nnsight.errors import InputError, RowError

PROMPTS = ("prompt", "prompt_embeds", "image", "class_labels", "batch_size")  # what says how many there are
_PER_PROMPT = frozenset({"prompt", "class_labels", "image", "mask_image", "latents", "generator"})


def _is_per_prompt(name: str) -> bool:
    return name in _PER_PROMPT or name.startswith(("prompt_", "negative_", "pooled_"))


def n_prompts(given: Mapping[str, Any]) -> int:
    """How many prompts a pipeline was given."""
    for name in PROMPTS:
        value = given.get(name)
        if isinstance(value, int) and name == "batch_size":
            return value
        if isinstance(value, (list, tuple, Tensor)):
            return len(value)
        if value is not None:
            return 1
    return 1


def together(given: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[int]]:
    """The inputs of several invokes as those of one run, and how many prompts each has.

    Raises:
        InputError: They have no common form.
    """
    counts = [n_prompts(one) for one in given]
    if len(given) == 1:
        return given[0], counts
    names = dict.fromkeys(name for one in given for name in one)
    return {name: _joined(name, [one.get(name) for one in given], counts) for name in names}, counts


def _joined(name: str, values: list[Any], counts: list[int]) -> Any:
    if not _is_per_prompt(name):
        if all(value is values[0] or _equal(value, values[0]) for value in values):
            return values[0]
        raise InputError(
            f"`{name}` holds for the whole batch, and the invokes give several.",
            they_gave=", ".join(map(repr, values))[:300],
            instead=f"{name}=... to the trace itself, for all of them",
        )
    if any(value is None for value in values):
        if name == "generator" or not name.startswith("negative_prompt") or isinstance(values[0], Tensor):
            have = sum(value is not None for value in values)
            called = "seed" if name == "generator" else name
            raise InputError(f"{have} of {len(values)} invokes have `{called}`, and in one batch all of them need it.")
        values = ["" if value is None else value for value in values]
    if all(isinstance(value, Tensor) for value in values):
        return torch.cat(values)
    lists = [
        [*value] if isinstance(value, (list, tuple)) else [value] * count
        for value, count in zip(values, counts, strict=True)
    ]
    if name == "generator" and any(len(one) != 1 and one[0] is one[-1] for one in lists):
        raise InputError(
            "A generator draws for one image after the other, and the invokes are one batch.", instead="seed=..."
        )
    return [item for one in lists for item in one]


def _equal(one: Any, other: Any) -> bool:
    return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)


class PipelineRows(Rows):
    """The rows of a pipeline's run. Each part of it has its own: a text encoder one a prompt, a denoiser one an image.

    Which axis they are on is measured for each part by itself, on what it was called with.

    Args:
        images: How many each prompt has.
    """

    def __init__(self, run: Run, batch: Batch, images: int) -> None:
        super().__init__(run, batch, None)
        self._images = images

    def shares(self, module: nn.Module, visit: Visit) -> Shares:
        if visit.shares is None:
            part, inputs, step = self._part_of(module)
            measured = self._measured_on(part, inputs)
            visit.shares = Shares(
                self._knife(inputs, step),
                partial(_axes, measured, module),
                self.run.outer.label(module),
            )
        return visit.shares

    def part_of_result(self, result: Any, index: int) -> Any:
        """A part's own images; what else the pipeline returns with one entry an image is cut too."""
        part = self.batch.part(index)
        each = self.batch.count * self._images
        first, last = part.start * self._images, part.stop * self._images

        def cut(value: Any) -> Any:
            if isinstance(value, (list, np.ndarray, Tensor)) and len(value) == each:
                return value[first:last]
            new = mapped(value, lambda _, item: cut(item))
            return value if new is None else new

        return cut(result)

    def result_shares(self, result: Any) -> Shares:
        raise RowError(
            "One row's part of a pipeline's output can't be assigned.",
            you_wrote=user_place().source,
            instead="tracer.result = ..., for the whole batch",
        )

    def _part_of(self, module: nn.Module) -> tuple[nn.Module, Inputs, int]:
        """The outermost module around this one that the pipeline called, what it was called with, and in which step."""
        counter = self.run.counter
        if not isinstance(counter, Stages):
            raise RowError(
                "A scan of a pipeline has no rows: it is not told what each part is called with.",
                you_wrote=user_place().source,
                instead=f"the whole batch in the scan: model.{self.run.outer.label(module)}",
            )
        around = [one for one in (module, *self.run.tree.above(module)) if one in counter.calls]
        if not around:
            raise RowError(
                f"The rows of `{self.run.outer.label(module)}` aren't known: a pipeline's parts have rows.",
                you_wrote=user_place().source,
                instead="row.result, or a value inside a part: row.unet..., row.vae...",
            )
        part = max(around, key=lambda one: -len(self.run.tree.above(one)))
        return part, *counter.calls[part]

    def _knife(self, inputs: Inputs, step: int) -> Knife:
        rows = next((spec.shape[0] for _, spec in specs_in(inputs) if spec.shape), 0)
        each = max(rows // self.batch.count, 1)
        images = self._images if step >= 0 and each % self._images == 0 else 1
        return Knife(self.batch, images, 0, each // images)

    def _measured_on(self, part: nn.Module, inputs: Inputs) -> Axial:
        if part not in self._measured:
            guesses = self._guesses(inputs)
            self._measured[part] = Axial(partial(measure, self.run.outer, part, None, inputs, guesses, None))
        return self._measured[part]


def _axes(measured: Axial, module: nn.Module, kind: str, path: Path, tensor: Tensor) -> Axes | Any:
    return measured.of(module, kind, path, tensor, 0)
