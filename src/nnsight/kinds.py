"""`envoys=`: classes of Envoy for some modules, and `eproperty`: named values on them that are made from others."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nnsight.core.catalogue import ROOT, spellings
from nnsight.core.escape import let_escape
from nnsight.core.history import user_place
from nnsight.core.tree import Tree
from nnsight.errors import InputError, WriteError

PORTS = ("output", "input", "inputs")


class eproperty:  # noqa: N801  it is used as `property` is
    """A value of a module under a name of its own: made from its output or input when it is read, and back when set.

    The decorated method makes it: `(self, value) -> derived`. Where it is a view, what is changed in it in place
    reaches the model. `@name.postprocess` makes a whole of what is assigned: `(self, derived) -> value`.

    Args:
        preprocess: The method, where there are no options.
        key: Which value it is made from: "output", "input" or "inputs".
        description: What it is, for `help`; else the method's docstring.

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
        self, preprocess: Callable[[Any, Any], Any] | None = None, *, key: str = "output", description: str = ""
    ) -> None:
        if key not in PORTS:
            raise InputError(f"An eproperty is made from {', '.join(map(repr, PORTS))}, not {key!r}.")
        self._key, self._description, self._name = key, description, ""
        self._postprocess: Callable[[Any, Any], Any] | None = None
        self._preprocess = _checked(preprocess)
        self.__doc__ = description or getattr(preprocess, "__doc__", None)

    def __call__(self, preprocess: Callable[[Any, Any], Any]) -> eproperty:
        return eproperty(preprocess, key=self._key, description=self._description)

    def postprocess(self, function: Callable[[Any, Any], Any]) -> eproperty:
        """What makes the module's value of one that is assigned."""
        both = self(self._preprocess) if self._preprocess is not None else self
        both._postprocess = _checked(function)
        return both

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, node: Any, owner: type | None = None) -> Any:
        if node is None:
            return self
        try:
            return self.of(node)
        except AttributeError as error:
            let_escape(error)
            raise

    def of(self, node: Any) -> Any:
        """The value of one module, in one run or in one row of it."""
        value = getattr(type(node), self._key).__get__(node)
        return value if self._preprocess is None else self._preprocess(node, value)

    def __set__(self, node: Any, derived: Any) -> None:
        if self._postprocess is None:
            raise WriteError(
                f"`{self._name}` can be read, and nothing says what a `{self._key}` would be with another one.",
                you_wrote=user_place().source,
                instead=f"@{self._name}.postprocess in {type(node).__name__}, or a change in place",
            )
        getattr(type(node), self._key).__set__(node, self._postprocess(node, derived))


def check_names(kind: type) -> None:
    """Refuses a class of Envoy that has an eproperty in place of a value which every module has.

    Before Python 3.12, an error in `__set_name__` would come as a RuntimeError.
    """
    for name in PORTS:
        if isinstance(inspect.getattr_static(kind, name), eproperty):
            raise InputError(f"`{name}` is a value of every module: an eproperty has another name.")


def _checked(function: Any) -> Any:
    """A method of an eproperty, which takes the module and a value; refused where that is sure to fail."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return function
    try:
        signature.bind(None, None)
    except TypeError:
        name = getattr(function, "__name__", "function")
        raise InputError(
            f"A method of an eproperty is called with the module and a value, and `{name}{signature}` takes others.",
            instead=f"def {name}(self, value):",
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

    def _check_some_found(self, tree: Tree) -> None:
        modules = [module for module in tree.root.modules() if module is not tree.root]
        if any(self.of(tree, module) is not None for module in modules):
            return
        names = {part for name, _ in tree.root.named_modules() for part in (name, name.rpartition(".")[2]) if part}
        near = [match for key, _ in self._paths for match in difflib.get_close_matches(key, sorted(names), n=1)]
        raise InputError(
            f"envoys: none of {', '.join(f'`{key}`' for key, _ in self._paths)} is a module of this model.",
            nearest=", ".join(f"`{name}`" for name in near),
        )


def _ends(path: list[str], wanted: list[str]) -> bool:
    end = path[-len(wanted) :]
    return len(end) == len(wanted) and all(want in ("*", name) for name, want in zip(end, wanted, strict=True))
