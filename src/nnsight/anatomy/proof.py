"""What a proof by numbers is made of: a model on trial, comparing, and what is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnsight.anatomy.tiny.inputs import tiny_ids
from nnsight.anatomy.trial import leaves
from nnsight.anatomy.uniform import Uniform

if TYPE_CHECKING:
    from nnsight.models.transformers_model import TransformersModel

Results = Iterator[tuple[bool, str]]
_MOST_LAYERS = 4  # of a deep model, for what takes a forward pass for each


@dataclass(frozen=True)
class Check:
    """One check of a model.

    Attributes:
        name: What was checked.
        passed: Whether it holds; None where the model has no such thing.
        detail: In numbers, or why not.
    """

    name: str
    passed: bool | None
    detail: str

    def line(self, width: int) -> str:
        """The check on one line, its name filled up to this width."""
        mark = {True: "ok", False: "FAILED", None: "-"}[self.passed]
        return f"{mark:8}{self.name:{width}}{self.detail}"

    def __str__(self) -> str:
        return self.line(44)


@dataclass(frozen=True)
class Report:
    """What was checked of a model; true where every check that applies holds."""

    model: str
    checks: tuple[Check, ...]

    def __bool__(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def __str__(self) -> str:
        width = max(44, *(len(check.name) + 2 for check in self.checks))
        return "\n".join([self.model, *(check.line(width) for check in self.checks)])

    __repr__ = __str__


class Trial:
    """The model, the inputs that it is checked on, and what it does with them untouched.

    Attributes:
        reads: Whether what is checked is an encoder, which reads for a decoder.
    """

    reads = False

    def __init__(self, model: TransformersModel, uniform: Uniform) -> None:
        self.model, self.uniform = model, uniform
        model.dispatch()
        ids, self.others = tiny_ids(model._module)
        self.ids = ids
        self._logits: Tensor | None = None
        self._has_logits = uniform._layout.logits is not None

    def trace(self) -> Any:
        if "inputs_embeds" in self.others:
            return self.model.trace(**self.others)
        if self.ids.is_floating_point():
            module: Any = self.model._module
            given: dict[str, Any] = {module.main_input_name: self.ids, **self.others}
            return self.model.trace(**given)
        return self.model.trace(self.ids, **self.others)

    @property
    def says_tokens(self) -> bool:
        """Whether it makes logits of the vocabulary."""
        from nnsight.models.language import LanguageModel

        return isinstance(self.model, LanguageModel)

    @property
    def logits(self) -> Tensor:
        if self._logits is None:
            with self.trace() as tracer:
                self._logits = self.answer(tracer)
        return self._logits

    def answer(self, tracer: Any) -> Tensor:
        """The logits of a run; of a model that returns none, the first tensor that it does."""
        if self._has_logits:
            logits: Tensor = tracer.uniform.logits
            return logits
        return next(tensor for _, tensor in leaves(tracer.result))

    def with_(self, change: Callable[[Uniform], None]) -> Tensor:
        """The logits of a run in which something is changed."""
        with self.trace() as tracer:
            change(tracer.uniform)
            return self.answer(tracer)

    def inside(self, layer: int, name: str) -> Tensor:
        """One value inside attention, in a run of its own: in which order they come is the model's."""
        with self.trace() as tracer:
            value: Tensor = getattr(tracer.uniform.layers[layer].attn, name)
        return value

    def alone(self, prompt: int) -> dict[str, Any]:
        """What is given beside the ids, for one of the prompts."""
        every = self.others.items()
        return {name: one[prompt : prompt + 1] if isinstance(one, Tensor) else one for name, one in every}

    def some(self, has: str) -> list[int]:
        """A few of the layers that have this, spread over the model."""
        having = [node.index for node in self.uniform.layers.having(has)]
        step = max(1, -(-len(having) // _MOST_LAYERS))
        return having[::step]


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    if one.shape != other.shape:
        return float("inf")
    size = float(other.abs().max())
    return float((one.float() - other.float()).abs().max()) / max(size, 1e-12)


def close(one: Tensor, other: Tensor, what: str, units: int = 32) -> tuple[bool, str]:
    """Whether two tensors are the same to within 1e-4 of the largest value, or so many units of rounding."""
    rounding = max((torch.finfo(value.dtype).eps for value in (one, other) if value.is_floating_point()), default=0)
    most = max(1e-4, units * rounding)  # of the coarser one: some models turn q and k in float32
    found = distance(one, other)
    return found <= most, f"{what}to within {found:.1e}" if found <= most else f"{what}off by {found:.1e}"
