"""Attention modules that call transformers' attention interface, met in that call.

Such a module's forward asks `ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)` for a function of q, k, v,
and calls that. While a run asks for the interior of some module, `get_interface` is a `Chooser` on that one object: to
who asks on the model's side of such a run it gives the function that it gave before, wrapped; to all others that
function itself. So other threads, other runs and other models have what they had, and no entry of the registry and no
config is ever changed:

- `config._attn_implementation` is shared by all layers of a model, and models branch on it (masks are made as it
  says, GPT-2 upcasts, Gemma 4 chooses by it): to exchange it changes more than the call that is meant.
- An entry of the registry is shared by all models of the process, and there is none for "eager", whose function is in
  the file of each model: `get_interface` is given it, and a registered function is not.

`scores` and `pattern` exist in the model's own eager function alone. The one call that is asked for them runs it, with
the mask that the implementation has been given put in eager's form, and less what that takes no notice of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from nnsight.anatomy.interior import Interior, MeetSoftmax, Ports, SiteName
from nnsight.anatomy.unheeded import unheeded, without
from nnsight.core.hooks import listens
from nnsight.core.run import Run
from nnsight.core.state import RunState
from nnsight.errors import BlockError, NotOnThisLayerError

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_GETTER = "get_interface"


class _Call(NamedTuple):
    """What an interface is called with beside q, k and v.

    `chosen` is the function that the model would have called, by the name of its `implementation`, and `eager` its own.
    """

    chosen: Callable[..., Any]
    eager: Callable[..., Any]
    implementation: str
    mask: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Same(NamedTuple):
    """What attention went on with in place of these q and k: other values may be attended to with the same ones.

    So it is in DiffLlama, whose values are attended to in two halves. It lasts as long as the query, which is to the
    end of the module's call: the patterns of all layers would not fit into memory. So it must not hold that query.
    """

    query: ref[Tensor]
    key: ref[Tensor]
    used: tuple[Tensor, Tensor] | None  # None: these themselves
    pattern: Tensor | None

    def is_of(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        return self.query() is query and self.key() is key


class Interfaced(Interior):
    """The inside of a module that calls the attention interface: attention is one function of q, k and v."""

    ports: ClassVar[Ports] = {
        "q": ("attention", "input", 0),
        "k": ("attention", "input", 1),
        "v": ("attention", "input", 2),
        "scores": ("softmax", "input", 0),
        "pattern": ("softmax", "output", 0),
        "z": ("attention", "output", 0),
    }
    is_met_midway: ClassVar[bool] = True

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(owner)
        self._same: _Same | None = None
        self._attending: list[tuple[ref[greenlet], tuple[Tensor, ...]]] = []  # eagerly, now, each with q, k and v

    def arrays(self, model: greenlet | None) -> tuple[Tensor, ...] | None:
        """The q, k and v of the call in which a model attends eagerly, in the user's layout."""
        return next((arrays for one, arrays in reversed(self._attending) if one() is model), None)

    def _begin(self, run: Run) -> None:
        Chooser.over(interface_of(type(self.owner))).listen(run.state)

    def _end(self, state: RunState) -> None:
        Chooser.over(interface_of(type(self.owner))).ignore(state)

    @contextmanager
    def _present(self) -> Iterator[None]:
        chooser = Chooser.over(interface_of(type(self.owner)))
        with self.lock:
            self.asked[self.owner] = self
            chooser.listen(None)
        try:
            yield
        finally:
            with self.lock:
                del self.asked[self.owner]
                chooser.ignore(None)

    def attend(self, call: _Call, *arrays: Tensor) -> Any:
        """One call of the interface, with q, k and v in its layout."""
        self.was_entered = True
        same = self._same if self._same is not None and self._same.is_of(*arrays) else None
        query, key, value = arrays if same is None or same.used is None else (*same.used, arrays[2])
        given = [array.transpose(1, 2) for array in (query, key, value)]
        softmax = _Softmax(self, None if same is None else same.pattern)
        rest: list[Any] = []
        changed: list[Tensor] = []

        def attention(*arrays: Tensor) -> Tensor:
            query, key, value = (array.transpose(1, 2) for array in arrays)
            changed[:] = [] if arrays[0] is given[0] and arrays[1] is given[1] else [query, key]
            if softmax.pattern is not None or self.wants_softmax():
                here = ref(getcurrent()), arrays
                self._attending.append(here)
                try:
                    z, *rest[:] = self._eagerly(call, softmax, query, key, value)
                finally:
                    self._attending = [one for one in self._attending if one is not here]
            else:
                z, *rest[:] = call.chosen(self.owner, query, key, value, call.mask, *call.args, **call.kwargs)
            return z

        z = self.visit("attention", attention, *given)
        if same is None and (changed or softmax.pattern is not None):
            used = (changed[0], changed[1]) if changed else None
            self._same = _Same(ref(query, partial(_forget, ref(self))), ref(key), used, softmax.pattern)
        return (z, *rest)

    def _eagerly(self, call: _Call, softmax: _Softmax, query: Tensor, key: Tensor, value: Tensor) -> Any:
        chosen, eager, implementation, mask, args, kwargs = call
        if chosen is not eager:
            given, arrays = mask, (self.owner, query, key, value)
            mask = eager_mask(mask, query, key, _is_causal(self.owner, kwargs), implementation, kwargs)
            if mask is None and query.shape[2] == 1:  # ModernBERT's decoder adds one unasked; sdpa has none in a step
                mask = query.new_zeros(1, 1, 1, key.shape[2])
            if names := unheeded(chosen, eager, kwargs):
                kwargs = self._without(
                    names, call, partial(chosen, *arrays, given, *args), partial(eager, *arrays, mask, *args)
                )
        self.ran.add("eager")
        with MeetSoftmax(softmax, key.shape[2]):
            z, *rest = eager(self.owner, query, key, value, mask, *args, **kwargs)
        return (z, *rest) if chosen is eager else (z, *[None] * len(rest))  # weights that it would not have had

    def _without(self, names: list[str], call: _Call, chosen: Any, eager: Any) -> dict[str, Any]:
        """What eager attention is given by name: less what the chosen implementation takes no notice of."""
        kwargs = without(names, call.kwargs, lambda given: chosen(**given), lambda given: eager(**given))
        dropped = {name: value for name, value in call.kwargs.items() if name not in kwargs}
        self.unheeded = (call.implementation, dropped) if dropped else None
        return {**kwargs}

    def never_came(self, where: SiteName, name: str, facts: dict[str, str]) -> BlockError:
        return self._lacks(name, "its eager attention computes no softmax over keys", ".q, .k, .v and .z", facts)


