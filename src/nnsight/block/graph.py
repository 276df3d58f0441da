"""Whether something can be differentiated, and if not, why."""

from __future__ import annotations

from typing import Any

import torch

from nnsight.core.graphless import reason_without_graph
from nnsight.core.history import user_frame, user_place
from nnsight.core.opened import OPEN
from nnsight.core.origins import Asked, Handed, asked_by
from nnsight.core.run import Run
from nnsight.errors import GradientError


def open_runs() -> list[Run]:
    """The runs that are open in this context, the last one first."""
    runs = [reference() for reference in reversed(OPEN.get())]
    return [run for run in runs if run is not None and run.is_open]


def check_loss(loss: Any, gradient: Any) -> None:
    """Refuses what can't be differentiated. `gradient`: of the loss itself, if it was given."""
    if not isinstance(loss, torch.Tensor):
        raise GradientError(
            f"What is differentiated is a tensor, not {type(loss).__name__}.",
            you_wrote=user_place().source,
            instead=_metric_of(loss),
        )
    check_graph(loss)
    if gradient is None and loss.numel() != 1:
        raise GradientError(
            f"A gradient is of one number, and this tensor has {loss.numel()}: {list(loss.shape)}.",
            you_wrote=_asked(loss).place.source,
            instead="loss.sum(), loss.mean(), or `gradient=` of the same shape",
        )


def check_graph(tensor: Any) -> None:
    """Refuses what no graph leads to."""
    if not isinstance(tensor, torch.Tensor):
        raise GradientError(
            f"A gradient is taken at tensors, and this is {type(tensor).__name__}.",
            you_wrote=user_place().source,
            instead="nnsight.grad(metric, at=[...]) for modules"
            if hasattr(tensor, "_module")
            else f"nnsight.grad(metric, at=model.get({tensor!r})) for a module"
            if isinstance(tensor, str)
            else None,
        )
    if not tensor.requires_grad:
        asked = _asked(tensor)
        handed = [run.history for run in open_runs() if isinstance(run.history, Handed)]
        reason = reason_without_graph(tensor, handed)
        raise GradientError(
            f"There is no gradient of {asked.label}: it has no graph.", **asked.facts, **reason._asdict()
        )


def _metric_of(value: Any) -> str | None:
    """What to write where this was given for the number that is differentiated."""
    if hasattr(value, "_module"):
        return "a number computed from its `.output`"
    if isinstance(value, (bool, int, float)):
        return "the tensor that it was made of, without .item() or float()"
    if isinstance(value, (list, tuple, dict)):
        return "one number, torch.stack(losses).sum() say; it comes first: nnsight.grad(metric, values)"
    return "the tensor that it returns: nnsight.grad(metric(), values)" if callable(value) else None


def _asked(tensor: torch.Tensor) -> Asked:
    return asked_by(user_frame(), tensor, [run.module for run in open_runs()])
