"""What `with tracer.invoke(prompt) as a:` binds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nnsight.core.escape import escaping, raise_escaped
from nnsight.core.group import GroupRun
from nnsight.core.history import user_place
from nnsight.core.run import Run
from nnsight.errors import OutsideTraceError

if TYPE_CHECKING:
    from nnsight.block.tracer import Tracer


class Invoked:
    """The model's tree as one invoke has it, by name, in its own block and in those of others: `a.transformer.h[5]`.

    It is asked for `.tokens`, `.result` and all else that a row has, too.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._alone: Tracer | None = None
        self._narrow: Callable[[Run], Any] | None = None
        self._find_tokens: Callable[[Run], Any] | None = None
        self._run: Callable[[], Run | None] = _nothing

    # What the invoke says of its run.

    def _begin(self, run: GroupRun, narrow: Callable[[Run], Any] | None, tokens: Callable[[Run], Any]) -> None:
        self._run, self._narrow, self._find_tokens = run.reference, narrow, tokens

    def _begin_alone(self, tracer: Tracer) -> None:
        """It runs where it stands, in this trace of its own."""
        self._alone = tracer

    def _end(self) -> None:
        self._run, self._narrow, self._find_tokens = _nothing, None, None

    # What is asked of it.

    @property
    def tracer(self) -> Tracer:
        """The trace that this is an invoke of."""
        return self._tracer

    @property
    def tokens(self) -> Any:
        """The prompt's own tokens, each as text; a list for each prompt where there are several."""
        if self._alone is not None:
            return self._alone._own_rows(self._alone._entered()).tokens(None)
        run = self._running("tokens")
        assert self._find_tokens is not None
        return self._find_tokens(run)

    @property
    @escaping
    def result(self) -> Any:
        """This invoke's part of what the traced call returned; the model runs to its end."""
        if self._alone is not None:
            return self._alone.result
        run = self._running("result")
        return run.returned() if self._narrow is None else self._narrow(run).result

    @result.setter
    def result(self, value: Any) -> None:
        if self._alone is not None:
            self._alone.result = value
            return
        run = self._running("result")
        if self._narrow is not None:
            self._narrow(run).result = value
            return
        run.returned()
        run.state.result = value

    def _running(self, what: str) -> GroupRun:
        run = self._run()
        if isinstance(run, GroupRun) and run.is_open:
            return run
        raise OutsideTraceError(
            f"The {what} of an invoke can be had while its trace runs, and this line stands in no invoke of it.",
            you_wrote=user_place().source,
            instead="this line in the block of the invoke",
        )

    def _seen(self, name: str) -> Any:
        """What has the names: a scope of the model; for the whole batch, the tracer's own names come first."""
        if self._alone is not None:
            return self._alone
        run = self._running(f"`{name}`")
        if self._narrow is None and hasattr(type(self._tracer), name):
            return self._tracer
        return self._tracer._bind(run if self._narrow is None else self._narrow(run), self._tracer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "result":
            raise_escaped()
        return getattr(self._seen(name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            setattr(self._seen(name), name, value)  # `a.output = value` is a write like any other

    def __getitem__(self, key: Any) -> Any:
        return self._seen("[]")[key]

    def __repr__(self) -> str:
        return "<invoke, alone>" if self._alone is not None else "<invoke>"


def _nothing() -> None:
    return None
