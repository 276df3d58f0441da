"""`rename=`: further names for modules, where programs for several architectures want one. The original names stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from nnsight.core.catalogue import ROOT, Catalogue
from nnsight.core.spelling import nearest, quoted
from nnsight.errors import RenameError

Aliases = dict[str, dict[str, str]]


def aliases_of(root: nn.Module, rename: Mapping[Any, str | Iterable[str]], taken: frozenset[str]) -> Aliases:
    """For each path that gets some, its further names and the paths they lead to.

    Args:
        root: The model.
        rename: What is renamed, with its new name or names. A name ("mlp") or a dotted path ("transformer.h") is
            looked for below every module, which then gets the new name; `*` stands for any one name. It may be
            written with new names that other keys give, before or behind it. A class of
            modules gets the new name where a module has exactly one child of it. A dotted new name, "attn.out", is
            given to the module's `attn`.
        taken: Names that every Envoy has.

    Raises:
        RenameError: A key finds several modules below one, or a new name is taken; or no key finds any. A key that
            another model has passes: one mapping serves several architectures.
    """
    _check_kinds(rename)
    catalogue = Catalogue(root)
    wanted = [(key, name) for key, names in rename.items() for name in ([names] if isinstance(names, str) else names)]
    found: Aliases = {}
    count, as_paths = -1, False
    while True:  # a key may lead through names that others give
        homeless = [
            f"rename: `{name}` has no place below `{path}`, which has no `{name.rpartition('.')[0]}`."
            for key, name in wanted
            for path, target in _targets(catalogue, found, key, as_path=as_paths).items()
            if not _bind(catalogue, found, taken, path, name, target)
        ]
        before, count = count, sum(map(len, found.values()))
        if count == before and as_paths:
            break
        as_paths = as_paths or count == before
    if homeless:
        raise RenameError(homeless[0])
    if rename and not found:
        known = dict.fromkeys(name for names in catalogue.children.values() for name in names)
        raise RenameError(
            f"rename: none of {quoted(rename)} is a module of this {type(root).__name__}.",
            nearest=", ".join(filter(None, (nearest(key, known, n=1) for key in rename))),
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


def _targets(catalogue: Catalogue, found: Aliases, key: Any, *, as_path: bool) -> dict[str, str]:
    """Where the key is found: each module below which it leads somewhere, and where it leads.

    `as_path`: whether a key that leads nowhere, and begins with "model", is a whole path, as `.path` has it.
    """
    if isinstance(key, type):
        within = {path: _children_of(catalogue, path, key) for path in catalogue.children}
        return {path: children[0] for path, children in within.items() if len(children) == 1}
    names = key.strip(".").split(".")
    within = {path: ends for path in catalogue.children if (ends := _follow(catalogue, found, path, names))}
    if as_path and not within and names[0] == ROOT and len(names) > 1:
        ends = _follow(catalogue, found, ROOT, names[1:])
        within = {ROOT: ends} if ends else {}
    several = [path for path, ends in within.items() if len(ends) > 1]
    if several:
        raise RenameError(
            f"rename: `{key}` finds {len(within[several[0]])} modules below `{several[0]}`, for one name.",
            instead="the name alone, which is renamed wherever it stands",
        )
    return {path: ends[0] for path, ends in within.items()}


def _children_of(catalogue: Catalogue, path: str, kind: type) -> list[str]:
    return [child for child in catalogue.children[path].values() if isinstance(catalogue.modules[child], kind)]


def _follow(catalogue: Catalogue, found: Aliases, path: str, names: list[str]) -> list[str]:
    ends = [path]
    for name in names:
        if name == "*":
            ends = [child for end in ends for child in catalogue.children[end].values()]
        else:
            known = [catalogue.children[end].get(name) or found.get(end, {}).get(name) for end in ends]
            ends = [end for end in known if end is not None]
    return ends


def _bind(catalogue: Catalogue, found: Aliases, taken: frozenset[str], path: str, name: str, target: str) -> bool:
    """Gives a module a name below another. False if a dotted name's first part leads nowhere."""
    *above, last = name.split(".")
    owners = _follow(catalogue, found, path, above)
    if len(owners) != 1:
        return False
    owner = owners[0]
    names = found.setdefault(owner, {})
    if target in (names.get(last), catalogue.children[owner].get(last)):
        return True
    is_taken = last in taken or hasattr(catalogue.modules[owner], last) or last in names
    if not last.isidentifier() or is_taken:
        why = "is taken there" if is_taken else "is no name in Python"
        raise RenameError(f"rename: `{last}` can't name `{target}` in `{owner}`: it {why}.")
    names[last] = target
    return True
