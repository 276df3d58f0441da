"""Rows: one run, asked through one prompt of its batch. What is read is narrowed to it, what is written is widened.

A row's part keeps its batch axis, of size 1, and has the prompt's own tokens without the padding. It is a view: changed
in place, it changes what the model goes on with. Where gradients flow, the model goes on with a value that is put
together from the views, since a view that is only looked at has no part in the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from nnsight.core.axes import Axes, Measured, Unknown, like, measure, specs_in
from nnsight.core.history import Place, user_place
from nnsight.core.run import Run
from nnsight.core.specs import Inputs, describe_inputs, shape_of, show_shape
from nnsight.core.state import Visit
from nnsight.core.tree import Tree
from nnsight.errors import AlreadyPastError, OutOfOrderError, RowError, WriteError

Path = tuple[Any, ...]
_PLAIN = (int, float, str, bool, bytes, complex, type(None))


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
    """

    count: int
    width: int | None = None
    spans: list[tuple[int, int]] | None = None
    tokens: Callable[[int], list[str]] | str = "they have tokens only where a tokenizer read them"
    token_inputs: frozenset[str] = frozenset()
    own_state: frozenset[str] = frozenset()
    returned: int = 1
    returns_prompts: bool = True

    @property
    def is_padded(self) -> bool:
        return self.spans is not None and any(span != (0, self.width) for span in self.spans)

    def show(self, index: int) -> str:
        """The prompt's tokens on one line, or how many rows there are."""
        if isinstance(self.tokens, str):
            return f"row {index} of {self.count}"
        tokens = self.tokens(index)
        shown = tokens if len(tokens) <= 24 else [*tokens[:12], "...", *tokens[-11:]]
        return f"{len(tokens)} tokens: {'|'.join(shown)}"


def plain_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    """The rows of any module's inputs: those of the first axis of its first tensor."""
    first = next((spec for _, spec in specs_in(describe_inputs(args, kwargs))), None)
    if first is None or not first.shape:
        what = "its inputs have no tensor" if first is None else "its first input is a single number, with no axes"
        raise RowError(f"This run has no rows: {what}.", you_wrote=user_place().source)
    return Batch(first.shape[0])


class Cut(NamedTuple):
    """Where a row's part of a tensor stands; `shared`: it is no single row's."""

    at: tuple[slice, ...]
    shared: bool


class _CanNotCut(Exception):
    """Why a row can't be cut out of a tensor."""


@dataclass
class Knife:
    """Cuts one row out of tensors whose axes were measured.

    Args:
        batch: The prompts.
        copies: Rows that the model has for each prompt: beams, or several sequences to return.
        step: How many tokens were generated before.
    """

    batch: Batch
    copies: int
    step: int

    def cut(self, tensor: Tensor, axes: Axes | Unknown, index: int) -> Cut:
        if isinstance(axes, Unknown):
            raise _CanNotCut(axes.why)
        at = tuple(self._slice(axis, size, index) for axis, size in zip(axes, tensor.shape, strict=True))
        return Cut(at, not any("row" in axis for axis in axes))

    def _slice(self, axis: str, size: int, index: int) -> slice:
        if axis == "":
            return slice(None)
        if axis == "token":
            start, stop = self._own(size, index)
            return slice(start, stop)
        rows, copies = self.batch.count * self.copies, self.copies
        if size % rows or (axis == "row" and size != rows):
            each = f" with {copies} copies each" if copies > 1 else ""
            raise _CanNotCut(f"the axis that has the rows is {size} long, for {self.batch.count} prompts{each}")
        if axis == "row":
            return slice(index * copies, (index + 1) * copies)
        width = size // rows
        start, stop = self._own(width, index)
        if width not in self._widths():
            raise _CanNotCut(f"the axis of rows and tokens is {size} long, for {rows} rows of {self.batch.width}")
        if copies > 1 and (axis == "token*row" or (start, stop) != (0, width)):
            raise _CanNotCut(f"rows and tokens are one axis, and a prompt's {copies} copies are not next to each other")
        if axis == "row*token":
            last = (index + 1) * copies - 1
            return slice(index * copies * width + start, last * width + stop)
        return slice(start * rows + index, (stop - 1) * rows + index + 1, rows)

    def _widths(self) -> set[int]:
        """How many tokens a row can have now: the prompt's and those generated, or the new one alone."""
        assert self.batch.width is not None
        return {self.batch.width + self.step, 1} if self.step else {self.batch.width}

    def _own(self, size: int, index: int) -> tuple[int, int]:
        """A prompt's own tokens on an axis of tokens."""
        batch = self.batch
        if not batch.is_padded:
            return 0, size
        assert batch.spans is not None
        assert batch.width is not None
        if self.step and size == 1:
            return 0, 1
        if size not in self._widths():
            raise _CanNotCut(f"an axis of tokens is {size} long, for prompts padded to {batch.width}")
        start, stop = batch.spans[index]
        return start, size - (batch.width - stop)


