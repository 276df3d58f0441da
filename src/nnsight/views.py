"""Views that are written back: what an eproperty with a `transform` returned, and a block may change in place.

That one was changed is told by what it is made of, through lists, tuples, dicts and the attributes of objects: a tensor
was, where torch has counted a change since (`_version`; in inference mode nothing is counted, and a copy is compared);
a container was, where another thing stands in it. A thing that can't be looked into, such as a numpy array, counts as
changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from nnsight.block.rows import RowRun, whole_of
from nnsight.core.changed import state_of, was_changed
from nnsight.core.history import add_note, user_place
from nnsight.core.run import Run
from nnsight.core.state import Visit
from nnsight.core.values import is_plain, leaves_of
from nnsight.errors import WriteError

if TYPE_CHECKING:
    from nnsight.node import Node


class Maker(Protocol):
    """What makes views of what passes a port, and writes them back: an eproperty, or a part under a uniform name.

    Attributes:
        name: What errors call it.
        kind: "input" or "output".
    """

    name: str
    kind: str

    def pick(self, node: Node, visit: Visit) -> Any:
        """What a view is made of, from what stands at the port."""

    def write_back(self, node: Node, view: Any, raw: Any) -> None:
        """Has the model go on with a view that was changed; `raw` is what stands there."""


class Views:
    """The views that were had where a run stands, until the model goes on.

    The visit has them, which the paused model's stack holds: so they hold nothing of the run.
    """

    def __init__(self) -> None:
        self._all: list[_View | _Watched] = []
        self._settles = False
        self.kept: dict[Any, Any] = {}  # what a view was made of besides, for who makes them

    @classmethod
    def of(cls, run: Run | RowRun) -> Views:
        visit = whole_of(run).state.visit
        assert visit is not None
        if visit.views is None:
            visit.views = cls()
        views: Views = visit.views
        return views

    def find(self, maker: Maker, run: Run | RowRun, raw: Any) -> list[Any]:
        """The view that was had before, if nothing else has changed since what it was made of."""
        return [one.view for one in self._made(maker, run) if not one.raw_then.differs(raw)]

    def has(self, maker: Maker, run: Run | RowRun) -> bool:
        """Whether one was had before."""
        return bool(self._made(maker, run))

    def _made(self, maker: Maker, run: Run | RowRun) -> list[_View]:
        made = (one for one in self._all if isinstance(one, _View))
        return [one for one in made if one.maker is maker and one.index == run.index]

    def add(self, maker: Maker, node: Node, raw: Any, view: Any) -> Any:
        self._all.append(_View(maker, node, raw, view))
        return view

    def watch(self, value: Any, check: Callable[[Any], None]) -> None:
        """Has a value that passes the port itself checked, if it is changed in place."""
        self._all.append(_Watched(value, check))

    def settle(self) -> None:
        """Writes back what was changed: called where the block asks again, and before the model goes on."""
        if self._settles:  # what it writes is asked for as well
            return
        self._settles = True
        try:
            for view in self._all:
                if view.then.differs(view.view):
                    view.write_back()
        finally:
            self._settles = False


class _View:
    """One view, and what it and the value that it was made of were like when it was had, or last written back."""

    def __init__(self, maker: Maker, node: Node, raw: Any, view: Any) -> None:
        self.maker, self.index = maker, node._run().index
        self.view, self.then = view, Snapshot(view, closed_changes=True)
        self.raw_then = Snapshot(raw)
        self._node, self._place = node._weakly(), user_place()

    def write_back(self) -> None:
        node = self._node()
        if node is None:  # its trace is gone
            return
        run = node._run()
        try:
            self._check_index(run)
            raw = self._standing(node, run)
            self._check_raw(raw, run)
            self.maker.write_back(node, self.view, raw)
        except Exception as error:  # also the user's own: it comes at another line than the change
            add_note(error, f"`{self.maker.name}` was had and changed in place at {self._place.quoted}")
            raise
        whole_of(run).history.place_last(self._place)
        self.then = Snapshot(self.view, closed_changes=True)
        self.raw_then = Snapshot(self._standing(node, run))

    def _standing(self, node: Node, run: Run | RowRun) -> Any:
        """What stands now where the run does, or this part of it."""
        return self.maker.pick(node, run.here(node._module, self.maker.kind))

    def _check_index(self, run: Run | RowRun) -> None:
        if run.index != self.index:
            raise WriteError(
                f"`{self.maker.name}` was changed in place by another invoke than the one that had it: it can't be "
                "written back.",
                instead="the change in the block in which it was had",
            )

    def _check_raw(self, raw: Any, run: Run | RowRun) -> None:
        """Refuses to put one change in place of another one. In a view of the value's own memory, both are."""
        # The rows of a batch are parts of one tensor, whose changes are counted together.
        is_another = self.raw_then.differs(raw, counted=not isinstance(run, RowRun))
        if is_another and not _storages(self.view) & _storages(raw):
            raise WriteError(
                f"`{self.maker.name}` was changed in place, and so was what it is made of, since it was had: one of "
                "the two changes would be lost.",
                you_wrote=self._place.source,
                instead=f"ask for `{self.maker.name}` behind the other change",
            )


class _Watched:
    """A value that needs not be written back, and not everything may be written into."""

    def __init__(self, value: Any, check: Callable[[Any], None]) -> None:
        self.view, self.then, self._check, self._place = value, Snapshot(value), check, user_place()

    def write_back(self) -> None:
        self.then = Snapshot(self.view)
        try:
            self._check(self.view)
        except Exception as error:
            add_note(error, f"it was had and changed in place at {self._place.quoted}")
            raise


class Snapshot:
    """What a value was made of, to tell later whether it was changed.

    Args:
        closed_changes: Whether an object that can't be looked into is always told to be changed, or never.
    """

    def __init__(self, value: Any, *, closed_changes: bool = False) -> None:
        self._leaves = [(leaf, state_of(leaf) if isinstance(leaf, Tensor) else None) for leaf in leaves_of(value)]
        self._is_told = closed_changes and any(map(_is_closed, leaves_of(value)))

    def differs(self, value: Any, *, counted: bool = True) -> bool:
        """`counted`: whether a change in place of the same tensor counts."""
        now = list(leaves_of(value))
        pairs = zip(now, self._leaves, strict=False)
        return (
            self._is_told
            or len(now) != len(self._leaves)
            or any(
                not _is_same(leaf, before) or (counted and state is not None and was_changed(leaf, state))
                for leaf, (before, state) in pairs
            )
        )


def _is_closed(leaf: Any) -> bool:
    return not isinstance(leaf, Tensor) and not is_plain(leaf)


def _is_same(leaf: Any, before: Any) -> bool:
    return leaf is before or (is_plain(leaf) and type(leaf) is type(before) and bool(leaf == before))


def _storages(value: Any) -> set[int]:
    tensors = [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
    return {tensor.untyped_storage()._cdata for tensor in tensors}
