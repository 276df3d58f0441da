"""What both ways to come into an attention module have in common: sites at which a run waits, and who asks for them.

A site is a function that the module computes on its way: the softmax, say, whose input is the scores, and whose output
the pattern. All arrays are in the user's layout while a run stands at a site, so that rows, gradients and shapes in
errors need no second one; the model's own layout is a view of that.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nnsight.core.hooks import listens
from nnsight.core.operations import after, before
from nnsight.core.ports import Port
from nnsight.core.run import Run
from nnsight.core.state import RunState
from nnsight.core.tree import Attached, Place
from nnsight.errors import BlockError, NotOnThisLayerError

NAMES = ("q", "k", "v", "scores", "pattern", "z")
SiteName = Literal["attention", "scoring", "softmax", "mixing", "routing"]
Ports = dict[str, tuple[SiteName, str, int]]  # for each name a site, "input" or "output", and which of the inputs
SOFTMAXES: set[Any] = {functional.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}

Note = Callable[[Place, str, Any], None]
Self = TypeVar("Self", bound="Interior")


class Site(Attached):
    """Attention inside one module, or a part of it."""

    interior: Interior
    name: SiteName

    def __init__(self, interior: Interior, name: SiteName) -> None:
        super().__init__()
        vars(self).update(interior=interior, name=name, place=(interior.owner, name), _asked=None)

    def asked(self, name: str) -> None:
        """Which of the values here is asked for, for errors."""
        vars(self)["_asked"] = name

    def name_of(self, kind: str) -> str:
        here = [name for name, port in self.interior.ports.items() if port[:2] == (self.name, kind)]
        if not here:
            return kind  # noted by its name
        return vars(self)["_asked"] if vars(self)["_asked"] in here else here[0]

    def visit(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = self.forward
        args, kwargs = before(self, args, kwargs)
        return after(self, args, kwargs, forward(function, *args, **kwargs))

    def forward(self, function: Any, /, *args: Any) -> Any:
        return function(*args)

    @property
    def is_awaited(self) -> bool:
        """Whether a run whose model this is waits here, in this very call."""
        hooks = [*self._forward_pre_hooks.values(), *self._forward_hooks.values()]
        return any(isinstance(hook, Port) and not hook.passes and listens(hook.state) for hook in hooks)

    @property
    def measured_with(self) -> str:
        return self.name  # alone: to measure the softmax, the copy has to attend eagerly

    def looking(self, owner: nn.Module, part: nn.Module, note: Note) -> AbstractContextManager[Any]:
        return self.interior.looking(owner, part, self.name, note)

    @property
    def was_entered(self) -> bool:
        return self.interior.was_entered

    @property
    def has_run(self) -> bool:
        interior = self.interior
        if self.name in interior.ran or self.name != "softmax":
            return self.name in interior.ran
        return interior.ports["z"][0] in interior.ran and "eager" not in interior.ran  # with no softmax to be met

    @property
    def is_met_midway(self) -> bool:
        return self.interior.is_met_midway

    def its_line(self) -> dict[str, str]:
        return {}

    def never_came(self, name: str, facts: dict[str, str]) -> BlockError:
        return self.interior.never_came(self.name, name, facts)


class Interior(ABC):
    """The inside of one module's attention, shared by the runs that ask for it.

    Args:
        owner: The module.
    """

    lock: ClassVar[threading.RLock] = threading.RLock()  # the collector, which ends runs, may come while it is held
    ports: ClassVar[Ports]
    asked: ClassVar[dict[nn.Module, Interior]] = {}  # of the modules that some run asks for
    is_met_midway: ClassVar[bool] = False  # also in a call that has begun

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.ran: set[str] = set()
        self.was_entered = False
        self.unheeded: tuple[str, dict[str, Any]] | None = None  # what the implementation of this name disregards
        self._states: list[RunState] = []
        self._sites: dict[SiteName, Site] = {}
        self._noting: tuple[SiteName, Place, Note] | None = None  # of a copy on which axes are measured

    @classmethod
    def of(cls: type[Self], module: nn.Module) -> Self:
        """The interior that is in use, or else a new one."""
        found = cls.asked.get(module)
        return found if type(found) is cls else cls(module)

    def site(self, name: SiteName) -> Site:
        site = self._sites.get(name)
        if site is None:
            site = Site(self, name)
            if self._states:
                self._sites[name] = site
        return site

    def enter(self, run: Run) -> None:
        """Has attention in this module met in the calls of this run, until that ends."""
        state = run.state
        for known in self._states:
            if known is state:
                return
        with self.lock:
            run.until_end(partial(self._leave, state))
            self.asked[self.owner] = self
            self._states.append(state)
            self._begin(run)

    def _leave(self, state: RunState) -> None:
        with self.lock:
            if not any(known is state for known in self._states):
                return
            self._states = [known for known in self._states if known is not state]
            self._end(state)
            if not self._states:
                self.asked.pop(self.owner, None)
                self._sites = {}  # which hold this

    @abstractmethod
    def _begin(self, run: Run) -> None:
        """Puts in place what meets attention in this run; the lock is held."""

    @abstractmethod
    def _end(self, state: RunState) -> None:
        """Takes it away."""

    @property
    def is_heard(self) -> bool:
        return self._noting is not None or any(map(listens, self._states))

    def copied(self, part: nn.Module) -> Interior:
        """The same of a copy of the owner."""
        return type(self)(part)

    @contextmanager
    def looking(self, owner: nn.Module, part: nn.Module, name: SiteName, note: Note) -> Iterator[None]:
        """Has the values at a site noted, in calls of `part`, a copy of a module like the owner."""
        copy = self.copied(part)
        copy._noting = name, (owner, name), note
        with copy._present():
            yield

    @abstractmethod
    def _present(self) -> AbstractContextManager[Any]:
        """Meets attention in all calls of a copy."""

    def wants_softmax(self) -> bool:
        """Whether this call has to attend eagerly."""
        if self._noting is not None:
            return self._noting[0] == "softmax"
        site = self._sites.get("softmax")
        return site is not None and site.is_awaited

    def visit(self, name: SiteName, function: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """Passes by a site with what it is a function of."""
        self.ran.add(name)
        if self._noting is not None:
            output = function(*args)
            if self._noting[0] == name:
                _, place, note = self._noting
                note(place, "input", (args, {}))
                note(place, "output", output)
            return output
        return self.site(name).visit(function, args, {})  # also where it is asked for from inside

    @abstractmethod
    def never_came(self, where: SiteName, name: str, facts: dict[str, str]) -> BlockError:
        """The error for a site that a call of the module did not come to."""

    def _lacks(self, name: str, because: str, instead: str, facts: dict[str, str]) -> NotOnThisLayerError:
        what = f"a {type(self.owner).__name__}"
        return NotOnThisLayerError(f"`{name}` is not on this layer, {what}.", **facts, because=because, instead=instead)


class Visits(Protocol):
    """What a site is passed by in: an `Interior`, mostly."""

    def visit(self, name: SiteName, function: Callable[..., Tensor], *args: Tensor) -> Tensor: ...


class MeetSoftmax(TorchFunctionMode):
    """Meets the softmax over keys in one eager attention.

    Columns behind the keys are attention sinks. A run sees the keys alone, and the model keeps the sinks as they are.

    Args:
        interior: What is visited.
        keys: How many keys there are; None: as many as there are columns.
    """

    def __init__(self, interior: Visits, keys: int | None = None) -> None:
        super().__init__()
        self._interior, self._keys, self._met = interior, keys, False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._met or function not in SOFTMAXES:
            return function(*args, **kwargs)
        whole, *rest = args or (kwargs.pop("input"),)
        keys = whole.shape[-1] if self._keys is None else self._keys
        if whole.ndim != 4 or whole.shape[-1] < keys:
            return function(whole, *rest, **kwargs)
        self._met = True
        if whole.shape[-1] == keys:
            return self._interior.visit("softmax", lambda scores: function(scores, *rest, **kwargs), whole)
        return self._beside_sinks(keys, lambda scores: function(scores, *rest, **kwargs), whole)

    def _beside_sinks(self, keys: int, softmax: Callable[[Tensor], Tensor], whole: Tensor) -> Tensor:
        scores, sinks = whole[..., :keys], whole[..., keys:]
        given: list[Tensor] = []  # the pattern with its sinks, and without

        def over_keys(new: Tensor) -> Tensor:
            full = softmax(whole if new is scores else torch.cat([new, sinks], -1))
            given[:] = [full, full[..., :keys]]
            return given[1]

        pattern = self._interior.visit("softmax", over_keys, scores)
        full, shown = given
        return full if pattern is shown else torch.cat([pattern, full[..., keys:]], -1)