class Hidden:
    """Stands in a row's value for a tensor that can't be cut, and says why as soon as it is used."""

    def __init__(self, why: Callable[[], RowError]) -> None:
        self._why = why

    def _raise(self, *_: Any, **__: Any) -> NoReturn:
        raise self._why()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._why()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise next(arg._why() for arg in [*args, *(kwargs or {}).values()] if isinstance(arg, cls))

    def __repr__(self) -> str:
        return "<a value of the whole batch, of which this row's part can't be told>"


for _name in "getitem setitem len iter bool float int neg".split() + [
    side + operator for side in ("", "r", "i") for operator in "add sub mul truediv matmul pow".split()
]:
    setattr(Hidden, f"__{_name}__", Hidden._raise)


class _View(NamedTuple):
    """A tensor as it was given to a row: its part, the whole that it is a part of, and the version of that."""

    part: Any
    whole: Tensor
    version: int | None
    shared: bool


class _Given(NamedTuple):
    value: Any
    views: dict[Path, _View]


class Shares:
    """What rows were given at the place where a run stands, until the model goes on.

    Holds nothing of the run: the paused model's stack holds it.
    """

    def __init__(self, knife: Knife, axes: Callable[[str, Path, Tensor], Axes | Unknown], label: str) -> None:
        self._knife, self._axes, self._label = knife, axes, label
        self._whole: dict[str, tuple[Any, ...]] = {}
        self._given: dict[tuple[str, int], _Given] = {}

    def take(self, visit: Visit, kind: str, index: int) -> Any:
        """A row's part of the value: the same object each time, until the value is another."""
        self._check_whole(visit, kind)
        given = self._given.get((kind, index))
        if given is None:
            views: dict[Path, _View] = {}
            given = _Given(self._narrow(_value(visit, kind), kind, index, (), views), views)
            self._given[kind, index] = given
        return given.value

    def put(self, visit: Visit, kind: str, index: int, value: Any) -> Any:
        """The value of the whole batch with another part for this row. What other rows were given stays theirs."""
        self.take(visit, kind, index)
        writer = _Writer(self, kind, index, self._given.pop((kind, index)).views, rebuild=False)
        whole = writer.widen(_value(visit, kind), value, ())
        self._whole[kind] = whole if kind == "input" else (whole,)
        return whole

    def settle(self, visit: Visit) -> None:
        """Before the model goes on: gives it what the rows made of their parts."""
        visit.shares = None
        here = "input" if visit.port is not None and visit.port.kind == "input" else "output"
        for kind in ("input", "output"):
            self._check_whole(visit, kind)
            old = whole = _value(visit, kind)
            fresh: set[int] = set()
            for (given_kind, index), given in self._given.items():
                if given_kind == kind:
                    writer = _Writer(self, kind, index, given.views, rebuild=kind == here, fresh=fresh)
                    whole = writer.widen(whole, given.value, ())
            if _same(whole, old):
                continue
            if kind != here:
                raise WriteError(
                    f"`{self._label}` can't be written any more: its forward has run.", you_wrote=user_place().source
                )
            if kind == "input":
                visit.args, visit.kwargs = whole
            else:
                visit.output = whole
            visit.changed = True

    def _check_whole(self, visit: Visit, kind: str) -> None:
        """Forgets what rows were given of a value that was replaced as a whole since."""
        now = (visit.args, visit.kwargs) if kind == "input" else (visit.output,)
        before = self._whole.get(kind, now)
        if any(a is not b for a, b in zip(now, before, strict=True)):
            self._given = {key: given for key, given in self._given.items() if key[0] != kind}
        self._whole[kind] = now

    def _narrow(self, whole: Any, kind: str, index: int, path: Path, views: dict[Path, _View]) -> Any:
        if isinstance(whole, Tensor):
            return self._part(whole, kind, index, path, views)
        if isinstance(whole, dict):
            new = copy.copy(whole)  # always: what is put into it is this row's
            for key, item in whole.items():
                new[key] = self._narrow(item, kind, index, (*path, key), views)
            return new
        if isinstance(whole, (tuple, list)):
            items = [self._narrow(item, kind, index, (*path, at), views) for at, item in enumerate(whole)]
            return type(whole)(items) if type(whole) is list else like(whole, items)
        return whole

    def _part(self, whole: Tensor, kind: str, index: int, path: Path, views: dict[Path, _View]) -> Any:
        try:
            cut = self._knife.cut(whole, self._axes(kind, path, whole), index)
        except _CanNotCut as error:
            refusal = partial(self._refusal, str(error), kind, path, show_shape(shape_of(whole)))
            if not path:
                raise refusal() from None
            part: Any = Hidden(refusal)
            views[path] = _View(part, whole, None, True)
            return part
        part = whole if all(one == slice(None) for one in cut.at) else _view(whole, cut.at)
        views[path] = _View(part, whole, None if whole.is_inference() else whole._version, cut.shared)
        return part

    def _refusal(self, why: str, kind: str, path: Path, shape: str) -> RowError:
        return RowError(
            f"A row's part of {self.name(kind, path)} can't be told: {why}.",
            you_wrote=user_place().source,
            it_is=shape,
            instead=f"the value of the whole batch, {self._in_full(kind)}",
        )

    def _in_full(self, kind: str) -> str:
        return f"tracer.{kind}" if kind == "result" else f"tracer.model.get({f'{self._label}.{kind}'!r})"

    def name(self, kind: str, path: Path) -> str:
        steps = path[1:] if kind == "input" and path and path[0] == 1 else path
        kind = "inputs" if kind == "input" else kind
        return f"`{self._label}.{kind}{''.join(f'[{step!r}]' for step in steps)}`"


