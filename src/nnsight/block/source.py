"""`envoy.source`: the operations inside a module's `forward`, listed, read, changed and skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from nnsight.block.first import Given, check_pair, first_input, with_first_input
from nnsight.block.rows import whole_of
from nnsight.core import rewrite
from nnsight.core.escape import escaping, raise_escaped
from nnsight.core.history import user_place
from nnsight.core.no_value import MadeAnew
from nnsight.core.operations import Body, Site, body_in, function_of
from nnsight.core.spelling import nearest, quoted
from nnsight.core.state import Visit
from nnsight.errors import (
    AlreadyPastError,
    NoSourceError,
    OutsideTraceError,
    UnknownIndexError,
    UnknownNameError,
    WriteError,
)

if TYPE_CHECKING:
    from nnsight.node import Node

_MOST_NAMES = 24  # that an error lists
_VALUES = ("output", "input", "inputs", "source")


class Source:
    """The operations of one function: printed, its source with their names; `source.<name>` is one of them.

    Args:
        node: The module whose forward this is, or whose forward calls it.
        within: The operation that calls the function; None for the forward itself.
    """

    __slots__ = ("_node", "_within")
    _node: Node
    _within: Operation | None

    def __init__(self, node: Node, within: Operation | None = None) -> None:
        object.__setattr__(self, "_node", node)
        object.__setattr__(self, "_within", within)

    @property
    @escaping
    def names(self) -> list[str]:
        """The names of all operations, in the order in which they stand to be executed."""
        return list(self._listing().operations)

    def __iter__(self) -> Iterator[Operation]:
        return iter([Operation(self, name) for name in self.names])

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return self._known_as(name) is not None

    def __dir__(self) -> list[str]:
        return [*object.__dir__(self), *self.names]

    def __getitem__(self, name: str | int) -> Operation:
        if isinstance(name, int):
            return self._at(name)
        known = self._known_as(name)
        if known is None:
            raise self._unknown(name)
        return Operation(self, known)

    def _at(self, index: int) -> Operation:
        names = self.names
        try:
            return Operation(self, names[index])
        except IndexError:
            raise UnknownIndexError(
                f"`{self._path}` has no operation at index {index}.",
                you_wrote=user_place().source,
                it_has=f"{len(names)} operations",
            ) from None

    def __getattr__(self, name: str) -> Operation:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "names":
            raise_escaped()
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name]  # a misspelt one says so
        raise WriteError(
            f"`{self._path}.{name}` is an operation, which can't be replaced.",
            you_wrote=user_place().source,
            instead=f".{name}.output = ...",
        )

    def __repr__(self) -> str:
        listing = self._listing()
        return "\n".join([listing.title, *_annotated(listing, range(len(listing.lines)))])

    @property
    def _path(self) -> str:
        return f"{self._within._path if self._within else self._node._label}.source"

    @property
    def _spelled(self) -> str:
        return f"{self._within._names()[1] if self._within else self._node._spelled}.source"

    def _known_as(self, name: str) -> str | None:
        """The full name for a name, which may lack its number where only one call, or one assignment, has it.

        `mix_call_1` is the second call of `mix`, however many assignments to that name there are.
        """
        operations = self._listing().operations
        if name in operations:
            return name
        base, _, number = name.rpartition("_call_")
        if base and number.isdecimal():
            return nth_call(self._listing(), base, int(number))
        same = [operation for full, operation in operations.items() if full.rpartition("_")[0] == name]
        calls = [operation for operation in same if operation.is_call]
        return (calls or same)[0].name if len(calls or same) == 1 else None

    def _listing(self) -> rewrite.Listing:
        if self._within is not None:
            return self._within._inner().listing
        return rewrite.listing(function_of(self._node._module, self._node._label))

    def _body(self, name: str) -> Body:
        """Where a run that is open finds these operations; this one is asked for."""
        if self._within is not None:
            return self._within._inner()
        run = whole_of(self._node._run(f"{self._path}.{name}"))
        module = run.own(self._node._module)
        run.come_into(module)
        return body_in(run, module)

    def _unknown(self, name: str) -> UnknownNameError:
        names, bare = self.names, str(name).rstrip("_0123456789")
        same = [full for full in names if full.rpartition("_")[0] == bare]
        parts = [full for full in names if bare and (bare in full or full.rpartition("_")[0] in bare.split("_"))]
        near = quoted(same) or nearest(name, names, n=3) or quoted(parts[:3])
        return UnknownNameError(
            f"`{self._path}` has no operation `{name}`.",
            you_wrote=user_place().source,
            nearest=near,
            it_has=_wrap(
                names if len(names) <= _MOST_NAMES else [*names[:_MOST_NAMES], "and others: print its .source"]
            ),
            inside=None if near else self._elsewhere(),
        )

    def _elsewhere(self) -> str | None:
        """Where operations are that this listing doesn't have."""
        listing = self._listing()
        if "_attention_forward" in listing.title and not listing.title.startswith("eager"):
            return 'the pattern is computed with LanguageModel(..., attn_implementation="eager") alone'
        calls = [operation.name for operation in listing.operations.values() if operation.is_call]
        attention = next((name for name in calls if name.startswith("attention_interface")), None)
        if attention is not None:
            return f'.source.{attention}.source, for what the attention does (the pattern: attn_implementation="eager")'
        return "what a call calls has operations of its own: .source.<call>.source" if calls else None


