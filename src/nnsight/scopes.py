"""The tree of modules bound to one run: `tracer.model`, and to one row of its batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nnsight.block import replay
from nnsight.block.rows import RowRun
from nnsight.block.tracer import Tracer
from nnsight.core.escape import escaping, raise_escaped
from nnsight.core.history import user_place
from nnsight.core.no_value import MadeAnew
from nnsight.core.run import Run
from nnsight.errors import OutsideTraceError
from nnsight.generator import Generator
from nnsight.kinds import PORTS
from nnsight.methods import of_scope
from nnsight.node import Node

if TYPE_CHECKING:
    from nnsight.envoy import Envoy


class Scope(Node, MadeAnew):
    """A module of a model bound to one run, also where another run of the same model was opened later."""

    _envoy: Envoy
    _bound: Run | RowRun

    def __init__(self, envoy: Envoy, run: Run | RowRun) -> None:
        self._envoy, self._bound, self._module = envoy, run, envoy._module

    def _kind(self) -> type:
        """For `isinstance`, and for `super()` in a method of a class of the user's own: what this is a scope of."""
        kind = type(self._envoy)
        return type(self) if kind.__module__.startswith("nnsight.") else kind

    __class__ = property(_kind)

    def _stands_for(self) -> tuple[Any, ...]:
        return self._envoy, self._bound

    @property
    def path(self) -> str:
        return self._envoy.path

    @property
    def _spelled(self) -> str:
        return self._envoy._spelled

    @property
    def model(self) -> Scope:
        """The same module: `tracer.model.h[5]` and `tracer.h[5]` are one.

        Or its child of this name, where it has one, as a Llama does.
        """
        return self._child("model") or self

    def _run_or_none(self) -> Run | RowRun | None:
        return self._bound if self._bound.is_open else None

    def _run(self, what: str = "") -> Run | RowRun:
        if not self._bound.is_open:
            raise OutsideTraceError(
                f"A value of `{what or self._label}` was asked for after the block of its trace.",
                you_wrote=user_place().source,
                instead="this line in the block; what is kept in a variable there can be used afterwards",
            )
        return self._bound

    def _weakly(self) -> Callable[[], Scope | None]:
        bound, envoy = weakref.ref(self._bound), self._envoy
        return lambda: None if (run := bound()) is None else Scope(envoy, run)

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        if self._envoy._tree.edits and replay.applies(run := self._run_or_none(), hook):
            edits = replay.Replay(self._envoy, block=run, above=hook)
            return edits.around(super().__call__, *args, hook=hook, **kwargs)
        return super().__call__(*args, hook=hook, **kwargs)

    def named_modules(self, include_fn: Callable[[Envoy], bool] | None = None) -> list[tuple[str, Scope]]:
        """As an Envoy's, bound to the same run."""
        return [(path, self._of(envoy)) for path, envoy in self._envoy.named_modules(include_fn)]

    def _child(self, name: str) -> Scope | None:
        child = self._envoy._child(name)
        return None if child is None else self._of(child)

    def _at(self, names: tuple[str, ...]) -> Scope:
        return self._of(self._envoy._at(names))  # type: ignore[arg-type]  # an Envoy's are Envoys

    def _of(self, envoy: Envoy) -> Scope:
        return Scope(envoy, self._bound)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_envoy" not in self.__dict__:
            raise AttributeError(name)
        if name in PORTS or name == "result":
            raise_escaped()
        own = self._envoy._of_its_class(name)
        if own is not None:
            try:
                return own.__get__(self, type(self))
            except AttributeError:
                raise_escaped()
                raise
        value = getattr(self._envoy, name)
        if isinstance(value, Generator):
            return Generator(self)
        if isinstance(value, Node):
            return value if isinstance(value, Scope) else self._of(value)  # type: ignore[arg-type]
        return of_scope(self, name, value) if callable(value) else value

    def _further_names(self) -> dict[str, str]:
        return self._envoy._further_names()

    def _uniform_of(self, name: str) -> str | None:
        return self._envoy._uniform_of(name)

    def __repr__(self) -> str:
        return repr(self._envoy)

    def __delattr__(self, name: str) -> None:
        delattr(self._envoy, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        elif hasattr(own := self._envoy._of_its_class(name), "__set__"):
            own.__set__(self, value)
        else:
            setattr(self._envoy, name, value)


# What is the trace's, and can be asked of a row too, where the module has nothing of this name.
_OF_TRACER = frozenset({"all", "barrier", "cache", "invoke", "iter", "lengths", "positions", "rows", "stop"})


class RowScope(Scope):
    """A module of a model bound to one run, and to one row of its batch: `a` of `with model.trace([p, q]) as (a, b):`.

    Values are the row's part, of its own tokens; what is assigned changes that part alone.
    """

    _bound: RowRun

    def __init__(self, envoy: Envoy, run: RowRun, tracer: Tracer) -> None:
        super().__init__(envoy, run)
        self._tracer = tracer

    def _stands_for(self) -> tuple[Any, ...]:
        return self._envoy, self._bound.rows, self._bound.index

    def __getattr__(self, name: str) -> Any:
        if name in _OF_TRACER and self._child(name) is None and not hasattr(self._module, name):
            return getattr(self._tracer._asked_by(self._bound), name)
        return super().__getattr__(name)

    def _of(self, envoy: Envoy) -> RowScope:
        return RowScope(envoy, self._bound, self._tracer)

    def _weakly(self) -> Callable[[], RowScope | None]:
        envoy, rows, tracer, index = (
            self._envoy,
            weakref.ref(self._bound.rows),
            weakref.ref(self._tracer),
            self._bound.index,
        )

        def again() -> RowScope | None:
            whole, trace = rows(), tracer()
            return None if whole is None or trace is None else RowScope(envoy, whole.row(index), trace)

        return again

    @property
    def tracer(self) -> Tracer:
        """The trace that this is a row of."""
        return self._tracer

    @property
    def tokens(self) -> list[str]:
        """The prompt's own tokens, each as text."""
        return self._bound.tokens

    @property
    @escaping
    def result(self) -> Any:
        """The row's part of what the traced call returned; the model runs to its end."""
        return self._bound.result

    @result.setter
    def result(self, value: Any) -> None:
        self._bound.result = value
