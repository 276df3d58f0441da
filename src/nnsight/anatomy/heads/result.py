"""What each head adds: its part of z through its part of the output projection, [prompt, token, head, model].

The model never makes these: it multiplies by the whole matrix at once. They are made when they are asked for, where
that matrix has been called; what a block assigns, or changes in them in place, becomes that call's output, summed over
the heads, with the bias. Where no plain matrix is kept, they are what the module makes of each head's part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nnsight.anatomy.checked import check_tensor
from nnsight.anatomy.effective import by_heads, constant_of
from nnsight.anatomy.heads.weights import Heads
from nnsight.block.rows import RowRun, whole_of
from nnsight.core.axes import Axes
from nnsight.core.escape import let_escape
from nnsight.core.history import user_place
from nnsight.core.run import Run
from nnsight.core.specs import shape_of, show_shape
from nnsight.core.state import Visit
from nnsight.errors import WriteError
from nnsight.views import Views

if TYPE_CHECKING:
    from nnsight.node import Node

_AXES: Axes = ("row", "token", "", "")


def read_result(heads: Heads, name: str) -> Tensor:
    """What each head adds, [prompt, token, head, model]: in place of what stands there, once it is changed in place."""
    projection = _projection(heads)
    node = projection.node
    try:
        run = node._run(name)
        visit = run.read(node._module, "output")
        if visit.port is None:  # of a call of the block's own, which is over
            return projection.made(_given(visit))
        maker = projection.maker(name)
        raw: Tensor = visit.output
        if had := Views.of(run).find(maker, run, raw):
            known: Tensor = had[0]
            return known
        assigned = _assigned(node, run)
        result = projection.made(_given(run.here(node._module, "input"))) if assigned is None else assigned
        if assigned is None and result.requires_grad and torch.is_grad_enabled():
            raw = _led_through(node, run, result, projection.constant(result))
        whole_of(run).history.call("result", shape_of(result))
        Views.of(run).add(maker, node, raw, result)
        return result
    except AttributeError as error:  # the model's own
        let_escape(error)
        raise


def write_result(heads: Heads, name: str, value: Any) -> None:
    """Has the output projection return the sum of this over the heads, and its bias."""
    projection = _projection(heads)
    node = projection.node
    check_tensor(value, f"`{name}`")
    run = node._run(name)
    visit = run.read(node._module, "output")
    maker = projection.maker(name)
    if any(value is had for had in Views.of(run).find(maker, run, visit.output)):  # what was read passes untouched
        return
    shape = (*visit.output.shape[:-1], projection.n_heads, visit.output.shape[-1])
    if value.shape != shape:
        raise WriteError(
            f"`{name}` has another shape than what you assigned.",
            you_wrote=user_place().source,
            it_has=f"[{', '.join(map(str, shape))}]",
            you_gave=show_shape(shape_of(value)),
        )
    maker.write_back(node, value, visit.output)
    Views.of(run).add(maker, node, _standing(node, run), value)
    whole_of(run).history.call("result", shape_of(value))


@dataclass(frozen=True)
class _Projection:
    """What z goes through.

    Attributes:
        node: Its module, in this run.
        n_heads: How many heads there are.
        d_value: How wide z is, of each.
        weight: Its matrix, [head, d_head, model]; None: the module keeps none that is plain, and is called instead.
        bias: The parameter that is added, if there is one; of such a module it is what that makes of zeros.
    """

    node: Node
    n_heads: int
    d_value: int
    weight: Tensor | None
    bias: str | None

    def made(self, given: Tensor) -> Tensor:
        """What each head adds of what the module is given, [prompt, token, head, model]."""
        if self.weight is None:
            return by_heads(self.node, given, self.n_heads)
        of_heads = given.unflatten(-1, (self.n_heads, self.d_value)).to(self.weight.dtype)
        return torch.einsum("pthd,hdm->pthm", of_heads, self.weight)

    def constant(self, like: Tensor) -> Tensor | None:
        """What is added behind the heads, [model]."""
        if self.weight is None:
            return constant_of(self.node, like, self.n_heads * self.d_value)
        return None if self.bias is None else getattr(self.node, self.bias)

    def maker(self, name: str) -> _Maker:
        return (
            _maker(name, self.bias) if self.weight is not None else _maker_of_calls(name, self.n_heads * self.d_value)
        )


def _projection(heads: Heads) -> _Projection:
    matrix = heads.projection()
    sizes, is_plain = heads.needed_sizes("result"), heads.is_plain(matrix)
    weight, bias = (heads.weight("o"), heads.bias_name(matrix)) if is_plain else (None, None)
    return _Projection(heads.node(matrix), sizes.heads, sizes.d_value, weight, bias)


class _Maker:
    """What is made of a projection's output, and how that is made of it. What views.py asks for.

    Args:
        name: What errors call it.
        bias: The parameter that is added behind the heads, if there is one.
        n_in: How many inputs the module has, where what is added is what it makes of zeros.
    """

    kind = "output"

    def __init__(self, name: str, bias: str | None, n_in: int = 0) -> None:
        self.name, self._bias, self._n_in = name, bias, n_in

    def pick(self, node: Node, visit: Visit) -> Any:
        return visit.output

    def write_back(self, node: Node, view: Tensor, raw: Any) -> None:
        output = view.sum(-2)
        if self._n_in:
            output = output + constant_of(node, view, self._n_in)
        elif self._bias is not None:
            output = output + getattr(node, self._bias)
        run = node._run()
        run.write_output(node._module, output, lambda _, new: new)
        if isinstance(run, Run) and run.state.rank < math.inf:
            _known[output] = view


@lru_cache(maxsize=4096)
def _maker(name: str, bias: str | None) -> _Maker:
    return _Maker(name, bias)


@lru_cache(maxsize=4096)
def _maker_of_calls(name: str, n_in: int) -> _Maker:
    return _Maker(name, None, n_in)


# What edits assign, by the output that was made of it: a block that comes later to the same place asks for it.
_known: Any = WeakTensorKeyDictionary()


def _assigned(node: Node, run: Run | RowRun) -> Tensor | None:
    output = whole_of(run).here(node._module, "output").output
    found: Tensor | None = _known.get(output) if isinstance(output, Tensor) else None
    return run.cut(found, _AXES) if found is not None and isinstance(run, RowRun) else found


def _given(visit: Visit) -> Tensor:
    given: Tensor = visit.args[0] if visit.args else next(iter(visit.kwargs.values()))
    return given


class _Through(torch.autograd.Function):
    """The output that the model made, bit for bit, whose gradient passes through the results of its heads."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, bias: Tensor | None, output: Tensor) -> Tensor:
        ctx.heads, ctx.has_bias = result.shape[-2], bias is not None
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        of_heads = grad.unsqueeze(-2).expand(*grad.shape[:-1], ctx.heads, grad.shape[-1])
        return of_heads, grad.flatten(0, -2).sum(0) if ctx.has_bias else None, None


def _led_through(node: Node, run: Run | RowRun, result: Tensor, bias: Tensor | None) -> Tensor:
    """Has the model go on with the same output, made of the results: so they have a gradient. Returns that output."""
    if whole_of(run).here(node._module, "output").versions is None:  # else computed again, without the results
        run.put(node._module, "output", _Through.apply(result, bias, _standing(node, run)))
    return _standing(node, run)


def _standing(node: Node, run: Run | RowRun) -> Tensor:
    output: Tensor = run.here(node._module, "output").output
    return output
