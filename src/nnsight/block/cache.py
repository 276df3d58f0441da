"""Caches: the values of many modules, kept while the model runs and read afterwards by path, attribute and index.

A `Cache` is plain data and strings; no module is in it, so it can be pickled, copied and kept after its model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from nnsight.block.chosen import choose, refuse_turn
from nnsight.core.catalogue import ROOT, Names, locate, nearest_paths
from nnsight.core.history import user_place
from nnsight.core.log import MISSING, CachedVisit, Log
from nnsight.core.recording import Narrow
from nnsight.core.run import Run
from nnsight.core.specs import shape_of, show_shape
from nnsight.core.spelling import nearest
from nnsight.errors import (
    AlreadyPastError,
    BlockError,
    NotCachedError,
    OutsideTraceError,
    UnknownIndexError,
    UnknownNameError,
)

_ROWS = 16  # that a repr shows
_CPU = torch.device("cpu")


def open_cache(run: Run, modules: Any, log: Log, *, inputs: bool, output: bool, part: Narrow | None) -> Cache:
    """What `tracer.cache` does, once it knows how a value is to be kept, and which part of it."""
    if not run.is_open:
        raise OutsideTraceError(
            "`tracer.cache()` was called after the block of its trace.", you_wrote=user_place().source
        )
    if run.state.ended:
        raise AlreadyPastError(
            "There is nothing left to cache: the model has run to its end.",
            you_wrote=user_place().source,
            instead="call `tracer.cache()` before `tracer.result`, best at the start of the block",
        )
    if not inputs and not output:
        raise BlockError(
            "This cache would keep nothing.",
            you_wrote=user_place().source,
            instead="include_inputs=True, or include_output=True",
        )
    _check_device(log.device)
    if log.dtype is not None and not isinstance(log.dtype, torch.dtype):
        raise TypeError(f"dtype takes a torch.dtype such as torch.float16, not {log.dtype!r}")
    catalogue, chosen = choose(run, modules)
    run.listen(chosen, log, inputs=inputs, output=output, part=part)
    kinds = ("inputs",) * inputs + ("output",) * output
    paths = catalogue.known if chosen is catalogue.paths else frozenset(chosen.values())
    return Cache(log, paths, kinds, catalogue.children, run.tree.aliases, catalogue.lists)


def _check_device(device: torch.device | None) -> None:
    """A device that isn't there is an error here, and not in the middle of the model."""
    if device is None or device == _CPU or device.type in ("cpu", "meta"):  # the name of a type takes torch longer
        return
    try:
        module = torch.get_device_module(device)
        count = module.device_count() if module.is_available() else 0
    except (RuntimeError, AttributeError):  # a kind of device without a module of its own
        return
    if (device.index or 0) >= count:
        raise BlockError(
            f"This cache can't keep its values on {device}: there is no such device here.",
            you_wrote=user_place().source,
            instead="device=None, which leaves them where they are, or the default, the CPU",
        )


