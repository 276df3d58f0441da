"""`envoys=`: classes of Envoy for some modules, and `eproperty`: named values on them that are made from others."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, overload

from torch import nn

from nnsight.block.first import first_input
from nnsight.core.catalogue import ROOT, spellings
from nnsight.core.escape import escaping
from nnsight.core.history import user_place
from nnsight.core.spelling import nearest, quoted
from nnsight.core.state import Visit
from nnsight.core.tree import Tree
from nnsight.errors import InputError, WriteError
from nnsight.views import Views

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")
U = TypeVar("U")
PORTS = ("output", "input", "inputs")


class eproperty(Generic[T]):  # noqa: N801  it is used as `property` is
    """A value of a module under a name of its own: made from its output or input when it is read, and back when set.

    The decorated method makes it: `(self, value) -> derived`. Where it is a view, what is changed in it in place
    reaches the model. Where it is a copy, `@name.transform` makes a whole of what was changed in it:
    `(self, derived, value) -> value`. That is called before the model goes on, or the block asks for something else of
    the module, and only where there was a change; until then, the same object is had again.
    `@name.postprocess` makes a whole of what is assigned: `(self, derived) -> value`.

    Args:
        preprocess: The method, where there are no options.
        key: Which value it is made from: "output", "input" or "inputs".
        description: What it is, for `help` and the printed tree; the method's docstring is for `help` alone.

    Example:
        >>> import nnsight, torch
        >>> class Attention(nnsight.Envoy):
        ...     @nnsight.eproperty(key="output")
        ...     def heads(self, value):
        ...         return value.unflatten(-1, (2, -1))
        ...
        ...     @heads.postprocess
        ...     def heads(self, heads):
        ...         return heads.flatten(-2)
        >>> model = nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(4, 8)), envoys={torch.nn.Linear: Attention})
        >>> with model.trace(torch.ones(1, 4)):
        ...     heads = model[0].heads
        >>> heads.shape
        torch.Size([1, 2, 4])
    """

    def __init__(
        self, preprocess: Callable[[Any, Any], T] | None = None, *, key: str = "output", description: str = ""
    ) -> None:
        if key not in PORTS:
            raise InputError(f"An eproperty is made from {', '.join(map(repr, PORTS))}, not {key!r}.")
        self._key, self.description, self.name = key, description, ""
        self.kind = "output" if key == "output" else "input"
        self._postprocess: Callable[[Any, Any], Any] | None = None
        self._transform: Callable[[Any, Any, Any], Any] | None = None
        self._preprocess = _checked(preprocess)
        self.__doc__ = description or getattr(preprocess, "__doc__", None)

    def __call__(self, preprocess: Callable[[Any, Any], U]) -> eproperty[U]:
        made: Any = self._with(_preprocess=_checked(preprocess))
        made.__doc__ = self.description or getattr(preprocess, "__doc__", None)
        return made

    def postprocess(self, function: Callable[[Any, Any], Any]) -> Self:
        """What makes the module's value of one that is assigned."""
        return self._with(_postprocess=_checked(function))

    def transform(self, function: Callable[[Any, Any, Any], Any]) -> Self:
        """What makes the module's value of a view that was changed in place, and of the value that it was made of."""
        return self._with(_transform=_checked(function, "view", "value"))

    def provide(self, *_: Any) -> NoReturn:
        """Refused: in the existing package, it hands a value to the blocks that wait for one."""
        raise InputError(
            f"Nothing is provided here: `{self.name}` is made of what the module is given or returns.",
            you_wrote=user_place().source,
            instead=f"envoy.{self.name} = value    in a trace, or in an edit",
        )

    def _with(self, **methods: Any) -> Self:
        made = copy.copy(self)
        vars(made).update(methods)
        return made

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, node: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self, node: object, owner: type | None = None) -> T: ...

    @escaping
    def __get__(self, node: Any, owner: type | None = None) -> Any:
        """The value of one module, in one run or in one row of it."""
        if node is None:
            return self
        if self._transform is None:
            return self._made(node, getattr(type(node), self._key).__get__(node))
        run = node._run()
        visit = run.read(node._module, self.kind)
        value = self.pick(node, visit)
        if visit.port is None:  # of a call of the block's own, which is over
            return self._made(node, value)
        views = Views.of(run)
        if had := views.find(self, run, value):
            return had[0]
        return views.add(self, node, value, self._made(node, value))

    def _made(self, node: Any, value: Any) -> Any:
        return value if self._preprocess is None else self._preprocess(node, value)

    def pick(self, node: Any, visit: Visit) -> Any:
        """What it is made from, of what stands at the module."""
        if self._key == "input":
            return first_input(visit, lambda: node._label)
        return visit.value(self.kind)

    def write_back(self, node: Any, view: Any, value: Any) -> None:
        """Gives the module what is made of a view that was changed in place."""
        assert self._transform is not None
        self._assign(node, self._transform(node, view, value))

    def _assign(self, node: Any, value: Any) -> None:
        getattr(type(node), self._key).__set__(node, value)

    def __set__(self, node: Any, derived: Any) -> None:
        if self._postprocess is None:
            raise WriteError(
                f"`{self.name}` can be read, and nothing says what a `{self._key}` would be with another one.",
                you_wrote=user_place().source,
                instead=f"@{self.name}.postprocess in {type(node).__name__}, or a change in place",
            )
        self._assign(node, self._postprocess(node, derived))


