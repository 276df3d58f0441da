"""Scans: a block on fake tensors. Shapes, dtypes and devices are those of a trace; no weight is read or loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from nnsight.block import replay
from nnsight.core.carried import Carried
from nnsight.core.catalogue import ROOT
from nnsight.core.copies import watch
from nnsight.core.fakes import FakeModel
from nnsight.core.run import Run
from nnsight.core.state import Visit
from nnsight.core.tree import Tree


def scan_run(
    envoy: Any,
    fn: str | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device | None,
    prepare: Callable[[nn.Module], None],
) -> ScanRun:
    """A run of a fake copy of an Envoy's module, and of the tree around it, with its edits at work.

    Args:
        device: Where weights that aren't loaded yet would go.
        prepare: Called with the copied root.

    Raises:
        ModelError: The model can't be copied.
    """
    outer = envoy._tree
    fake = FakeModel(outer.root, device)
    prepare(fake.root)
    part, tree = fake.copy_of(envoy._module), Tree(fake.root, outer.aliases)
    call = getattr(part, fn) if fn else part
    if outer.edits:
        call = replay.replayed(envoy, call, fn, _target(fake, outer, tree))
    return ScanRun(fake, outer, tree, part, partial(_under, fake.mode, call), *fake.inputs(args, kwargs))


class _OnFakes(Run):
    """A run of a fake copy of the model, which answers for the modules of the model itself: those the block names."""

    __slots__ = ()  # each final class has its own
    _fake: FakeModel

    def __init__(self, fake: FakeModel, outer: Tree, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._fake, self.outer = fake, outer  # type: ignore[misc]  # the slot is each final class's

    def named(self, module: nn.Module) -> nn.Module:
        return self._fake.original_of(module)

    def _check_written(self, value: Any) -> None:
        """Here, a write is of fake tensors."""

    def own(self, thing: Any) -> Any:
        known = self._fake.copy_of(thing)
        if known is None and isinstance(thing, nn.Module) and thing in self.outer:  # loaded since the scan began
            return self.tree.at(self.outer.path(thing))
        return thing if known is None else known

    def read(self, module: nn.Module, kind: str, at: int | None = None) -> Visit:
        return super().read(self.own(module), kind, at)

    def write_output(self, module: nn.Module, value: Any, widen: Callable[[Visit, Any], Any] | None = None) -> None:
        super().write_output(self.own(module), value, widen)

    def write_inputs(
        self, module: nn.Module, change: Callable[[Visit], tuple[tuple[Any, ...], dict[str, Any]]]
    ) -> None:
        super().write_inputs(self.own(module), change)

    def skip(self, module: nn.Module, value: Any, part: Callable[[Visit], None] | None = None) -> None:
        super().skip(self.own(module), value, part)

    def next(self, module: nn.Module, calls: int = 1) -> None:
        super().next(self.own(module), calls)

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._fake.mode:
            return super().record(self.own(module), args, kwargs)


def _target(fake: FakeModel, outer: Tree, tree: Tree) -> replay.Target:
    return replay.Target(tree, fake.copy_of, partial(ScanCarried, fake, outer))


class ScanRun(_OnFakes):
    """A scan."""

    __slots__ = ("_fake",)

    @property
    def target(self) -> replay.Target:
        return _target(self._fake, self.outer, self.tree)._replace(copy_of=self.own)

    def note_calls(self) -> list[str]:
        """A list that fills with the paths of the modules that are called, at the start of each call."""
        order: list[str] = []
        for path, part in self.tree.root.named_modules():
            whole = f"{ROOT}.{path}" if path else ROOT
            watch(part, partial(_note, order, whole))
        return order


class ScanCarried(_OnFakes, Carried):
    """An edit in a scan."""

    __slots__ = ("_fake",)


def _under(mode: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with mode:
        return call(*args, **kwargs)


def _note(order: list[str], path: str, *_: Any) -> None:
    order.append(path)
