"""`nnsight.grad`: gradients at tensors, or at the outputs of modules, in any order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from nnsight.block.graph import check_graph, check_loss, open_runs
from nnsight.core.backward_missed import independent
from nnsight.core.finite import all_finite, is_finite, warn_not_finite
from nnsight.core.graphless import reason_without_graph
from nnsight.core.history import user_frame, user_place
from nnsight.core.origins import Handed, asked_by, explain_changed
from nnsight.core.run import Run
from nnsight.errors import BlockError, GradientError, OutsideTraceError


@overload
def grad(
    metric: torch.Tensor,
    of: torch.Tensor,
    *,
    gradient: torch.Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
) -> torch.Tensor: ...
@overload
def grad(
    metric: torch.Tensor,
    of: list[torch.Tensor],
    *,
    gradient: torch.Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
) -> list[torch.Tensor]: ...
@overload
def grad(
    metric: torch.Tensor,
    of: Any = None,
    *,
    at: Any = None,
    gradient: torch.Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool = False,
) -> Any: ...


def grad(
    metric: torch.Tensor,
    of: Any = None,
    *,
    at: Any = None,
    gradient: torch.Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool = False,
) -> Any:
    """The gradients of `metric`, in any order, and none is accumulated: `nnsight.grad(metric, [a, b])`.

    Args:
        metric: What is differentiated: one number, or any shape with `gradient`.
        of: A tensor, or tensors in lists, tuples and dicts.
        at: Instead of `of`, a module of the open trace, a list of them or a `ModuleList`: the gradients at their
            outputs, which must have been read in this block before `metric` was computed. What was read last counts.
        gradient: The gradient of `metric` itself, of the same shape.
        retain_graph: As in `torch.autograd.grad`.
        create_graph: The same.
        allow_unused: Whether a tensor that `metric` does not depend on has None for a gradient, rather than an error.

    Returns:
        The gradients in the form of `of`: of a tensor a tensor of its shape and dtype, of a list a list. Of `at`, in
        the form of the modules' outputs, with None for what has no graph.

    Raises:
        GradientError: `metric` or one of the tensors has no graph, or `metric` is more than one number.
        IndependentError: `metric` does not depend on one of the tensors.
    """
    if (of is None) == (at is None):
        raise BlockError(
            "`nnsight.grad` takes either tensors or modules.",
            you_wrote=user_place().source,
            instead="nnsight.grad(metric, [a, b])    or nnsight.grad(metric, at=[model.h[3], model.h[5]])",
        )
    check_loss(metric, gradient)
    wanted = _outputs(at) if of is None else of
    leaves, form = tree_flatten(wanted)
    differentiated = [leaf for leaf in leaves if of is not None or _has_graph(leaf)]
    for leaf in differentiated:
        check_graph(leaf)
    try:
        grads = torch.autograd.grad(
            metric,
            differentiated,
            None if gradient is None else (gradient,),
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
    except RuntimeError as error:
        explain_changed(error)
        raise
    _check_gradients(differentiated, grads, allow_unused)
    found = iter(grads)
    return tree_unflatten([next(found) if of is not None or _has_graph(leaf) else None for leaf in leaves], form)


def _outputs(at: Any) -> Any:
    """For each module, the output that its run handed out in this block."""
    several = not hasattr(at, "_module") and not isinstance(at, (torch.Tensor, str, nn.Module))
    several = several or isinstance(getattr(at, "_module", None), nn.ModuleList)
    return [_output(one) for one in at] if several and isinstance(at, Iterable) else _output(at)


def _output(node: Any) -> Any:
    if not hasattr(node, "_run_or_none"):
        raise BlockError(
            f"`at=` takes modules of the model, as `model.h[3]` is one, and this is {type(node).__name__}.",
            you_wrote=user_place().source,
            instead="nnsight.grad(metric, [a, b])    for values"
            if isinstance(node, torch.Tensor)
            else f"at=model.get({node!r})"
            if isinstance(node, str)
            else "nnsight.grad(metric, values), of values that the block has read",
        )
    run: Any = node._run_or_none()
    if run is None:
        raise OutsideTraceError(
            "`at=` takes modules of a trace that is open.",
            you_wrote=user_place().source,
            instead="nnsight.grad(metric, [a, b]), with the values that were read",
        )
    if not isinstance(run, Run):
        raise BlockError(
            "`at=` takes modules of the whole batch, not of a row.",
            you_wrote=user_place().source,
            instead="nnsight.grad(metric, [a, b]), with the values of the row that were read",
        )
    label = f"{run.tree.label(node._module)}.output"
    key = node._module, "output"
    if not isinstance(run.history, Handed):
        raise BlockError(
            "`at=` works in the code that opens the trace: only there is it kept which values were read.",
            you_wrote=user_place().source,
            instead="nnsight.grad(metric, [a, b]), with the values that were read",
        )
    if key not in run.history.values:
        seen = [one.verb for one in run.history if one.module is node._module and one.kind == "output"]
        if "read" in seen:
            reason = reason_without_graph(torch.empty(()), [run.history])
            raise GradientError(f"`{label}` has no graph.", you_wrote=user_place().source, **reason._asdict())
        raise BlockError(
            f"`{label}` was {'written, and ' if seen else ''}not read in this trace, so that its value is gone.",
            you_wrote=user_place().source,
            instead=f"read `{label}` {'behind the write' if seen else 'before the metric is computed'}",
        )
    return run.history.values[key]


def _has_graph(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _check_gradients(tensors: list[torch.Tensor], grads: Any, allow_unused: bool) -> None:
    modules = [run.module for run in open_runs()]
    for tensor, gradient in zip(tensors, grads, strict=True):
        if gradient is None and not allow_unused:
            asked = asked_by(user_frame(), tensor, modules)
            raise independent(asked, asked.place)
    if not all_finite([gradient for gradient in grads if gradient is not None]):
        found = zip(tensors, grads, strict=True)
        first = next(tensor for tensor, gradient in found if gradient is not None and not is_finite(gradient))
        warn_not_finite(asked_by(user_frame(), first, modules))
