"""Where a tensor came from, for errors about gradients, which name the module and the line that it was read at.

Noted only in a trace whose own code names `backward` or `grad`: there `Handed` stands in for the run's history.
"""

from __future__ import annotations

import linecache
import weakref
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from nnsight.core.graphless import Reason, reason_of_run
from nnsight.core.history import NOTHING, History, Place, add_note, line_of, user_frame
from nnsight.core.specs import shape_of, show_shape
from nnsight.core.tree import Attached
from nnsight.core.values import tensors_in

if TYPE_CHECKING:
    from nnsight.core.run import Run

# On the way of each read: not looked up in torch's big modules there.
_Tensor, _Unheard, _ref = torch.Tensor, torch._C.DisableTorchFunction, weakref.ref


class Origin(NamedTuple):
    """What a tensor is to the user: a value of this module, read at this instruction. Holds nothing of the model's.

    `path` leads to it in the value; `part` the part of the batch that it is, if not all of it: "row 1".
    """

    tensor: weakref.ref[torch.Tensor]
    root: weakref.ref[nn.Module]
    module: weakref.ref[nn.Module] | str  # what the value is called, where that is known
    kind: str
    path: tuple[Any, ...]
    code: CodeType
    at: int
    part: str | None

    @property
    def label(self) -> str | None:
        """`transformer.h.3.output[0]`; None where the model is gone."""
        name, path = self.module, "".join(f"[{step!r}]" for step in self.path)
        if not isinstance(name, str):
            root, module = self.root(), name()
            names = [] if root is None else [name for name, one in root.named_modules() if one is module]
            if not names:
                return None
            name = f"{names[0] or 'model'}.{self.kind}"
        if name.endswith(".input"):
            path = "" if path == "[0][0]" else "s" + path
        elif self.kind == "input":  # of attention: `attn.k` is one of the inputs that stand there
            path = ""
        return name + path

    @property
    def place(self) -> Place:
        return Place(self.code, line_of(self.code, self.at))


# The origins of all tensors that were read, in this order, and as plain tuples: this is on the way of each read, and is
# looked into for an error only.
_noted: list[tuple[Any, ...]] = []
_beside: Any = WeakIdKeyDictionary()  # a row's tensor -> weak references to all that rows were given of one value


def _forget_the_dead() -> None:
    """Takes out the tensors that are gone, where a trace begins; no more often than they can have doubled."""
    global _most
    if (count := len(_noted)) > _most:
        _noted[:count] = [one for one in _noted[:count] if one[0]() is not None]
        _most = 500 + 2 * len(_noted)


_most = 500


def _origin_of(tensor: torch.Tensor) -> Origin | None:
    """Where it was read last."""
    return next((Origin(*one) for one in reversed(_noted) if one[0]() is tensor), None)


class Handed(History):
    """A history that also keeps what the run handed out, while its block is open.

    Attributes:
        values: The last value read at a module's port, by `(module, kind)`; of values that have a graph only.
        reason: Why the last value without a graph has none.
    """

    __slots__ = ("_root", "_run", "reason", "values")

    def __init__(self, run: Run) -> None:
        _forget_the_dead()
        self._notes, self._counts, self.seen = run.history._notes, run.history._counts, run.history.seen
        self._run, self._root = run.reference, weakref.ref(run.tree.root)
        self.values: dict[tuple[nn.Module, str], Any] = {}
        self.reason: Reason | None = None

    def note(self, verb: str, module: nn.Module, kind: str, step: int, value: Any, was: Any = NOTHING) -> None:
        with _Unheard():  # by the block's mode
            super().note(verb, module, kind, step, value, was)
            run = self._run()
            if run is None or verb != "read":
                return
            named = run.tree.name_of(module, kind) if isinstance(module, Attached) else _ref(module)
            note = self._notes[-1]
            code, at = note[4], note[5]
            has_graph = None
            for path, tensor in (((), value),) if type(value) is _Tensor else tensors_in(value):
                _noted.append((_ref(tensor), self._root, named, kind, path, code, at, None))
                has_graph = has_graph or tensor.requires_grad
            if has_graph:
                self.values[module, kind] = value
            elif has_graph is not None:
                self.reason = reason_of_run(run)

    def hand(self, module: nn.Module, kind: str, value: Any, part: str, beside: list[Any]) -> None:
        """Notes what a part of the batch was given. `beside`: weak references to what other parts were given there."""
        run, frame = self._run(), user_frame()
        if run is None:
            return
        named = run.tree.name_of(module, kind)
        for path, tensor in tensors_in(value):
            _noted.append((_ref(tensor), self._root, named, kind, path, frame.f_code, frame.f_lasti, part))
            if tensor not in _beside:
                beside.append(weakref.ref(tensor))
                _beside[tensor] = beside

    def close(self) -> None:
        self.values.clear()


