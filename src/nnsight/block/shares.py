"""What the rows of a batch hold of the values at one place: their parts, of which no change is lost for another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnsight.block.cuts import CanNotCut, Cut, Knife
from nnsight.block.replaced import Replaced
from nnsight.block.skips import Skips
from nnsight.block.widen import Writer
from nnsight.core.axes import Axes, Path, Unknown
from nnsight.core.changed import State, state_of, was_changed
from nnsight.core.hidden import Hidden
from nnsight.core.history import History, Place, user_place
from nnsight.core.specs import shape_of, show_shape
from nnsight.core.state import Visit
from nnsight.core.values import fields_of, holds_fakes, is_plain, is_record, leaves_of, like, with_fields
from nnsight.errors import RowError, WriteError


class _View(NamedTuple):
    """What was given to a row: its part, and the whole that it is a part of.

    Of a tensor that is shared, there is a copy to put back: one row can't change it, and may try in place. Of a part
    that is no view, `given` are the values that it and the whole had when they were last the same. Of either, `state`
    tells whether it was changed since (core/changed.py).
    """

    part: Any
    whole: Any
    shared: bool
    state: State = 0
    copy: Tensor | None = None
    given: Tensor | None = None

    def is_rewritten(self) -> bool:
        """Whether a part that is no view was changed in place: the whole doesn't have it yet."""
        return self.given is not None and was_changed(self.part, self.state)

    def noted(self) -> _View:
        """The same, with what a part that is no view has now."""
        return self._replace(state=state_of(self.part), given=self.part.detach().clone())

    def changed(self) -> bool:
        """Whether a tensor that is shared was changed in place."""
        return self.copy is not None and was_changed(self.whole, self.state)

    def put_back(self) -> None:
        with torch.no_grad(), torch.inference_mode(self.whole.is_inference()):
            self.whole.detach().copy_(self.copy)


class Given(NamedTuple):
    value: Any
    views: dict[Path, _View]
    place: Place


