"""What `as (tracer, edited)` binds first in an edit: the steps, the positions of tokens, and the edited model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from nnsight.block.repeated import Repeats
from nnsight.block.steps import chosen_steps
from nnsight.core.history import user_place
from nnsight.errors import BlockError

_INSTEAD = {
    "invoke": "with edited.trace() as tracer:    and in it `with tracer.invoke(prompt):`",
    "barrier": "with edited.trace() as tracer:    and in it tracer.barrier(2)",
    "stop": "with edited.trace(prompt) as tracer:    and in it tracer.stop()",
    "cache": "with edited.trace(prompt) as tracer:    and in it tracer.cache()",
    "rows": "with edited.trace([p, q]) as (a, b):",
}


class EditTracer:
    """What `as (tracer, edited)` binds first: the steps, and by any other name the edited model."""

    def __init__(self, model: Any, step: int | None = None, seen: Any = None) -> None:
        self._model, self._step, self._seen = model, step, seen

    @property
    def model(self) -> Any:
        """The edited model."""
        return self._model

    @property
    def step(self) -> int:
        """How many calls of the edited module came before this one: the step of a generation, from 0."""
        if self._step is None:
            raise BlockError("Outside its edit, a tracer has no step.", you_wrote=user_place().source)
        if self._seen is not None:
            self._seen.plan.check_counted()
        return self._step

    @property
    def positions(self) -> Any:
        """The position of each token of this step, as a language model's `tracer.positions`."""
        return self._tokens("positions").positions

    @property
    def lengths(self) -> Any:
        """How many tokens each prompt has, as a language model's `tracer.lengths`."""
        return self._tokens("lengths").lengths

    def _tokens(self, name: str) -> Any:
        if self._seen is None:
            raise BlockError(
                f"`{name}` is known in edits of a language model as a whole, while it runs.",
                you_wrote=user_place().source,
                instead="with model.edit() as (tracer, edited):",
            )
        self._seen.plan.check_counted()
        return self._seen

    @property
    def iter(self) -> _Steps:
        """`for step in tracer.iter[1:]`: runs its body in these steps. Without it, an edit runs in every step."""
        return _Steps(self.step)

    def all(self) -> _Steps:
        """All steps, as `iter[:]`."""
        return _Steps(self.step)

    @property
    def result(self) -> Any:
        raise BlockError(
            "An edit has no result: it runs while the model does.",
            you_wrote=user_place().source,
            instead="the model's own output: edited.output",
        )

    def _refuse(self, name: str) -> BlockError:
        return BlockError(
            f"An edit has no `{name}`: it is replayed in the runs of other blocks.",
            you_wrote=user_place().source,
            instead=_INSTEAD[name],
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in _INSTEAD:
            raise self._refuse(name)
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._model, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._model[key]

    __iter__ = None

    def __repr__(self) -> str:
        return f"<edit of {self._model!r}>"


class _Steps(Repeats):
    """The step of this call, where it is one of those that were asked for."""

    def __init__(self, step: int, wanted: Iterable[int] | None = None) -> None:
        self._step, self._wanted = step, itertools.count() if wanted is None else wanted

    def __getitem__(self, wanted: Any) -> _Steps:
        numbers = [wanted.start, wanted.stop] if isinstance(wanted, slice) else wanted
        for number in numbers if isinstance(numbers, (list, tuple)) else [numbers]:
            if isinstance(number, int) and number < 0:
                raise BlockError(
                    "An edit doesn't know how many steps there will be, so that none can be counted from the end.",
                    you_wrote=user_place().source,
                )
        return _Steps(self._step, chosen_steps(wanted))

    def __iter__(self) -> Iterator[int]:
        up_to_here = itertools.takewhile(lambda step: step <= self._step, self._wanted)
        return iter([self._step] if self._step in up_to_here else [])
