"""Layers that are calls of one module: a model whose names are asked in one call of that module.

    one = in_turn(model, layer.turn)
    one.get("albert.encoder.albert_layer_groups.0.albert_layers.0.attention").output    # of that call

Whatever is asked through it has the run come to that call first, and is looked for in that call alone (core/turns.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nnsight.block.rows import RowRun, whole_of
from nnsight.core.run import Run
from nnsight.core.turns import Turn
from nnsight.scopes import Scope

if TYPE_CHECKING:
    from nnsight.envoy import Envoy
    from nnsight.node import Node


def in_turn(root: Node, turn: Turn) -> InTurn:
    """The root of a model, or of one run or row of it, in one call of a module that is called several times."""
    return InTurn(root, turn)


class InTurn(Scope):
    """A module of a model, in one call of a module."""

    _turn: Turn

    def __init__(self, node: Any, turn: Turn) -> None:
        self._node, self._turn = node, turn
        self._envoy: Envoy = node._envoy if issubclass(type(node), Scope) else node
        self._module = node._module

    def _stands_for(self) -> tuple[Any, ...]:
        return self._node, self._turn

    def _run_or_none(self) -> Any:
        run = self._node._run_or_none()
        return None if run is None else _RunInTurn(run, self._turn)

    def _run(self, what: str = "") -> Any:
        return _RunInTurn(self._node._run(what or self._label), self._turn)

    def _weakly(self) -> Callable[[], InTurn | None]:
        weakly, turn = self._node._weakly(), self._turn

        def again() -> InTurn | None:
            node = weakly()
            return None if node is None else InTurn(node, turn)

        return again

    def _of(self, envoy: Envoy) -> InTurn:
        node = self._node._of(envoy) if issubclass(type(self._node), Scope) else envoy
        return InTurn(node, self._turn)


class _RunInTurn:
    """A run, or a row of it, that is brought into one call of a module before it is asked for something.

    To who looks what it is, it is what it stands for.
    """

    __slots__ = ("_asked", "_turn")

    def __init__(self, run: Run | RowRun, turn: Turn) -> None:
        self._asked, self._turn = run, turn

    def _kind(self) -> type:
        return type(self._asked)

    __class__ = property(_kind)

    def read(self, *args: Any) -> Any:
        return self._in_turn(self._asked.read, *args)

    def write_output(self, *args: Any) -> None:
        self._in_turn(self._asked.write_output, *args)

    def write_inputs(self, *args: Any) -> None:
        self._in_turn(self._asked.write_inputs, *args)

    def skip(self, *args: Any) -> None:
        self._in_turn(self._asked.skip, *args)

    def _in_turn(self, ask: Callable[..., Any], *args: Any) -> Any:
        whole = whole_of(self._asked)
        whole.come_to(self._turn)
        try:
            return ask(*args)
        finally:
            if whole.turns is not None:
                whole.turns.bound = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._asked, name)
