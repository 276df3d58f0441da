"""`rename=`: further names for modules, where programs for several architectures want one. The original names stay."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from nnsight.core.catalogue import ROOT, Catalogue
from nnsight.errors import RenameError

Aliases = dict[str, dict[str, str]]


def aliases_of(root: nn.Module, rename: Mapping[Any, str | Iterable[str]], taken: frozenset[str]) -> Aliases:
    """For each path that gets some, its further names and the paths they lead to.

    Args:
        root: The model.
        rename: What is renamed, with its new name or names. A name ("mlp") or a dotted path ("transformer.h") is
            looked for below every module, which then gets the new name; `*` stands for any one name. A class of
            modules gets the new name where a module has exactly one child of it. A dotted new name, "attn.out", is
            given to the module's `attn`.
        taken: Names that every Envoy has.

    Raises:
        RenameError: A key finds several modules below one, or a new name is taken; or no key finds any. A key that
            another model has passes: one mapping serves several architectures.
    """
    _check_kinds(rename)
    catalogue = Catalogue(root)
    found: Aliases = {}
    for key, names in rename.items():
        targets = _targets(catalogue, key)
        for name in [names] if isinstance(names, str) else names:
            for path, target in targets.items():
                _bind(catalogue, found, taken, path, name, target)
    if rename and not found:
        known = dict.fromkeys(name for names in catalogue.children.values() for name in names)
        near = [match for key in rename for match in difflib.get_close_matches(str(key), known, n=1)]
        raise RenameError(
            f"rename: none of {', '.join(f'`{key}`' for key in rename)} is a module of this {type(root).__name__}.",
            nearest=", ".join(f"`{name}`" for name in near),
        )
    return found


def _check_kinds(rename: Any) -> None:
    if not isinstance(rename, Mapping):
        raise RenameError(f"rename: a {type(rename).__name__} is no mapping.", instead='{"a module": "its new name"}')
    for key, names in rename.items():
        if not isinstance(key, (str, type)):
            raise RenameError(f"rename: {key!r} is neither a name, a path nor a class of modules.")
        listed = names if isinstance(names, (list, tuple, set, frozenset)) else [names]
        if not listed or not all(isinstance(name, str) for name in listed):
            raise RenameError(f"rename: the new name of `{key}` is a string, or a list of them, not {names!r}.")


def _targets(catalogue: Catalogue, key: Any) -> dict[str, str]:
    """Where the key is found: each module below which it leads somewhere, and where it leads."""
    if isinstance(key, type):
        within = {path: _children_of(catalogue, path, key) for path in catalogue.children}
        targets = {path: children[0] for path, children in within.items() if len(children) == 1}
    else:
        names = key.strip(".").split(".")
        if names[0] == ROOT and ROOT not in catalogue.children[ROOT] and len(names) > 1:  # as `.path` has it
            names = names[1:]
        within = {path: _follow(catalogue, path, names) for path in catalogue.children}
        several = [path for path, ends in within.items() if len(ends) > 1]
        if several:
            raise RenameError(
                f"rename: `{key}` finds {len(within[several[0]])} modules below `{several[0]}`, for one name.",
                instead="the name alone, which is renamed wherever it stands",
            )
        targets = {path: ends[0] for path, ends in within.items() if ends}
    return targets


def _children_of(catalogue: Catalogue, path: str, kind: type) -> list[str]:
    return [child for child in catalogue.children[path].values() if isinstance(catalogue.modules[child], kind)]


def _follow(catalogue: Catalogue, path: str, names: list[str]) -> list[str]:
    ends = [path]
    for name in names:
        below = [catalogue.children[end] for end in ends]
        ends = [child for children in below for known, child in children.items() if name in ("*", known)]
    return ends


def _bind(catalogue: Catalogue, found: Aliases, taken: frozenset[str], path: str, name: str, target: str) -> None:
    *above, last = name.split(".")
    owners = _follow(catalogue, path, above)
    if len(owners) != 1:
        raise RenameError(f"rename: `{name}` has no place below `{path}`, which has no `{'.'.join(above)}`.")
    owner = owners[0]
    names = found.setdefault(owner, {})
    is_taken = last in taken or hasattr(catalogue.modules[owner], last) or names.get(last, target) != target
    if not last.isidentifier() or is_taken:
        why = "is taken there" if is_taken else "is no name in Python"
        raise RenameError(f"rename: `{last}` can't name `{target}` in `{owner}`: it {why}.")
    names[last] = target