def check_names(kind: type) -> None:
    """Refuses a class of Envoy that has an eproperty in place of a value which every module has.

    And one that says how invokes are put together, as in the existing package: here, nothing would ever call it.
    """
    if "_batcher_class" in vars(kind) or {"_batch", "_batch_size"} <= vars(kind).keys():
        raise InputError(
            f"`_batch` and the like of {kind.__name__} would never be called: the inputs of several invokes are put "
            "together along their first axis.",
            instead="model.trace(one batch) as (a, b):    where that is not right",
        )
    for name in PORTS:
        if isinstance(inspect.getattr_static(kind, name), eproperty):
            raise InputError(f"`{name}` is a value of every module: an eproperty has another name.")


def descriptions(kind: type | None) -> dict[str, str]:
    """The eproperties of a class that have a description, and that."""
    values = [] if kind is None else [(name, inspect.getattr_static(kind, name)) for name in dir(kind)]
    return {name: one.description for name, one in values if isinstance(one, eproperty) and one.description}


def let_errors_out(kind: type) -> frozenset[str]:
    """Has an AttributeError that a property of a class of Envoy raises come out as itself; returns their names."""
    names = set()
    for name, value in list(vars(kind).items()):
        if isinstance(value, property) and value.fget is not None:
            setattr(kind, name, value.getter(escaping(value.fget)))
        elif isinstance(value, functools.cached_property):
            value.func = escaping(value.func)
        elif not isinstance(value, eproperty):
            continue
        names.add(name)
    return frozenset(names)


def _checked(function: Any, *takes: str) -> Any:
    """A method of an eproperty, which takes the module and a value; refused where that is sure to fail."""
    takes = takes or ("value",)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return function
    try:
        signature.bind(None, *takes)
    except TypeError:
        name = getattr(function, "__name__", "function")
        raise InputError(
            f"A method of an eproperty is called with the module and a {' and a '.join(takes)}, and "
            f"`{name}{signature}` takes others.",
            instead=f"def {name}(self, {', '.join(takes)}):",
        ) from None
    return function


class Kinds:
    """Which class of Envoy a module has.

    Args:
        given: One class for all, or classes by what they are for: a class of modules, or the end of a path, in which
            `*` stands for any one name. Classes are looked at first, then paths, each in order.
        base: What the classes are subclasses of.
        tree: The model's. Paths may be spelt with its further names.

    Raises:
        InputError: Something else was given, or paths alone, and none is of this model.
    """

    def __init__(self, given: Any, base: type, tree: Tree) -> None:
        entries: Mapping[Any, Any] = given if isinstance(given, Mapping) else {nn.Module: given}
        for key, kind in entries.items():
            if not isinstance(key, (str, type)):
                raise InputError(f"envoys: {key!r} is neither a class of modules nor a path.")
            is_kind = isinstance(kind, type) and issubclass(kind, base) and not hasattr(kind, "_begin_tree")
            if not is_kind:
                raise InputError(f"envoys: {kind!r} is no subclass of nnsight.Envoy.", you_gave=f"{key!r}: {kind!r}")
        self._types = [(key, kind) for key, kind in entries.items() if isinstance(key, type)]
        self._paths = [(key.strip("."), kind) for key, kind in entries.items() if isinstance(key, str)]
        if self._paths and not self._types:
            self._check_some_found(tree)

    def of(self, tree: Tree, module: nn.Module) -> Any:
        """The class for a module; None: the usual one."""
        for key, kind in self._types:
            if isinstance(module, key):
                return kind
        if not self._paths:
            return None
        ways = [way.split(".") for way in spellings(f"{ROOT}.{tree.path(module)}", tree.aliases)]
        return next((kind for key, kind in self._paths if any(_ends(way, key.split(".")) for way in ways)), None)

    def described(self, tree: Tree) -> dict[nn.Module, dict[str, str]]:
        """The values that the classes of a tree's modules describe."""
        kinds = {module: self.of(tree, module) for module in tree.root.modules()}
        found = {kind: descriptions(kind) for kind in {*kinds.values()}}  # once for each class, since that takes long
        return {module: found[kind] for module, kind in kinds.items() if found[kind]}

    def _check_some_found(self, tree: Tree) -> None:
        modules = [module for module in tree.root.modules() if module is not tree.root]
        if any(self.of(tree, module) is not None for module in modules):
            return
        keys = [key for key, _ in self._paths]
        names = {part for name, _ in tree.root.named_modules() for part in (name, name.rpartition(".")[2]) if part}
        raise InputError(
            f"envoys: none of {quoted(keys)} is a module of this model.",
            nearest=", ".join(filter(None, (nearest(key, sorted(names), n=1) for key in keys))),
        )


def _ends(path: list[str], wanted: list[str]) -> bool:
    end = path[-len(wanted) :]
    return len(end) == len(wanted) and all(want in ("*", name) for name, want in zip(end, wanted, strict=True))
