"""`with tracer.invoke(...):` prompts of one batch, each with a block of its own.

The body of an invoke is taken out of its place (carry.py), since all prompts have to be known before the batch can run.
It runs when the trace ends, beside the others, with the names that stood for something where it was written. What it
binds is bound around it afterwards. Where a body can't be taken out, it runs where it stands, in a forward pass of its
own.

Names that several invokes of one function use are in `shared_names.py`, barriers in `barrier.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from nnsight.block import gradient
from nnsight.block.around import looking_for
from nnsight.block.between import binds_between
from nnsight.block.carry import Block, Body
from nnsight.block.invoked import Invoked
from nnsight.block.leave_out import Skip, entering, unpacks
from nnsight.block.shared_names import Names
from nnsight.core.group import GroupRun, Member
from nnsight.core.history import add_note, no_such_name, user_place, warn_user
from nnsight.core.run import Run
from nnsight.core.side import modes_here
from nnsight.errors import BlockError, OutOfOrderError

if TYPE_CHECKING:
    from nnsight.block.invokes import Invokes
    from nnsight.block.tracer import Tracer

_INSTEAD = "with model.trace(prompt):    a trace of its own, in which anything may stand"


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
        # The offsets of the instructions in its frame, and what names stood for there, by id.
        self.entered = self.left = 0
        self.stood_for: dict[str, int] = {}

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
        self.entered = entering(frame)
        self.stood_for = {name: id(value) for name, value in self._around.items()}
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
            self.left = entering(self.frame)
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
        others = {
            at: other.block.binds for at, other in enumerate(self._invokes.all) if other.block and other.frame is frame
        }
        if found := next(looking_for(self.block, frame, frozenset().union(*others.values())), None):
            function, name = found
            at = next(at for at, binds in others.items() if name in binds)
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
        code, opened = self._invokes.opened
        opened_here = opened if self.frame is not None and code is self.frame.f_code else None
        self.names = Names(self, siblings, self._invokes.all.index(self), run, opened_here)
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

    def is_bound_since(self, name: str, stands_for: Any) -> bool:
        """Whether the lines behind it bound a name, which stands for this now, before the trace ended."""
        if self.frame is None or self.stood_for.get(name) != id(stands_for):
            return True
        return binds_between(self.frame.f_code, self.left, entering(self.frame), name)

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
