"""All invokes of a trace: one run of their prompts, which their blocks ask in turn, and the names that these bind."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import CodeType
from typing import TYPE_CHECKING, Any

from nnsight.block import gradient
from nnsight.block.around import write_back
from nnsight.block.cuts import Part
from nnsight.block.invoke import Invoke
from nnsight.block.rows import Rows
from nnsight.core.carried import from_user
from nnsight.core.group import GroupRun
from nnsight.core.history import PACKAGE, add_note, raised_at, user_place
from nnsight.core.run import Run
from nnsight.core.tree import Tree
from nnsight.errors import BlockError, InputError

if TYPE_CHECKING:
    from nnsight.block.launch import Launch
    from nnsight.block.tracer import Tracer

_TURNS = (
    "What another invoke puts into a list or a dict is there when that one has come so far. To wait for it: "
    "meet = tracer.barrier(2), and meet() in both."
)


class Invokes:
    """The invokes of one trace, in written order.

    Args:
        prepare: Makes one invoke's inputs ready, to be put together.
        launch: Puts them together in a run of the class that it is given, else a `Run`, and says how many rows each of
            them has in the whole. Of none, it says what to give the trace.
        tree: Of the model.
        opens: The line that opens such a trace on a prompt, for errors.
    """

    def __init__(
        self,
        prepare: Callable[..., Any],
        launch: Callable[..., tuple[Launch, list[int]]],
        tree: Tree,
        opens: str,
    ) -> None:
        self.prepare, self.launch, self.tree, self.opens = prepare, launch, tree, opens
        self.all: list[Invoke] = []  # that run together
        self._made: list[Invoke] = []
        self.live: Invoke | None = None  # that runs where it stands, just now
        self.opened: tuple[CodeType | None, int] = (None, 0)  # where the trace was entered, and at which instruction
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

    def _explain_missing(self, error: BaseException | None) -> None:
        """The same, for a name that a function called in a block looked for around the trace, and for an item."""
        is_item = isinstance(error, KeyError) or (isinstance(error, IndexError) and "list index" in str(error))
        name = None if error is None else self._bound_name(error)
        if error is None or (name is None and not is_item):
            return
        place = raised_at(error)
        code = None if place is None else place.code
        blocks = [invoke.body.function.__code__ for invoke in self.all if invoke.body is not None]
        if is_item and code in blocks and len(blocks) > 1:
            add_note(error, _TURNS)
        if name is None or code is None or code in blocks or code.co_filename.startswith(PACKAGE):
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
        run = launch.make_run()
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
            return self.launch(given, GroupRun)
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
                self._explain_missing(member.error)
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
            around = frame.f_locals
            for invoke in self.all:
                if invoke.frame is frame and invoke.body is not None and invoke.names is not None:
                    own = invoke.body.bound()
                    bound |= {
                        name: value
                        for name, value in own.items()
                        if name not in around or not invoke.is_bound_since(name, around[name])
                    }
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
