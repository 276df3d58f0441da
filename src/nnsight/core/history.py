"""What a run remembers of what the block did: for receipts, and for errors that name an earlier line."""

from __future__ import annotations

import linecache
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnsight.core.specs import TensorSpec, shape_of
from nnsight.core.values import DEEPEST
from nnsight.errors import UnknownNameError

PACKAGE = str(Path(__file__).parent.parent) + os.sep
TORCH = str(Path(torch.__file__).parent) + os.sep
NOTHING: Any = object()
_new: Any = tuple.__new__  # without a Python call
# The block's own modes would be asked about each look at a tensor.
_function_modes, _are_heard = torch._C._len_torch_function_stack, torch._C._is_torch_function_enabled
_Unheard: Any = torch._C.DisableTorchFunction


class Place(NamedTuple):
    """A line of the user's."""

    code: CodeType
    line: int

    def __str__(self) -> str:
        return f"{Path(self.code.co_filename).name}:{self.line}"

    @property
    def source(self) -> str:
        """The line's text, or where it stands if its text can't be had (a REPL, `python -`)."""
        return self.text or f"line {self.line} of {self.code.co_filename}"

    @property
    def quoted(self) -> str:
        """Where the line stands, and its text if that can be had."""
        return f"{self}: {self.text}" if self.text else str(self)

    @property
    def text(self) -> str:
        """The line's text; empty if it can't be had."""
        return linecache.getline(self.code.co_filename, self.line).strip()


class Access(NamedTuple):
    """One thing that the block did to the model.

    `verb` is "read", "wrote" or "skipped"; shapes are notes, not tensors. `part` is what it was done for,
    if not for the whole batch: "row 1". `changed`: what was read was then changed in place.
    """

    verb: str
    module: nn.Module
    kind: str
    step: int
    place: Place
    shape: Any
    was: Any
    part: str | None = None
    changed: bool = False


_UNMARKED = 9  # entries of a note
_TOLD = 3  # parts of a tensor that one line names


class History:
    """What a block did, noted in passing as plain tuples, since that is on the way of every read.

    `seen` is what was read where the run stands, by id: each tensor, how many changes in place torch had counted of it,
    and which notes those reads are.
    """

    __slots__ = ("_counts", "_notes", "seen")

    def __init__(self) -> None:
        self._notes: list[tuple[Any, ...]] = []
        self.seen: dict[int, tuple[Tensor, int, list[int]]] = {}
        self._counts = not torch.is_inference_mode_enabled()  # in which torch counts nothing, and says so slowly

    def note(self, verb: str, module: nn.Module, kind: str, step: int, value: Any, was: Any = NOTHING) -> None:
        """`value` is what the block had or gave, and `was` what that took the place of; only their shapes are kept."""
        if _function_modes() and _are_heard():
            with _Unheard():
                History.note(self, verb, module, kind, step, value, was)
            return
        is_tensor = type(value) is Tensor
        try:
            shape = _new(TensorSpec, (value.shape, value.dtype, value.device)) if is_tensor else shape_of(value)
            if was is NOTHING:
                before = None
            else:
                before = _new(TensorSpec, (was.shape, was.dtype, was.device)) if type(was) is Tensor else shape_of(was)
        except RuntimeError:  # a nested tensor, which has no `shape`
            shape, before = shape_of(value), None if was is NOTHING else shape_of(was)
        frame: Any = sys._getframe(3)
        while frame.f_code.co_filename.startswith(PACKAGE) and frame.f_back is not None:
            frame = frame.f_back
        # The line is looked up when it is asked for: that takes longer, the more lines stand before it.
        self._notes.append((verb, module, kind, step, frame.f_code, frame.f_lasti, shape, before, None))
        if verb == "read" and self._counts:
            at = len(self._notes) - 1
            try:
                if is_tensor and id(value) not in self.seen:
                    self.seen[id(value)] = value, value._version, [at]
                else:
                    for tensor in _tensors(value):
                        self.seen.setdefault(id(tensor), (tensor, tensor._version, []))[2].append(at)
            except RuntimeError:  # a tensor that was made in inference mode
                self._counts, self.seen = False, {}

    def note_changes(self, *, stays: bool = False) -> None:
        """Notes which of the values were changed in place. `stays`: the model does not go on, so that more may come."""
        if _function_modes() and _are_heard():
            with _Unheard():
                History.note_changes(self, stays=stays)
            return
        seen = self.seen
        for key, (tensor, version, reads) in list(seen.items()) if stays else seen.items():
            if tensor._version != version:
                self._mark(reads)
                if stays:
                    seen[key] = tensor, tensor._version, reads[-1:]
        if not stays:
            self.seen = {}

    def let_go(self, tensors: list[Tensor]) -> None:
        """Holds these no longer: others took their places, and nobody has a part of them who could change it."""
        for tensor in tensors:
            seen = self.seen.pop(id(tensor), None)
            if seen is not None and seen[1] != tensor._version:
                self._mark(seen[2])

    def _mark(self, reads: list[int]) -> None:
        """Of several reads of one tensor, the last one is marked, and that it may have been for another part."""
        new = [at for at in reads if len(self._notes[at]) == _UNMARKED]
        if not new:  # changed once more
            return
        note = self._notes[new[-1]]
        parts = list(dict.fromkeys(self._notes[at][8] for at in new))
        if None in parts:
            part = None
        else:
            others = "an earlier one" if len(new) < len(reads) else "another" if len(parts) > _TOLD else None
            part = " or ".join([*parts[-_TOLD:], *([others] if others else [])])
        self._notes[new[-1]] = (*note[:8], part, True)

    def amend(self, part: str, shape: Any) -> None:
        """Says of the last note that it was done for this part, with this shape, or the noted one if that is None."""
        note = self._notes[-1]
        self._notes[-1] = (*note[:6], note[6] if shape is None else shape, None, part)

    def call(self, name: str, shape: Any) -> None:
        """Says of the last note which of a port's values it was, below its module, and of what shape."""
        note = self._notes[-1]
        before = None if note[7] is None else shape  # such values keep their shape
        self._notes[-1] = (*note[:2], name, *note[3:6], shape, before, *note[8:])

    def place_last(self, place: Place) -> None:
        """Says of the last note that it was done at this line."""
        note = self._notes[-1]
        at = next((start for start, _, line in place.code.co_lines() if line == place.line), 0)
        self._notes[-1] = (*note[:4], place.code, at, *note[6:])

    def __iter__(self) -> Iterator[Access]:
        for verb, module, kind, step, code, at, shape, was, part, *changed in self._notes:
            place = Place(code, line_of(code, at))
            yield Access(verb, module, kind, max(step, 0), place, shape, was, part, bool(changed))

    def __bool__(self) -> bool:
        return bool(self._notes)

    @property
    def last(self) -> Access:
        return list(self)[-1]


