"""Matrices that modules keep in a form of their own, quantised, adapted or parametrised: known by what a module makes.

Nothing is asked of that form. A module's bias is what it makes of zeros, and its matrix what it makes of the rows of
the identity, but for the bias. What it makes of one head is what it makes of that head's part of what it is given, and
zeros. Whether that adds up over heads to what it makes of all of them is tried: where a module rounds each token by its
largest channel, it does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nnsight.core.history import user_place
from nnsight.core.modes import without_modes
from nnsight.core.spelling import nearest
from nnsight.core.unloaded import Unloaded
from nnsight.core.values import is_fake
from nnsight.errors import UnknownNameError

if TYPE_CHECKING:
    from nnsight.node import Node

Call = Callable[[Tensor], Tensor]  # a module, or that of one run
_TOKENS, _LARGE, _SMALL = 8, 5.0, 0.2
_MOST = 1e-4  # that parts may be off by, of the root mean square; or one unit of rounding
_UNTRIED = ""
_PLAIN = {nn.Parameter, Tensor, Unloaded}  # what a parametrization makes is no parameter


def check_name(name: str, known: Collection[str], called: str, what: str) -> None:
    """Refuses a name that none of the matrices has; `what`: what they are."""
    if name not in known:
        raise UnknownNameError(
            f"`{called}.effective` is for {what}, and {name!r} is none.",
            you_wrote=user_place().source,
            nearest=nearest(name, known, n=1),
            instead=", ".join(known),
        )


def is_plain(weight: Any) -> bool:
    """Whether a parameter is a matrix's own numbers: a quantized one is packed, or has scales beside it."""
    if weight is None or not (type(weight) in _PLAIN or is_fake(weight)):  # torchao has a class of its own
        return False
    return bool(weight.is_floating_point() and weight.element_size() > 1)


def widths_of(module: nn.Module) -> tuple[int, int] | None:
    """How many inputs and outputs a module has that stands for a matrix, if it says so."""
    widths = [getattr(module, name, None) for name in ("in_features", "out_features")]
    return (widths[0], widths[1]) if all(isinstance(one, int) and one > 0 for one in widths) else None  # type: ignore[return-value]


def caller(node: Node) -> Call:
    """A module in a run, or as it is by itself where there is none: without hooks, edits and taps."""
    return node._module.forward if node._run_or_none() is None else node


def constant_of(call: Call, like: Tensor, n_in: int) -> Tensor:
    """What a module makes of zeros, which is its bias: [out]."""
    return call(_in_graph(like.new_zeros(1, 1, n_in)))[0, 0]


def matrix_of(call: Call, like: Tensor, n_in: int) -> Tensor:
    """What a module makes of the rows of the identity, but for its bias: [in, out]."""
    identity = torch.eye(n_in, dtype=like.dtype, device=like.device)[None].contiguous()
    return call(_in_graph(identity))[0] - constant_of(call, like, n_in)


def _in_graph(given: Tensor) -> Tensor:
    """An input as if it had a graph.

    bitsandbytes packs its weights for good on some CPUs, and computes otherwise from then on, in the first call that
    has none: asking must not be that call.
    """
    return given.requires_grad_(True)


def by_heads(call: Call, given: Tensor, n_heads: int) -> Tensor:
    """What a module makes of each head's part of what it is given, but for its bias: [prompt, token, head, out].

    Args:
        call: The module.
        given: [prompt, token, head * d_head].
        n_heads: How many there are.
    """
    width = given.shape[-1] // n_heads
    own = torch.eye(n_heads, dtype=torch.bool, device=given.device).repeat_interleave(width, 1)[:, None, None]
    alone = torch.where(own, given, given.new_zeros(()))  # [head, prompt, token, head * d_head]
    made = call(alone.flatten(0, 1)).unflatten(0, (n_heads, -1))
    return (made - constant_of(call, given, given.shape[-1])).movedim(0, -2)


def input_like(module: nn.Module, root: nn.Module) -> Tensor:
    """An empty tensor of the type, and on the device, in which a module of a model is given its inputs."""
    dtype = getattr(root, "dtype", torch.float32)
    device = next((one.device for one in module.parameters()), torch.device("cpu"))
    return torch.empty(0, dtype=dtype, device=device)


def computed_in(made: Tensor) -> torch.dtype:
    """The type that values have the precision of: that of 16 bits where they are handed on in more."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(made, made.to(dtype).to(made.dtype)):
            return dtype
    return made.dtype


_found: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def why_not_by_heads(module: nn.Module, root: nn.Module, n_in: int, n_heads: int) -> str:
    """Why what a module makes of single heads is not what it adds of them; an empty string where it is.

    Tried once for each module, on inputs drawn at random: one even, and one in which a channel of each token is large.
    """
    key = n_heads, module.training
    known = _found.get(module)
    if known is not None and known[0] == key:
        return known[1]
    like = input_like(module, root)
    try:
        with without_modes(), torch.inference_mode(False), torch.enable_grad():
            off = _off(module.forward, like, n_in, n_heads)
    except Exception as error:  # noqa: BLE001  another module may refuse such inputs in any way
        return f"it can't be called on single heads: {type(error).__name__}: {error}"[:200]
    if off is None:
        return _UNTRIED
    training = ", and it is in training mode" if module.training else ""
    why = f"what it makes of single heads adds up to what it makes of all but for {off:.1e}{training}" if off else ""
    _found[module] = key, why
    return why


def _off(call: Call, like: Tensor, n_in: int, n_heads: int) -> float | None:
    """By how much the parts do not add up, of the root mean square; 0: they do; None: there are no numbers yet."""
    draw = torch.Generator().manual_seed(0)
    even = torch.randn(1, _TOKENS, n_in, generator=draw)
    uneven = torch.randn(1, _TOKENS, n_in, generator=draw) * _SMALL
    uneven.scatter_(-1, torch.randint(n_in, (1, _TOKENS, 1), generator=draw), _LARGE)
    worst: list[float] = []
    for given in (_in_graph(even.to(like)), _in_graph(uneven.to(like))):
        made = call(given)
        if made.is_meta:
            return None
        if not bool(made.isfinite().all()):
            return math.inf
        added = by_heads(call, given, n_heads).double().sum(-2) + constant_of(call, given, n_in).double()
        made, added = made.detach(), added.detach()
        off = float((added - made).square().mean().sqrt() / made.double().square().mean().sqrt().clamp_min(1e-30))
        allowed = min(max(_MOST, torch.finfo(computed_in(made)).eps), torch.finfo(torch.bfloat16).eps / 2)
        if not off <= allowed:  # nor if it is no number
            worst.append(off)
    return max(worst, default=0.0)
