"""What a `with model.trace(...)` binds: it is asked for a run's values, ends the run, and tells what was done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from nnsight.block import gradient
from nnsight.block.barrier import Barrier
from nnsight.block.beginning import Beginning
from nnsight.block.cache import Cache, open_cache
from nnsight.block.invoke import Invoke
from nnsight.block.leave_out import entering
from nnsight.block.receipt import receipt
from nnsight.block.rows import RowRun, Rows, RowScopes
from nnsight.block.steps import Loop, Steps
from nnsight.core import expected, failed
from nnsight.core.escape import escaping, raise_escaped
from nnsight.core.group import GroupRun
from nnsight.core.history import add_note, user_place
from nnsight.core.log import Log
from nnsight.core.run import Run
from nnsight.core.spelling import nearest
from nnsight.errors import BlockError, OutsideTraceError, RowError, UnknownNameError, WriteError

if TYPE_CHECKING:
    from typing_extensions import Self

    from nnsight.scopes import RowScope

CPU = torch.device("cpu")


class StopBlock(BaseException):
    """Leaves a block after `tracer.stop()`; the tracer whose run it names swallows it."""

    def __init__(self, run: Run) -> None:
        super().__init__("tracer.stop() outside the block of its trace")
        self.run = run


class Tracer(Beginning):
    """A trace, which `model.trace(...)` makes: used once, in a `with`. Printed afterwards, it tells what was done.

    What it doesn't have itself is asked of the model, in this run: `tracer.transformer.h[5]`.
    """

    _rows: Rows | None = None
    _scope: Any = None
    _unpacked_at = -1  # the instruction that took the rows apart
    _asking: RowRun | None = None  # the row that asks, where it isn't the block

    def _asked_by(self, row: RowRun) -> Tracer:
        """This trace as one of its rows asks it."""
        asked: Tracer = object.__new__(type(self))
        vars(asked).update(vars(self), _asking=row)
        return asked

    def _asked(self) -> Any:
        """What answers here: the run, or the part of it that this line is written for."""
        return self._asking or self._entered().asked()

    def __enter__(self) -> Self:
        frame = sys._getframe(1)
        if self._invokes is not None:
            self._invokes.opened = frame.f_code, entering(frame)
        self._open(frame.f_code)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            failed.without_our_frames(error, Run.raises)
            return self._leave(error, traceback)
        except BaseException as late:  # of any class: it goes on as it is
            if self._gradients is not None:  # it may be a signal's, which can come between any two calls
                self._gradients.close()
            if isinstance(late, Exception):
                failed.without_our_frames(late, Run.raises)
            raise late  # with the traceback that it has now

    def _leave(self, error: BaseException | None, traceback: TracebackType | None) -> bool:
        if self._launch is None and self._end_gathering(error):
            return False
        unpacking = traceback is not None and traceback.tb_next is None and traceback.tb_lasti == self._unpacked_at
        if unpacking and isinstance(error, ValueError):
            self._explain_unpacking(error)
        run = self._run or self._entered()
        if self._gradients is not None:
            self._gradients.close()
        if error is not None:
            gradient.explain(error)
            expected.explain(error, run)
        try:
            if error is None or (isinstance(error, StopBlock) and error.run is not run):
                self._finish(run)
            elif isinstance(error, GeneratorExit):
                run.drop()  # a generator may be closed by another thread than its own
            elif (late := run.stop("failed in the block")) is not None:
                add_note(error, f"While the model was unwound, it raised {type(late).__name__}: {late}")
        finally:
            run.leave()
            self.__dict__["_launch"] = None  # it holds the inputs
        return isinstance(error, StopBlock) and error.run is run

    def _explain_unpacking(self, error: ValueError) -> None:
        """Adds how many rows there are, to an error that says that there are more or fewer names."""
        if self._rows is not None:
            count = self._rows.batch.count
            rows = f"{count} row{'s' * (count != 1)}"
            add_note(error, f"This batch has {rows}. For any number: `as tracer`, and then tracer.rows.")

    @staticmethod
    def _finish(run: Run) -> None:
        try:
            run.finish(is_left=True)
        except (RowError, WriteError):  # what a row left where the model stands can't be given to it
            run.stop("failed in the block")
            raise
        except BaseException:  # a Ctrl-C between the model and here
            run.drop()
            raise

    # Prompts that come one by one.

    def invoke(self, *args: Any, **kwargs: Any) -> Invoke:
        """A prompt of this trace with a block of its own: `with tracer.invoke("The Eiffel Tower is in"):`.

        All prompts of a trace run in one batch, when its block ends; the trace itself is given none. Each block has the
        values of its own prompt, in the prompt's own tokens, and an order of its own. What it binds is bound around it
        afterwards, and can be used in the other blocks as soon as it is there.

        Args:
            args: What `trace` takes; nothing: a block for the whole batch.
            kwargs: As in `trace`. What the trace itself was given comes first.

        Raises:
            BlockError: The trace has a prompt already, or the line stands in another invoke.
        """
        if self._invokes is None or not self._is_gathering:
            raise self._no_invoke()
        return self._invokes.new(args, kwargs, self)

    def barrier(self, n_participants: int) -> Barrier:
        """A place where as many invokes wait for each other: `barrier = tracer.barrier(2)`, then `barrier()` in two.

        A block waits by itself for a name that another one binds; a barrier is for what has no name.

        Raises:
            BlockError: `n_participants` is no whole number from 1 on.
        """
        return Barrier(self, n_participants)

    def _in_charge(self) -> Tracer:
        """This trace, or that of an invoke which runs where it stands, just now."""
        live = None if self._invokes is None else self._invokes.live
        return self if live is None or live.alone is None else live.alone

    # Its run.

    def run(self) -> Any:
        """Runs the model with an empty block, and returns its result."""
        with self:
            return self.result

    @property
    @escaping
    def result(self) -> Any:
        """What the traced call returned; the model runs to its end. After that, no inner value can be had any more.

        Assigning replaces it, for who asks afterwards. In an invoke it is that of its own prompts.
        """
        asked = self._entered("tracer.result").asked()
        return asked.result if isinstance(asked, RowRun) else asked.returned()

    @result.setter
    def result(self, value: Any) -> None:
        asked = self._entered("tracer.result").asked()
        if isinstance(asked, RowRun):
            asked.result = value
            return
        asked.returned()
        asked.state.result = value

    @property
    def iter(self) -> Steps:
        """The steps of a generation, as a loop: `for step in tracer.iter[:]`; also `[2:]`, `[::2]`, `[3]`, `[[0, 4]]`.

        A step is one call of the model; step 0 reads the prompt. In the loop, values are those of its step. The loop
        ends where the generation ends, and what follows it runs. A plain trace has one step.
        """
        run, launch = self._entered("tracer.iter"), self._in_charge()._launch
        if launch is None:
            raise BlockError("`tracer.iter` was asked for after its block.", you_wrote=user_place().source)
        return Steps(run, launch.plan)

    def all(self) -> Loop:
        """All steps: `tracer.iter[:]`."""
        return self.iter[:]

    def next(self) -> NoReturn:
        """Refused: a trace has no next call. Its steps are a loop, and `.next()` is a module's."""
        raise BlockError(
            "`.next()` is of a module that is called several times in a step, not of a trace.",
            you_wrote=user_place().source,
            instead="for step in tracer.iter[:]:    or, of a module, tracer.model.<module>.next().output",
        )

    def stop(self) -> None:
        """Ends the model where it stands, and leaves the block: what follows in it does not run.

        In an invoke, it leaves that block alone, and the model goes on for the others.

        Raises:
            BlockError: The block is over.
        """
        run = self._entered("tracer.stop()")
        if not run.is_open:
            raise BlockError("`tracer.stop()` was called after its block.", you_wrote=user_place().source)
        if isinstance(run, GroupRun):
            run.settle()
            raise StopBlock(run)  # the model goes on for the other blocks
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
            BlockError: Nothing would be kept, or there is no such device.
            ModelError: A module inside TorchScript is meant.
            TypeError: `modules` is none of these, or `dtype` no dtype.
        """
        keep = Log(
            device=None if device is None else torch.device(device),
            dtype=dtype,
            detach=detach,
            clone=clone,
            non_blocking=non_blocking,
        )
        run = self._entered("tracer.cache()")
        part = asked.kept if isinstance(asked := self._asked(), RowRun) else None
        return open_cache(run, modules, keep, inputs=include_inputs, output=include_output, part=part)

    @property
    def model(self) -> Any:
        """The model's tree bound to this run, also where another run of the same model was opened later."""
        run = self._entered()
        if isinstance(run, GroupRun):
            return self._bind(run.asked(), self)
        if self._scope is None:
            self._scope = self._bind(run, self)
        return self._scope

    @property
    def tracer(self) -> Tracer:
        """This trace: what is written for a row or an invoke, `a.tracer.stop()`, can be given a trace too."""
        return self

    @property
    def rows(self) -> tuple[RowScope, ...]:
        """The model's tree bound to each row of the batch: `with model.trace([p, q]) as (a, b):` gives the same.

        Raises:
            RowError: The inputs have no rows.
            BlockError: The trace has invokes, or is over.
        """
        run = self._entered()
        if isinstance(run, GroupRun):
            raise BlockError(
                "A trace with invokes has no rows: each invoke has its own prompts.",
                you_wrote=user_place().source,
                instead="the model itself, whose values are those of this invoke's prompts",
            )
        if (tracer := self._in_charge()) is not self:
            return tracer.rows
        rows = self._own_rows(run)
        # Made anew each time: a row knows its tracer.
        return RowScopes(self._bind(rows.row(index), self) for index in range(rows.batch.count))

    def _own_rows(self, run: Run) -> Rows:
        """The rows of its run, found when they are first asked for."""
        if self._rows is None:
            if self._launch is None:
                raise BlockError(
                    "The rows of this trace were asked for after its block.", you_wrote=user_place().source
                )
            self._rows = self._launch.make_rows(run)
        return self._rows

    def _entered(self, asked: str = "") -> Run:
        """Its run; `asked` is what is asked of it, if not a value."""
        tracer = self._in_charge()
        if tracer is not self:
            return tracer._entered()
        if self._run is None and self._is_gathering:
            self._run_alone(asked)
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
        if self._is_gathering:
            assert self._invokes is not None
            if not hasattr(self._invokes.tree.root, name) and (near := self._near(name)):
                raise UnknownNameError(f"A trace has no `{name}`.", you_wrote=user_place().source, nearest=near)
        try:
            return getattr(self.model, name)
        except UnknownNameError as error:
            if near := self._near(name):
                add_note(error, f"A trace has {near}.")
            raise
        except OutsideTraceError as error:
            if name == "output":
                add_note(error, "What the model returned is tracer.result, also after the trace.")
            raise

    def _near(self, name: str) -> str:
        """A trace's own names that are spelt nearly so."""
        return nearest(name, [one for one in dir(type(self)) if not one.startswith("_") and one != "tracer"])

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.model, name, value)  # `tracer.output = value` is a write like any other

    def __getitem__(self, key: Any) -> Any:
        model = self.model
        if isinstance(key, int) and not hasattr(type(model._module), "__getitem__"):
            raise BlockError(
                f"`[{key}]` of a trace may mean a prompt of its batch, or a module.",
                you_wrote=user_place().source,
                instead=f"tracer.rows[{key}] for the prompt; tracer.model[{key}] for the model's child of that number",
            )
        return model[key]

    def __iter__(self) -> Iterator[RowScope]:
        self._unpacked_at = sys._getframe(1).f_lasti
        return iter(self.rows)

    def __reduce__(self) -> Any:
        raise TypeError("a trace can't be copied or pickled; its values and caches can")

    def __repr__(self) -> str:
        if self._run is not None:
            return receipt(self._run)
        if self._invokes is None or not self._used:
            return "<trace, not entered>"
        return "<trace, ended>" if self._closed else f"<trace, {len(self._invokes.all)} invokes>"

    def __str__(self) -> str:
        return repr(self) if self._run is None else receipt(self._run, whole=True)


_OWN = frozenset(dir(Tracer))
