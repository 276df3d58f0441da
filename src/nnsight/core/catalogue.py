"""The paths of a tree as plain strings, for what outlives its model: a cache, which is pickled without it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nnsight.core.tree import Tree

ROOT = "model"
Names = dict[str, dict[str, str]]


class Catalogue:
    """Every module of a tree by its path ("model.transformer.h.0"), in torch's order.

    `children` has, for each path, the names below it and the paths they lead to: a shared module has one path, the
    first. `known` are all paths, `lists` those of the `ModuleList`s and `ModuleDict`s that are never called, and
    `scripted` the modules inside TorchScript, which calls no hooks.
    """

    __slots__ = ("_kids", "children", "known", "lists", "modules", "paths", "scripted")

    def __init__(self, root: nn.Module) -> None:
        self.paths: dict[nn.Module, str] = {}
        self.children: dict[str, dict[str, str]] = {}
        self.scripted: set[nn.Module] = set()
        self._walk(root, ROOT, False)
        self._kids = self._kids_now()
        self.modules = {path: module for module, path in self.paths.items()}
        self.known = frozenset(self.modules)
        self.lists = frozenset(path for module, path in self.paths.items() if _is_list(module))

    def _walk(self, module: nn.Module, path: str, scripted: bool) -> None:
        self.paths[module] = path
        if scripted:
            self.scripted.add(module)
        scripted = scripted or isinstance(module, torch.jit.ScriptModule)
        names = self.children[path] = {}
        for name, child in module._modules.items():
            if child is None:
                continue
            if child not in self.paths:
                self._walk(child, f"{path}.{name}", scripted)
            names[name] = self.paths[child]

    def called(self, module: nn.Module) -> list[nn.Module]:
        """The module, or, of a list of modules, which is never called, those in it."""
        if self.paths[module] not in self.lists:
            return [module]
        return [called for child in module.children() for called in self.called(child)]

    def ending(self, end: str, aliases: Names) -> list[str]:
        """The paths that end with these names, however they are written."""
        return [p for p in self.modules if any(way.endswith(f".{end}") for way in spellings(p, aliases))]

    def is_current(self) -> bool:
        """Whether no module came, went or moved since."""
        return self._kids_now() == self._kids

    def _kids_now(self) -> list[tuple[Any, ...]]:
        """Each module that has any below it, with their names: the most have none."""
        return [(module, *kids.items()) for module in self.paths if (kids := module._modules)]


def catalogue_of(tree: Tree, *, check: bool) -> Catalogue:
    """The tree's catalogue, made when it is first needed and whenever the tree has changed.

    Args:
        check: Whether to look at each module for changes that were made beside the tree; it takes a while.
    """
    known: Catalogue | None = tree.catalogue
    if known is None or (check and not known.is_current()):
        known = tree.catalogue = Catalogue(tree.root)
    return known


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward


def locate(children: Names, aliases: Names, path: str, below: str = ROOT) -> str | None:
    """Where a dotted path below `below` leads to; the leading "model." of a whole path may be there or not.

    A whole path comes first: in a model whose root has a child called `model`, "model.norm" is the root's `norm` if it
    has one, else the child's.
    """
    if path == below:
        return below
    if (
        path.startswith(below + ".")
        and (found := _follow(children, aliases, below, path[len(below) + 1 :])) is not None
    ):
        return found
    return _follow(children, aliases, below, path)


def _follow(children: Names, aliases: Names, path: str, names: str) -> str | None:
    at: str | None = path
    for name in names.split("."):
        if at is None:
            return None
        at = children.get(at, {}).get(name) or aliases.get(at, {}).get(name)
    return at


def spellings(path: str, aliases: Names, within: tuple[str, ...] = ()) -> list[str]:
    """All ways to write a path, itself first."""
    if not aliases or path in within:  # one alias within the other's target
        return [path]
    parent, _, last = path.rpartition(".")
    found = [f"{above}.{last}" for above in spellings(parent, aliases, within)] if parent else [path]
    for owner, names in aliases.items():
        for name, target in names.items():
            if target == path:
                found += [f"{above}.{name}" for above in spellings(owner, aliases, (*within, path))]
    return found


def nearest_paths(path: str, known: Iterable[str]) -> str:
    """The three known paths that look most like this one, as whole paths or from some name on."""
    labels = [label.removeprefix(f"{ROOT}.") for label in known]
    ends = {label.split(".", dots)[-1]: label for label in labels for dots in range(label.count("."), -1, -1)}
    near = difflib.get_close_matches(path, ends, n=12)
    return ", ".join([f"`{label}`" for label in dict.fromkeys(ends[end] for end in near)][:3])
