"""Attention modules that call no interface: met where they call torch's attention, or a softmax between two products.

Falcon, BLOOM, MPT and GPT-J compute attention themselves, and so does torch's `MultiheadAttention`. A mode that is
active only in calls of that module sees `scaled_dot_product_attention`, a function of q, k and v; or, where it is
written by hand, the first product of matrices (of q and k), the softmax, and the next product of what has its shape
(the pattern, and v).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from nnsight.anatomy.interior import SOFTMAXES, MeetSoftmax, Ports, SiteName
from nnsight.anatomy.meeting import Meeting, Met
from nnsight.anatomy.multihead import is_whole, opened
from nnsight.core.specs import describe_inputs, specs_in
from nnsight.errors import BlockError, NotOnThisLayerError

_ATTENTION = functional.scaled_dot_product_attention
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_SUMS = {torch.baddbmm, Tensor.baddbmm}  # of something and a product


class Direct(Met):
    """The inside of a module that computes attention itself: q and k are met first, and v where z is made of it."""

    ports: ClassVar[Ports] = {
        "q": ("scoring", "input", 0),
        "k": ("scoring", "input", 1),
        "scores": ("softmax", "input", 0),
        "pattern": ("softmax", "output", 0),
        "v": ("mixing", "input", 0),
        "z": ("mixing", "output", 0),
    }

    def meeting(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Meeting:
        first = next((spec for _, spec in specs_in(describe_inputs(args, kwargs)) if spec.shape), None)
        if first is None:
            return _Meet(self, 1, None)
        return _Meet(self, first.shape[0], first.shape[1] if len(first.shape) > 2 else None)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One call of torch's attention, which has the heads in front of the tokens.

        The pattern can be asked for before v, as where it is computed by hand, and behind it.
        """

        def scoring(query: Tensor, key: Tensor) -> Tensor:
            query, key = _turned(query), _turned(key)
            pattern = self._pattern(query, key, *args, **kwargs) if self.wants_softmax() else None

            def mixing(value: Tensor) -> Tensor:
                value, known = _turned(value), pattern
                if known is None and self.wants_softmax():
                    known = self._pattern(query, key, *args, **kwargs)
                if known is None:
                    return _turned(_ATTENTION(query, key, value, *args, **kwargs))
                return _turned(known @ value.repeat_interleave(known.shape[1] // value.shape[1], 1))

            return self.visit("mixing", mixing, _turned(value))

        return _turned(self.visit("scoring", scoring, _turned(query), _turned(key)))

    def _pattern(
        self,
        query: Tensor,
        key: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """What torch's attention computes of q and k, in its own words, with a softmax that can be met."""
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        elif attn_mask is not None:
            scores = scores + attn_mask
        self.ran.add("eager")
        pattern = self.visit("softmax", lambda scores: functional.softmax(scores, -1), scores)
        return functional.dropout(pattern, dropout_p)

    def never_came(self, where: SiteName, name: str, facts: dict[str, str]) -> BlockError:
        because = (
            "its forward calls neither transformers' attention interface, nor torch's attention with all tokens at "
            "once, nor a softmax between two such products of matrices"
        )
        return self._lacks(name, because, ".source, which has all that its forward does", facts)


def _turned(array: Tensor) -> Tensor:
    return array.transpose(1, 2)


class _Meet(Meeting):
    """Meets attention in one call of a module.

    Args:
        interior: What is visited.
        batch: How many rows the module is called with, where rows and heads are one axis.
        tokens: How many tokens, all of which are queries at once; None: not known. A block of them is none of ours.
    """

    def __init__(self, interior: Direct, batch: int, tokens: int | None) -> None:
        super().__init__()
        self._interior, self._batch, self._tokens = interior, batch, tokens
        self._softmax = MeetSoftmax(interior)
        self._met: set[SiteName] = set()
        self._shape: torch.Size | None = None  # of the pattern
        self._served: torch.Size | None = None  # of the product whose factors a run was given as q and k

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_whole(function):
            return opened(self, args, kwargs)
        if function is _ATTENTION and not self._met and self._is_of_all(args[0] if args else kwargs["query"]):
            self._met = {"scoring", "mixing"}
            return self._interior.attend(*args, **kwargs)
        if function in SOFTMAXES:
            return self._meet_softmax(function, types, args, kwargs)
        if function in _SUMS and len(args) == 1 and kwargs.keys() >= {"batch1", "batch2"}:
            kwargs = dict(kwargs)
            args = (*args, kwargs.pop("batch1"), kwargs.pop("batch2"))
        at = 0 if function in _PRODUCTS else 1 if function in _SUMS else None
        if at is None or len(args) < at + 2 or not self._is_of_heads(*args[at : at + 2]):
            return function(*args, **kwargs)
        return self._meet_product(
            lambda left, right: function(*args[:at], left, right, *args[at + 2 :], **kwargs), *args[at : at + 2]
        )

    def check_served(self) -> None:
        """Raises where what a run was given as q and k turns out to be none: no softmax of their product came.

        It could only be known afterwards, and the run must not go on with such values.
        """
        if self._served is None or (self._shape is not None and self._shape[-2:] == self._served[-2:]):
            return
        kind = type(self._interior.owner).__name__
        raise NotOnThisLayerError(
            f"There are no `q` and `k` on this layer, a {kind}: what was taken for them are factors of a product "
            "that no softmax was taken of."
        )

    def _is_of_heads(self, left: Any, right: Any) -> bool:
        return (
            isinstance(left, Tensor) and isinstance(right, Tensor) and left.ndim == right.ndim and left.ndim in (3, 4)
        )

    def _is_of_all(self, array: Tensor) -> bool:
        """Whether all tokens have a row in it, as queries."""
        return self._tokens is None or array.shape[-2:-1] == (self._tokens,)

    def _meet_softmax(self, function: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
        whole = args[0] if args else kwargs["input"]
        if self._shape is not None or not self._is_of_all(whole):
            return function(*args, **kwargs)
        self._shape = whole.shape
        if whole.ndim == 3 and not whole.shape[0] % self._batch and args and kwargs.get("dim", *args[1:2]) == -1:
            pattern = self._softmax.__torch_function__(function, types, (self._heads(whole), *args[1:]), kwargs)
            return pattern.flatten(0, 1)
        return self._softmax.__torch_function__(function, types, args, kwargs)

    def _heads(self, array: Tensor) -> Tensor:
        """With rows and heads on two axes."""
        if array.ndim == 4:
            return array
        rows = self._batch if array.shape[0] % self._batch == 0 else 1
        return array.unflatten(0, (rows, -1))

    def _meet_product(self, product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
        def as_given(array: Tensor) -> Tensor:
            return array.flatten(0, 1) if left.ndim == 3 else array

        if self._shape is None and "scoring" not in self._met and self._is_of_all(left):
            self._met.add("scoring")

            def scoring(query: Tensor, key: Tensor) -> Tensor:
                return product(as_given(_turned(query)), as_given(key.permute(0, 2, 3, 1)))

            was_awaited = self._interior.site("scoring").is_awaited
            query, key = _turned(self._heads(left)), self._heads(right).permute(0, 3, 1, 2)
            raw = self._interior.visit("scoring", scoring, query, key)
            self._served = raw.shape if was_awaited else None
            return raw
        if self._shape is not None and "mixing" not in self._met and left.shape[-2:] == self._shape[-2:]:
            self._met.add("mixing")

            def mixing(value: Tensor) -> Tensor:
                return _turned(self._heads(product(left, as_given(_turned(value)))))

            return as_given(_turned(self._interior.visit("mixing", mixing, _turned(self._heads(right)))))
        return product(left, right)
