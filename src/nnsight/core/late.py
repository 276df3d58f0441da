"""Ports that are armed while torch is already calling the hooks of their place.

An edit goes on in the middle of a module's hooks. Where it calls another module there, with `hook=True`, a block that
waits for something inside that one goes on from there, perhaps to wait for the very place that torch is at. torch calls
the hooks that stood there when it called the first, and would pass the new port by.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nnsight.core.hooks import listens, put_hook, take_hook
from nnsight.core.ports import NOTHING, Calls, Port


class Tail:
    """Stands behind a port of an edit, and passes the value on to what was armed there since the port fired.

    Of several at one place, the first does it for all.

    Args:
        port: Of an edit.
        stays: Whether it does so in each call, until it is disarmed.
    """

    __slots__ = ("_is_output", "_known", "_port", "_stays", "_tables")

    def __init__(self, port: Port, *, stays: bool = False) -> None:
        self._port, self._stays = port, stays
        self._is_output = port.kind == "output"
        self._tables = port.tables
        self._known: tuple[Any, ...] | None = None  # what stood there when the port fired; None before, and once done

    def arm(self) -> None:
        put_hook(self, *self._tables)

    def disarm(self) -> None:
        take_hook(self, *self._tables)

    def port_fired(self) -> None:
        self._known = tuple(self._tables[0])

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        if self._known is None or not listens(self._port.state):
            return None
        answer: Any = None
        for port in self._late():  # what is armed from here on waits for the next call
            left: Any = port(module, args, *rest) if port in self._tables[0] else None
            if left is None:
                continue
            answer = left
            if self._is_output:
                rest = (rest[0], None if left is NOTHING else left)
            else:
                args, rest = left[0], (left[1],)
        self._be_done()
        return answer

    def _late(self) -> list[Any]:
        known = self._known or ()
        ports = [hook for hook in list(self._tables[0]) if isinstance(hook, Port) and not isinstance(hook, Calls)]
        own = self._port.state  # whose edit stands here: what it waits for now is a later call's
        late = (port for port in ports if port not in known and port.state is not own)
        return sorted(late, key=lambda port: port.state.rank)

    def _be_done(self) -> None:
        for tail in [self, *self._tables[0]]:
            if isinstance(tail, Tail) and tail._known is not None and listens(tail._port.state):
                tail._known = None
                if not tail._stays:
                    tail.disarm()

    def __reduce__(self) -> Any:
        return self._port.__reduce__()  # a module that is copied or pickled meanwhile
