"""The steps of a generation, as a loop in the block: `for step in tracer.iter[:]`.

A step is one call of the model; step 0 reads the prompt. The loop runs the model to the beginning of each step that it
is asked for, and ends when the generation ends, however many steps were asked for.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

from nnsight.block.calls import stands_in_for, stands_in_with
from nnsight.block.repeated import Repeats
from nnsight.core import missed
from nnsight.core.history import deprecated, user_place
from nnsight.core.run import Run
from nnsight.core.several import Call
from nnsight.errors import AlreadyPastError, BlockError


class Plan(NamedTuple):
    """How many steps a run will have. `planned`: None where nothing says; `unless`: what may end it sooner.

    `uncounted`: why a call of the model isn't a step in this run, and what to give instead. `instead`: what makes sure
    how many there are. `kind`: says what the call of the model is that begins just now, where a step may have several
    (core/several.py). `guesses`: whether tokens are guessed, and a call reads several of them.
    """

    planned: int | None = None
    unless: str | None = None
    uncounted: tuple[str, str] | None = None
    instead: str = "min_new_tokens equal to max_new_tokens, or "
    kind: Callable[[], Call] | None = None
    guesses: bool = False

    def check_counted(self) -> None:
        """Raises where the run's steps can't be counted."""
        if self.uncounted is not None:
            why, instead = self.uncounted
            raise BlockError(why, you_wrote=user_place().source, instead=instead)


ONE_STEP = Plan(1)


class Steps:
    """`tracer.iter`: which steps to go through: `[:]` all, `[2:]`, `[:5]`, `[::2]`, `[3]`, `[[0, 4]]`, `[-1]`."""

    def __init__(self, run: Run, plan: Plan) -> None:
        plan.check_counted()
        self._run, self._plan = run, plan

    def __getitem__(self, key: Any) -> Loop:
        return Loop(self._run, self._wanted(key))

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])

    def __call__(self, *_: Any) -> NoReturn:
        raise BlockError(
            "`tracer.iter` is no call: steps are asked for in brackets.",
            you_wrote=user_place().source,
            instead="for step in tracer.iter[:]:",
        )

    def __enter__(self) -> NoReturn:
        raise BlockError(
            "Steps are asked for in brackets.",
            you_wrote=user_place().source,
            instead="for step in tracer.iter[:]:",
        )

    def __exit__(self, *_: object) -> None: ...

    def _wanted(self, key: Any) -> Iterable[int]:
        if isinstance(key, slice):
            return self._slice(key)
        if _is_step(key):
            return [self._counted(key)]
        if isinstance(key, (list, tuple, range)) and all(map(_is_step, key)):
            steps = [self._counted(step) for step in key]
            if any(later <= step for step, later in itertools.pairwise(steps)):
                raise _bad_key(
                    key, "Generation goes forward: steps are asked for in order, each once.", sorted({*steps})
                )
            return steps
        raise _bad_key(key, "`tracer.iter` takes a step, a slice, or a list of steps.", "tracer.iter[:]")

    def _slice(self, key: slice) -> Iterable[int]:
        stride = 1 if key.step is None else key.step
        ends = [end for end in (key.start, key.stop) if end is not None]
        if not all(map(_is_step, [*ends, stride])) or stride < 1:
            raise _bad_key(key, "Generation goes forward: a slice of steps has whole numbers, and a positive stride.")
        if self._plan is ONE_STEP and ((key.start or 0) > 0 or (key.stop or 0) > 1):
            raise _no_calls(key.start or 0, key.stop, stride)
        start = 0 if key.start is None else self._counted(key.start, end=True)
        if key.stop is None:
            return range(start, 1, stride) if self._plan is ONE_STEP else itertools.count(start, stride)
        return range(start, self._counted(key.stop, end=True), stride)

    def _counted(self, step: int, *, end: bool = False) -> int:
        """A step counted from the first; a negative one counts from the last that is planned."""
        count, unless = self._plan.planned, self._plan.unless
        if step < 0:
            why = "nothing says how many steps there will be" if count is None else unless
            if count is None or why:
                raise BlockError(
                    f"A negative step counts from the last one, and {why}.",
                    you_wrote=user_place().source,
                    instead=f"{self._plan.instead}break in `for step in tracer.iter[:]`",
                )
            return max(step + count, 0) if end else self._from_end(step, count)
        if not end and count is not None and step >= count:
            raise self._beyond(step, count)
        return step

    def _from_end(self, step: int, count: int) -> int:
        if step + count < 0:
            raise self._beyond(step, count)
        return step + count

    def _beyond(self, step: int, count: int) -> BlockError:
        most = "at most " if self._plan.unless else ""
        what = f"There is no step {step}: this run has {most}{count} step{'s' * (count != 1)}, from 0 to {count - 1}."
        instead = f"module.next({step}).output for a later call of a module" if self._plan is ONE_STEP else None
        return BlockError(what, you_wrote=user_place().source, instead=instead)


def chosen_steps(key: Any) -> Iterable[int]:
    """The steps that `tracer.iter[key]` means, in order, where nothing says how many there will be."""
    return Steps(None, Plan())._wanted(key)  # type: ignore[arg-type]


class Loop(Repeats):
    """The steps of one `for`; each begins when the loop comes to it."""

    def __init__(self, run: Run, wanted: Iterable[int]) -> None:
        self._run, self._wanted = run, wanted

    def __iter__(self) -> Iterator[int]:
        for step in self._wanted:
            if step < max(self._run.state.step, self._run.state.block_step):
                raise self._past(step)
            if not self._run.to_step(step):
                return
            yield step

    def _past(self, step: int) -> AlreadyPastError:
        state = self._run.state
        if state.ended:
            return missed.over(
                self._run, f"Step {step}", "one loop over the steps; tracer.result behind the loop, not in it"
            )
        now = max(state.step, state.block_step)
        return AlreadyPastError(
            f"Step {step} is past: the model stands in step {now}.",
            you_wrote=user_place().source,
            instead=f"one loop over all steps, or go on with tracer.iter[{now}:]",
        )


def of_module(run: Run, label: str, name: str) -> Any:
    """`module.iter` and `module.all`, which programs for the existing package have for those of the trace."""
    steps = Steps(run, run.plan)
    deprecated(f"`{label}.{name}` is deprecated: for step in tracer.iter[:]:")
    return steps if name == "iter" else _AllOfModule(steps, label)


class _AllOfModule:
    """`module.all`: has to be what a loop or a `with` goes through, since nothing that is behind it belongs to it."""

    def __init__(self, steps: Steps, label: str) -> None:
        self._steps, self._label = steps, label

    def __call__(self) -> Loop:
        caller = sys._getframe(1)
        if not (stands_in_with(caller) or stands_in_for(caller)):
            raise BlockError(
                f"`{self._label}.all()` by itself has no effect on the lines behind it: they are about one step.",
                you_wrote=user_place().source,
                instead="for step in tracer.iter[:]:    with those lines in it",
            )
        return self._steps[:]


def _no_calls(start: int, stop: int | None, stride: int) -> BlockError:
    """The error for a loop over more than one step in a trace, by which its writer may mean the calls of a module."""
    shown = f"{start or ''}:{'' if stop is None else stop}{f':{stride}' if stride > 1 else ''}"
    last = "n" if stop is None else f"n - {-stop}" if stop < 0 else stop
    ends = [*([start] if start or stride > 1 else []), last, *([stride] if stride > 1 else [])]
    numbers = ", ".join(map(str, ends))
    first = f"module.next({start})" if start else "module"
    further = f"module.next({stride if stride > 1 else ''}) if call{f' > {start}' if start else ''} else {first}"
    return BlockError(
        f"A trace is one step, one call of the model, and `[{shown}]` means steps of a generation.",
        you_wrote=user_place().source,
        for_steps="model.generate(...)",
        for_calls=f"for call in range({numbers}): value = ({further}).output",
        otherwise=f"for _ in range({numbers}): with the same body, if it reads several values, one behind the other"
        if start == 0 and stride == 1
        else None,
    )


def _is_step(key: Any) -> bool:
    return isinstance(key, int) and not isinstance(key, bool)


def _bad_key(key: Any, what: str, instead: Any = None) -> BlockError:
    shown = f"tracer.iter[{instead}]" if isinstance(instead, list) else instead
    return BlockError(what, you_wrote=user_place().source, you_gave=repr(key), instead=shown)