class _Writer:
    """Puts a row's part into the value of the whole batch, which stays as it was: what changes is a copy.

    Args:
        rebuild: Where gradients flow through a part, the whole is put together anew from it.
        fresh: The copies that were made already, by id.
    """

    def __init__(
        self,
        shares: Shares,
        kind: str,
        index: int,
        views: dict[Path, _View],
        *,
        rebuild: bool,
        fresh: set[int] | None = None,
    ) -> None:
        self._shares, self._kind, self._index, self._views = shares, kind, index, views
        self._rebuild, self._fresh = rebuild, set() if fresh is None else fresh

    def widen(self, whole: Any, part: Any, path: Path) -> Any:
        if isinstance(whole, Tensor):
            return self._tensor(whole, part, path)
        if isinstance(whole, dict):
            if not isinstance(part, dict) or list(part) != list(whole):
                raise self._other_structure(whole, part, path)
            return like(whole, [self.widen(item, part[key], (*path, key)) for key, item in whole.items()])
        if isinstance(whole, (tuple, list)):
            if not isinstance(part, (tuple, list)) or len(part) != len(whole):
                raise self._other_structure(whole, part, path)
            return like(whole, [self.widen(item, part[at], (*path, at)) for at, item in enumerate(whole)])
        if part is whole or (isinstance(whole, _PLAIN) and type(part) is type(whole) and part == whole):
            return whole
        raise self._shared(path)

    def _tensor(self, whole: Tensor, part: Any, path: Path) -> Tensor:
        view, batch = self._views.get(path), self._shares._knife.batch
        untouched = view is not None and part is view.part
        if view is not None and view.shared:
            in_place = view.version is not None and view.whole._version != view.version
            if untouched and not (in_place and batch.count > 1):
                return whole
            if isinstance(view.part, Hidden):
                view.part._raise()
            if batch.count > 1:
                raise self._shared(path)
        flows = whole.requires_grad or (isinstance(part, Tensor) and part.requires_grad)
        if untouched and view is not None and view.whole is whole and not (self._rebuild and flows):
            return whole
        if not isinstance(part, Tensor):
            raise self._other_structure(whole, part, path)
        cut = self._shares._knife.cut(whole, self._shares._axes(self._kind, path, whole), self._index)
        with torch.inference_mode(whole.is_inference()), torch.set_grad_enabled(flows):
            expected = whole[cut.at].shape
            if part.shape != expected:
                raise self._other_shape(expected, part, path)
            if id(whole) not in self._fresh:
                whole = whole.clone()
                if self._rebuild:
                    self._fresh.add(id(whole))
            whole[cut.at] = part
        return whole

    def _other_shape(self, expected: torch.Size, part: Tensor, path: Path) -> WriteError:
        batch = self._shares._knife.batch
        facts: dict[str, str] = {}
        if batch.spans is not None:
            others = [i for i in range(batch.count) if i != self._index]
            fitting = [i for i in others if batch.spans[i][1] - batch.spans[i][0] in part.shape]
            for i in sorted([self._index, *(fitting or others)[:1]]):
                facts[f"row {i}"] = batch.show(i)
        return WriteError(
            f"{self._shares.name(self._kind, path)} of row {self._index} has the shape {list(expected)}, "
            f"and this has {list(part.shape)}; nothing is broadcast.",
            you_wrote=user_place().source,
            **facts,
            instead="the positions that correspond: b.layer.output[:, -3:] = a.layer.output[:, -3:]"
            if batch.spans is not None
            else None,
        )

    def _other_structure(self, whole: Any, part: Any, path: Path) -> WriteError:
        return WriteError(
            f"{self._shares.name(self._kind, path)} is another kind of value than what row {self._index} was given.",
            you_wrote=user_place().source,
            the_batch_has=show_shape(shape_of(whole)),
            you_gave=show_shape(shape_of(part)),
            instead="a value of the form that reading it gives; envoy.output[:] = 0 fills a tensor",
        )

    def _shared(self, path: Path) -> WriteError:
        name = self._shares.name(self._kind, path)
        return WriteError(
            f"{name} is shared by all {self._shares._knife.batch.count} rows: "
            "one row can't change it for itself alone.",
            you_wrote=user_place().source,
            instead=f"write it for the whole batch: tracer.model.{self._shares._label}.{self._kind} = ...",
        )