class Cache(Mapping[str, "CachedModule"]):
    """What `tracer.cache` keeps: a mapping from paths to modules, in the order of their first calls.

    `cache["transformer.h.0"]`, `cache["model.transformer.h.0"]`, `cache.transformer.h[0]` and
    `cache[model.transformer.h[0]]` are the same `CachedModule`. The paths that it lists are whole
    ("model.transformer.h.0"). Everything that a `CachedModule` has, the cache has for the root: `cache.output`.
    """

    def __init__(
        self,
        log: Log,
        chosen: frozenset[str],
        kinds: tuple[str, ...],
        children: Names,
        aliases: Names,
        lists: frozenset[str],
    ) -> None:
        self._log, self._chosen, self._kinds = log, chosen, kinds
        self._children, self._aliases, self._lists = children, aliases, lists

    def __getitem__(self, key: Any) -> CachedModule:
        return CachedModule(self, ROOT)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._log.visits))

    def __len__(self) -> int:
        return len(self._log.visits)

    def __contains__(self, key: object) -> bool:
        return key in CachedModule(self, ROOT)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        return True

    def save(self) -> Cache:
        """Itself; for programs written for the existing package."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_log" not in self.__dict__:
            raise AttributeError(name)
        return getattr(CachedModule(self, ROOT), name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(CachedModule(self, ROOT))})

    def __repr__(self) -> str:
        return _table(self, ROOT)

    def _below(self, path: str) -> Cache:
        """The cache of this module and all below it, for a view of it that is pickled."""
        below, new = set[str](), [path]
        while new:
            below.add(at := new.pop())
            new += self._children.get(at, {}).values()  # of a shared module, its first path
        chosen, log = self._chosen & below, self._log.of(below)
        return Cache(log, chosen, self._kinds, self._children, self._aliases, self._lists)

    def __getstate__(self) -> dict[str, Any]:
        """Of the names in the tree, those that are needed to come to a value."""
        needed = {ROOT}
        for path in [*self._log.visits, *self._chosen]:
            while path not in needed:
                needed.add(path)
                path = path.rpartition(".")[0] or ROOT
        return {
            **self.__dict__,
            "_children": {path: names for path, names in self._children.items() if path in needed},
            "_lists": self._lists & needed,
        }


class CachedModule:
    """One module in a cache: its values, and the way to the modules below it.

    `.output`, `.input` and `.inputs` are those of its first call in the run, however often it was called: what they
    would have been in the block. `.outputs` is the list of all its outputs, and `.visits` of all its calls, with the
    generation step of each.

    `len` is the number of calls; of a `ModuleList`, which is never called, that of its children in the cache.
    """

    __slots__ = ("_cache", "path")

    def __init__(self, cache: Cache, path: str) -> None:
        self._cache, self.path = cache, path

    def __reduce__(self) -> Any:
        return CachedModule, (self._cache._below(self.path), self.path)

    @property
    def visits(self) -> list[Visited]:
        """All calls that were kept, in their order; empty if there was none."""
        self._cache._log.settle()
        return [Visited(self, visit) for visit in self._cache._log.visits.get(self.path, ())]

    @property
    def output(self) -> Any:
        """What the module returned in its first call, as the block left it."""
        return self._first("output").output

    @property
    def outputs(self) -> list[Any]:
        """What the module returned in each of its calls."""
        self._first("output")
        return [visit.output for visit in self.visits if visit._visit._output is not MISSING]

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` of its first call, as the block left them."""
        inputs: tuple[tuple[Any, ...], dict[str, Any]] = self._first("inputs").inputs
        return inputs

    @property
    def input(self) -> Any:
        """The first positional input of its first call, or else the first keyword one."""
        return self._first("inputs").input

    def _first(self, kind: str) -> Visited:
        for visit in self.visits:
            if visit._has(kind):
                return visit
        raise self._missing(kind)

    def _missing(self, kind: str) -> NotCachedError:
        cache, label = self._cache, self.path.removeprefix(f"{ROOT}.")
        facts = {"you_wrote": user_place().source}
        if self.path not in cache._chosen:
            facts["it_has"] = nearest_paths(self.path, cache) or f"{len(cache)} module{'s' * (len(cache) != 1)}"
            return NotCachedError(f"`{label}` is not in this cache: it was not among its modules.", **facts)
        if kind not in cache._kinds:
            facts["instead"] = f"tracer.cache(..., include_{kind}=True)"
            return NotCachedError(f"This cache was not told to keep the {kind} of its modules.", **facts)
        called = "did not call it" if cache._log.ended else "has not called it so far"
        if cache._log.visits.get(self.path):
            why = "ended in an error" if kind == "output" else "had begun before the cache was made"
            return NotCachedError(f"`{label}` has no {kind} in this cache: its call {why}.", **facts)
        if not cache._log.ended:
            facts["instead"] = "this line behind the block, which has all that the model called"
        return NotCachedError(f"`{label}` has no {kind} in this cache: the model {called} since it was made.", **facts)

    # The tree.

    def keys(self) -> list[str]:
        """The whole paths of the cached modules from this one down."""
        return [path for path in self._cache if path == self.path or path.startswith(self.path + ".")]

    def __len__(self) -> int:
        if self.path in self._cache._lists:
            return len(list(iter(self)))
        return len(self._cache._log.visits.get(self.path, ()))

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[CachedModule]:
        below = [CachedModule(self._cache, path) for path in dict.fromkeys(self._names().values())]
        return (child for child in below if child.keys())

    def __contains__(self, key: object) -> bool:
        try:
            return bool(self[key].keys())
        except (KeyError, IndexError):
            return False

    def __getitem__(self, key: Any) -> Any:
        names = list(self._names().values())
        if isinstance(key, slice):
            return [CachedModule(self._cache, path) for path in names[key]]
        if isinstance(key, int):
            if not -len(names) <= key < len(names):
                raise UnknownIndexError(
                    f"`{self.path.removeprefix(ROOT + '.')}` has no child at index {key}.",
                    you_wrote=user_place().source,
                    it_has=f"{len(names)} children",
                    instead=self._in_list(key),
                )
            return CachedModule(self._cache, names[key])
        refuse_turn(key)
        wanted = key if isinstance(key, str) else str(getattr(key, "path", key))
        path = locate(self._cache._children, self._cache._aliases, wanted, self.path)
        found = None if path is None else CachedModule(self._cache, path)
        if found is None:
            near = nearest_paths(wanted, self._cache)
            raise NotCachedError(
                f"`{wanted}` is no module of this model.",
                you_wrote=user_place().source,
                nearest=near,
                instead=None if near else self._by_modules(),
            )
        if not found.keys() and found.path not in self._cache._chosen:
            raise found._missing("output")
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in CachedModule.__slots__:  # while it is unpickled
            raise AttributeError(name)
        names = self._names()
        path = (
            names.get(name)
            or self._cache._aliases.get(self.path, {}).get(name)
            or (names.get(name[2:]) if name.startswith("E_") else None)
        )
        if path is not None:
            return CachedModule(self._cache, path)
        if name == ROOT and self.path in (ROOT, f"{ROOT}.{ROOT}"):
            return self  # the root, whole: `cache.model.transformer`, and `cache.model.model.layers`
        near = nearest(name, [*names, *_VALUES], n=3)
        instead = None
        if name == "layers" and self.path == ROOT:  # a uniform name, which a cache has none of
            instead = "cache[model.layers[3]]"
        elif not near and hasattr(torch.Tensor, name):
            instead = f"{_spelled(self.path)}.output.{name}"
        raise UnknownNameError(
            f"`{self.path}` has no `{name}` in this cache.",
            you_wrote=user_place().source,
            nearest=near,
            instead=instead,
            children=", ".join(list(names)[:12]),
        )

    def _by_modules(self) -> str | None:
        """How a module that is here is asked for, for who came with a name of another library's."""
        first = next(iter(self._cache), None)
        if first is None:
            return None
        return f'cache["{first.removeprefix(ROOT + ".")}"], by the names of the model\'s own, or cache[module]'

    def _in_list(self, index: int) -> str | None:
        """Where this number may have been meant: below, in the one list of modules of which the cache has some."""
        lists = [path for path in self._cache._lists if path.startswith(f"{self.path}.")]
        return f"{_spelled(lists[0])}[{index}]" if len(lists) == 1 else None

    def _names(self) -> dict[str, str]:
        return self._cache._children.get(self.path, {})

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *self._names()})

    def __repr__(self) -> str:
        return _table(self._cache, self.path)


