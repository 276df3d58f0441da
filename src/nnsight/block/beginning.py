"""How a trace begins: with a prompt of its own, or with those that come one by one, as invokes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from types import CodeType
from typing import TYPE_CHECKING, Any

from nnsight.block import gradient
from nnsight.block.invokes import Invokes
from nnsight.block.launch import Launch
from nnsight.block.rows import RowRun
from nnsight.core import save
from nnsight.core.context import put
from nnsight.core.history import user_place
from nnsight.core.run import Run
from nnsight.errors import BlockError

if TYPE_CHECKING:
    from typing_extensions import Self

# The traces that wait for prompts in this context.
_GATHERING: ContextVar[tuple[weakref.ref[Beginning], ...]] = ContextVar("gathering", default=())


def gathering(invokes_of: Any) -> Beginning | None:
    """The trace that waits for prompts whose block a line stands in, if it is one of this tree."""
    traces = [trace for reference in reversed(_GATHERING.get()) if (trace := reference()) is not None]
    return next((one for one in traces if one._is_gathering and one._invokes.tree is invokes_of), None)  # type: ignore[union-attr]


class Beginning:
    """How a trace begins, whatever is asked of it then (tracer.py).

    Args:
        launch: How its run begins; None: its prompts come with `tracer.invoke(...)`.
        bind: Binds the model's tree to a run, or to one row of it.
        invokes: Where there is no `launch`: the invokes of this trace, none so far.
    """

    _launch: Launch | None
    _bind: Callable[[Run | RowRun, Any], Any]
    _invokes: Invokes | None = None
    _run: Run | None = None
    _gradients: gradient.Watch | None = None
    _used = _closed = False
    _code: CodeType

    def __init__(
        self,
        launch: Launch | None,
        bind: Callable[[Run | RowRun, Any], Any],
        invokes: Invokes | None = None,
    ) -> None:
        own = self.__dict__  # quicker than `__setattr__`, which is there for `tracer.output = value`; below, too
        own["_launch"], own["_bind"] = launch, bind
        if invokes is not None:
            own["_invokes"] = invokes

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

    # Prompts that come one by one.

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

    def _live_trace(self, launch: Launch, code: CodeType) -> Self:
        """Another trace, entered, for an invoke whose block stands in `code` and runs there."""
        tracer = type(self)(launch, self._bind)
        tracer._open(code)
        return tracer
