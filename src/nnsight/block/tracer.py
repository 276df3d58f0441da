"""The object that a `with model.trace(...)` binds: it opens a run, ends it, and tells afterwards what was done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch

from nnsight.block import gradient
from nnsight.block.cache import Cache, open_cache
from nnsight.block.receipt import receipt
from nnsight.block.rows import RowRun, Rows
from nnsight.block.steps import Loop, Plan, Steps
from nnsight.core.escape import let_escape, raise_escaped
from nnsight.core.history import add_note, user_place
from nnsight.core.recording import Log
from nnsight.core.run import Run
from nnsight.core.save import mount
from nnsight.errors import BlockError, WriteError

CPU = torch.device("cpu")


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
        plan: How many steps the run will have.
        make_rows: Finds the rows of the run in its inputs.
    """

    def __init__(
        self,
        make_run: Callable[[], Run],
        scope: Callable[[Run | RowRun, Tracer], Any],
        plan: Plan,
        make_rows: Callable[[Run], Rows],
    ) -> None:
        self._make_run: Callable[[], Run] | None = make_run
        self._bind, self._plan = scope, plan
        self._make_rows: Callable[[Run], Rows] | None = make_rows
        self._rows: Rows | None = None
        self._run: Run | None = None
        self._scope: Any = None
        self._gradients: gradient.Watch | None = None

    def __enter__(self) -> Tracer:
        if self._make_run is None:
            raise BlockError(
                "A trace is used once; this one has been entered before.", instead="with model.trace(...) again"
            )
        mount()
        make_run, self._make_run = self._make_run, None
        self._run = make_run()
        self._run.enter()
        self._gradients = gradient.watch(self._run, sys._getframe(1).f_code)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        run = self._entered()
        if self._gradients is not None:
            self._gradients.close()
        if error is not None:
            gradient.explain(error)
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

    @property
    def iter(self) -> Steps:
        """The steps of a generation, as a loop: `for step in tracer.iter[:]`; also `[2:]`, `[::2]`, `[3]`, `[[0, 4]]`.

        A step is one call of the model; step 0 reads the prompt. In the loop, values are those of its step. The loop
        ends where the generation ends, and what follows it runs. A plain trace has one step.
        """
        return Steps(self._entered(), self._plan)

    def all(self) -> Loop:
        """All steps: `tracer.iter[:]`."""
        return self.iter[:]

    def stop(self) -> None:
        """Ends the model where it stands, and leaves the block: what follows in it does not run."""
        run = self._entered()
        if not run.is_open:
            raise BlockError("`tracer.stop()` was called after its block.", you_wrote=user_place().source)
        if (late := run.stop("stopped")) is not None:
            raise late
        raise StopBlock(run)

    def cache(
        self,
        modules: Any = None,
        device: torch.device | str | None = CPU,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        include_output: bool = True,
        include_inputs: bool = False,
        non_blocking: bool = False,
        clone: bool = False,
    ) -> Cache:
        """Keeps the values of many modules, at each call from here on, with no pause at any of them.

        A value is kept as the block left it: behind every write at the same place.

        Args:
            modules: A path ("transformer.h.0"), an Envoy, a pattern ("h.*.mlp"), a class of modules, a function that
                says of a module whether it is meant, or several of these. None: every module that is traced.
            device: Where values are kept; None: where they are.
            dtype: What floating-point values are turned into.
            detach: Whether values are kept without their graph.
            include_output: Whether outputs are kept.
            include_inputs: Whether inputs are kept.
            non_blocking: Whether copies from another device may be under way while the model runs on; they are waited
                for when the cache is read.
            clone: Whether values are copied even where they need not be: against changes in place that come later.

        Raises:
            UnknownNameError: No module is meant.
            OutsideTraceError: The block is over.
            AlreadyPastError: The model has run to its end.
        """
        keep = Log(
            device=None if device is None else torch.device(device),
            dtype=dtype,
            detach=detach,
            clone=clone,
            non_blocking=non_blocking,
        )
        return open_cache(self._entered(), modules, keep, inputs=include_inputs, output=include_output)

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
