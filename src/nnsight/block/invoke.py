"""`with tracer.invoke(...):` prompts of one batch, each with a block of its own.

The body of an invoke is taken out of its place (carry.py), since all prompts have to be known before the batch can run.
It runs when the trace ends, beside the others, with the names that stood for something where it was written. What it
binds is bound around it afterwards. Where a body can't be taken out, it runs where it stands, in a forward pass of its
own.

Names that several invokes of one function use are in `shared_names.py`, barriers in `barrier.py`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from nnsight.block import gradient
from nnsight.block.around import looking_for, write_back
from nnsight.block.carry import Block, Body
from nnsight.block.cuts import Part
from nnsight.block.invoked import Invoked
from nnsight.block.leave_out import Skip, unpacks
from nnsight.block.rows import Rows
from nnsight.block.shared_names import Names
from nnsight.core.carried import from_user
from nnsight.core.group import GroupRun, Member
from nnsight.core.history import PACKAGE, add_note, no_such_name, user_place, warn_user
from nnsight.core.run import Run
from nnsight.core.side import modes_here
from nnsight.core.tree import Tree
from nnsight.errors import BlockError, InputError, OutOfOrderError

if TYPE_CHECKING:
    from nnsight.block.tracer import Launch, Tracer

_INSTEAD = "with model.trace(prompt):    a trace of its own, in which anything may stand"


class Invokes:
    """The invokes of one trace, in written order.

    Args:
        prepare: Makes one invoke's inputs ready, to be put together.
        launch: Puts them together, and says how many rows each of them has in the whole. Of none, it says what to
            give the trace.
        tree: Of the model.
        opens: The line that opens such a trace on a prompt, for errors.
    """

    def __init__(
        self,
        prepare: Callable[..., Any],
        launch: Callable[[list[Any]], tuple[Launch, list[int]]],
        tree: Tree,
        opens: str,
    ) -> None:
        self.prepare, self.launch, self.tree, self.opens = prepare, launch, tree, opens
        self.all: list[Invoke] = []  # that run together
        self._made: list[Invoke] = []
        self.live: Invoke | None = None  # that runs where it stands, just now
        self.n_lived = 0

    def new(self, args: tuple[Any, ...], kwargs: dict[str, Any], tracer: Tracer) -> Invoke:
        invoke = Invoke(self, tracer, self.prepare(args, kwargs) if args or kwargs else None)
        self._made.append(invoke)
        return invoke

    def check_entered(self) -> None:
        for invoke in self._made:
            if not invoke.is_entered:
                raise BlockError(
                    "An invoke of this trace was not entered, so that its prompt did not run.",
                    you_wrote=invoke.place.source,
                    instead="with tracer.invoke(...):",
                )

    def explain(self, error: BaseException) -> None:
        """Adds a note to an error about a name that an invoke binds, but only when the trace ends."""
        if (name := self._bound_name(error)) is not None:
            add_note(error, f"`{name}` is bound by an invoke, which runs when the block of the trace ends.")

    def _bound_name(self, error: BaseException) -> str | None:
        """The name that is missing, where an invoke binds it."""
        name = re.search(r"'(\w+)'", str(error)) if isinstance(error, NameError) else None
        binds = name is not None and any(one.block is not None and name[1] in one.block.binds for one in self.all)
        return name[1] if name is not None and binds else None

    def _explain_in_function(self, error: BaseException | None) -> None:
        """The same, for one that a function called in a block looked for around the trace."""
        if error is None or (name := self._bound_name(error)) is None:
            return
        traceback = error.__traceback__
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        code = None if traceback is None else traceback.tb_frame.f_code
        blocks = [invoke.body.function.__code__ for invoke in self.all if invoke.body is not None]
        if code is None or code in blocks or code.co_filename.startswith(PACKAGE):
            return
        add_note(
            error,
            f"`{name}` is bound by an invoke, and around the trace only when the trace has ended: give it to "
            f"`{code.co_name}` as an argument.",
        )

    def start(self) -> tuple[GroupRun, Launch]:
        """Makes the run of all invokes, with a member for each, in written order."""
        with_data = [invoke for invoke in self.all if invoke.given is not None]
        launch, counts = self._launch_all([invoke.given for invoke in with_data])
        run = launch.make_run(kind=GroupRun)
        run.plan = launch.plan
        assert isinstance(run, GroupRun)
        parts, first = [], 0
        for invoke, count in zip(with_data, counts, strict=True):
            parts.append(Part(first, first + count, f"invoke {self.all.index(invoke)}"))
            first += count
        rows = _OneRows(launch.make_rows, tuple(parts))
        for invoke in self.all:
            index = with_data.index(invoke) if invoke in with_data else None
            narrow = partial(rows.of, index) if index is not None and len(parts) > 1 else None
            tokens = partial(rows.tokens, None if index is None else parts[index])
            run.members.append(invoke.member(run, narrow, tokens))
        return run, launch

    def _launch_all(self, given: list[Any]) -> tuple[Launch, list[int]]:
        try:
            return self.launch(given)
        except InputError as error:
            if given:
                raise
            raise InputError(
                "An invoke without a prompt sees the batch of the others, and there is none: no invoke has a prompt.",
                you_wrote=self.all[0].place.source,
                instead=f"with tracer.invoke(prompt):    or {self.opens}",
            ) from error

    def end(self, run: GroupRun) -> None:
        """Lets blocks and model run to their ends, binds the names, and raises what a block raised."""
        hands_out = any(not gradient.NAMES.isdisjoint(invoke.named_in_code) for invoke in self.all)
        handed = gradient.hand_out(run) if hands_out else None
        try:
            run.drive()
            for member in run.members:
                self._explain_in_function(member.error)
            errors = [(at, member.error) for at, member in enumerate(run.members) if member.error is not None]
            failed = [(at, error) for at, error in errors if not _stops(error, run)]
            if len(errors) == len(run.members):
                late = run.stop("failed in the block" if failed else "stopped")
                if late is not None:
                    failed.append((len(run.members), late))
            else:
                run.finish()
        except BaseException as error:
            if (late := run.stop("failed in the block")) is not None:  # nothing, where the model failed
                add_note(error, f"While the model was unwound, it raised {type(late).__name__}: {late}")
            raise
        finally:
            if handed is not None:
                handed.close()
            self._bind_names()
            for member in run.members:
                member.body, member.stack, member.error, member.unwinding = _nothing, None, None, None  # cycles
            run.members = []
        try:
            if failed:
                self._raise(failed)
        finally:
            del errors, failed  # this frame is in their tracebacks

    @staticmethod
    def _raise(failed: list[tuple[int, BaseException]]) -> None:
        (at, error), *others = failed
        for other, late in others:
            same = type(late) is type(error) and _headline(late) == _headline(error)
            how = ", in the same way." if same else f": {type(late).__name__}: {_headline(late)}"
            add_note(error, f"Invoke {other} of this trace failed too{how}")
        add_note(error, f"In invoke {at} of the trace.")
        try:
            raise error.with_traceback(from_user(error.__traceback__))
        finally:
            del failed, error, others

    def _bind_names(self) -> None:
        """Binds what the blocks have bound around them, as if they had run in their places, one after the other."""
        frames = {id(invoke.frame): invoke.frame for invoke in self.all if invoke.frame is not None}
        for frame in frames.values():
            bound: dict[str, Any] = {}
            unbound: dict[str, Any] = {}
            for invoke in self.all:
                if invoke.frame is frame and invoke.body is not None and invoke.names is not None:
                    bound |= invoke.body.bound()
                    gone = invoke.body.unbound() | invoke.names.unbound()
                    unbound = {name: was for name, was in unbound.items() if name not in bound} | gone
                    bound = {name: value for name, value in bound.items() if name not in gone}
            write_back(frame, bound, unbound)

    def clear(self) -> None:
        """Lets go of frames and values, which the tracer may outlive."""
        for names in [invoke.names for invoke in self._made if invoke.names is not None]:
            names.close()  # all, before any is let go: they ask each other
        for invoke in self._made:
            invoke.close()
        self.all, self._made = [], []

    def alone(self, asked: str | None) -> Launch:
        """The run of a trace that was given nothing.

        Args:
            asked: What is asked of it, if not a value: "tracer.stop()"; None at its end, where nothing is.
        """
        try:
            return self.launch([])[0]
        except InputError:
            if asked is None:
                raise
            what = f"`{asked}` belongs in an invoke" if asked else "there is no value outside its invokes"
            raise InputError(
                f"This trace was given no prompt, so that {what}.",
                you_wrote=user_place().source,
                instead=f"{self.opens}    or this line in `with tracer.invoke(prompt):`",
            ) from None


def _stops(error: BaseException, run: Run) -> bool:
    return getattr(error, "run", None) is run


def _headline(error: BaseException) -> str:
    """What happened, without the facts."""
    return str(error).partition("\n")[0]


def _nothing() -> None:
    return None


class _OneRows:
    """The rows of a run, found when they are first needed: in a generation, they are known from its first step on."""

    def __init__(self, make: Callable[[Run], Rows], parts: tuple[Part, ...]) -> None:
        self._make, self._parts = make, parts
        self._rows: Rows | None = None

    def of(self, index: int, run: Run) -> Any:
        return self._of_run(run).row(index)

    def tokens(self, part: Part | None, run: Run) -> Any:
        return self._of_run(run).tokens(part)

    def _of_run(self, run: Run) -> Rows:
        if self._rows is None:
            rows = self._make(run)
            rows.batch = replace(rows.batch, parts=self._parts)
            self._rows = rows
        return self._rows


class Invoke:
    """One invoke of a trace: `with tracer.invoke("The Eiffel Tower is in"):`. It is used once.

    In its block, the values of the model are those of its own prompts, in their own tokens; without a prompt, those of
    the whole batch. `as` binds an `Invoked`.
    """

    def __init__(self, invokes: Invokes, tracer: Tracer, given: Any) -> None:
        self._invokes, self._tracer, self.given = invokes, tracer, given
        self.block: Block | None = None
        self.body: Body | None = None
        self.frame: FrameType | None = None
        self.names: Names | None = None
        self._around: dict[str, Any] = {}
        self._skip: Skip | None = None
        self._live: Tracer | None = None
        self.invoked = Invoked(tracer)
        self.is_entered, self.place = False, user_place()

    def __getattr__(self, name: str) -> NoReturn:
        raise no_such_name(
            name,
            f"`{name}` is asked for in the block of an invoke, and this one was not entered.",
            f"with tracer.invoke(...) as a: a.{name}",
        )

    def __enter__(self) -> Invoked:
        frame = sys._getframe(1)
        if self.is_entered:
            raise BlockError("An invoke is entered once.", you_wrote=user_place().source)
        if not self._tracer._is_gathering:
            raise self._tracer._no_invoke()
        self.is_entered = True
        if unpacks(frame):
            raise BlockError(
                "What an invoke binds is one name.",
                you_wrote=user_place().source,
                instead="with model.trace([p, q]) as (a, b):    for rows",
            )
        try:
            self.block = Block.of(frame, _INSTEAD, in_place=True)
        except BlockError as refused:
            self._enter_live(frame, refused)
            return self.invoked
        self._check_functions(frame)
        self._modes, self._context = modes_here(), copy_context()
        self._around = {name: frame.f_locals[name] for name in self.block.names.intersection(frame.f_locals)}
        self.frame, self._skip = frame, Skip(frame, self.block, self.invoked)
        self._invokes.all.append(self)
        return self.invoked

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if self._live is not None:
            self._invokes.live = None
            return self._live.__exit__(kind, error, traceback)
        assert self._skip is not None
        skip, self._skip = self._skip, None
        assert self.block is not None
        assert self.frame is not None
        if skip.done(error):
            names = self.frame.f_locals  # where `as` has bound this
            self._around.update({name: names[name] for name in self.block.names if names.get(name) is self.invoked})
            return True
        self._invokes.all.remove(self)
        self.close()
        if error is None:
            raise BlockError("The body of this invoke ran in its place: it could not be left out.", instead=_INSTEAD)
        return False

    def _check_functions(self, frame: FrameType) -> None:
        """Refuses a function that would look around the invokes for what one of them is yet to bind."""
        assert self.block is not None
        for at, other in enumerate(self._invokes.all):
            if other.frame is not frame or other.block is None:
                continue
            if found := next(looking_for(self.block, frame, other.block.binds), None):
                function, name = found
                raise BlockError(
                    f"`{function}` looks around this invoke for `{name}`, which invoke {at} binds there only when the "
                    "trace has ended.",
                    you_wrote=user_place().source,
                    instead=f"{function}({name}):    the value as an argument",
                )

    # Where it stands.

    def _enter_live(self, frame: FrameType, refused: BlockError) -> None:
        why = str(refused).splitlines()[0].partition(": ")[2].rstrip(".") or "it is not entered by a `with` of its own"
        if self.given is None:
            raise BlockError(
                f"An invoke without a prompt sees the batch of the others, and this one can't run beside them: {why}.",
                you_wrote=user_place().source,
                instead=_INSTEAD,
            )
        launch, _ = self._invokes.launch([self.given])
        if launch.samples:
            raise BlockError(
                "With sampling, the prompts of a batch share one random generator, and this invoke can't run beside "
                f"the others: {why}.",
                you_wrote=user_place().source,
                instead="model.generate(...) for each prompt",
            )
        text = f"This invoke runs in a forward pass of its own, not in one batch with the others: {why}."
        warn_user(text, UserWarning)
        self._live = self._tracer._live_trace(launch, frame.f_code)
        self.invoked._begin_alone(self._live)
        self._invokes.live = self
        self._invokes.n_lived += 1

    @property
    def alone(self) -> Tracer | None:
        """Its own trace, where it runs in its place."""
        return self._live

    # Beside the others.

    def member(self, run: GroupRun, narrow: Callable[[Run], Any] | None, tokens: Callable[[Run], Any]) -> Member:
        """Its block, as one of a group.

        Args:
            run: Of the group.
            narrow: Finds its part of the run; None where it has the whole of it.
            tokens: Finds its prompt's tokens.
        """
        assert self.block is not None
        siblings = [other for other in self._invokes.all if other.frame is self.frame]
        self.names = Names(self, siblings, self._invokes.all.index(self), run)
        self.body = Body(self.block, self._around, self.names.shared, self.names.ask)
        self.names.cells = {name: self.body.cells[name] for name in self.names.shared}
        self.invoked._begin(run, narrow, tokens)
        return Member(
            partial(_run_block, run.reference, self.body.function, self.names), self._modes, self._context, narrow
        )

    @property
    def named_in_code(self) -> tuple[str, ...]:
        """The names in the code that it stands in: a gradient may be asked for behind the trace."""
        assert self.body is not None
        own = self.body.function.__code__.co_names
        return own if self.frame is None else (*own, *self.frame.f_code.co_names)

    def close(self) -> None:
        """Lets go of all that it was given and found."""
        self.invoked._end()
        self.frame = self.body = self.names = self.given = None
        self._around = {}

    def __repr__(self) -> str:
        return "<invoke, alone>" if self._live is not None else "<invoke>"


def _run_block(reference: Callable[[], Run | None], function: Callable[[], Any], names: Names) -> None:
    """One block, on its own stack."""
    run = reference()
    assert run is not None
    try:
        with gradient.watched(run, function):
            function()
    except OutOfOrderError as error:
        if names.waited_for:
            way_out = "Where that comes too late in the model, read it in a trace of its own, before this one."
            add_note(error, f"Before that, it had waited for {' and '.join(names.waited_for)}. {way_out}")
        raise
    finally:
        names.ended = True
