"""The object that a `with model.trace(...)` binds: it opens a run, ends it, and tells afterwards what was done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from nnsight.block.receipt import receipt
from nnsight.block.rows import RowRun, Rows
from nnsight.core.escape import let_escape, raise_escaped
from nnsight.core.history import add_note, user_place
from nnsight.core.run import Run
from nnsight.core.save import mount
from nnsight.errors import BlockError, WriteError


class StopBlock(BaseException):
    """Leaves a block after `tracer.stop()`; the tracer whose run it names swallows it."""

    def __init__(self, run: Run) -> None:
        super().__init__("tracer.stop() outside the block of its trace")
        self.run = run


class Tracer:
    """A trace: used once, in a `with`.

    Args:
        make_run: Makes the run, when the block is entered.
        scope: Binds the model's tree to a run, or to one row of it.
        make_rows: Finds the rows of the run in its inputs.
    """

    def __init__(
        self,
        make_run: Callable[[], Run],
        scope: Callable[[Run | RowRun, Tracer], Any],
        make_rows: Callable[[Run], Rows],
    ) -> None:
        self._make_run: Callable[[], Run] | None = make_run
        self._bind = scope
        self._make_rows: Callable[[Run], Rows] | None = make_rows
        self._rows: Rows | None = None
        self._run: Run | None = None
        self._scope: Any = None

    def __enter__(self) -> Tracer:
        if self._make_run is None:
            raise BlockError(
                "A trace is used once; this one has been entered before.", instead="with model.trace(...) again"
            )
        mount()
        make_run, self._make_run = self._make_run, None
        self._run = make_run()
        self._run.enter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        run = self._entered()
        try:
            if error is None or (isinstance(error, StopBlock) and error.run is not run):
                self._finish(run)
            elif isinstance(error, GeneratorExit):
                run.drop()  # a generator may be closed by another thread than its own
            elif (late := run.stop("failed in the block")) is not None:
                add_note(error, f"While the model was unwound, it raised {type(late).__name__}: {late}")
        finally:
            run.leave()
            self._make_rows = None  # it holds the inputs
        return isinstance(error, StopBlock) and error.run is run

    @staticmethod
    def _finish(run: Run) -> None:
        try:
            run.finish()
        except WriteError:  # what a row left where the model stands can't be given to it
            run.stop("failed in the block")
            raise

    def run(self) -> Any:
        """Runs the model with an empty block, and returns its result."""
        with self:
            return self.result

    @property
    def result(self) -> Any:
        """What the traced call returned; the model runs to its end. After that, no inner value can be had any more."""
        try:
            return self._entered().finish()
        except AttributeError as error:
            let_escape(error)
            raise

    @result.setter
    def result(self, value: Any) -> None:
        run = self._entered()
        run.finish()
        run.state.result = value

    def stop(self) -> None:
        """Ends the model where it stands, and leaves the block: what follows in it does not run."""
        run = self._entered()
        if not run.is_open:
            raise BlockError("`tracer.stop()` was called after its block.", you_wrote=user_place().source)
        if (late := run.stop("stopped")) is not None:
            raise late
        raise StopBlock(run)

    @property
    def model(self) -> Any:
        """The model's tree bound to this run, also where another run of the same model was opened later."""
        if self._scope is None:
            self._scope = self._bind(self._entered(), self)
        return self._scope

    @property
    def rows(self) -> tuple[Any, ...]:
        """The model's tree bound to each row of the batch: `with model.trace([p, q]) as (a, b):` gives the same."""
        run = self._entered()
        if self._rows is None:
            if self._make_rows is None:
                raise BlockError(
                    "The rows of this trace were asked for after its block.", you_wrote=user_place().source
                )
            self._rows, self._make_rows = self._make_rows(run), None
        # Made anew each time: a row knows its tracer.
        return tuple(self._bind(self._rows.row(index), self) for index in range(self._rows.batch.count))

    def _entered(self) -> Run:
        if self._run is None:
            raise BlockError(
                "This trace has not been entered.",
                you_wrote=user_place().source,
                instead="with model.trace(...) as tracer:",
            )
        return self._run

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "result":
            raise_escaped()
        return getattr(self.model, name)

    def __getitem__(self, key: Any) -> Any:
        return self.model[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return "<trace, not entered>" if self._run is None else receipt(self._run)