def _view(whole: Tensor, at: tuple[slice, ...]) -> Tensor:
    """A part of a tensor, in its graph also where the block has turned gradients off."""
    if not whole.requires_grad or torch.is_grad_enabled():
        return whole[at]
    with torch.inference_mode(False), torch.enable_grad():
        return whole[at]


def _value(visit: Visit, kind: str) -> Any:
    return (visit.args, visit.kwargs) if kind == "input" else visit.output


def _same(whole: Any, old: Any) -> bool:
    """Whether nothing in a value was replaced; the pair of inputs is made anew each time."""
    return whole is old or (type(whole) is tuple and len(whole) == 2 and whole[0] is old[0] and whole[1] is old[1])


class Rows:
    """The rows of one run: its prompts, and where they stand in its values."""

    def __init__(self, run: Run, batch: Batch, fn: str | None) -> None:
        self.run, self.batch, self._fn = run, batch, fn
        self._measured: Measured | None = None
        self.last: tuple[int, Place] | None = None  # which row asked last, and where

    def row(self, index: int) -> RowRun:
        return RowRun(self, index)

    def knife(self) -> Knife:
        called = self._called()
        copies = next((spec.shape[0] for _, spec in specs_in(called) if spec.shape), 0) // self.batch.count
        return Knife(self.batch, max(copies, 1), max(self.run.state.step, 0))

    def shares(self, module: nn.Module, visit: Visit) -> Shares:
        if visit.shares is None:
            measured = self.measured()  # and not self, which holds the run
            visit.shares = Shares(
                self.knife(),
                lambda kind, path, tensor: measured.of(module, kind, path, tensor),
                self.run.tree.label(module),
            )
        return visit.shares

    def result_shares(self, result: Any) -> Shares:
        if self._fn != "generate":
            measured, module = self.measured(), self.run.module
            return Shares(self.knife(), lambda kind, path, tensor: measured.of(module, kind, path, tensor), "model")
        sequences = result if isinstance(result, Tensor) else getattr(result, "sequences", None)
        longer = sequences.shape[1] - (self.batch.width or 0) if isinstance(sequences, Tensor) else 0
        axes: Axes = ("row", "token" if self.batch.returns_prompts else "")

        def of_generated(kind: str, path: Path, tensor: Tensor) -> Axes | Unknown:
            return axes if tensor is sequences else Unknown("only the generated sequences are known to be one a row")

        return Shares(Knife(self.batch, self.batch.returned, longer), of_generated, "model")

    def measured(self) -> Measured:
        if self._measured is None:
            run, inputs = self.run, self._called()
            fn = None if self._fn == "generate" else self._fn
            self._measured = measure(run.tree, run.module, fn, inputs, self._guesses(inputs))
        return self._measured

    def _called(self) -> Inputs:
        """What the traced module is called with, but for its own state; in a generation, in the first step."""
        called = self.run.called or self.run.state.first_call
        if called is None:
            raise RowError(
                "A generation's rows can be told from its first step on, and this is before it.",
                you_wrote=user_place().source,
                instead="the value of the whole batch: tracer.model...",
            )
        args, kwargs = called
        return args, {name: value for name, value in kwargs.items() if name not in self.batch.own_state}

    def _guesses(self, inputs: Inputs) -> list[dict[Path, Axes]]:
        """Which axes of the inputs may have rows and tokens. What a prompt became is known; of others, the twin tells:

        the first tensor alone has rows, or all that have as many on their first axis.
        """
        specs = list(specs_in(inputs))
        if not specs:
            return []
        rows = specs[0][1].shape[:1]
        with_rows = [path for path, spec in specs if spec.shape[:1] == rows]
        if self.batch.token_inputs:
            return [{path: self._input_axes(path, spec, path in with_rows) for path, spec in specs}]
        everything = {path: self._input_axes(path, spec, True) for path, spec in specs if path in with_rows}
        one = {specs[0][0]: everything[specs[0][0]]}
        return [one] if one == everything else [one, everything]

    def _input_axes(self, path: Path, spec: Any, has_rows: bool) -> Axes:
        axes: list[Any] = [""] * len(spec.shape)
        if axes and has_rows:
            axes[0] = "row"
        if path[-1] in self.batch.token_inputs:
            for at in (2, 3) if len(axes) == 4 else (1,):  # a mask may be [row, 1, token, token]
                if at < len(axes) and spec.shape[at] == self.batch.width:
                    axes[at] = "token"
        return tuple(axes)


