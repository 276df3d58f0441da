"""What values are made of: containers that can be gone through and made anew, plain things, and closed objects."""

from __future__ import annotations

import copy
import dataclasses
import enum
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nnsight.core.hidden import Hidden

_PLAIN = (
    *(int, float, str, bool, bytes, complex, type(None), type(...), range, slice, enum.Enum, torch.Size),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator, torch.nn.Module),
    *(type, types.FunctionType, types.BuiltinFunctionType),
)
_MANY = (list, tuple, set, frozenset, deque)
DEEPEST = 8  # that containers and objects are looked into: one may hold itself


def is_plain(value: Any) -> bool:
    """Whether a value is the same for all rows, and holds no tensors of theirs: a number, a text, a module."""
    return isinstance(value, _PLAIN)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a scan's, without values."""
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    return fakes is not None and isinstance(tensor, fakes.FakeTensor)


def holds_fakes(value: Any, depth: int = 0) -> bool:
    """Whether a scan's tensor is in a value, looking into containers."""
    if "nnsight.core.fakes" not in sys.modules:  # no scan was ever made
        return False
    if isinstance(value, torch.Tensor):
        return is_fake(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return depth < DEEPEST and any(holds_fakes(item, depth + 1) for item in items)


def is_record(value: Any) -> bool:
    """Whether a value is an instance of a dataclass, and no dict as well, as transformers' outputs are."""
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, dict))


def fields_of(record: Any) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if hasattr(record, f.name)}


def with_fields(record: Any, fields: dict[str, Any]) -> Any:
    """A copy of a dataclass with other fields, made without its constructor; it may be frozen."""
    new = copy.copy(record)
    for name, value in fields.items():
        object.__setattr__(new, name, value)
    return new


def mapped(value: Any, change: Callable[[Any, Any], Any]) -> Any:
    """A list, tuple or dict with `change(key, item)` in place of each item; None, for anything else.

    A dict keeps its class, as transformers' outputs are dicts.
    """
    if type(value) in (list, tuple):
        return type(value)([change(index, item) for index, item in enumerate(value)])
    if isinstance(value, dict):
        new = {} if type(value) is dict else _copied(value)
        for key, item in list(value.items()):
            new[key] = change(key, item)
        return new
    return None


def _copied(value: dict[Any, Any]) -> dict[Any, Any]:
    """A shallow copy. That of a dataclass, as transformers' outputs are, has its fields and not its items yet.

    Their own way goes through all fields three times.
    """
    if not (isinstance(value, OrderedDict) and dataclasses.is_dataclass(value)):
        return copy.copy(value)
    new = type(value).__new__(type(value))
    vars(new).update(vars(value))
    return new


def like(container: Any, items: list[Any]) -> Any:
    """A container of the same class and keys with other items; itself, where they are the same."""
    old = list(container.values()) if isinstance(container, dict) else list(container)
    if all(a is b for a, b in zip(old, items, strict=True)):
        return container
    if isinstance(container, dict):
        new = copy.copy(container)
        for key, item in zip(container, items, strict=True):
            new[key] = item
        return new
    make = getattr(type(container), "_make", type(container))
    return make(items)


def _as_it_is(value: Any) -> Any:
    return value


def through(value: Any, change: Callable[[torch.Tensor], Any], closed: Callable[[Any], Any] = _as_it_is) -> Any:
    """`value` with its tensors changed, through tuples, lists and dicts of any class; those are made anew.

    Dataclasses are gone through too. An object of another class (a key-value cache) stays what it is, or becomes what
    `closed` makes of it.
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    if value is None:
        return None
    kind = type(value)  # what is frequent comes first: `is_plain` asks for two dozen classes
    if kind is tuple or kind is list:
        return kind([through(item, change, closed) for item in value])
    if isinstance(value, dict):
        return mapped(value, lambda _, item: through(item, change, closed))
    if is_plain(value) or isinstance(value, Hidden):
        return value
    if isinstance(value, (tuple, list)):
        items = [through(item, change, closed) for item in value]
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    if is_record(value):
        return with_fields(value, {k: through(item, change, closed) for k, item in fields_of(value).items()})
    return closed(value)


def tensors_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    """The tensors in a value, through tuples, lists and dicts and dataclasses, with their paths."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from tensors_in(item, (*path, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_in(item, (*path, key))
    elif is_record(value):
        yield from tensors_in(fields_of(value), path)


def holds_tensors(value: Any, depth: int = 0) -> bool:
    """Whether there is a tensor in a value, looking into the attributes of objects of any class."""
    if isinstance(value, torch.Tensor):
        return True
    if is_plain(value) or depth > DEEPEST:
        return False
    return any(holds_tensors(item, depth + 1) for item in _within(value))


def leaves_of(value: Any, depth: int = 0, known: set[int] | None = None) -> Iterator[Any]:
    """Tensors, plain things and objects that can't be looked into: what a value is made of, in order, keys included.

    A container is there by its length, and once, also where it holds itself.
    """
    known = set() if known is None else known
    if isinstance(value, torch.Tensor) or is_plain(value):
        yield value
    elif id(value) not in known:
        known.add(id(value))
        inside = _within(value)
        if depth > DEEPEST or (not inside and not isinstance(value, (dict, *_MANY))):
            yield value
            return
        yield len(inside)
        for item in inside:
            yield from leaves_of(item, depth + 1, known)


def _within(value: Any) -> list[Any]:
    """What is in a container, with its keys, and in the attributes of any object."""
    items = [*value, *value.values()] if isinstance(value, dict) else [*value] if isinstance(value, _MANY) else []
    own = [getattr(value, name, None) for kind in type(value).__mro__ for name in _slots(kind)]
    return [*items, *getattr(value, "__dict__", {}).values(), *own]


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
