"""Rows: one run, asked through one prompt of its batch. What is read is narrowed to it, what is written is widened.

A row's part keeps its batch axis, of size 1, and has the prompt's own tokens without the padding. It is a view: changed
in place, it changes what the model goes on with. What is written instead of it comes into a copy of the batch, one for
all rows, when the model goes on or somebody asks for the whole. Where gradients flow, the model goes on with a value
that is put together from the views, since a view that is only looked at has no part in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from nnsight.block.cuts import Batch, Knife, Part
from nnsight.block.plain import axis_in
from nnsight.block.shares import Shares
from nnsight.core import missed
from nnsight.core.axes import Axes, Axial, Measured, Path, Unknown
from nnsight.core.hidden import hidden
from nnsight.core.history import Place, user_place
from nnsight.core.measuring import measure
from nnsight.core.origins import Handed
from nnsight.core.run import Run
from nnsight.core.several import SeveralCalls
from nnsight.core.specs import Inputs, shape_of, show_shape, specs_in
from nnsight.core.spliced import AxesOfCall, call_around
from nnsight.core.state import Visit
from nnsight.core.tree import Attached, Tree
from nnsight.core.values import through
from nnsight.errors import AlreadyPastError, BlockError, OutOfOrderError, RowError, UnknownIndexError

_SEQUENCES = "only the generated sequences are known to be one a row"


class Rows:
    """The rows of one run: its prompts, and where they stand in its values."""

    def __init__(self, run: Run, batch: Batch, fn: str | None) -> None:
        self.run, self.batch, self._fn = run, batch, fn
        self._measured: dict[Any, Axial] = {}
        self.last: tuple[int, Place] | None = None  # which part asked last, and where

    def row(self, index: int) -> RowRun:
        return RowRun(self, index)

    def knife(self) -> Knife:
        called = self._called()
        axis = self.batch.axis
        copies = next((s.shape[axis] for _, s in specs_in(called) if len(s.shape) > axis), 0) // self.batch.count
        window = None if (counter := self.run.counter) is None else counter.window
        return Knife(self.batch, max(copies, 1), max(self.run.state.step, 0), window=window)

    def tokens(self, part: Part | None) -> Any:
        """The tokens of a part's prompts as text; of the whole batch, a list for each prompt, if there is no part."""
        tokens = self.batch.tokens
        if isinstance(tokens, str):
            raise RowError(f"The tokens of these rows aren't known: {tokens}.", you_wrote=user_place().source)
        each = [tokens(row) for row in (range(self.batch.count) if part is None else range(part.start, part.stop))]
        return each[0] if len(each) == 1 else each

    def shares(self, module: nn.Module, visit: Visit) -> Shares:
        if visit.shares is None:
            measured, knife = self._axial(module), self.knife()  # and not self, which holds the run
            visit.shares = Shares(
                knife,
                lambda kind, path, tensor: measured.of(module, kind, path, tensor, knife.step),
                self.run.outer.label(module),
            )
        return visit.shares

    def result_shares(self, result: Any) -> Shares:
        if self._fn != "generate":
            measured, module = self.measured(), self.run.named(self.run.module)
            return Shares(self.knife(), lambda kind, path, tensor: measured.of(module, kind, path, tensor, 0), "model")
        sequences = result if isinstance(result, Tensor) else getattr(result, "sequences", None)
        longer = sequences.shape[1] - (self.batch.width or 0) if isinstance(sequences, Tensor) else 0
        axes: Axes = ("row", "token" if self.batch.returns_prompts else "")

        own = not self.batch.token_inputs  # a method that was written for this model, and may return anything

        def of_generated(kind: str, path: Path, tensor: Tensor) -> Axes | Unknown:
            if own or tensor is not sequences or tensor.ndim != 2:
                what = "it is what a `generate` of the model's own returns" if own else _SEQUENCES
                return Unknown(what)
            return axes

        return Shares(Knife(self.batch, self.batch.returned, longer), of_generated, "model")

    def part_of_result(self, result: Any, index: int) -> Any:
        return self.result_shares(result).take(Visit(None, (), {}, result), "result", index)

    def _axial(self, module: nn.Module) -> Axial | AxesOfCall:
        """The axes of a module's values where the run stands: in a call that an edit makes, perhaps."""
        inside = module if isinstance(module, Attached) else None
        if (call := call_around(self.run.state.link)) is not None:
            return AxesOfCall(self.run.outer, self.measured(), call, inside)
        return self.measured(module)

    def measured(self, module: nn.Module | None = None) -> Axial:
        """The axes of all modules' values; with a stand-in for an operation, also of those in the same function."""
        if callable(self._fn):
            failed = Measured(failed="a function runs the model here, and axes are measured on a copy")
            return Axial(lambda _: failed)
        inside = module if isinstance(module, Attached) else None
        within = None if inside is None else (inside.place[0], inside.measured_with)
        if within not in self._measured:
            run, inputs = self.run, self._called()
            fn = None if self._fn == "generate" else self._fn
            root = run.named(run.module)  # the model's own, in a scan too
            guesses = self._guesses(inputs)
            self._measured[within] = Axial(partial(measure, run.outer, root, fn, inputs, guesses, inside))
        return self._measured[within]

    def _called(self) -> Inputs:
        """What the traced module is called with, but for its own state; in a generation, in the first step."""
        called = self.run.called or self.run.state.first_call
        if called is None and self._fn != "generate":
            raise RowError(
                "No row of this trace was asked for in its block, so that none can be told behind it.",
                you_wrote=user_place().source,
                instead="a.result in the block; or tracer.result, which is the whole batch's",
            )
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

        the first tensor alone has rows, or all that have as many on that axis.
        """
        specs = list(specs_in(inputs))
        if not specs:
            return []
        axis = self.batch.axis
        rows = specs[0][1].shape[axis]
        at = {path: axis_in(spec.shape, rows, axis) for path, spec in specs}
        if self.batch.token_inputs:
            return [{path: self._input_axes(path, spec, at[path]) for path, spec in specs}]
        everything = {path: self._input_axes(path, spec, at[path]) for path, spec in specs if at[path] is not None}
        one = {specs[0][0]: everything[specs[0][0]]}
        return [one] if one == everything else [one, everything]

    @property
    def _first_width(self) -> int | None:
        """Tokens of a row, with its padding, in the first call."""
        counter = self.run.counter
        first = counter.first if isinstance(counter, SeveralCalls) else None
        return self.batch.width if first is None else first.width

    def _input_axes(self, path: Path, spec: Any, rows_at: int | None) -> Axes:
        axes: list[Any] = [""] * len(spec.shape)
        if rows_at is not None:
            axes[rows_at] = "row"
        has_answer = self.batch.answers is not None and path[-1] in self.batch.answer_inputs
        if has_answer and rows_at is not None and len(axes) > 1:
            axes[1] = "answer"
        elif path[-1] in self.batch.token_inputs:  # of an encoder's output, as of an input
            for at in (2, 3) if len(axes) == 4 else (1,):  # a mask may be [row, 1, token, token]
                if at < len(axes) and spec.shape[at] == self._first_width:
                    axes[at] = "token"
        return tuple(axes)


class RowScopes(tuple[Any, ...]):
    """What `tracer.rows` has: a scope for each row."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        try:
            return super().__getitem__(key)
        except IndexError:
            count = len(self)
            raise UnknownIndexError(
                f"There is no row {key}: this batch has {count} row{'s' * (count != 1)}, from 0 to {count - 1}.",
                you_wrote=user_place().source,
            ) from None
        except TypeError:
            raise BlockError(
                f"A row is asked for by its number, and several by a slice, not by {key!r}.",
                you_wrote=user_place().source,
                instead=f"tracer.rows[0]: the first of {len(self)}",
            ) from None