def _tensors(value: Any, depth: int = 0) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in list(items)[:8] for tensor in _tensors(item, depth + 1)] if depth < DEEPEST else []


def line_of(code: CodeType, at: int) -> int:
    """The line of the instruction at this offset."""
    lines = (line for start, end, line in code.co_lines() if start <= at < end)
    return next(lines, None) or code.co_firstlineno


def raised_at(error: BaseException) -> Place | None:
    """The innermost line that an error came through; None where it came through none."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return None if at is None else Place(at.tb_frame.f_code, at.tb_lineno)


def user_place(ours: int = 1) -> Place:
    """The innermost line that is not the library's own; `ours`: how many frames are known to be, to look no closer."""
    frame = _user_frame(ours + 1)
    return Place(frame.f_code, frame.f_lineno)


def _user_frame(ours: int = 1) -> FrameType:
    frame = sys._getframe(ours)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return frame


def user_frame(frame: FrameType | None = None) -> FrameType:
    """The innermost frame, from this one on, that is neither ours nor torch's: a call may come to us through torch."""
    frame = frame or sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((PACKAGE, TORCH)):
        frame = frame.f_back
    return frame


def no_such_name(name: str, what: str, instead: str) -> AttributeError:
    """What a `__getattr__` raises for a name that is asked of the wrong thing; Python's own are just not there."""
    if name.startswith("_"):
        return AttributeError(name)
    return UnknownNameError(what, you_wrote=user_place().source, instead=instead)


def deprecated(text: str) -> None:
    """Warns at the user's line of a way to write something that programs for the existing package have."""
    warn_user(text, FutureWarning)


def warn_user(text: str, category: type[Warning]) -> None:
    """Warns at the user's line."""
    frame = _user_frame()
    told = frame.f_globals.setdefault("__warningregistry__", {})  # once a line, as `warnings.warn` does
    warnings.warn_explicit(text, category, frame.f_code.co_filename, frame.f_lineno, registry=told)


def add_note(error: BaseException, note: str) -> None:
    """`BaseException.add_note`, by hand on Python 3.10, which doesn't print notes but keeps them for who asks."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", []), note]
