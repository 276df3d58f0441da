"""Calls that edits make of modules, and which values of the model they are given: by that, rows can be told in them.

The twin on which axes are measured runs without edits, so that what an edit calls is not in it. It is measured on a
twin of its own, whose inputs have the axes of the values that the edit passed on. Which those are is told by identity:
of a tensor that the edit computed, nothing is known.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from nnsight.core.axes import Axes, Axial, Path, Unknown
from nnsight.core.measuring import measure
from nnsight.core.specs import Inputs, TensorSpec, describe_inputs, specs_in
from nnsight.core.state import Visit
from nnsight.core.switch import Link
from nnsight.core.tree import Attached, Tree
from nnsight.core.values import tensors_in


class Source(NamedTuple):
    """What a tensor is: a part of a module's input or output; in a call that an edit made, if one is named."""

    call: SplicedCall | None
    module: nn.Module
    kind: str
    path: Path


class SplicedCall(NamedTuple):
    """A call of a module that an edit makes. Holds no tensors.

    Attributes:
        called: What its inputs look like.
        sources: What the tensors among them are, where that is known.
    """

    module: nn.Module
    called: Inputs
    sources: dict[Path, Source]

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """While the model's side makes it."""
        stack = _going_on.setdefault(getcurrent(), [])
        stack.append(self)
        try:
            yield
        finally:
            stack.pop()


_going_on: weakref.WeakKeyDictionary[greenlet, list[SplicedCall]] = weakref.WeakKeyDictionary()


def call_around(link: Link) -> SplicedCall | None:
    """The innermost call of an edit's that goes on where a run's model stands."""
    model = link.model()
    calls = None if model is None else _going_on.get(model)
    return calls[-1] if calls else None


class Had:
    """What an edit has had of the model so far, in one call of its module."""

    __slots__ = ("_calls", "_sources")

    def __init__(self) -> None:
        self._calls: list[SplicedCall] = []
        self._sources: dict[int, tuple[weakref.ref[torch.Tensor], Source]] = {}

    def note(self, call: SplicedCall | None, module: nn.Module, kind: str, value: Any) -> None:
        """`call`: the one in which the module had this input, or output."""
        for path, tensor in tensors_in(value):
            self._sources[id(tensor)] = weakref.ref(tensor), Source(call, module, kind, path)

    def note_visit(self, call: SplicedCall | None, module: nn.Module, visit: Visit) -> None:
        """Notes all that stands where the edit does, as it has left it."""
        self.note(call, module, "input", (visit.args, visit.kwargs))
        if visit.port is not None and visit.port.kind == "output":
            self.note(call, module, "output", visit.output)

    def note_recorded(self, module: nn.Module, kind: str, value: Any) -> None:
        """Notes what the edit had of a call that it has made."""
        call = next((call for call in reversed(self._calls) if module in set(call.module.modules())), None)
        if call is not None:
            self.note(call, module, kind, value)

    def passed_on(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SplicedCall:
        """The call of `module` on these inputs."""
        sources: dict[Path, Source] = {}
        for path, tensor in tensors_in((args, kwargs)):
            reference, source = self._sources.get(id(tensor), (None, None))
            if source is not None and reference is not None and reference() is tensor:
                sources[path] = source
        call = SplicedCall(module, describe_inputs(args, kwargs), sources)
        self._calls.append(call)
        return call


class AxesOfCall:
    """The axes of the values in a call that an edit makes.

    Args:
        tree: Where its module stands.
        outside: The axes of the model's own values.
        inside: Something inside a module; what is beside it is measured too.
    """

    def __init__(self, tree: Tree, outside: Axial, call: SplicedCall, inside: Attached | None = None) -> None:
        self._tree, self._outside, self._call, self._inside = tree, outside, call, inside
        self._measured: Axial | Unknown | None = None

    def of(self, module: nn.Module, kind: str, path: Path, tensor: torch.Tensor | TensorSpec, step: int) -> Any:
        """As `Axial.of`."""
        if self._measured is None:
            self._measured = self._measure(step)
        return (
            self._measured
            if isinstance(self._measured, Unknown)
            else self._measured.of(module, kind, path, tensor, step)
        )

    def _measure(self, step: int) -> Axial | Unknown:
        guess: dict[Path, Axes] = {}
        for path, spec in specs_in(self._call.called):
            axes = self._given(path, spec, step)
            if isinstance(axes, Unknown):
                return axes
            guess[path] = axes
        module, called = self._call.module, self._call.called
        return Axial(partial(measure, self._tree, module, None, called, [guess], self._inside))

    def _given(self, path: Path, spec: TensorSpec, step: int) -> Axes | Unknown:
        label, source = self._tree.label(self._call.module), self._call.sources.get(path)
        if source is None:
            return Unknown(
                f"an edit called `{label}` on a tensor that it computed; rows are known in what it had of the model "
                "and passed on as it was, and in what the module computes of that"
            )
        of = self._outside if source.call is None else AxesOfCall(self._tree, self._outside, source.call)
        axes: Axes | Unknown = of.of(source.module, source.kind, source.path, spec, step)
        if isinstance(axes, tuple) and any("*" in axis for axis in axes):
            return Unknown(f"an edit called `{label}` on a tensor whose rows and tokens are flattened into one axis")
        return axes