class RowRun:
    """A run, asked through one row, or one invoke: what an Envoy asks of a run, it answers for that part alone."""

    def __init__(self, rows: Rows, index: int) -> None:
        self.rows, self.index, self._run = rows, index, rows.run
        self.label = rows.batch.part(index).label

    @property
    def _is_row(self) -> bool:
        return self.rows.batch.parts is None

    @property
    def is_open(self) -> bool:
        return self._run.is_open

    @property
    def tree(self) -> Tree:
        return self._run.tree

    @property
    def whole(self) -> Run:
        """The run that this is a part of."""
        return self._run

    def read(self, module: nn.Module, kind: str) -> Visit:
        visit = self._ask(module, kind, lambda: self._run.read(module, kind))
        if visit.port is None:  # of a module that the block called itself, on values of its own
            return visit
        own = self.here(module, kind)
        part = own.value(kind)
        self._note(shape_of(part))
        if isinstance(self._run.history, Handed):
            self._run.history.hand(module, kind, part, self.label, self.rows.shares(module, visit).beside)
        return own

    def here(self, module: nn.Module, kind: str) -> Visit:
        """This part of what stands where the run does."""
        visit = self._run.here(module, kind)
        return visit.narrowed(kind, self.rows.shares(module, visit).take(visit, kind, self.index))

    def put(self, module: nn.Module, kind: str, value: Any) -> None:
        """Has the model go on with another value of this part; no write of the block's."""
        visit = self._run.here(module, kind)
        visit.replace(kind, self.rows.shares(module, visit).put(visit, kind, self.index, value))

    def write_output(self, module: nn.Module, value: Any, widen: Callable[[Visit, Any], Any] | None = None) -> None:
        """`widen` makes this part of the output of what is written, as in `Run.write_output`."""

        def whole(visit: Visit, part: Any) -> Any:
            shares = self.rows.shares(module, visit)
            if widen is not None:
                part = widen(visit.narrowed("output", shares.had(visit, "output", self.index).value), part)
            return shares.put_later(visit, "output", self.index, part)

        self._ask(module, "output", lambda: self._run.write_output(module, value, whole), writes=True)
        self._note(shape_of(value))

    def write_inputs(
        self, module: nn.Module, change: Callable[[Visit], tuple[tuple[Any, ...], dict[str, Any]]]
    ) -> None:
        def widen(visit: Visit) -> tuple[tuple[Any, ...], dict[str, Any]]:
            shares = self.rows.shares(module, visit)
            if shares.is_skipped(self.index):
                raise missed.nothing_takes(self._run, module, f" of {self.label}")
            changed = change(visit.narrowed("input", shares.had(visit, "input", self.index).value))
            whole: tuple[tuple[Any, ...], dict[str, Any]] = shares.put_later(visit, "input", self.index, changed)
            return whole

        self._ask(module, "input", lambda: self._run.write_inputs(module, widen), writes=True)
        self._note(None)

    def skip(self, module: nn.Module, value: Any) -> None:
        place = user_place()

        def part(visit: Visit) -> None:
            self.rows.shares(module, visit).skip(self.index, value, place)

        self._ask(module, "input", lambda: self._run.skip(module, value, part))
        self._note(None)

    def next(self, module: nn.Module, calls: int = 1) -> None:
        if not self._is_row:
            self._run.next(module, calls)
            return
        name = self._run.outer.label(module)
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
        return self.rows.part_of_result(self._run.returned(), self.index)

    @result.setter
    def result(self, value: Any) -> None:
        result = self._run.returned()
        shares = self.rows.result_shares(result)
        self._run.state.result = shares.put(Visit(None, (), {}, result), "result", self.index, value)

    @property
    def tokens(self) -> Any:
        """The prompt's own tokens as text; a list for each prompt where there are several."""
        return self.rows.tokens(self.rows.batch.part(self.index))

    def cut(self, tensor: Tensor, axes: Axes) -> Tensor:
        """This part of a tensor whose axes are known."""
        return tensor[self.rows.knife().cut(tensor, axes, self.index).at]

    def kept(self, module: nn.Module, kind: str, value: Any) -> Any:
        """This part of a value that a cache keeps; what can't be told says so when it is used."""
        args, kwargs = value if kind == "input" else ((), {})
        module = self._run.named(module)
        visit = Visit(None, args, kwargs, None if kind == "input" else value)
        try:
            part = self.rows.shares(module, visit).take(visit, kind, self.index)
        except RowError as error:
            return hidden(error, show_shape(shape_of(value)))
        return through(part, Tensor.clone)  # a view would keep the whole batch, and change with the other rows

    def _note(self, shape: Any) -> None:
        """Has the run remember for which part it was asked, and with what shape, which a write doesn't change."""
        self._run.history.amend(self.label, shape)

    def _ask(self, module: nn.Module, kind: str, ask: Callable[[], Any], *, writes: bool = False) -> Any:
        visit = self._run.state.visit
        shares = None if visit is None else visit.shares
        if shares is not None:
            shares.asked_by_part = writes or not shares.has_written(kind, self.index)
        try:
            return self._in_order(module, kind, ask) if self._is_row else ask()  # an invoke has an order of its own
        finally:
            if shares is not None:
                shares.asked_by_part = False

    def _in_order(self, module: nn.Module, kind: str, ask: Callable[[], Any]) -> Any:
        last = self.rows.last
        try:
            answer = ask()
        except OutOfOrderError as error:
            if last is None or last[0] == self.index or type(error) not in (AlreadyPastError, OutOfOrderError):
                raise
            raise AlreadyPastError(
                f"`{self._run.outer.name_of(module, kind)}` is past for {self.label}: the rows share one forward pass, "
                f"which ran on when row {last[0]} was asked.",
                you_wrote=user_place().source,
                it_ran_on=last[1].quoted,
                instead="one loop for both rows",
            ) from None
        self.rows.last = self.index, user_place()
        return answer


def whole_of(run: Run | RowRun) -> Run:
    """The run itself, where a row or an invoke of it may be what asks."""
    return run.whole if isinstance(run, RowRun) else run
