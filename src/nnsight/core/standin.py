"""What stands in for a module's `forward` while a run waits for the module's input, so that it can be skipped there."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from nnsight.core.hooks import Hold, listens
from nnsight.core.tree import Attached

if TYPE_CHECKING:
    from nnsight.core.counter import StepCounter
    from nnsight.core.ports import Calls, Input, Port


class StandIn:
    """Stands in for a module's `forward` while a run waits for its input, and puts back what was there.

    torch fetches `forward` before it calls pre-hooks, so a skip that is decided at the input needs it in place by then.
    """

    __slots__ = ("_armed", "_module", "_ports", "original", "own")
    lock = threading.RLock()  # the collector, which ends runs, may come while it is held
    rewritten: ClassVar[dict[nn.Module, Any]] = {}  # forwards put in place (core/operations.py), also after the fetch

    def __init__(self, module: nn.Module) -> None:
        self.own, self.original = "forward" in module.__dict__, module.forward
        self._armed, self._module = 0, module
        self._ports: list[Input | Calls | StepCounter] = []

    @property
    def __wrapped__(self) -> Any:
        """For `inspect.signature`, by which transformers chooses what to pass."""
        return self.original

    @classmethod
    def over(cls, module: nn.Module, port: Input | Calls | StepCounter | None = None) -> StandIn:
        """The stand-in of this module, put there if it isn't yet: runs that wait for the same module share it."""
        with cls.lock:
            standin = module.__dict__.get("forward")
            if type(standin) is not cls:
                standin = module.__dict__["forward"] = cls(module)
            standin._armed += 1
            if port is not None:
                standin._ports.append(port)
            return standin

    @classmethod
    def known_to(cls, module: nn.Module, port: Input | Calls | StepCounter) -> StandIn | None:
        """The one that is there for this port."""
        standin = module.__dict__.get("forward")
        return standin if type(standin) is cls and port in standin._ports else None

    def leave(self, module: nn.Module, port: Calls | StepCounter | None = None) -> None:
        with self.lock:  # in an order that a Ctrl-C can cut anywhere: it is done again then
            if self._armed <= 1 and module.__dict__.get("forward") is self:
                if self.own:
                    module.__dict__["forward"] = self.original
                else:
                    del module.__dict__["forward"]
            if port is not None and port in self._ports:
                self._ports.remove(port)
            self._armed -= 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._ports:
            return self.rewritten.get(self._module, self.original)(*args, **kwargs)
        fired = [port for port in tuple(self._ports) if port.skipped is not None and listens(port.state)]
        skipping = [port for port in fired if port.skipped]
        for port in fired:
            if port.fires_once:
                self._ports.remove(port)
            else:  # it hears the next call too, and decides nothing where `forward` is called by itself
                port.skipped = None
        if skipping:
            self._tell_who_waits_inside()
            value = max(skipping, key=_rank).skip_value  # a block has the last word over an edit
            for port in skipping:
                port.skip_value = None
            return value
        return self.rewritten.get(self._module, self.original)(*args, **kwargs)

    def _tell_who_waits_inside(self) -> None:
        """Others may wait for what a skipped module would have called: their errors say why it never came."""
        module = self._module.place[0] if isinstance(self._module, Attached) else self._module
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, Hold) and listens(hook.state):
                hook.skipped.append(self._module)

    def __reduce__(self) -> Any:
        """A module that is copied meanwhile gets what stood there before, bound to the copy."""
        if self.own:
            return itself, (self.original,)
        module: Any = getattr(self.original, "__self__", None)
        return getattr, (module, "forward")


def itself(value: Any) -> Any:
    """What is pickled in the place of a stand-in: a call of this with what stood there before."""
    return value


def forward_is_property(module: nn.Module) -> bool:
    """Whether a module finds its forward in its class, whatever it has itself."""
    return hasattr(getattr(type(module), "forward", None), "__set__")


def _rank(port: Port | StepCounter) -> float:
    return port.state.rank


def is_left_out(port: Port | StepCounter) -> bool:
    """Whether another, an edit, has skipped the module in the call at whose input this port stands."""
    standin = vars(port.module).get("forward")
    if type(standin) is not StandIn:
        return False
    return any(other.skipped and other is not port and listens(other.state) for other in tuple(standin._ports))