def rows_were_read() -> bool:
    """Whether there is a tensor that a row was given."""
    return bool(_beside.data)


def beside(tensor: torch.Tensor) -> list[torch.Tensor]:
    """For what a row was given: what other rows were given of the same value."""
    others = [reference() for reference in _beside.get(tensor, ())]
    return [other for other in others if other is not None and other is not tensor and other.requires_grad]


class Asked(NamedTuple):
    """A gradient that was asked for: the tensor, and the line. What both are called is found out for an error only.

    `modules` are those whose parameters it may be.
    """

    tensor: weakref.ref[torch.Tensor]
    code: CodeType
    at: int
    modules: list[nn.Module]

    @property
    def place(self) -> Place:
        return Place(self.code, line_of(self.code, self.at))

    @property
    def is_part(self) -> bool:
        """Whether it is what a row was given."""
        origin = None if (tensor := self.tensor()) is None else _origin_of(tensor)
        return origin is not None and origin.part is not None

    @property
    def label(self) -> str:
        """The value of a module, a parameter, or what the line calls it."""
        tensor = self.tensor()
        if tensor is None:
            return "a tensor"
        if (origin := _origin_of(tensor)) is not None and (label := origin.label) is not None:
            return f"`{label}` of {origin.part}" if origin.part else f"`{label}`"
        for module in self.modules:
            for name, parameter in module.named_parameters():
                if parameter is tensor:
                    return f"`{name}`"
        written = _expression(self.code, self.at)
        return f"`{written}`" if written else f"a tensor of {show_shape(shape_of(tensor))}"

    @property
    def facts(self) -> dict[str, str | None]:
        tensor = self.tensor()
        origin = None if tensor is None else _origin_of(tensor)
        return {"you_wrote": self.place.source, "read_at": origin.place.quoted if origin else None}


def asked_by(frame: FrameType, tensor: torch.Tensor, modules: list[nn.Module]) -> Asked:
    return Asked(weakref.ref(tensor), frame.f_code, frame.f_lasti, modules)


def _expression(code: CodeType, at: int) -> str | None:
    """The `h` of the `h.grad` that this instruction belongs to; None on Python 3.10, and where there is no source."""
    if not hasattr(code, "co_positions"):
        return None
    line, end, first, last = list(code.co_positions())[at // 2]
    if line is None or line != end:
        return None
    text = linecache.getline(code.co_filename, line).encode()[first:last].decode(errors="replace")
    return text.removesuffix(".grad") if text.endswith(".grad") else None


def explain_changed(error: BaseException) -> None:
    """Adds what to write to torch's error for a value that was changed in place after something had used it."""
    if isinstance(error, RuntimeError) and "modified by an inplace operation" in str(error):
        add_note(
            error,
            "A value was changed in place, `layer.output[:] = new`, after the model or the block had used what it was, "
            "which the backward pass needs. Assign it, `layer.output = new`, or use a copy of what it was: "
            "`part = layer.output[:, -1].clone()`.",
        )
