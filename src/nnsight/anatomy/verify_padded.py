"""What is checked of a padded batch, and why it may differ from its prompts one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from nnsight.anatomy.proof import Trial, close, distance
from nnsight.anatomy.tiny.inputs import reads_end
from nnsight.errors import Error

_FAR = 1e-4


def as_alone(trial: Trial) -> Iterator[tuple[bool, str]]:
    """A padded batch is its prompts alone."""
    if "inputs_embeds" in trial.others or trial.ids.shape[0] != 2 or trial.ids.is_floating_point():
        return
    if trial.ids.ndim != 2 or reads_end(trial.model._module):
        return
    prompts = [trial.ids[0].tolist(), trial.ids[1, :4].tolist()]
    together = _together(trial, prompts)
    for i, prompt in enumerate(prompts):
        alone = _alone(trial, i, prompt)
        holds, told = close(_cut(trial, together, i, alone), alone, f"prompt {i}: ")
        yield holds, told if holds else told + _why(trial, prompts, i, together, alone)


def _together(trial: Trial, prompts: list[list[int]], **more: Any) -> Tensor:
    with trial.model.trace(prompts, **{**trial.others, **more}) as tracer:
        return trial.answer(tracer)


def _alone(trial: Trial, i: int, prompt: list[int], **more: Any) -> Tensor:
    with trial.model.trace([prompt], **{**trial.alone(i), **more}) as tracer:
        return trial.answer(tracer)


def _cut(trial: Trial, together: Tensor, i: int, alone: Tensor) -> Tensor:
    """Of a batch's logits, one prompt's own."""
    count = alone.shape[1]  # as many as the prompt has tokens, or as there are classes
    behind = trial.model._takes().side == "right"
    return together[i : i + 1, :count] if behind else together[i : i + 1, -count:]


def _why(trial: Trial, prompts: list[list[int]], i: int, together: Tensor, alone: Tensor) -> str:
    """What is known of the difference, behind its number."""
    if not trial.model._can_generate():  # it may look ahead on purpose
        return ""
    if not trial.says_tokens or alone.ndim != 3:
        return ""
    return _looks_ahead(trial, prompts, i, together, alone) or _not_with_cache(trial, prompts, i)


def _looks_ahead(trial: Trial, prompts: list[list[int]], i: int, together: Tensor, alone: Tensor) -> str:
    """A prompt's own last token changes logits in front of it: the model looks ahead."""
    changed = [list(prompt) for prompt in prompts]
    changed[i][-1] = next(token for token in prompts[0] if token != prompts[i][-1])
    other = _alone(trial, i, changed[i])
    ahead = distance(other[:, :-1], alone[:, :-1])
    other, before = (_cut(trial, one, i, alone) for one in (_together(trial, changed), together))
    within = distance(other[:, :-1], before[:, :-1])
    if max(ahead, within) <= _FAR:
        return ""
    told = f"its last token changes the logits in front of it, alone by {ahead:.1e}, in the batch by {within:.1e}"
    return f"; the model looks ahead: {told}"


def _not_with_cache(trial: Trial, prompts: list[list[int]], i: int) -> str:
    """The model goes another way where it keeps a cache, and makes no difference there."""
    if trial.others.get("use_cache") is not False:
        return ""
    try:
        alone = _alone(trial, i, prompts[i], use_cache=True)
        holds, told = close(_cut(trial, _together(trial, prompts, use_cache=True), i, alone), alone, "")
    except Error:
        return ""
    return f"; with `use_cache=True` the model makes no difference, {told}" if holds else ""
