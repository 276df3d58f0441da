"""The prompts of a batch, and where one of them stands in a tensor whose axes are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nnsight.core.axes import Axes, Axis, Unknown
from nnsight.core.several import Window


class Part(NamedTuple):
    """Rows of a batch that are asked together, from `start` to before `stop`, and what errors call them."""

    start: int
    stop: int
    label: str


@dataclass
class Batch:
    """The prompts of a batch.

    Args:
        count: How many there are.
        width: Tokens of a row with its padding; None where rows have no tokens that are known.
        spans: Where each prompt's own tokens stand in its row.
        tokens: Each prompt's tokens as text, or why they can't be had.
        token_inputs: The names of the inputs whose axes are [row, token].
        own_state: Inputs that hold what the model made itself, and makes again: left out when it is measured.
        returned: Sequences that a generation returns for each prompt.
        returns_prompts: Whether they begin with the prompt.
        goes_on: Whether a generation's tokens come behind the prompt's own; in a decoder of their own they don't.
        answers: How many tokens each prompt has in a decoder of its own, where those rows are filled up; else None.
        answer_width: Tokens of such a row with its padding.
        answer_inputs: The names of the inputs whose axes are [row, answer].
        recurs_over_padding: Whether the model works through the padding behind a prompt, and keeps what came of it.
        parts: What is asked on its own; None: each row.
        axis: On which axis of the inputs the rows are.
    """

    count: int
    width: int | None = None
    spans: list[tuple[int, int]] | None = None
    tokens: Callable[[int], list[str]] | str = "they have tokens only where a tokenizer read them"
    token_inputs: frozenset[str] = frozenset()
    own_state: frozenset[str] = frozenset()
    returned: int = 1
    returns_prompts: bool = True
    goes_on: bool = True
    answers: list[int] | None = None
    answer_width: int = 0
    answer_inputs: frozenset[str] = frozenset()
    recurs_over_padding: bool = False
    parts: tuple[Part, ...] | None = None
    axis: int = 0

    @property
    def n_parts(self) -> int:
        return self.count if self.parts is None else len(self.parts)

    def part(self, index: int) -> Part:
        return Part(index, index + 1, f"row {index}") if self.parts is None else self.parts[index]

    def span(self, part: Part) -> tuple[int, int]:
        """Where the tokens of a part's prompts stand in its rows: from the first of any to the last of any."""
        assert self.spans is not None
        starts, stops = zip(*self.spans[part.start : part.stop], strict=True)
        return min(starts), max(stops)

    @property
    def is_padded(self) -> bool:
        return self.spans is not None and any(span != (0, self.width) for span in self.spans)

    def show(self, index: int) -> str:
        """The tokens of a part's prompt on one line, or how many rows there are."""
        part = self.part(index)
        if isinstance(self.tokens, str) or part.stop - part.start > 1:
            rows = f"row {part.start}" if part.stop - part.start == 1 else f"rows {part.start} to {part.stop - 1}"
            return f"{rows} of {self.count}"
        tokens = self.tokens(part.start)
        shown = tokens if len(tokens) <= 24 else [*tokens[:12], "...", *tokens[-11:]]
        return f"{len(tokens)} tokens: {'|'.join(shown)}"


class Cut(NamedTuple):
    """Where a row's part of a tensor stands.

    Attributes:
        at: Its place, or the first of several.
        shared: Whether it is no single row's.
        further: The other places, one behind the other along `axis`: such a part is no view, but a copy.
    """

    at: tuple[slice, ...]
    shared: bool
    further: tuple[tuple[slice, ...], ...] = ()
    axis: int = 0

    def of(self, whole: Tensor) -> Tensor:
        if not self.further:
            return whole[self.at]
        return torch.cat([whole[at] for at in (self.at, *self.further)], self.axis)

    def put(self, whole: Tensor, part: Tensor) -> None:
        if not self.further:
            whole[self.at] = part
            return
        for at, piece in zip((self.at, *self.further), part.chunk(1 + len(self.further), self.axis), strict=True):
            whole[at] = piece


class CanNotCut(Exception):
    """Why a row can't be cut out of a tensor."""


