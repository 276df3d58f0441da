"""Edits that stay: blocks that are replayed in each later run of the model that carries them.

An edit belongs to one module, the one whose `edit` was called, and runs once for each call of that module: once in a
trace, once for each token in a generation. `Edit` is the block and where it was written; `replay.py` has it run.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable
from types import CodeType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from nnsight.block.carry import Block
from nnsight.block.edit_tracer import EditTracer
from nnsight.block.gradient import watched
from nnsight.block.leave_out import Skip, binds_nothing, unpacks
from nnsight.core.carried import Carried
from nnsight.core.history import Place, add_note, raised_at, user_place
from nnsight.core.opened import OPEN
from nnsight.core.save import mount
from nnsight.core.spelling import quoted
from nnsight.core.tree import Tree, is_below
from nnsight.errors import BlockError, ModelError

if TYPE_CHECKING:
    from nnsight.envoy import Envoy

_INSTEAD = "@model.edit\ndef edited(model):\n    model.layer.output = ...      # and so on: this form needs no source"


class Edit:
    """A block that stays. It is never changed, and may belong to several edited views.

    Args:
        path: The module that carries it; its path below the root.
        body: Called with what the block binds: the tracer and the model.
        place: Where it was written.
    """

    def __init__(self, path: str, body: _Called | _Replayed, place: Place) -> None:
        self.path, self.body, self.place = path, body, place
        self.told = False  # that it was left waiting, which is said once
        self._asked: list[str] = []  # the modules that it asked for in its last run, in order
        self._early: set[tuple[str, str, int]] = set()  # where it ended in calls of a part alone
        self.makes_view = False  # whether it is what a view of the model is, and so can't be cleared
        self.names = _names_in(getattr(body.function, "__code__", None))  # the attributes that it asks for

    def __deepcopy__(self, memo: Any) -> Edit:
        return self

    def __reduce__(self) -> Any:
        if isinstance(self.body, _Replayed):
            raise ModelError(
                f"The edit at {self.place} is the body of a `with`, which can't be pickled.",
                instead="its function form, with a function that can be imported:  edited = model.edit(function)",
            )
        return _unpickled, (self.path, self.body)

    # In a call of a part of its module alone, it ends where it asks for something else. What it would have asked for
    # behind that is known by its runs: the last one, or else the next.

    def ended_early(self, path: str, asked: list[str]) -> None:
        """Notes that it ended in a call of the module at `path` alone, where the last that it asked for is outside."""
        early = path, asked[-1], len(asked)
        if not self._tell_missed(*early):
            self._early.add(early)

    def came_through(self, asked: list[str]) -> None:
        """Notes what it asked for in a call of its own module."""
        self._asked = asked
        while self._early:
            self._tell_missed(*self._early.pop())

    def _tell_missed(self, path: str, outside: str, count: int) -> bool:
        missed = next((one for one in self._asked[count:] if is_below(one, path)), None)
        if missed is not None:
            self.tell(
                f"In a call of `{path}` alone, `{outside or 'model'}` isn't called, and the edit did not come to "
                f"`{missed}` behind it. One of that module itself does: model.{path}.edit(..., inplace=True)."
            )
        return missed is not None

    def tell(self, what: str) -> None:
        """Warns, once, that a part of this edit had no effect."""
        if not self.told:
            self.told = True
            text = f"An edit was left waiting, and what follows there in it did nothing. {what}"
            warnings.warn_explicit(text, UserWarning, self.place.code.co_filename, self.place.line)


def _names_in(code: Any) -> set[str]:
    """The attributes that a function's code, and the functions in it, ask for."""
    if not isinstance(code, CodeType):
        return set()
    return {*code.co_names}.union(*map(_names_in, code.co_consts))


def _unpickled(path: str, body: _Called) -> Edit:
    return Edit(path, body, _place_of(body.function))


