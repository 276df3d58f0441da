"""Operations inside a `forward`, tapped by the same ports as modules are.

A module whose operations a run asks for gets, on the instance and until that run ends, a rewritten `forward`
(core/rewrite.py), which passes each operation to a `Body`. What somebody waits for there has a `Site`: a stand-in for a
module, with hook tables in which a port puts itself, and a `forward` that is the operation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from types import FunctionType
from typing import Any

from torch import nn

from nnsight.core.counter import StepCounter
from nnsight.core.history import user_place
from nnsight.core.hooks import listens
from nnsight.core.ports import NOTHING
from nnsight.core.rewrite import Listing, innermost, listing, rewritten
from nnsight.core.run import Run
from nnsight.core.standin import StandIn, forward_is_property, itself
from nnsight.core.state import RunState
from nnsight.core.tree import Attached, Place
from nnsight.errors import BlockError, NeverCalledError, NoSourceError, StillRunningError


class Site(Attached):
    """One operation of one module's forward."""

    body: Body
    name: str
    inner: Body | None  # where the operations of its callee are asked for
    callee: Any  # what is about to be called, while somebody waits at its input

    def __init__(self, body: Body, name: str) -> None:
        super().__init__()
        vars(self).update(body=body, name=name, place=(body.owner, f"{body.path}.{name}"), inner=None, callee=None)

    def visit(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the operation with the hooks around it, as `Module.__call__` does.

        `forward` is fetched before they run: that is where a port leaves word of a skip.
        """
        forward = self.forward
        vars(self)["callee"] = function
        try:
            args, kwargs = before(self, args, kwargs)
        finally:
            vars(self)["callee"] = None
        return after(self, args, kwargs, forward(function, *args, **kwargs))

    def forward(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if self.inner is not None:
            function = self.inner.around(function)
        return function(*args, **kwargs)

    @property
    def measured_with(self) -> str:
        return self.body.path

    def looking(
        self, owner: nn.Module, part: nn.Module, note: Callable[[Place, str, Any], None]
    ) -> AbstractContextManager[Any]:
        with suppress(NoSourceError):  # of one that has a forward of its own
            put_rewritten(part, _Looks(note, owner, "source", self.body.path))  # of a copy, so for good
        return nullcontext()

    @property
    def was_entered(self) -> bool:
        return self.body.entered

    @property
    def has_run(self) -> bool:
        return self.name in self.body.ran

    def its_line(self) -> dict[str, str]:
        listing = self.body.listing
        line = listing.operations[self.name].line
        return {"its_line": f"{line}: {listing.lines[line - listing.first].strip()}"}

    def never_came(self, name: str, facts: dict[str, str]) -> BlockError:
        return NeverCalledError(
            f"`{name}` has no value: the function was called, but never came to that line.", **facts
        )


def before(site: Attached, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Calls the hooks that wait in front of a site; returns what it is to be called with."""
    for hook in list(site._forward_pre_hooks.values()):
        changed: Any = hook(site, args, kwargs)
        args, kwargs = (args, kwargs) if changed is None else changed
    return args, kwargs


def after(site: Attached, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Calls the hooks that wait behind a site; returns what the model goes on with."""
    for hook in list(site._forward_hooks.values()):
        changed: Any = hook(site, args, kwargs, output)
        output = output if changed is None else None if changed is NOTHING else changed
    return output


class Body:
    """What a rewritten function hands its operations to.

    Args:
        owner: The module in whose forward this is.
        path: Where the function stands below it: "source", or "source.attention_interface_1.source".
        function: The function as it was.
    """

    def __init__(self, owner: nn.Module, path: str, function: FunctionType) -> None:
        self.owner, self.path = owner, path
        self.listing: Listing = listing(function)
        self.entered = False
        self.ran: set[str] = set()
        self.is_open = False
        self._sites: dict[str, Site] = {}

    def site(self, name: str) -> Site:
        """What a run waits for to have this operation."""
        if name in self._sites:
            return self._sites[name]
        site = Site(self, name)
        if self.is_open:
            self._sites[name] = site
        return site

    def close(self) -> None:
        """Nobody waits here any more. Gives up the sites, which hold this body."""
        self.is_open = False
        sites, self._sites = self._sites, {}
        for site in sites.values():
            if site.inner is not None:
                site.inner.close()

    def around(self, function: Any) -> Any:
        """The function with its operations handed to this body; as it is, where it can't be rewritten."""
        self.entered = True
        try:
            return rewritten(function, self)
        except NoSourceError:
            return function

    def call(self, name: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Called by the rewritten function in place of `function(*args, **kwargs)`."""
        self.ran.add(name)
        site = self._sites.get(name)
        return function(*args, **kwargs) if site is None else site.visit(function, args, kwargs)

    def assign(self, name: str, value: Any, /) -> Any:
        """Called by the rewritten function with what it is about to assign."""
        self.ran.add(name)
        site = self._sites.get(name)
        return value if site is None else site.visit(itself, (value,), {})


class Rewritten:
    """Stands in for a module's `forward` while a run asks for operations in it, and puts back what was there.

    Runs that ask for the same module share it. A call that none of them listens to runs the forward as it was.
    """

    def __init__(self, module: nn.Module) -> None:
        self._slot = _slot(module)
        self._original = original(module)
        self._own = True
        self._states: list[RunState] = []
        self.body = Body(module, "source", innermost(self._original))
        self._forward = rewritten(self._original, self.body)
        self.__wrapped__ = self._original  # for `inspect.signature`, by which transformers chooses what to pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(listens(state) for state in self._states):
            self.body.entered = True
            return self._forward(*args, **kwargs)
        return self._original(*args, **kwargs)

    def enter(self, run: Run) -> None:
        """Has the module's calls in this run go through the rewritten forward, until the run ends."""
        with StandIn.lock:
            if run.state in self._states:
                return
            run.until_end(partial(self._leave, run.state))
            self._check_not_running(run)
            if not self._states:
                self._put()
                self.body.is_open = True
            self._states.append(run.state)

    def _put(self) -> None:
        module, slot = self.body.owner, self._slot
        there = vars(module).get(slot)
        if isinstance(there, StandIn):  # another run waits for the module's input just now
            self._own, there.own, there.original = there.own, True, self
        else:
            self._own = slot in vars(module)
            vars(module)[slot] = self
        _in_place[module] = self
        if slot == "forward":
            StandIn.rewritten[module] = self

    def _leave(self, state: RunState) -> None:
        with StandIn.lock:
            if self._states == [state]:
                self._put_back()
            if state in self._states:
                self._states.remove(state)

    def _put_back(self) -> None:
        self.body.close()
        module, there = self.body.owner, vars(self.body.owner).get(self._slot)
        _in_place.pop(module, None)
        StandIn.rewritten.pop(module, None)
        if isinstance(there, StandIn) and there.original is self:
            there.own, there.original = self._own, self._original
        elif there is self and self._own:
            vars(module)[self._slot] = self._original
        elif there is self:
            del vars(module)[self._slot]

    def _check_not_running(self, run: Run) -> None:
        """Raises where the run stands inside a call of this forward that began before it was rewritten."""
        module, visit = self.body.owner, run.state.visit
        port = visit.port if visit is not None else None
        if isinstance(port, StepCounter) and module is port.module and not port.stands_in:
            raise self._is_running(run, "ask for one of its operations in step 0, or in the step before this one")
        code = innermost(self._original).__code__
        first = code.co_varnames[0] if code.co_varnames else ""
        for frame in run.frames():
            receiver = frame.f_locals.get(first) if frame.f_code is code else None
            if receiver is module or (type(receiver) is tuple and receiver and receiver[0] is module):
                label = run.tree.label(module)
                raise self._is_running(run, f"ask for an operation of it before anything inside `{label}`")

    def _is_running(self, run: Run, instead: str) -> StillRunningError:
        label = run.tree.label(self.body.owner)
        return StillRunningError(
            f"`{label}.source` can't be had in this call: it began before any of its operations was asked for.",
            you_wrote=user_place().source,
            instead=instead,
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_original" not in vars(self):
            raise AttributeError(name)
        return getattr(self._original, name)

    def __reduce__(self) -> Any:
        """A module that is copied meanwhile gets what stood there before, bound to the copy."""
        if self._own:
            return itself, (self._original,)
        return getattr, (self.body.owner, self._slot)


_in_place: dict[nn.Module, Rewritten] = {}


def _slot(module: nn.Module) -> str:
    """The attribute that holds the module's own forward: accelerate's `forward` calls this one."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def original(module: nn.Module) -> Callable[..., Any]:
    """The module's own forward, also while something of ours stands in for it."""
    forward: Any = getattr(module, _slot(module))
    if isinstance(forward, StandIn):
        forward = forward.original
    if isinstance(forward, Rewritten):
        forward = forward._original
    return forward


def put_rewritten(module: nn.Module, ours: Any) -> None:
    """Has the forward of a module of ours, a twin's, pass its operations to `ours`, for good."""
    vars(module)[_slot(module)] = rewritten(original(module), ours)


class _Looks:
    """What a rewritten function of a twin hands its operations to: notes their values.

    Args:
        path: Where the function stands below `owner`.
        wanted: Where the one stands whose operations are to be noted; it is reached through those before.
    """

    def __init__(self, note: Callable[[Place, str, Any], None], owner: nn.Module, path: str, wanted: str) -> None:
        self._note, self._owner, self._path, self._wanted = note, owner, path, wanted

    def call(self, name: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        inner = f"{self._path}.{name}.source"
        if self._wanted == inner or self._wanted.startswith(inner + "."):
            with suppress(NoSourceError):
                function = rewritten(function, _Looks(self._note, self._owner, inner, self._wanted))
        return self._noted(name, (args, kwargs), function(*args, **kwargs))

    def assign(self, name: str, value: Any, /) -> Any:
        return self._noted(name, ((value,), {}), value)

    def _noted(self, name: str, inputs: Any, output: Any) -> Any:
        if self._path == self._wanted:
            place = self._owner, f"{self._path}.{name}"
            self._note(place, "input", inputs)
            self._note(place, "output", output)
        return output


def function_of(module: nn.Module, label: str) -> FunctionType:
    """The Python function that a module's forward comes down to.

    Raises:
        NoSourceError: The module has no forward of its own.
    """
    if "_orig_mod" in module._modules:
        raise NoSourceError(
            f"`{label}` is what torch.compile made of a module; the operations are in that one's forward.",
            you_wrote=user_place().source,
            instead="._orig_mod.source",
        )
    if forward_is_property(module):
        raise NoSourceError(
            f"The forward of `{label}` is a property, and nothing can stand in for it to see its operations.",
            you_wrote=user_place().source,
        )
    function = innermost(original(module))
    if function.__code__ is nn.Module.forward.__code__:
        raise NoSourceError(
            f"`{label}`, a {type(module).__name__}, has no forward: it only holds its children.",
            you_wrote=user_place().source,
            instead=f"a child's: model.{label}[0].source",
        )
    return function


def body_in(run: Run, module: nn.Module) -> Body:
    """The operations of a module's forward in this run, which from here on goes through them."""
    function_of(module, run.tree.label(module))
    with StandIn.lock:  # else two threads would each put one there
        found = _in_place.get(module) or Rewritten(module)
        if not run.state.ended:
            found.enter(run)
    return found.body