@dataclass
class Knife:
    """Cuts one part of the rows out of tensors whose axes were measured.

    Args:
        batch: The prompts.
        copies: Rows that the model has for each prompt: beams, or several sequences to return.
        step: How many tokens were generated before.
        groups: How often all prompts come, one behind the other, each with its copies: twice under guidance.
        window: Which columns of the rows this call of the model has; None: all, or the newest alone.
    """

    batch: Batch
    copies: int
    step: int
    groups: int = 1
    window: Window | None = None

    def cut(self, tensor: Tensor, axes: Axes | Unknown, index: int) -> Cut:
        axes = self._known(axes)
        if self.batch.recurs_over_padding and not any("token" in axis for axis in axes) and "row" in axes:
            self._check_state(index)
        at = tuple(self._slice(axis, size, index) for axis, size in zip(axes, tensor.shape, strict=True))
        if self.groups > 1 and "row" in axes:
            return self._cut_groups(at, axes.index("row"))
        return Cut(at, not any("row" in axis for axis in axes))

    def _known(self, axes: Axes | Unknown) -> Axes:
        if not isinstance(axes, Unknown):
            return axes
        if axes.unpadded is None or self.batch.is_padded:
            raise CanNotCut(axes.why)
        return axes.unpadded

    def _cut_groups(self, at: tuple[slice, ...], axis: int) -> Cut:
        """A part of each group: `at` is that of the first."""
        each, first = self.batch.count * self.copies, at[axis]
        if first.stop - first.start == each:
            return Cut((*at[:axis], slice(None), *at[axis + 1 :]), False)
        if first.stop - first.start == 1:
            return Cut((*at[:axis], slice(first.start, None, each), *at[axis + 1 :]), False)
        pieces = [
            (*at[:axis], slice(first.start + group * each, first.stop + group * each), *at[axis + 1 :])
            for group in range(self.groups)
        ]
        return Cut(pieces[0], False, tuple(pieces[1:]), axis)

    def whole_shape(self, part: Tensor, axes: Axes | Unknown) -> list[int]:
        """The shape of the tensor of which this is one part."""
        axes = self._known(axes)
        rows = self.batch.count * self.copies * self.groups

        def size(axis: Axis, own: int) -> int:
            if axis == "":
                return own
            if axis == "answer":
                return self.batch.answer_width
            return (rows if "row" in axis else 1) * (self._width_of(own) if "token" in axis else 1)

        return [size(axis, own) for axis, own in zip(axes, part.shape, strict=True)]

    def _width_of(self, own: int) -> int:
        """Tokens of a row, where a part has `own` of them."""
        if not self.batch.is_padded or (self._longer and own == 1):
            return own
        if self.window is not None:
            return own if self.window.width is None else self.window.width
        assert self.batch.width is not None
        return self.batch.width + self._longer

    @property
    def _longer(self) -> int:
        """How many tokens stand behind the prompts' own."""
        return self.step if self.batch.goes_on else 0

    def _check_state(self, index: int) -> None:
        """A state that a recurrence leaves is a prompt's own only where no padding came behind it."""
        batch = self.batch
        if batch.spans is not None and any(stop != batch.width for _, stop in self._spans_of(index)):
            raise CanNotCut("this model's state runs on through the padding behind the prompt, as it would not alone")

    def _spans_of(self, index: int) -> list[tuple[int, int]]:
        part = self.batch.part(index)
        return (self.batch.spans or [])[part.start : part.stop]

    def _slice(self, axis: str, size: int, index: int) -> slice:
        if axis == "":
            return slice(None)
        if axis == "token":
            start, stop = self._own(size, index)
            return slice(start, stop)
        if axis == "answer":
            part = self.batch.part(index)
            return slice(0, max((self.batch.answers or [])[part.start : part.stop]))
        rows, copies = self.batch.count * self.copies * self.groups, self.copies
        if size % rows or (axis == "row" and size != rows):
            each = f" with {copies * self.groups} copies each" if copies * self.groups > 1 else ""
            raise CanNotCut(f"the axis that has the rows is {size} long, for {self.batch.count} prompts{each}")
        part = self.batch.part(index)
        first, last = part.start * copies, part.stop * copies
        if axis == "row":
            return slice(first, last)
        if self.groups > 1:
            raise CanNotCut("rows and tokens are one axis, and under guidance the rows come twice")
        width = size // rows
        start, stop = self._own(width, index)
        if self._widths().isdisjoint({width, None}):
            raise CanNotCut(f"the axis of rows and tokens is {size} long, for {rows} rows of {self.batch.width}")
        if last - first > 1 and (axis == "token*row" or (start, stop) != (0, width)):
            raise CanNotCut(
                f"rows and tokens are one axis, on which its {last - first} rows are not next to each other"
            )
        if axis == "row*token":
            return slice(first * width + start, (last - 1) * width + stop)
        return slice(start * rows + first, (stop - 1) * rows + first + 1, rows)

    def _widths(self) -> set[int | None]:
        """How many tokens a row can have now: the prompt's and those generated, or the new one alone."""
        assert self.batch.width is not None
        if self.window is not None:
            return {self.window.width}
        return {self.batch.width + self._longer, 1} if self._longer else {self.batch.width}

    def _own(self, size: int, index: int) -> tuple[int, int]:
        """A prompt's own tokens on an axis of tokens."""
        batch = self.batch
        if not batch.is_padded:
            return 0, size
        assert batch.width is not None
        if self.window is not None:
            return self._own_in(self.window, size, index)
        if self._longer and size == 1:
            return 0, 1
        if size not in self._widths():
            raise CanNotCut(f"an axis of tokens is {size} long, for prompts padded to {batch.width}")
        start, stop = batch.span(batch.part(index))
        return start, size - (batch.width - stop)

    def _own_in(self, window: Window, size: int, index: int) -> tuple[int, int]:
        """The same, where a call has a part of the columns, or other tokens."""
        batch = self.batch
        assert batch.width is not None
        if window.start is None or window.stop is None:
            return 0, size
        if size not in (window.width, window.stop):
            raise CanNotCut(f"an axis of tokens is {size} long, in a call that has {window.width} of each row")
        before = window.stop - size  # none, where attention looks at all columns so far
        start, stop = batch.span(batch.part(index))
        last = window.stop if batch.goes_on and window.stop > batch.width else stop
        begin, end = (min(max(at - before, 0), size) for at in (start, last))
        return begin, end