class Operation(MadeAnew):
    """A call or an assignment inside a `forward`. Its values are read and assigned as a module's are.

    A call's `output` is what it returned; an assignment's is the value assigned, which is its `input` too.
    """

    __slots__ = ("_source", "name")
    _source: Source
    name: str

    def __init__(self, source: Source, name: str) -> None:
        object.__setattr__(self, "_source", source)
        object.__setattr__(self, "name", name)

    @property
    def output(self) -> Any:
        """What the call returned, or what is assigned; the model runs up to there and waits. Assigning replaces it."""
        return self._read("output", lambda visit: visit.output)

    @output.setter
    def output(self, value: Any) -> None:
        self._write(lambda run, site: run.write_output(site, value))

    @property
    def inputs(self) -> Any:
        """What the function is called with, as `(args, kwargs)`. Assigning replaces both."""
        return self._read("input", lambda visit: (visit.args, visit.kwargs))

    @inputs.setter
    def inputs(self, value: Any) -> None:
        check_pair(value, self.name)
        self._write(lambda run, site: run.write_inputs(site, lambda _: value))

    @property
    def input(self) -> Any:
        """The first positional input, or else the first keyword one. Assigning replaces that one."""
        return self._read("input", lambda visit: first_input(visit, lambda: self._path))

    @input.setter
    def input(self, value: Any) -> None:
        def change(visit: Visit) -> Given:
            return with_first_input(visit, value, lambda: self._path)

        self._write(lambda run, site: run.write_inputs(site, change))

    def skip(self, value: Any) -> None:
        """Leaves out the call this time; `value` becomes its output. Its arguments have been computed by then."""
        self._write(lambda run, site: run.skip(site, value))

    def next(self, calls: int = 1) -> Operation:
        """This operation at its visit after the one where the run stands, or else after the next one; `calls` on."""
        self._write(lambda run, site: run.next(site, calls))
        return self

    @property
    def source(self) -> Source:
        """The operations of the function that is called here. Which one that is, is known once the model is there."""
        return Source(self._source._node, self)

    def __getattr__(self, name: str) -> Any:
        if name in _VALUES:
            raise_escaped()
        raise self._unknown(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("output", "input", "inputs"):
            raise self._unknown(name)
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        listing = self._source._listing()
        at = listing.operations[self.name].line - listing.first
        around = range(max(at - 4, 0), min(at + 5, len(listing.lines)))
        return "\n".join([f"{self._path}, {listing.title}", *_annotated(listing, around, self.name)])

    @property
    def _path(self) -> str:
        return f"{self._source._path}.{self.name}"

    _is = "an operation, not a value"

    def _names(self) -> tuple[str, str]:
        return self._path, f"{self._source._spelled}.{self.name}"

    def _stands_for(self) -> tuple[Any, ...]:
        return self._source._node, self._source._within, self.name

    def _site(self) -> Site:
        return self._source._body(self.name).site(self.name)

    @escaping
    def _read(self, kind: str, get: Callable[[Visit], Any]) -> Any:
        site = self._site()
        return get(self._source._node._run().read(site, kind))

    def _write(self, verb: Callable[[Any, nn.Module], Any]) -> None:
        site = self._site()
        verb(self._source._node._run(), site)

    def _inner(self) -> Body:
        """The operations of the function called here; the model runs up to the call to see which it is."""
        listing, node = self._source._listing(), self._source._node
        if not listing.operations[self.name].is_call:
            base, _, number = self.name.rpartition("_")
            if (call := nth_call(listing, base, int(number))) is not None:  # as it was named where only calls count
                return Operation(self._source, call)._inner()
            raise NoSourceError(f"`{self._path}` is an assignment, which calls nothing.", you_wrote=user_place().source)
        if node._run_or_none() is None:
            raise OutsideTraceError(
                f"What `{self._path}` calls is known only while the model runs.",
                you_wrote=user_place().source,
                instead="with model.trace(...):  and this line inside it",
            )
        site = self._site()
        if site.inner is not None:
            whole_of(node._run()).come_into(site)
        else:
            visit = whole_of(node._run()).read(site, "input")
            if site.inner is not None:  # another invoke, which waited here too, was served first
                return site.inner
            if visit.port is None or visit.port.kind != "input":
                raise AlreadyPastError(
                    f"`{self._path}.source` can't be had any more: the call has returned.",
                    you_wrote=user_place().source,
                    instead="ask for it before its output",
                )
            inner = Body(site.body.owner, f"{site.body.path}.{self.name}.source", self._callee(site))
            rewrite.rewritten(site.callee, inner)  # says so here where a decorator is in the way
            inner.is_open = True
            site.inner = inner
        return site.inner

    def _callee(self, site: Site) -> Any:
        if isinstance(site.callee, nn.Module):
            label = self._source._node._run().tree.label(site.callee)
            raise NoSourceError(
                f"`{self._path}` calls the module `{label}`.",
                you_wrote=user_place().source,
                instead=f"model.{label}.source",
            )
        try:
            return rewrite.innermost(site.callee)
        except NoSourceError as error:
            why = str(error).partition("\n")[0]
            raise NoSourceError(f"`{self._path}.source` can't be had. {why}", you_wrote=user_place().source) from None

    def _unknown(self, name: str) -> UnknownNameError:
        values = [*_VALUES, "skip", "next", "name"]
        return UnknownNameError(
            f"`{self._path}`, an operation, has no `{name}`.",
            you_wrote=user_place().source,
            nearest=nearest(name, values),
            it_has=", ".join(values),
        )


def nth_call(listing: rewrite.Listing, base: str, number: int) -> str | None:
    """The name of a call, counted among the calls of that callee alone."""
    found = [one.name for one in listing.operations.values() if one.is_call and one.name.rpartition("_")[0] == base]
    return found[number] if number < len(found) else None


def _annotated(listing: rewrite.Listing, rows: range, only: str | None = None) -> list[str]:
    """Source lines, with the names of each line's operations on its left, one beneath the other."""
    names: dict[int, list[str]] = {}
    for operation in listing.operations.values():
        if only in (None, operation.name):
            names.setdefault(operation.line - listing.first, []).append(operation.name)
    width = max((len(name) for row in rows for name in names.get(row, ())), default=0)
    numbers = len(str(listing.first + rows.stop))
    lines = []
    for row in rows:
        first, *more = names.get(row, [""])
        arrow = "->" if first else "  "
        text = f" {first:>{width}} {arrow} {listing.first + row:>{numbers}}  {listing.lines[row]}"
        lines += [text.rstrip(), *(f" {name:>{width}} ->" for name in more)]
    return lines


def _wrap(names: list[str]) -> str:
    lines, line = [], ""
    for name in names:
        if len(line) + len(name) > 90:
            lines.append(line)
            line = ""
        line += f"{name}, "
    return "\n".join([*lines, line]).removesuffix(", ")
