"""Where each module of a model stands: its path, and the modules above it. Built once, when first asked."""

from __future__ import annotations

import keyword
import weakref
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from nnsight.errors import BlockError, ModelError

Place = tuple[nn.Module, str]  # a parent, and the name that it has for its child


class Attached(nn.Module):
    """What a run can wait for inside a module, where the tree has nothing: `place` is that module, and a name in it.

    The tree keeps none of them: they last as long as a run.
    """

    place: Place

    @abstractmethod
    def visit(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `__call__` is to a module: runs it with the hooks around it."""

    def name_of(self, kind: str) -> str:
        """What a value here is called, below the module's path."""
        return f"{self.place[1]}.{kind}"

    # Axes are measured on a copy of the module.

    @property
    @abstractmethod
    def measured_with(self) -> str:
        """Where all stands that is measured together with this, below modules of the same class."""

    @abstractmethod
    def looking(
        self, owner: nn.Module, part: nn.Module, note: Callable[[Place, str, Any], None]
    ) -> AbstractContextManager[Any]:
        """Has `note` called, in `part`, a copy of `owner`, for what is measured together there.

        It is given places, kinds and values. `owner` is any module of the class of the one that this is in.
        """

    # Why nothing came, for errors.

    @property
    @abstractmethod
    def was_entered(self) -> bool:
        """Whether the run came into what this is inside of, with somebody there who would have seen this."""

    @property
    @abstractmethod
    def has_run(self) -> bool:
        """Whether the run came by, while or before somebody waited here."""

    @property
    def is_met_midway(self) -> bool:
        """Whether it is met too in a call that had begun before anybody asked for it."""
        return False

    @abstractmethod
    def its_line(self) -> dict[str, str]:
        """A row for errors: where it stands in the model's code, if that is known."""

    @abstractmethod
    def never_came(self, name: str, facts: dict[str, str]) -> BlockError:
        """The error for when it was entered, and this did not come."""


class Tree:
    """The module tree of one model, shared by all its Envoys and runs.

    A module can stand at several places (shared modules); its path is the first of them, in torch's order.
    """

    __slots__ = (
        "_above",
        "_places",
        "aliases",
        "base",
        "called_by_edits",
        "callers",
        "catalogue",
        "edits",
        "family",
        "kinds",
        "measured",
        "root",
        "top",
    )

    def __init__(
        self, root: nn.Module, aliases: dict[str, dict[str, str]] | None = None, edits: tuple[Any, ...] = ()
    ) -> None:
        self.root = root
        self.aliases = aliases or {}  # for each path, further names below it and the paths they lead to
        self.top: Callable[[], Any] = _nothing  # a weak reference to the root's Envoy
        self.edits = edits  # replayed in every run of this tree, in this order
        self.base: Tree | None = None  # of an edited view: the tree that it is a view of
        self.family: list[Callable[[], Any]] = []  # weak references to the Envoys that its views begin with
        self.kinds: Any = None  # kinds.py's, where some modules have an Envoy of another class
        self.measured: dict[Any, Any] = {}  # what measuring.py found, for each kind of input
        self._places: dict[nn.Module, list[Place]] = {}
        self._above: dict[nn.Module, tuple[nn.Module, ...]] = {}
        self.callers: dict[nn.Module, tuple[nn.Module, ...]] = {}  # what `callers_of` has found
        self.catalogue: Any = None  # core/catalogue.py's, where a cache was asked for
        self.called_by_edits: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # with `hook=True`, in some run

    def __reduce__(self) -> Any:
        return _rebuilt, (self.root, self.aliases, self.edits, self.kinds)

    def view(self, edits: tuple[Any, ...]) -> Tree:
        """Another tree of the same modules, with edits of its own."""
        tree = Tree(self.root, self.aliases, edits)
        tree.base, tree.family, tree.top, tree.kinds = self, self.family, self.top, self.kinds
        return tree

    def is_view_of(self, other: Tree) -> bool:
        base = self.base
        while base is not None and base is not other:
            base = base.base
        return base is not None

    def replace_root(self, root: nn.Module) -> None:
        self.root = root
        self.forget()

    def forget(self) -> None:
        """Drops what was built: a module came, went or moved."""
        self._places, self._above, self.callers, self.measured = {}, {}, {}, {}
        self.catalogue = None

    def first_place(self, module: nn.Module, place: Place) -> Place:
        """Where a module stands first, which was just met at `place`."""
        if place not in self._at(module):
            self.forget()
        return self._at(module)[0]

    def __contains__(self, module: nn.Module) -> bool:
        return module is self.root or (bool(self._at(module)) and not isinstance(module, Attached))

    def path(self, module: nn.Module) -> str:
        """The dotted path from the root, "" for the root itself."""
        names: list[str] = []
        while module is not self.root:
            places = self._at(module)
            if not places:
                return "(detached)"
            module, name = places[0]
            names.append(name)
        return ".".join(reversed(names))

    def at(self, path: str) -> nn.Module:
        """The module that a path leads to, which must be there; TorchScript has no `get_submodule`."""
        found: Any = self.root
        for name in filter(None, path.split(".")):
            found = found._modules[name]
        module: nn.Module = found
        return module

    def label(self, module: nn.Module) -> str:
        """The path as errors and receipts print it; the root is "model"."""
        return self.path(module) or "model"

    def spelled(self, module: nn.Module, taken: type = object) -> str:
        """What leads to a module in Python: `model.transformer.h[3]`.

        Args:
            taken: Attributes of this class stand before children of their names, which are had by `["output"]`.
        """
        found, above = "model", self.root
        for name in filter(None, self.path(module).split(".")):
            below = above._modules
            if name.isdecimal() and list(below).index(name) == int(name):
                found += f"[{name}]"
            elif name.isidentifier() and not keyword.iskeyword(name) and not hasattr(taken, name):
                found += f".{name}"
            else:
                found += f"[{name!r}]"
            above = below[name]  # type: ignore[assignment]  # it is on the way to one
        return found

    def name_of(self, module: nn.Module, kind: str) -> str:
        """What a value of a module, or inside one, is called: "transformer.h.3.output", "transformer.h.3.attn.q"."""
        if isinstance(module, Attached):
            return f"{self.label(module.place[0])}.{module.name_of(kind)}"
        return f"{self.label(module)}.{kind}"

    def above(self, module: nn.Module) -> tuple[nn.Module, ...]:
        """Every module on any path from the root down to `module`, without itself."""
        known = self._above.get(module)
        if known is not None:
            return known
        if isinstance(module, Attached):
            return (module.place[0], *self.above(module.place[0]))
        found: dict[nn.Module, None] = {}
        queue = [module]
        while queue:
            for parent, _ in self._at(queue.pop()):
                if parent not in found and parent is not module:
                    found[parent] = None
                    queue.append(parent)
        self._above[module] = tuple(found)
        return self._above[module]

    def is_only_in(self, module: nn.Module, above: nn.Module) -> bool:
        """Whether a module is below another, and nothing on the way stands at a second place."""
        while module is not above:
            places = self._at(module)
            if len(places) != 1:
                return False
            module = places[0][0]
        return True

    def callers_of(self, module: nn.Module) -> tuple[nn.Module, ...]:
        """Of those above a module, the ones that are called themselves: a list of modules isn't."""
        if isinstance(module, Attached):
            owner = module.place[0]
            return (owner, *(self.callers.get(owner) or self.callers_of(owner)))
        found = tuple(
            one
            for one in self.above(module)
            if type(one) not in (nn.ModuleList, nn.ModuleDict) or "forward" in vars(one)
        )
        self.callers[module] = found
        return found

    def _at(self, module: nn.Module) -> list[Place]:
        if not self._places:
            self._places = _walk(self.root, {self.root: []})  # at once: another thread may be looking
        if isinstance(module, Attached):
            return [module.place]
        return self._places.get(module, [])


def _rebuilt(root: nn.Module, aliases: dict[str, dict[str, str]], edits: tuple[Any, ...], kinds: Any) -> Tree:
    tree = Tree(root, aliases, edits)
    tree.kinds = kinds
    return tree


def _walk(parent: nn.Module, places: dict[nn.Module, list[Place]]) -> dict[nn.Module, list[Place]]:
    """Adds the places of all modules below `parent`, in the order of torch's `named_modules`."""
    for name, child in parent._modules.items():
        if child is None:
            continue
        is_new = child not in places
        if not is_new and type(child).__eq__ is not object.__eq__ and all(child is not one for one in places):
            raise ModelError(
                f"`{name}`, a {type(child).__name__}, equals another module of this model, and can't be told from it; "
                "torch's `parameters()` leaves out the second, too.",
                instead="a class without `__eq__`; of a dataclass, @dataclass(eq=False)",
            )
        places.setdefault(child, []).append((parent, name))
        if is_new:
            _walk(child, places)
    return places


def _nothing() -> None:
    return None


def is_below(path: str, above: str) -> bool:
    """Whether a path leads to the module at another path, or into it; the root's path is empty."""
    return not above or path == above or path.startswith(f"{above}.")
