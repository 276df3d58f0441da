"""`.next()`: which calls of a module the following wait passes over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from nnsight.core.history import Place, user_place
from nnsight.core.tree import Attached
from nnsight.errors import BlockError

if TYPE_CHECKING:
    from nnsight.core.run import Run

Ahead = dict[nn.Module, tuple[int, Place, int]]  # how many calls, where it was said, in which step


def go_on(run: Run, module: nn.Module, calls: Any) -> None:
    """Has the following wait for this module, or for anything inside it, pass over calls of it:

    the one where the run stands, else the next one, and `calls - 1` more.
    """
    if not isinstance(calls, int) or isinstance(calls, bool) or calls < 1:
        raise BlockError(
            "`.next(n)` goes n calls on: a whole number, 1 or more.",
            you_wrote=user_place().source,
            you_gave=repr(calls),
        )
    if run.counter is not None and module in run.counter.counted and not run.counter.has_several:
        raise BlockError(
            "In a generation, the model's next call is the next step.",
            you_wrote=user_place().source,
            instead="for step in tracer.iter[:]:",
        )
    before = run.ahead.get(module)
    run.ahead[module] = (calls + (before[0] if before else 0), user_place(), run.state.block_step)


def meant_by(run: Run, module: nn.Module, *, itself: bool) -> list[nn.Module]:
    """Of the modules that `.next()` was said of, those that `module` is inside, outermost first, and perhaps itself."""
    around = run.tree.above(module)
    meant = [one for one in run.ahead if one in around or (itself and one is module)]
    return sorted(meant, key=lambda one: len(run.tree.above(one)))


def check_used(run: Run) -> None:
    """Raises where a `.next()` was said, and nothing asked for behind it."""
    if not run.ahead:
        return
    module, (_, place, _) = next(iter(run.ahead.items()))
    run.ahead.clear()
    name = run.tree.label(module)
    raise BlockError(
        f"`{name}.next()` was not used: nothing of `{name}` was asked for behind it in its step.",
        you_wrote=place.source,
        instead=f"value = {name}.next().output",
    )


def take(run: Run, module: nn.Module) -> int:
    """How many calls of the module a wait for it passes over; those of modules around it are passed over here."""
    if any(step != run.state.block_step for _, _, step in run.ahead.values()):
        check_used(run)
    run.come_into(module, itself=False)
    ahead = run.ahead.pop(module, None)
    return ahead[0] if ahead else 0


def is_inside(run: Run, module: nn.Module) -> bool:
    """Whether the model stands in a call of this module."""
    code = (type(module).visit if isinstance(module, Attached) else nn.Module._call_impl).__code__
    return any(frame.f_code is code and frame.f_locals.get("self") is module for frame in run.frames())
