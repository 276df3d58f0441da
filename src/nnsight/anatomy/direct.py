"""Attention modules that call no interface: met where they call torch's attention, or a softmax.

Falcon, BLOOM, MPT and GPT-J compute attention themselves. A mode that is active only in calls of that module sees
`scaled_dot_product_attention`, which is a function of q, k, v, or the softmax of what it computes by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nnsight.anatomy.interior import Interior, MeetSoftmax, SiteName
from nnsight.core.ports import Calls
from nnsight.core.run import Run
from nnsight.core.state import RunState
from nnsight.errors import BlockError

_ATTENTION = functional.scaled_dot_product_attention


class Direct(Interior):
    """The inside of a module that computes attention itself."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(owner)
        self._meeting: list[tuple[RunState, Calls, list[_Meet]]] = []

    def _begin(self, run: Run) -> None:
        modes: list[_Meet] = []
        calls = Calls(self.owner, run.state, partial(self._enter, modes), partial(_exit, modes))
        self._meeting.append((run.state, calls, modes))
        calls.arm()

    def _end(self, state: RunState) -> None:
        for known, calls, modes in self._meeting:
            if known is state:
                calls.disarm()
                if modes and torch.overrides._get_current_function_mode() is modes[0]:  # its call was interrupted
                    _exit(modes)
        self._meeting = [entry for entry in self._meeting if entry[0] is not state]

    def _enter(self, modes: list[_Meet], *_: Any) -> None:
        self.was_entered = True
        modes.append(_Meet(self))
        modes[0].__enter__()

    @contextmanager
    def _present(self) -> Iterator[None]:
        modes: list[_Meet] = []
        begin = self.owner.register_forward_pre_hook(lambda *_: self._enter(modes))
        end = self.owner.register_forward_hook(lambda *_: _exit(modes), always_call=True)
        try:
            yield
        finally:
            begin.remove()
            end.remove()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One call of torch's attention, which has the heads in front of the tokens."""

        def attention(*arrays: Tensor) -> Tensor:
            function: Callable[..., Tensor] = self._eagerly if self.wants_softmax() else _ATTENTION
            return function(*(array.transpose(1, 2) for array in arrays), *args, **kwargs).transpose(1, 2)

        return self.visit("attention", attention, *(one.transpose(1, 2) for one in (query, key, value))).transpose(1, 2)

    def _eagerly(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """What torch's attention computes, in its own words, with a softmax that can be met."""
        if enable_gqa:
            key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        elif attn_mask is not None:
            scores = scores + attn_mask
        self.ran.add("eager")
        pattern = self.visit("softmax", lambda scores: functional.softmax(scores, -1), scores)
        return functional.dropout(pattern, dropout_p) @ value

    def never_came(self, where: SiteName, name: str, facts: dict[str, str]) -> BlockError:
        if where == "attention" and "softmax" in self.ran:
            because = "it computes attention itself, and calls no function of q, k and v"
            return self._lacks(
                name, because, ".scores and .pattern, or .source, which has all that its forward does", facts
            )
        because = (
            "its forward calls neither transformers' attention interface nor torch's attention, nor a softmax over keys"
        )
        return self._lacks(name, because, ".source, which has all that its forward does", facts)


def _exit(modes: list[_Meet], *_: Any) -> None:
    if modes:
        modes.pop().__exit__(None, None, None)


class _Meet(TorchFunctionMode):
    """Meets attention in one call of a module."""

    def __init__(self, interior: Direct) -> None:
        super().__init__()
        self._interior, self._softmax, self._met = interior, MeetSoftmax(interior), False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is _ATTENTION and not self._met:
            self._met = True
            return self._interior.attend(*args, **(kwargs or {}))
        return self._softmax.__torch_function__(function, types, args, kwargs)