class _Called:
    """A function as an edit: `function(model)`, or `function(tracer, model)`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._takes_two = _check_function(function)

    def __call__(self, tracer: EditTracer, model: Any) -> None:
        how = "An edit's function is given its tracer where it takes two: def edited(tracer, model)"
        _call(self.function, model, how, *((tracer, model) if self._takes_two else (model,)))


def _check_function(function: Any) -> bool:
    """Whether it takes the tracer too."""
    how = "a function of the model: `def edited(model): ...`, or `model.edit(lambda model: ...)`"
    if not callable(function) or isinstance(function, nn.Module) or hasattr(type(function), "clear_edits"):
        other = "model.edit(inplace=True), to edit the model itself" if isinstance(function, bool) else how
        if isinstance(function, str):
            other = "with model.edit() as edited:    which takes no prompt"
        of_module = "layer.edit(...), of the module that is to be edited"
        raise BlockError(
            f"`edit` takes a function, not a {type(function).__name__}.",
            you_wrote=user_place().source,
            instead=of_module if hasattr(type(function), "clear_edits") else other,
        )
    if any(check(function) for check in (inspect.isgeneratorfunction, inspect.iscoroutinefunction)):
        raise BlockError("An edit can't be a generator or a coroutine: its body would never run.", instead=how)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return False
    for count in (1, 2):
        try:
            signature.bind(*[None] * count)
        except TypeError:
            continue
        return count == 2
    name = getattr(function, "__name__", "function")
    raise BlockError(
        f"An edit's function is called with the model alone, and `{name}{signature}` takes others.", instead=how
    )


def _place_of(function: Any) -> Place:
    code = getattr(inspect.unwrap(getattr(function, "func", function)), "__code__", None)
    return Place(code, code.co_firstlineno) if isinstance(code, CodeType) else user_place()


class _Here:
    """Stands for an Envoy of the edited model among the names of a block: found anew in each run, and never held."""

    def __init__(self, path: str) -> None:
        self.path = path


class _Replayed:
    """The body of a `with`, with what its names stood for."""

    def __init__(self, function: Callable[..., Any], names: dict[str, Any]) -> None:
        self.function, self._names = function, names

    def __call__(self, tracer: EditTracer, model: Any) -> None:
        root = model.root
        values = {
            name: _found(root, model, value.path)
            if isinstance(value, _Here)
            else tracer
            if isinstance(value, EditTracer)
            else value
            for name, value in self._names.items()
        }
        how = "An edit binds its tracer with `as (tracer, edited)`, or `as tracer` if inplace=True."
        _call(self.function, model, how, **values)


def _call(function: Callable[..., Any], model: Any, how: str, /, *args: Any, **kwargs: Any) -> None:
    """Runs an edit; `how`: how it is given its tracer."""
    with watched(model._run_or_none(), function):
        try:
            function(*args, **kwargs)
        except NameError as error:
            _explain(error, how)
            raise


def _explain(error: NameError, how: str) -> None:
    """Adds a note to an error about a tracer that an edit did not bind."""
    place, name = raised_at(error), re.search(r"'(\w+)'", str(error))
    if place is None or name is None:
        return
    if re.search(rf"\b{name[1]}\.(iter|all|step|positions|lengths|stop|cache|invoke|result)\b", place.text):
        add_note(error, how)


def _found(root: Any, model: Any, path: str) -> Any:
    if path == model._tree.path(model._module):
        return model
    return root._below(path) if path else root


class EditBlock:
    """What `model.edit()` returns: for a `with`, or as a decorator."""

    def __init__(self, envoy: Envoy, inplace: bool) -> None:
        _check_not_in_edit(envoy)
        mount()
        self._envoy, self._inplace = envoy, inplace

    def __repr__(self) -> str:
        return f"<edit of `{self._envoy._label}`, not written>"

    def __call__(self, function: Callable[..., Any]) -> Any:
        return add(self._envoy, function, self._inplace)

    def __enter__(self) -> Any:
        frame = sys._getframe(1)
        block = Block.of(frame, _INSTEAD)
        line = Place(frame.f_code, block.line).text
        if not self._inplace and binds_nothing(frame):
            raise BlockError(
                "This edit is of a view of the model, which has no name here, so that it would be lost.",
                you_wrote=line,
                instead="with model.edit() as edited:    or model.edit(inplace=True), to edit the model itself",
            )
        if block.enters("edit"):
            raise _in_edit(line)
        if block.outer:
            names = quoted(sorted(block.outer))
            raise BlockError(
                f"An edit runs later, when it can't bind {names} in the function around it any more.",
                you_wrote=line,
                instead="change an object instead, such as a list: found.append(value)",
            )
        edited = self._envoy if self._inplace else self._envoy._view()
        tracer = EditTracer(edited)
        entered = (tracer, edited) if unpacks(frame) else tracer if self._inplace else edited
        self._open = (frame, block, edited, Skip(frame, block, entered))
        return entered

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> bool:
        frame, block, edited, skip = self._open
        del self._open
        if not skip.done(error):
            if error is not None:
                return False
            raise BlockError("The body of this edit ran in its place: it could not be left out.", instead=_INSTEAD)
        names = _names_for(block, frame, edited)
        body = _Replayed(block.function(names), names)
        _carry(edited, Edit(edited._tree.path(edited._module), body, Place(frame.f_code, block.line)))
        return True


def _in_edit(line: str) -> BlockError:
    return BlockError(
        "An edit can't be made in another: its body runs later, while the model does.",
        you_wrote=line,
        instead="one after the other; an edit of an edited model comes behind its edits:\n"
        "with model.edit() as once: ...\n"
        "with once.edit() as twice: ...",
    )


def _check_not_in_edit(envoy: Envoy) -> None:
    if isinstance(envoy._run_or_none(), Carried):
        raise _in_edit(user_place().source)


def shown(tree: Tree, path: str) -> str:
    """A line for each edit of the module at a path and of those below it: where it was written."""
    lines = []
    for edit in tree.edits:
        if is_below(edit.path, path):
            what = "" if edit.path == path else f"`{edit.path}` "
            lines.append(f"\n{what}edited at {edit.place.quoted}")
    return "".join(lines)


def edits_now(tree: Tree) -> list[Carried]:
    """The edits of this model that run just now, around the line that asks."""
    runs = [run for reference in OPEN.get() if isinstance(run := reference(), Carried) and run.is_open]
    return [run for run in runs if run.outer is tree]


def check_not_in_its_own(tree: Tree, module: nn.Module) -> None:
    """Refuses a trace, in an edit, of a model that has this edit."""
    path = tree.path(module)
    if any(is_below(run.carrier, path) for run in edits_now(tree)):
        raise BlockError(
            "An edit can't trace the model that it edits: it would run again in that trace, and so on without end.",
            you_wrote=user_place().source,
            instead="the trace before the edit, and what it found in it:\n"
            "with model.trace(...): hidden = ...\n"
            "with model.edit() as edited: ...",
        )


def original_is_traced(tree: Tree) -> bool:
    """Whether a line that asks this edited view for a value stands in a trace of what it is a view of."""
    runs = [run for reference in OPEN.get() if (run := reference()) is not None and run.is_open]
    return any(tree.is_view_of(run.outer) for run in runs)


def _names_for(block: Block, frame: FrameType, edited: Any) -> dict[str, Any]:
    """What the names of a body stand for: the locals around it, and never an Envoy of the edited model itself.

    In a file or a notebook cell, the locals are the globals. They are kept as well: a loop would change them.
    """
    names: dict[str, Any] = {}
    for name in block.names.intersection(frame.f_locals) - block.globals:
        value = frame.f_locals[name]
        tree = getattr(value, "__dict__", {}).get("_tree")
        if isinstance(tree, Tree) and tree.family is edited._tree.family:
            names[name] = _Here(tree.path(value._module))
        elif isinstance(value, EditTracer):
            names[name] = EditTracer(None)
        else:
            names[name] = value
    return names


def add(envoy: Envoy, function: Callable[..., Any], inplace: bool) -> Any:
    """Adds a function as an edit, and returns the edited model: a view, or the same one if `inplace`."""
    body = _Called(function)
    _check_not_in_edit(envoy)
    mount()
    edited = envoy if inplace else envoy._view()
    _carry(edited, Edit(edited._tree.path(edited._module), body, _place_of(function)))
    return edited


def _carry(edited: Any, edit: Edit) -> None:
    edited._tree.edits = (*edited._tree.edits, edit)


def clear(envoy: Any) -> None:
    """Takes away the edits of a module and of all modules below it."""
    tree: Tree = envoy._tree
    path = tree.path(envoy._module)
    tree.edits = tuple(edit for edit in tree.edits if edit.makes_view or not is_below(edit.path, path))