class Shares:
    """What rows were given at the place where a run stands, until the model goes on.

    Holds nothing of the run: the paused model's stack holds it.
    """

    def __init__(self, knife: Knife, axes: Callable[[str, Path, Tensor], Axes | Unknown], label: str) -> None:
        self.knife, self.axes, self.label = knife, axes, label
        self.beside: list[Any] = []  # weak references to the tensors that the rows were given, for gradients
        self._whole: dict[str, tuple[Any, ...]] = {}
        self._given: dict[tuple[str, int], Given] = {}
        self._has_all: set[str] = (
            set()
        )  # of what there was a copy with what rows wrote, since when all have their parts
        self.replaced = Replaced()
        self._has_copies = False  # whether a part was given that is no view
        self._later: dict[tuple[str, int], None] = {}  # whose part was written, and isn't in the whole yet
        self.asked_by_part = False  # one that needs nothing of what others wrote
        self._skips: Skips | None = None

    def take(self, visit: Visit, kind: str, index: int) -> Any:
        """A row's part of the value: the same object each time, until the value is another."""
        if (kind, index) in self._later:
            self.write_out(visit)
        return self.had(visit, kind, index).value

    def has_written(self, kind: str, index: int) -> bool:
        """Whether a row has put another part there, which isn't in the whole yet."""
        return (kind, index) in self._later

    def had(self, visit: Visit, kind: str, index: int) -> Given:
        """A row's part to make another one of, not to be changed in place: the whole may not have it yet."""
        self._check_whole(visit, kind)
        key = kind, index
        given = self._given.get(key)
        is_later = key in self._later
        if given is None or (self.replaced and not is_later and self._is_outdated(*key, given, visit.value(kind))):
            views: dict[Path, _View] = {}
            given = Given(self._narrow(visit.value(kind), kind, index, (), views), views, user_place())
            self._given[key] = given
        return given

    def put(self, visit: Visit, kind: str, index: int, value: Any) -> Any:
        """The value of the whole batch with another part for this row. What other rows were given stays theirs."""
        given = self.had(visit, kind, index)
        self._later.pop((kind, index), None)
        writer = Writer(self, kind, index, given)
        whole = writer.widen(visit.value(kind), value, ())
        if writer.is_needed:  # else it is the part that the row was given, of which a gradient may be asked for
            del self._given[kind, index]
            self._keep(kind, index, given, value, whole)
        return self._becomes(kind, visit.value(kind), whole)

    def put_later(self, visit: Visit, kind: str, index: int, value: Any) -> Any:
        """The same, but the value of the whole batch stays what it is until somebody asks for it, or the model goes on.

        It is copied once then, and not for each row that is written.
        """
        given = self.had(visit, kind, index)
        writer = Writer(self, kind, index, given, keeps=True)
        kept = writer.widen(visit.value(kind), value, ())
        self._given[kind, index] = given._replace(value=kept)
        if writer.is_needed:
            self._later[kind, index] = None
        else:  # it is the part that the row was given, of which a gradient may be asked for
            self._later.pop((kind, index), None)
        return visit.value(kind)

    def write_out(self, visit: Visit, history: History | None = None) -> None:
        """Has the whole batch be what its rows wrote: before it is asked for."""
        later, self._later = self._later, {}
        for kind in dict.fromkeys(kind for kind, _ in later):
            if (
                kind not in self._has_all
            ):  # before the first copy: theirs is of what others hold too, the stream, a cache
                self._has_all.add(kind)
                for index in range(self.knife.batch.n_parts):
                    if (kind, index) not in later:
                        self.had(visit, kind, index)
            old = whole = visit.value(kind)
            fresh: set[int] = set()
            written = {index: self._given.pop((kind, index)) for of, index in later if of == kind}
            for index, given in written.items():
                whole = Writer(self, kind, index, given, fresh=fresh).widen(whole, given.value, ())
            for index, given in written.items():
                self._keep(kind, index, given, given.value, whole)
            visit.replace(kind, self._becomes(kind, old, whole, history))

    def _keep(self, kind: str, index: int, given: Given, value: Any, whole: Any) -> None:
        """A row keeps the parts that it was given of what it has not written: of several inputs, the others."""
        views = {path: view for path, view in given.views.items() if path and _at(value, path) is view.part}
        if any(not view.shared for view in views.values()):
            self._given[kind, index] = Given(self._narrow(whole, kind, index, (), views), views, given.place)

    def _becomes(self, kind: str, old: Any, whole: Any, history: History | None = None) -> Any:
        """Notes what took the place of the whole.

        What that was is let go by the history, where no row has a part of it: else there would be a copy of the batch
        for each time that it was asked for between two rows that are written.
        """
        self._whole[kind] = whole if kind == "input" else (whole,)
        if had := [view.whole for key, given in self._given.items() if key[0] == kind for view in given.views.values()]:
            self.replaced.note(kind, had, whole)
        if history is not None:
            kept = {id(tensor) for tensor in (*had, *leaves_of(whole))}
            history.let_go([leaf for leaf in leaves_of(old) if isinstance(leaf, Tensor) and id(leaf) not in kept])
        return whole

    def _is_outdated(self, kind: str, index: int, given: Given, value: Any) -> bool:
        """Whether what took the place of what a row was given was changed in place since, in that row."""
        for path, view in given.views.items():
            if view.whole in self.replaced and self.replaced.is_changed(now := _at(value, path)):
                cut = self.knife.cut(now, self.axes(kind, path, now), index)
                if not _has_values(cut.of(now), view.part):
                    return True
        return False

    def bring_together(self, visit: Visit, history: History | None = None, *, stays: bool = True) -> None:
        """Puts what rows changed in parts of what was replaced into the copy, before it is asked for or goes on.

        And has parts that are no views be as the whole is, and the other way round, as views are by themselves.

        Args:
            stays: Whether it is asked for; else what was changed in such a part comes into a new whole.
        """
        if self._later and stays and not self.asked_by_part:
            self.write_out(visit, history)
        if not self.replaced and not self._has_copies:
            return
        for kind in ("input", "output"):
            self._check_whole(visit, kind)
        known = [one for one in self._given.items() if one[0] not in self._later]
        for (kind, index), given in known if self._has_copies else ():
            for path, view in given.views.items():
                if view.given is not None:
                    given.views[path] = self._level(kind, index, path, given, _at(visit.value(kind), path), stays)
        if not self.replaced:
            return
        for (kind, index), given in known:
            for path, view in given.views.items():
                whole = _at(visit.value(kind), path)
                is_old = view.whole in self.replaced and whole is not view.whole and not view.shared
                if is_old and not self.replaced.is_as_left(view.whole):
                    self._bring(kind, index, path, given, whole)
        self.replaced.all_settled()

    def _level(self, kind: str, index: int, path: Path, given: Given, whole: Tensor, stays: bool) -> _View:
        view = given.views[path]
        cut = self.knife.cut(whole, self.axes(kind, path, whole), index)
        assert view.given is not None
        is_rewritten, is_other = view.is_rewritten(), not _has_values(cut.of(whole), view.given)
        if is_rewritten and is_other:
            raise self._changed_twice(kind, index, path, given, ", which is a copy,", "")
        flows = whole.requires_grad or view.part.requires_grad
        with torch.inference_mode(whole.is_inference()), torch.set_grad_enabled(flows):
            if is_other:
                view.part.copy_(cut.of(whole))
            elif is_rewritten and stays:
                cut.put(whole, view.part)
            else:
                return view
        return view._replace(whole=whole).noted()

    def _bring(self, kind: str, index: int, path: Path, given: Given, whole: Tensor) -> None:
        part = given.views[path].part
        # Of a copy that rows have parts of, the change may be theirs.
        others = [view.whole for one in self._given.values() for view in one.views.values()]
        if self.replaced.is_changed(whole) and all(other is not whole for other in others):
            raise self._changed_twice(kind, index, path, given)
        flows = whole.requires_grad or part.requires_grad
        with torch.inference_mode(whole.is_inference()), torch.set_grad_enabled(flows):
            self.knife.cut(whole, self.axes(kind, path, whole), index).put(whole, part)
        self.replaced.settled(whole)

    def _changed_twice(
        self,
        kind: str,
        index: int,
        path: Path,
        given: Given,
        what: str = "",
        when: str = ", behind a write of another",
    ) -> WriteError:
        row = self.knife.batch.part(index).label
        return WriteError(
            f"{self.name(kind, path)} of {row}{what} was changed in place, and so was the value of the whole "
            f"batch{when}: one of the two changes would be lost.",
            read_at=given.place.quoted,
            noticed_at=user_place().quoted,
            instead=f"read it again for {row} behind the change of the whole batch",
        )

    def skip(self, index: int, value: Any, place: Place) -> None:
        """Leaves the module out, if all parts say so before the model goes on."""
        if self._skips is None:
            self._skips = Skips(self.knife, self.axes, self.label)
        self._skips.give(index, value, place)

    def is_skipped(self, index: int | None = None) -> bool:
        """Whether a part has said what the module gives instead; all of them, if none is named."""
        return self._skips is not None and self._skips.has(index)

    def settle(self, visit: Visit) -> None:
        """Before the model goes on: gives it what the rows made of their parts."""
        self.bring_together(visit, stays=False)
        visit.shares = None
        if self._skips is not None:
            visit.skip_value, visit.skipped = self._skips.whole(), True
        here = "input" if visit.port is not None and visit.port.kind == "input" else "output"
        for kind in ("input", "output"):
            self._check_whole(visit, kind)
            old = whole = visit.value(kind)
            fresh: set[int] = set()
            for (given_kind, index), given in self._given.items():
                if given_kind == kind:
                    writer = Writer(self, kind, index, given, rebuild=kind == here, fresh=fresh)
                    whole = writer.widen(whole, given.value, ())
            if _same(whole, old):
                continue
            if kind != here:
                raise WriteError(
                    f"`{self.label}` can't be written any more: its forward has run.", you_wrote=user_place().source
                )
            visit.replace(kind, whole)

    def _check_whole(self, visit: Visit, kind: str) -> None:
        """Forgets what rows were given of a value that was replaced as a whole since."""
        now = (visit.args, visit.kwargs) if kind == "input" else (visit.output,)
        before = self._whole.get(kind, now)
        if any(a is not b for a, b in zip(now, before, strict=True)):
            self._given = {k: given for k, given in self._given.items() if k[0] != kind or k in self._later}
            self._has_all.discard(kind)
        self._whole[kind] = now

    def _narrow(self, whole: Any, kind: str, index: int, path: Path, views: dict[Path, _View]) -> Any:
        """A row's part of a value. `views`: the parts that it keeps, to which all others are added."""
        if path in views:
            return views[path].part
        if isinstance(whole, Tensor):
            return self._part(whole, kind, index, path, views)
        if isinstance(whole, dict):
            new = copy.copy(whole)  # always: what is put into it is this row's
            for key, item in whole.items():
                new[key] = self._narrow(item, kind, index, (*path, key), views)
            return new
        if isinstance(whole, (tuple, list)):
            items = [self._narrow(item, kind, index, (*path, at), views) for at, item in enumerate(whole)]
            return type(whole)(items) if type(whole) is list else like(whole, items)
        if is_record(whole):
            fields = fields_of(whole).items()
            return with_fields(whole, {k: self._narrow(item, kind, index, (*path, k), views) for k, item in fields})
        if is_plain(whole):
            return whole
        what = type(whole).__name__
        why = f"it is a {what}, which may hold all rows; tuples, lists, dicts and dataclasses are looked into"
        return self._hide(why, whole, kind, path, views, what)

    def _hide(self, why: str, whole: Any, kind: str, path: Path, views: dict[Path, _View], shape: str) -> Hidden:
        refusal = partial(self._refusal, why, kind, path, shape)
        if not path:
            raise refusal() from None
        part = Hidden(refusal, shape)
        views[path] = _View(part, whole, True)
        return part

    def _part(self, whole: Tensor, kind: str, index: int, path: Path, views: dict[Path, _View]) -> Any:
        try:
            cut = self.knife.cut(whole, self.axes(kind, path, whole), index)
        except CanNotCut as error:
            return self._hide(str(error), whole, kind, path, views, show_shape(shape_of(whole)))
        part = whole if not cut.further and all(one == slice(None) for one in cut.at) else _part_of(whole, cut)
        view = _View(part, whole, cut.shared)
        if cut.further:
            view = view.noted()
        elif cut.shared and self.knife.batch.n_parts > 1:
            view = view._replace(state=state_of(whole), copy=whole.detach().clone())
        views[path] = view
        self._has_copies |= bool(cut.further)
        return part

    def _refusal(self, why: str, kind: str, path: Path, shape: str) -> RowError:
        return RowError(
            f"A row's part of {self.name(kind, path)} can't be told: {why}.",
            you_wrote=user_place().source,
            it_is=shape,
            instead=f"the value of the whole batch, {self._in_full(kind)}",
        )

    def _in_full(self, kind: str) -> str:
        return f"tracer.{kind}" if kind == "result" else f"tracer.model.get({f'{self.label}.{kind}'!r})"

    def name(self, kind: str, path: Path) -> str:
        steps = path[1:] if kind == "input" and path and path[0] == 1 else path
        kind = "inputs" if kind == "input" else kind
        return f"`{self.label}.{kind}{''.join(f'[{step!r}]' for step in steps)}`"


def _has_values(one: Tensor, other: Tensor) -> bool:
    if holds_fakes(one):
        return True  # a scan's have none
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _part_of(whole: Tensor, cut: Cut) -> Tensor:
    """A part of a tensor, in its graph also where the block has turned gradients off."""
    if not whole.requires_grad or torch.is_grad_enabled():
        return cut.of(whole)
    with torch.inference_mode(False), torch.enable_grad():
        return cut.of(whole)


def _at(value: Any, path: Path) -> Any:
    for step in path:
        value = value[step] if isinstance(value, (dict, tuple, list)) else getattr(value, step)
    return value


def _same(whole: Any, old: Any) -> bool:
    """Whether nothing in a value was replaced; the pair of inputs is made anew each time."""
    return whole is old or (type(whole) is tuple and len(whole) == 2 and whole[0] is old[0] and whole[1] is old[1])
