"""Puts a row's part of a value back into that of the whole batch, or says why it doesn't fit there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnsight.core.axes import Path
from nnsight.core.hidden import Hidden
from nnsight.core.history import user_place
from nnsight.core.specs import shape_of, show_shape
from nnsight.core.values import fields_of, is_plain, is_record, like, with_fields
from nnsight.errors import WriteError

if TYPE_CHECKING:
    from nnsight.block.shares import Given, Shares


class Writer:
    """Puts a row's part into the value of the whole batch, which stays as it was: what changes is a copy.

    Args:
        rebuild: Where gradients flow through a part, the whole is put together anew from it.
        fresh: The copies that were made already, by id; None: each part makes one.
        keeps: What comes of it is not the whole but the part, as it is now, to be put there later.

    Attributes:
        is_needed: Whether there is anything in the part that the whole doesn't have.
    """

    def __init__(
        self,
        shares: Shares,
        kind: str,
        index: int,
        given: Given,
        *,
        rebuild: bool = False,
        fresh: set[int] | None = None,
        keeps: bool = False,
    ) -> None:
        self._shares, self._kind, self._index = shares, kind, index
        self._views, self._place = given.views, given.place
        self._rebuild, self._fresh, self._keeps = rebuild, fresh, keeps
        self.is_needed = False

    def widen(self, whole: Any, part: Any, path: Path) -> Any:
        if isinstance(whole, Tensor):
            return self._tensor(whole, part, path)
        if isinstance(whole, dict):
            if not isinstance(part, dict) or list(part) != list(whole):
                raise self._other_structure(whole, part, path)
            return like(whole, [self.widen(item, part[key], (*path, key)) for key, item in whole.items()])
        if isinstance(whole, (tuple, list)):
            if not isinstance(part, (tuple, list)) or len(part) != len(whole):
                raise self._other_structure(whole, part, path)
            return like(whole, [self.widen(item, part[at], (*path, at)) for at, item in enumerate(whole)])
        if is_record(whole):
            return self._record(whole, part, path)
        view = self._views.get(path)
        if part is whole or (view is not None and part is view.part):
            return part if self._keeps else whole
        if is_plain(whole) and type(part) is type(whole) and part == whole:
            return whole
        raise self._shared(path)

    def _record(self, whole: Any, part: Any, path: Path) -> Any:
        old = fields_of(whole)
        if type(part) is not type(whole) or fields_of(part).keys() != old.keys():
            raise self._other_structure(whole, part, path)
        new = {name: self.widen(item, getattr(part, name), (*path, name)) for name, item in old.items()}
        return with_fields(whole, new) if any(new[name] is not item for name, item in old.items()) else whole

    def _tensor(self, whole: Tensor, part: Any, path: Path) -> Any:
        view, batch = self._views.get(path), self._shares.knife.batch
        untouched = view is not None and part is view.part
        if view is not None and view.shared:
            if untouched and view.changed():
                view.put_back()
                raise self._changed_in_place(path)
            if untouched:
                return part if self._keeps else whole
            if isinstance(view.part, Hidden):
                view.part._raise()
            if batch.n_parts > 1:
                raise self._shared(path)
        flows = whole.requires_grad or (isinstance(part, Tensor) and part.requires_grad)
        rebuilds, same = self._rebuild and flows, view is not None and view.whole is whole
        kept = untouched and view is not None and not view.is_rewritten()
        as_it_was = kept and view is not None and (same or self._shares.replaced.is_as_left(view.whole))
        if as_it_was and not rebuilds:
            return part if self._keeps else whole
        if not isinstance(part, Tensor):
            raise self._other_structure(whole, part, path)
        cut = self._shares.knife.cut(whole, self._shares.axes(self._kind, path, whole), self._index)
        if as_it_was and not same and not torch.equal(cut.of(whole), part):
            return whole  # which was changed in place behind the write of another row
        with torch.inference_mode(whole.is_inference()), torch.set_grad_enabled(flows):
            expected = cut.of(whole).shape
            if part.shape != expected:
                raise self._other_shape(expected, part, path)
            self.is_needed = True
            if self._keeps:
                return cut.of(whole).clone().copy_(part)
            if self._fresh is None or id(whole) not in self._fresh:
                whole = whole.clone()
                if self._fresh is not None:
                    self._fresh.add(id(whole))
            cut.put(whole, part)
        return whole

    def _other_shape(self, expected: torch.Size, part: Tensor, path: Path) -> WriteError:
        batch = self._shares.knife.batch
        facts: dict[str, str] = {}
        if batch.spans is not None:
            others = [i for i in range(batch.n_parts) if i != self._index]
            fitting = [i for i in others if (span := batch.span(batch.part(i)))[1] - span[0] in part.shape]
            for i in sorted([self._index, *(fitting or others)[:1]]):
                facts[batch.part(i).label] = batch.show(i)
        return WriteError(
            f"{self._shares.name(self._kind, path)} of {batch.part(self._index).label} has the shape {list(expected)}, "
            f"and this has {list(part.shape)}; nothing is broadcast.",
            you_wrote=user_place().source,
            **facts,
            instead=self._that_fits(expected, part),
        )

    def _that_fits(self, expected: torch.Size, part: Tensor) -> str | None:
        batch = self._shares.knife.batch
        if part.ndim != len(expected) or batch.spans is None:
            return f"a value of the shape {list(expected)}" if part.ndim != len(expected) else None
        if batch.parts is not None:
            return "the positions that correspond: layer.output[:, -3:] = hidden[:, -3:]"
        return "the positions that correspond: b.layer.output[:, -3:] = a.layer.output[:, -3:]"

    def _other_structure(self, whole: Any, part: Any, path: Path) -> WriteError:
        label = self._shares.knife.batch.part(self._index).label
        return WriteError(
            f"{self._shares.name(self._kind, path)} is another kind of value than what {label} was given.",
            you_wrote=user_place().source,
            the_batch_has=show_shape(shape_of(whole)),
            you_gave=show_shape(shape_of(part)),
            instead="a value of the form that reading it gives; envoy.output[:] = 0 fills a tensor",
        )

    def _changed_in_place(self, path: Path) -> WriteError:
        batch = self._shares.knife.batch
        return WriteError(
            f"{self._shares.name(self._kind, path)} is shared by all {batch.n_parts} {self._ones}s, and "
            f"{batch.part(self._index).label} changed it in place. It has been put back as it was.",
            read_at=self._place.quoted,
            noticed_at=user_place().quoted,
            instead=f"value.clone() to work on, or change it for the whole batch: {self._in_full}",
        )

    @property
    def _ones(self) -> str:
        return "row" if self._shares.knife.batch.parts is None else "invoke"

    @property
    def _in_full(self) -> str:
        return "tracer.result" if self._kind == "result" else f"tracer.model.{self._shares.label}.{self._kind}"

    def _shared(self, path: Path) -> WriteError:
        name, count, one = self._shares.name(self._kind, path), self._shares.knife.batch.n_parts, self._ones
        return WriteError(
            f"{name} is shared by all {count} {one}s: one {one} can't change it for itself alone.",
            you_wrote=user_place().source,
            instead=f"write it for the whole batch: {self._in_full} = ...",
        )