class RowRun:
    """A run, asked through one row: what an Envoy asks of a run, it answers for that row alone."""

    def __init__(self, rows: Rows, index: int) -> None:
        self.rows, self.index, self._run = rows, index, rows.run

    @property
    def is_open(self) -> bool:
        return self._run.is_open

    @property
    def tree(self) -> Tree:
        return self._run.tree

    def read(self, module: nn.Module, kind: str) -> Visit:
        visit = self._ask(module, kind, lambda: self._run.read(module, kind))
        if visit.port is None:  # of a module that the block called itself, on values of its own
            return visit
        part = self.rows.shares(module, visit).take(visit, kind, self.index)
        self._note(shape_of(part))
        args, kwargs = part if kind == "input" else (visit.args, visit.kwargs)
        return Visit(visit.port, args, kwargs, part if kind == "output" else None)

    def write_output(self, module: nn.Module, value: Any) -> None:
        def widen(visit: Visit, part: Any) -> Any:
            return self.rows.shares(module, visit).put(visit, "output", self.index, part)

        self._ask(module, "output", lambda: self._run.write_output(module, value, widen))
        self._note(shape_of(value))

    def write_inputs(
        self, module: nn.Module, change: Callable[[Visit], tuple[tuple[Any, ...], dict[str, Any]]]
    ) -> None:
        def widen(visit: Visit) -> tuple[tuple[Any, ...], dict[str, Any]]:
            shares = self.rows.shares(module, visit)
            args, kwargs = shares.take(visit, "input", self.index)
            whole: tuple[tuple[Any, ...], dict[str, Any]] = shares.put(
                visit, "input", self.index, change(Visit(visit.port, args, kwargs, None))
            )
            return whole

        self._ask(module, "input", lambda: self._run.write_inputs(module, widen))
        self._note(None)

    def skip(self, module: nn.Module, value: Any) -> None:
        name = self._run.tree.label(module)
        raise RowError(
            f"`{name}` runs for all rows of a batch at once: one row can't skip it.",
            you_wrote=user_place().source,
            instead=f"write its output for this row, or skip it for all: tracer.model.get({name!r}).skip(value)",
        )

    def next(self, module: nn.Module) -> None:
        name = self._run.tree.label(module)
        raise RowError(
            "The rows of a batch share one forward pass: one row can't go on to the next call alone.",
            you_wrote=user_place().source,
            instead=f"tracer.model.get({name!r}).next() once, and then read it for each row",
        )

    def own(self, thing: Any) -> Any:
        return self._run.own(thing)

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._run.record(module, args, kwargs)

    @property
    def result(self) -> Any:
        result = self._run.finish()
        return self.rows.result_shares(result).take(Visit(None, (), {}, result), "result", self.index)

    @result.setter
    def result(self, value: Any) -> None:
        result = self._run.finish()
        shares = self.rows.result_shares(result)
        self._run.state.result = shares.put(Visit(None, (), {}, result), "result", self.index, value)

    @property
    def tokens(self) -> list[str]:
        tokens = self.rows.batch.tokens
        if isinstance(tokens, str):
            raise RowError(f"The tokens of these rows aren't known: {tokens}.", you_wrote=user_place().source)
        return tokens(self.index)

    def _note(self, shape: Any) -> None:
        """Has the run remember which row asked, and with what shape, which a write doesn't change."""
        self._run.history.amend(self.index, shape)

    def _ask(self, module: nn.Module, kind: str, ask: Callable[[], Any]) -> Any:
        last = self.rows.last
        try:
            answer = ask()
        except OutOfOrderError as error:
            if last is None or last[0] == self.index or type(error) not in (AlreadyPastError, OutOfOrderError):
                raise
            raise AlreadyPastError(
                f"`{self._run.tree.label(module)}.{kind}` is past for row {self.index}: the rows share one forward "
                f"pass, which ran on when row {last[0]} was asked.",
                you_wrote=user_place().source,
                it_ran_on=last[1].quoted,
                instead="one loop for both rows, or a `tracer.invoke(...)` for each",
            ) from None
        self.rows.last = self.index, user_place()
        return answer