def _spelled(path: str) -> str:
    """What leads there in Python: `cache.transformer.h[3]`."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", path.replace(ROOT, "cache", 1))


_VALUES = ("output", "outputs", "input", "inputs", "visits", "keys", "path")


class Visited:
    """One call of a module in a cache."""

    __slots__ = ("_module", "_visit")

    def __init__(self, module: CachedModule, visit: CachedVisit) -> None:
        self._module, self._visit = module, visit

    @property
    def step(self) -> int:
        """The generation step in which it was called; 0 in a plain trace."""
        return max(self._visit.step, 0)

    @property
    def output(self) -> Any:
        """What the module returned."""
        return self._value("output", self._visit._output)

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What it was called with, as `(args, kwargs)`."""
        inputs: tuple[tuple[Any, ...], dict[str, Any]] = self._value("inputs", self._visit._inputs)
        return inputs

    @property
    def input(self) -> Any:
        """The first positional input, or else the first keyword one."""
        args, kwargs = self.inputs
        if not args and not kwargs:
            raise NotCachedError(
                f"`{self._module.path.removeprefix(ROOT + '.')}` was called without any input.",
                you_wrote=user_place().source,
                instead=".inputs, which is ((), {}) here",
            )
        return args[0] if args else next(iter(kwargs.values()))

    def _has(self, kind: str) -> bool:
        return (self._visit._output if kind == "output" else self._visit._inputs) is not MISSING

    def _value(self, kind: str, value: Any) -> Any:
        if value is MISSING:
            raise self._module._missing(kind)
        if kind in self._visit.changed():
            raise BlockError(
                f"`{self._module.path.removeprefix(ROOT + '.')}.{kind}` is lost: after it was cached, it was "
                "changed in place, by the block or by the model itself.",
                you_wrote=user_place().source,
                instead="tracer.cache(..., clone=True), which keeps copies",
            )
        return value

    def __repr__(self) -> str:
        shown = [f"{kind} {_show(self._visit, kind)}" for kind in ("inputs", "output") if self._has(kind)]
        return f"<call of {self._module.path} in step {self.step}: {', '.join(shown)}>"


def _show(visit: CachedVisit, kind: str) -> str:
    return show_shape(shape_of(visit._output if kind == "output" else visit._inputs))


def _table(cache: Cache, path: str) -> str:
    visits = {key: cache._log.visits[key] for key in CachedModule(cache, path).keys()}  # noqa: SIM118
    calls = sum(map(len, visits.values()))
    below = "" if path == ROOT else f" from `{path}` down"
    title = f"<cache{below}: {len(visits)} module{'s' * (len(visits) != 1)}, {calls} call{'s' * (calls != 1)}>"
    rows = [
        (key, f"{len(calls)} x" if len(calls) > 1 else "", _show(calls[0], cache._kinds[-1]))
        for key, calls in list(visits.items())[:_ROWS]
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True) if width or cell)
        for row in rows
    ]
    more = [f"... and {len(visits) - _ROWS} more"] if len(visits) > _ROWS else []
    return "\n  ".join([title, *lines, *more])
