"""Why a gradient can't be had, or can't be changed any more, and what to write instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nnsight.core.history import Place
from nnsight.core.origins import Asked
from nnsight.errors import AlreadyPastError, GradientError, IndependentError, WriteError

if TYPE_CHECKING:
    from nnsight.core.backward import Backward
    from nnsight.core.backward_ports import GradientPort


def why(backward: Backward, port: GradientPort, asked: Asked, loss: torch.Tensor) -> Exception:
    """Why the gradient that was waited for did not come."""
    if port is backward.state.at:  # where torch hands on None
        return independent(asked, backward.place)
    if port.in_checkpoint:
        return GradientError(
            f"The gradient of {asked.label} comes in parts, one a reentrant checkpoint, and can't be caught.",
            **asked.facts,
            instead="checkpoint with use_reentrant=False, or read t.grad after the block",
        )
    return past(backward, asked) if _depends(loss, port.tensor) else independent(asked, backward.place)


def late(backward: Backward, asked: Asked) -> WriteError:
    """For what is assigned, or changed in place, where the pass has run beyond it."""
    stands = backward.asked[-1] if backward.asked else None
    return WriteError(
        f"The gradient of {asked.label} can't be changed any more: the backward pass has run beyond it.",
        **asked.facts,
        it_stood=f"at the gradient of {stands.label}, since {stands.place.quoted}" if stands else None,
        instead="change the gradients of several rows from the last row to the first",
    )


def past(backward: Backward, asked: Asked) -> AlreadyPastError:
    """For what is asked where the pass has run beyond it."""
    all_asked = backward.asked
    before = [one for one in all_asked if one.tensor() is asked.tensor()]
    others = [one for one in all_asked if one.tensor() is not asked.tensor()]
    tensor = asked.tensor()
    in_any_order = "nnsight.grad(loss, [a, b])"
    return AlreadyPastError(
        f"The gradient of {asked.label} is past: the backward pass had run beyond it when you asked.",
        **asked.facts,
        before=f"asked at {before[-1].place.quoted}" if before else None,
        it_stood=f"at the gradient of {others[-1].label}, since {others[-1].place.quoted}" if others else None,
        instead="keep the value from there in a variable"
        if before
        else "leave `inputs=` out, or name this tensor there too"
        if backward.restricted
        else f"ask earlier, or read it after the block, where `.grad` is torch's own, or use {in_any_order}"
        if tensor is not None and tensor.is_leaf
        else f"ask in the reverse order of the forward pass, or in any order: {in_any_order}",
    )


def independent(asked: Asked, loss: Place) -> IndependentError:
    """For what the loss was not computed from; `loss`: where its backward pass was opened."""
    tensor = asked.tensor()
    instead = "compute the loss from this very tensor, not from a copy, a .detach() or what was there before a write"
    if tensor is not None and tensor._is_view() and not asked.is_part:
        instead = (
            "take the part of the gradient, `t.grad[0]`: `t[0]` is a new tensor each time, which the loss never saw"
        )
        if tensor._version:  # that of the whole, and counted for all its parts
            instead += (
                "; or, if it was changed in place behind that, read a copy before: part = layer.output[:, -1].clone()"
            )
    return IndependentError(
        f"The loss does not depend on {asked.label}, so that there is no gradient.",
        **asked.facts,
        loss=loss.quoted if loss != asked.place else None,
        instead=instead,
    )


def _depends(loss: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether the graph of `loss` leads to `tensor`. Walks the graph; asked only when something went wrong."""
    wanted = torch.autograd.graph.get_gradient_edge(tensor)
    edge = torch.autograd.graph.get_gradient_edge(loss)
    seen, todo = {(edge.node, edge.output_nr)}, [edge.node]
    nodes = {edge.node}
    while todo:
        for node, number in todo.pop().next_functions:
            if node is None:
                continue
            seen.add((node, number))
            if node not in nodes:
                nodes.add(node)
                todo.append(node)
    return (wanted.node, wanted.output_nr) in seen
