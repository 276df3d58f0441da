"""The names that several invokes of one function use, and what they stand for in each.

Such a name is the block's own as soon as it has bound it. Before that, it is the one of the invoke before which binds
it too, and the block waits for it, unless the lines between the two bind it, as a loop does; else what stood there
around the trace; else, of a block that never binds it, that of an invoke which comes later. One that stood for
something before the trace and that only a later invoke binds is refused.

What an invoke binds in each step of a loop is waited for in each step, by who is in the same one.
"""

from __future__ import annotations

import builtins
from types import CellType
from typing import TYPE_CHECKING, Any

from nnsight.block.between import binds_between
from nnsight.block.carry import has
from nnsight.core.group import GroupRun
from nnsight.core.history import user_place
from nnsight.errors import BlockError

if TYPE_CHECKING:
    from nnsight.block.invoke import Invoke


class Names:
    """The names that a block shares with those of other invokes of the same function, and what they stand for in it.

    Holds no function, so that block and names are no cycle.
    """

    def __init__(self, invoke: Invoke, siblings: list[Invoke], at: int, run: GroupRun, opened: int | None) -> None:
        assert invoke.block is not None
        assert invoke.frame is not None
        self._code, self._entered, self._left, self._opened = invoke.frame.f_code, invoke.entered, invoke.left, opened
        self.binds, self.at, self._run = invoke.block.binds, at, run.reference
        others = [other.block for other in siblings if other is not invoke and other.block is not None]
        self.shared = frozenset(
            name
            for name in invoke.block.names
            if any(name in (block.names if name in self.binds else block.binds) for block in others)
        )
        self._around = {name: value for name, value in invoke._around.items() if name in self.shared}
        self._stood_for = {name: value for name, value in invoke.stood_for.items() if name in self.shared}
        self._since: dict[tuple[str, int], bool] = {}
        self._siblings = siblings
        self.cells: dict[str, CellType] = {}
        self.waited_for: list[str] = []
        self.gone: set[str] = set()  # what `del` unbound, until it is bound again
        self.bound_in: dict[str, int] = {}  # the last step in which a loop that goes on has bound it
        self.ended = False

    def ask(self, name: str, told: str | None = None) -> Any:
        """What a shared name stands for now, in this block.

        Its own value; else that of the invoke before which binds it, or of the lines behind that; else what stood
        there around the trace; else, of a name that this block never binds, that of an invoke which comes later.

        Args:
            name: The name.
            told: "gone": it stands for nothing from now on. Not asked but told is "bound": a loop over steps has bound
                it, as it does in each step, and "over": that loop is.
        """
        if told == "over":
            return self.bound_in.pop(name, None)
        if told == "bound":
            if (run := self._run()) is not None:
                self.bound_in[name] = run.state.block_step
            return None
        value = self._found(name)
        if told == "gone":
            self.gone.add(name)
            if has(self.cells[name]):
                del self.cells[name].cell_contents
        return value

    def _found(self, name: str) -> Any:
        if has(self.cells[name]):
            return self.cells[name].cell_contents
        if name in self.gone:
            raise _not_defined(name)
        for giver in self._givers(name, later=False):
            if self._is_bound_since(name, giver):
                return self._around[name]
            if self._gives(giver, name):
                return giver.cells[name].cell_contents
            if name in giver.gone:
                raise _not_defined(name)
        later = [] if name in self.binds else self._givers(name, later=True)
        if name in self._around:
            if later and not self._is_bound_in_trace(name):
                raise self._ambiguous(name, later[0])
            return self._around[name]
        if hasattr(builtins, name):
            return getattr(builtins, name)
        for giver in later:
            if self._gives(giver, name):
                return giver.cells[name].cell_contents
        raise _not_defined(name)

    def _is_bound_since(self, name: str, giver: Names) -> bool:
        """Whether the lines between the invokes bind a name behind another one, as a loop over invokes does."""
        if name not in self._stood_for:
            return False
        if giver._stood_for.get(name) != self._stood_for[name]:
            return True
        known = self._since.get((name, giver.at))
        if known is None:
            known = binds_between(self._code, giver._left, self._entered, name)
            self._since[name, giver.at] = known
        return known

    def _is_bound_in_trace(self, name: str) -> bool:
        return self._opened is not None and binds_between(self._code, self._opened, self._entered, name)

    def unbound(self) -> dict[str, Any]:
        """The names that the block has unbound, and what they stood for around it: this object, where for nothing."""
        return {name: self._around.get(name, self) for name in self.gone if not has(self.cells[name])}

    def _givers(self, name: str, *, later: bool) -> list[Names]:
        """The others that bind a name, the nearest first."""
        siblings = [one.names for one in self._siblings if one.names is not None and name in one.names.binds]
        if later:
            return [names for names in siblings if names.at > self.at]
        return [names for names in siblings if names.at < self.at][::-1]

    def _gives(self, giver: Names, name: str) -> bool:
        """Waits until another block has bound a name, or has ended; whether it has."""
        run, cell = self._run(), giver.cells[name]

        def stuck() -> BlockError:
            return BlockError(
                f"`{name}` is bound by invoke {giver.at}, which waits for something of this one in turn.",
                you_wrote=user_place().source,
                instead=f"another name, if it is not that `{name}` which is meant",
            )

        if not giver.ended and isinstance(run, GroupRun):
            step, member = run.state.block_step, run.members[giver.at]

            def is_there() -> bool:
                if not has(cell):
                    return giver.ended
                bound = giver.bound_in.get(name, step)
                return bound >= step or giver.ended or step not in (member.block_step, member.until_step)

            if not is_there():
                self.waited_for.append(f"`{name}` of invoke {giver.at}")
                run.wait_until(is_there, stuck)
        return has(cell)

    def _ambiguous(self, name: str, giver: Names) -> BlockError:
        return BlockError(
            f"`{name}` stands for something already, and invoke {giver.at}, which comes later, binds it: which of the "
            "two is meant can't be told.",
            you_wrote=user_place().source,
            instead=f"another name, or `del {name}` before the trace, or the invoke that binds it first",
        )

    def close(self) -> None:
        """The run is over: what others have bound is what their names stand for, should a function ask later."""
        for name in self.shared:
            earlier = self._givers(name, later=False)
            later = [] if name in self._around else self._givers(name, later=True)
            behind = next((at for at, one in enumerate(earlier) if self._is_bound_since(name, one)), len(earlier))
            givers = [one for one in earlier[:behind] + later if has(one.cells[name])]
            if givers:
                self._around[name] = givers[0].cells[name].cell_contents
        self._siblings = []


def _not_defined(name: str) -> NameError:
    return NameError(f"name {name!r} is not defined", name=name)
