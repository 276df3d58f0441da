"""A module that is left out for a whole batch, whose rows each say what its output is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nnsight.block.cuts import CanNotCut, Knife
from nnsight.core.axes import Axes, Path, Unknown
from nnsight.core.history import Place
from nnsight.core.specs import shape_of, show_shape
from nnsight.core.values import like
from nnsight.errors import RowError, WriteError


class Skips:
    """What the parts of a batch gave for one module's output, until all have.

    Args:
        knife: Tells where a part stands in the whole.
        axes: Of a tensor in the module's output.
        label: The module.
    """

    def __init__(self, knife: Knife, axes: Callable[[str, Path, Tensor], Axes | Unknown], label: str) -> None:
        self._knife, self._axes, self._label = knife, axes, label
        self._given: dict[int, tuple[Any, Place]] = {}

    def give(self, index: int, value: Any, place: Place) -> None:
        self._given[index] = value, place

    def has(self, index: int | None) -> bool:
        """Whether a part has given its own; all of them, if none is named."""
        return len(self._given) == self._knife.batch.n_parts if index is None else index in self._given

    def whole(self) -> Any:
        """The output of the whole batch; where prompts are padded, zeros stand there."""
        batch = self._knife.batch
        missing = [batch.part(index).label for index in range(batch.n_parts) if index not in self._given]
        if missing:
            raise RowError(
                f"`{self._label}` runs for all rows of a batch at once, and was not skipped for {', '.join(missing)}.",
                you_wrote=next(iter(self._given.values()))[1].source,
                instead="skip it for all, or write its output for this one",
            )
        return self._joined([self._given[index][0] for index in range(batch.n_parts)], ())

    def _joined(self, parts: list[Any], path: Path) -> Any:
        first = parts[0]
        if all(part is first for part in parts) and not isinstance(first, Tensor):
            return first
        if any(type(part) is not type(first) for part in parts):
            raise self._differ(parts)
        if isinstance(first, Tensor):
            return self._tensor(parts, path)
        if isinstance(first, dict) and all(list(part) == list(first) for part in parts):
            return like(first, [self._joined([part[key] for part in parts], (*path, key)) for key in first])
        if isinstance(first, (tuple, list)) and all(len(part) == len(first) for part in parts):
            columns = enumerate(zip(*parts, strict=True))
            return like(first, [self._joined(list(column), (*path, at)) for at, column in columns])
        if all(part == first for part in parts):
            return first
        raise self._differ(parts)

    def _tensor(self, parts: list[Tensor], path: Path) -> Tensor:
        axes = self._axes("output", path, parts[0])
        try:
            whole = parts[0].new_zeros(self._knife.whole_shape(parts[0], axes))
            cuts = [self._knife.cut(whole, axes, index) for index in range(len(parts))]
        except CanNotCut as error:
            raise RowError(
                f"`{self._label}` can't be skipped row by row: {error}.",
                you_wrote=self._given[0][1].source,
                instead=f"tracer.model.get({self._label!r}).skip(value), for the whole batch",
            ) from None
        if any(cut.shared for cut in cuts) or any(
            cut.of(whole).shape != part.shape for cut, part in zip(cuts, parts, strict=True)
        ):
            raise self._differ(parts)
        for cut, part in zip(cuts, parts, strict=True):
            cut.put(whole, part)
        return whole

    def _differ(self, parts: list[Any]) -> WriteError:
        return WriteError(
            f"What the rows gave for the output of `{self._label}`, which is skipped, does not go together.",
            you_wrote=self._given[0][1].source,
            they_gave=", ".join(show_shape(shape_of(part)) for part in parts),
        )
