"""The object that a `with model.trace(...)` binds: it opens a run, ends it, and tells afterwards what was done."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import CodeType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from nnsight.block import gradient
from nnsight.block.barrier import Barrier
from nnsight.block.cache import Cache, open_cache
from nnsight.block.invoke import Invoke, Invokes
from nnsight.block.receipt import receipt
from nnsight.block.rows import RowRun, Rows, RowScopes
from nnsight.block.steps import Loop, Plan, Steps
from nnsight.core import save
from nnsight.core.context import put
from nnsight.core.escape import escaping, raise_escaped
from nnsight.core.group import GroupRun
from nnsight.core.history import add_note, user_place
from nnsight.core.recording import Log
from nnsight.core.run import Run
from nnsight.core.spelling import nearest
from nnsight.errors import BlockError, RowError, UnknownNameError, WriteError

if TYPE_CHECKING:
    from typing_extensions import Self

    from nnsight.scopes import RowScope

CPU = torch.device("cpu")


class StopBlock(BaseException):
    """Leaves a block after `tracer.stop()`; the tracer whose run it names swallows it."""

    def __init__(self, run: Run) -> None:
        super().__init__("tracer.stop() outside the block of its trace")
        self.run = run


@dataclass
class Launch:
    """A run whose inputs are known, and that is not made yet.

    Args:
        make_run: Makes it; `kind=` is its class.
        make_rows: Finds its rows in its inputs.
        plan: How many steps it will have.
        samples: Whether what it does depends on random numbers.
    """

    make_run: Callable[..., Run]
    make_rows: Callable[[Run], Rows]
    plan: Plan
    samples: bool = False


# The traces that wait for prompts in this context.
_GATHERING: ContextVar[tuple[weakref.ref[Tracer], ...]] = ContextVar("gathering", default=())


def gathering(invokes_of: Any) -> Tracer | None:
    """The trace that waits for prompts whose block a line stands in, if it is one of this tree."""
    traces = [trace for reference in reversed(_GATHERING.get()) if (trace := reference()) is not None]
    return next((one for one in traces if one._is_gathering and one._invokes.tree is invokes_of), None)  # type: ignore[union-attr]


class Tracer:
    """A trace, which `model.trace(...)` makes: used once, in a `with`. Printed afterwards, it tells what was done.

    What it doesn't have itself is asked of the model, in this run: `tracer.transformer.h[5]`.

    Args:
        launch: How its run begins; None: its prompts come with `tracer.invoke(...)`.
        bind: Binds the model's tree to a run, or to one row of it.
        invokes: Where there is no `launch`: the invokes of this trace, none so far.
    """

    _launch: Launch | None
    _bind: Callable[[Run | RowRun, Tracer], Any]
    _invokes: Invokes | None = None
    _rows: Rows | None = None
    _run: Run | None = None
    _scope: Any = None
    _gradients: gradient.Watch | None = None
    _used = _closed = False
    _unpacked_at = -1  # the instruction that took the rows apart
    _asking: RowRun | None = None  # the row that asks, where it isn't the block
    _code: CodeType

    def __init__(
        self,
        launch: Launch | None,
        bind: Callable[[Run | RowRun, Tracer], Any],
        invokes: Invokes | None = None,
    ) -> None:
        own = self.__dict__  # quicker than `__setattr__`, which is there for `tracer.output = value`; below, too
        own["_launch"], own["_bind"] = launch, bind
        if invokes is not None:
            own["_invokes"] = invokes

    def _asked_by(self, row: RowRun) -> Tracer:
        """This trace as one of its rows asks it."""
        asked: Tracer = object.__new__(type(self))
        vars(asked).update(vars(self), _asking=row)
        return asked

    def _asked(self) -> Any:
        """What answers here: the run, or the part of it that this line is written for."""
        return self._asking or self._entered().asked()

    def __enter__(self) -> Self:
        self._open(sys._getframe(1).f_code)
        return self

    def _open(self, code: CodeType) -> None:
        """Enters the trace for a block that stands in `code`."""
        if self._used:
            raise BlockError(
                "A trace is used once; this one has been entered before.", instead="with model.trace(...) again"
            )
        self.__dict__["_used"] = True
        if not save.is_mounted:
            save.mount()
        if self._launch is None:
            self._code = code
            put(_GATHERING, (*(one for one in _GATHERING.get() if one() is not None), weakref.ref(self)))
            return
        self._begin(self._launch, code)

    def _begin(self, launch: Launch, code: CodeType) -> None:
        run = self.__dict__["_run"] = launch.make_run()
        run.plan = launch.plan
        run.enter()
        if not gradient.NAMES.isdisjoint(code.co_names):
            self.__dict__["_gradients"] = gradient.Watch(run, code)  # at once: it is in force

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if self._launch is None and self._end_gathering(error):
            return False
        unpacking = traceback is not None and traceback.tb_next is None and traceback.tb_lasti == self._unpacked_at
        if unpacking and isinstance(error, ValueError):
            self._explain_unpacking(error)
        run = self._run or self._entered()
        if self._gradients is not None:
            try:
                self._gradients.close()
            except KeyboardInterrupt:  # which can come between any two calls
                self._gradients.close()
                raise
        if error is not None:
            gradient.explain(error)
            save.explain(error)
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

    def _no_invoke(self) -> BlockError:
        """Why no invoke can be opened here."""
        if self._invokes is None:
            why, instead = (
                "This trace was given a prompt itself, so that it has no invokes.",
                "with model.trace() as tracer:",
            )
            if self._run is not None and self._run.outer is not self._run.tree:
                why, instead = "A scan has no invokes.", "with model.scan([p, q]) as (a, b):    for rows"
        elif not self._used:
            why, instead = "This trace has not been entered.", "with model.trace() as tracer:"
        elif self._launch is not None and not self._closed:
            why, instead = "This trace runs already, without a prompt.", "the invokes before anything is asked"
        else:
            why = "An invoke can't be opened in another, or after the trace."
            instead = "one after the other:\nwith tracer.invoke(p): ...\nwith tracer.invoke(q): ..."
        return BlockError(why, you_wrote=user_place().source, instead=instead)

    def _end_gathering(self, error: BaseException | None) -> bool:
        """At the end of a block without a prompt, its invokes run. False: there are none, and none was there."""
        invokes = self._invokes
        assert invokes is not None
        self._closed = True
        if error is not None:
            invokes.explain(error)
            invokes.clear()
            return True
        invokes.check_entered()
        if not invokes.all:
            if invokes.n_lived == 0:
                self._run_alone(None)
            return invokes.n_lived > 0
        try:
            run, self._launch = invokes.start()
            self._run = run
            try:
                run.enter()
                invokes.end(run)
            except BaseException:  # before it began, perhaps
                run.drop()
                raise
            finally:
                run.leave()
        finally:
            self._launch = None
            invokes.clear()
        return True

    def _run_alone(self, asked: str | None) -> None:
        """Begins the run of a trace that was given nothing: some models need nothing."""
        assert self._invokes is not None
        self._launch = self._invokes.alone(asked)
        self._begin(self._launch, self._code)

    @property
    def _is_gathering(self) -> bool:
        """Whether this trace waits for prompts."""
        invokes = self._invokes
        return self._used and not self._closed and invokes is not None and self._run is None and invokes.live is None

    def _in_charge(self) -> Tracer:
        """This trace, or that of an invoke which runs where it stands, just now."""
        live = None if self._invokes is None else self._invokes.live
        return self if live is None or live.alone is None else live.alone

    def _live_trace(self, launch: Launch, code: CodeType) -> Tracer:
        """Another trace, entered, for an invoke whose block stands in `code` and runs there."""
        tracer = type(self)(launch, self._bind)
        tracer._open(code)
        return tracer

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

    def _near(self, name: str) -> str:
        """A trace's own names that are spelt nearly so."""
        return nearest(name, [one for one in dir(type(self)) if not one.startswith("_")])

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.model, name, value)  # `tracer.output = value` is a write like any other

    def __getitem__(self, key: Any) -> Any:
        return self.model[key]

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


_OWN = frozenset(vars(Tracer))