def _forget(of: ref[Interfaced], gone: ref[Tensor]) -> None:
    interior = of()
    if interior is not None and interior._same is not None and interior._same.query is gone:
        interior._same = None


class _Softmax:
    """The softmax of one call, as a run leaves it, or as one left it for the same q and k."""

    def __init__(self, interior: Interior, pattern: Tensor | None) -> None:
        self._interior, self.pattern = interior, pattern

    def visit(self, name: SiteName, function: Callable[..., Tensor], *args: Tensor) -> Tensor:
        if self.pattern is not None:
            function(*args)
        else:
            self.pattern = self._interior.visit(name, function, *args)
        return self.pattern


class Chooser:
    """Stands in for an interface's `get_interface` while runs listen, and puts back what was there."""

    _of: ClassVar[dict[int, Chooser]] = {}

    def __init__(self, interface: Any) -> None:
        self._interface = interface
        self._own = _GETTER in vars(interface)
        self._original = getattr(interface, _GETTER)
        self._states: list[RunState | None] = []  # one for each module that a run asks for; None: of measuring

    @classmethod
    def over(cls, interface: Any) -> Chooser:
        return cls._of.get(id(interface)) or cls(interface)

    def __call__(self, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        chosen: Callable[..., Any] = self._original(attn_implementation, default)
        for state in self._states:
            if state is None or listens(state):
                return partial(_attend, chosen, default, attn_implementation)
        return chosen

    def listen(self, state: RunState | None) -> None:
        if not self._states:
            self._of[id(self._interface)] = self
            vars(self._interface)[_GETTER] = self
        self._states.append(state)

    def ignore(self, state: RunState | None) -> None:
        at = next(at for at, known in enumerate(self._states) if known is state)
        self._states = self._states[:at] + self._states[at + 1 :]  # another thread may be looking
        if self._states:
            return
        del self._of[id(self._interface)]
        if vars(self._interface).get(_GETTER) is not self:  # somebody else's is over ours, and calls it
            return
        if self._own:
            vars(self._interface)[_GETTER] = self._original
        else:
            del vars(self._interface)[_GETTER]


def _attend(
    chosen: Callable[..., Any],
    eager: Callable[..., Any],
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    interior = Interior.asked.get(module)
    if interior is None or not isinstance(interior, Interfaced) or not interior.is_heard:
        return chosen(module, query, key, value, attention_mask, *args, **kwargs)
    call = _Call(chosen, eager, implementation, attention_mask, args, kwargs)
    return interior.attend(call, query, key, value)


def interface_of(kind: type[nn.Module]) -> Any:
    """The attention interface that modules of a class call: one of its functions names it. None, if none does."""
    found = _interfaces.get(kind, _interfaces)
    if found is _interfaces:  # itself: nobody has looked
        found = _interfaces[kind] = _find_interface(kind)
    return found


_interfaces: WeakKeyDictionary[type[nn.Module], Any] = WeakKeyDictionary()


def _find_interface(kind: type[nn.Module]) -> Any:
    for one in kind.__mro__:
        if one is nn.Module:
            return None
        for function in vars(one).values():
            function = getattr(function, "__wrapped__", function)
            if isinstance(function, FunctionType) and {_INTERFACE, _GETTER} <= {*function.__code__.co_names}:
                return function.__globals__[_INTERFACE]
    return None


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """As transformers' implementations find it out."""
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def eager_mask(
    mask: Any, query: Tensor, key: Tensor, is_causal: bool, implementation: str, kwargs: dict[str, Any]
) -> Tensor | None:
    """The mask that eager attention adds, from the one that another implementation was given.

    Args:
        mask: Of sdpa, and of whatever has masks like it: none, where all keys that causality allows are seen, bool
            [batch, 1, query, key], or one to add. Of flash: none, or which keys are no padding, [batch, key]. Of flex:
            blocks, or one to add.
        query: [batch, head, query, d_head].
        key: [batch, kv_head, key, d_head].
        is_causal: Whether a query sees only what stands before it.
        implementation: The name of the implementation.
        kwargs: What else it is given.

    Raises:
        NotOnThisLayerError: The mask has a form that can't be told.
    """
    is_flash = "flash" in implementation
    if hasattr(mask, "mask_mod"):
        mask = _from_blocks(mask, query, key)
    if not (mask is None or (isinstance(mask, Tensor) and mask.ndim == (2 if is_flash else 4))):
        raise NotOnThisLayerError(
            f"Scores and pattern can't be had from the attention implementation {implementation!r}: what is masked "
            f"there is given as a {type(mask).__name__}.",
            instead='LanguageModel(..., attn_implementation="sdpa"), or "eager"',
        )
    n_queries, n_keys = query.shape[2], key.shape[2]
    if is_flash:
        mask = _from_flash(mask, n_queries, n_keys, query.device, kwargs.get("sliding_window") if is_causal else None)
    if mask is None or is_flash:
        causal = _causal(n_queries, n_keys, n_keys - n_queries if is_flash else 0, query.device)
        if is_causal and n_queries > 1:
            mask = causal if mask is None else mask & causal
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, torch.zeros((), dtype=query.dtype, device=query.device), torch.finfo(query.dtype).min)


def _causal(n_queries: int, n_keys: int, offset: int, device: torch.device) -> Tensor:
    """Which keys a query may see, [1, 1, query, key]; query 0 stands at key `offset`."""
    queries, keys = torch.arange(n_queries, device=device), torch.arange(n_keys, device=device)
    return (keys[None, :] <= queries[:, None] + offset)[None, None]


def _from_blocks(mask: Any, query: Tensor, key: Tensor) -> Tensor:
    """Which keys are seen, [batch, 1, query, key], of a `BlockMask`: what it was made of says so of each."""
    from torch.nn.attention.flex_attention import create_mask  # which takes long to import

    seen: Tensor = create_mask(mask.mask_mod, query.shape[0], 1, query.shape[2], key.shape[2], device=str(query.device))
    return seen


def _from_flash(mask: Tensor | None, n_queries: int, n_keys: int, device: torch.device, window: int | None) -> Any:
    """Which keys are seen but for causality, [batch or 1, 1, query or 1, key]; None: all."""
    seen = None if mask is None else mask[:, None, None, -n_keys:].bool()
    if window is None:
        return seen
    recent = ~_causal(n_queries, n_keys, n_keys - n_queries - window, device)
    return recent if seen is None else seen & recent
