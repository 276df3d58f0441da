"""Which modules a cache is told to hear: by path, Envoy, pattern, class or function."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from nnsight.core.catalogue import Catalogue, catalogue_of, locate, nearest_paths, spellings
from nnsight.core.history import user_place
from nnsight.core.run import Run
from nnsight.core.turns import Turn
from nnsight.errors import ModelError, NotCachedError, UnknownNameError

_LIST = "[layer.output for layer in model.layers], or of layer.attn.z"
_UNIFORM = re.compile(r"(layers|blocks)\b|.*\bhook_")  # names that modules may have, too


def choose(run: Run, modules: Any) -> tuple[Catalogue, dict[nn.Module, str]]:
    """All modules that there are; and those that are meant, with their paths, in the order in which they were given."""
    if modules is None:
        catalogue = catalogue_of(run.tree, check=True)
        if run.module is run.tree.root and not catalogue.scripted:
            return catalogue, catalogue.paths
        found: Iterable[nn.Module] = (m for m in run.module.modules() if m not in catalogue.scripted)
    else:
        items = [(item, _module_of(item)) for item in _items(modules)]
        catalogue = catalogue_of(run.tree, check=any(module is None for _, module in items))  # given by name
        found = [each for item, module in items for each in _meant(run, catalogue, item, module)]
        if not found:
            raise UnknownNameError("`tracer.cache` was given an empty list of modules.", you_wrote=user_place().source)
    return catalogue, {module: catalogue.paths[module] for module in found}


def _items(modules: Any) -> list[Any]:
    if isinstance(modules, str) or callable(modules):  # Envoys and modules are
        return [modules]
    if isinstance(modules, Iterable) and not isinstance(modules, torch.Tensor):
        return list(modules)
    raise _no_choice(modules)


def _no_choice(given: Any) -> TypeError:
    what = "a tensor: the module itself is meant, without `.output`" if isinstance(given, torch.Tensor) else repr(given)
    instead = "" if isinstance(given, torch.Tensor) else f". Values under uniform names are kept by a list: {_LIST}"
    return TypeError(f"tracer.cache takes paths, Envoys, patterns and functions, not {what}{instead}")


def _module_of(item: Any) -> nn.Module | None:
    """The item, or the module of an Envoy or a scope, which are defined below this file."""
    refuse_turn(item)
    module = item if isinstance(item, nn.Module) else getattr(item, "_module", None)
    return module if isinstance(module, nn.Module) else None


def refuse_turn(item: Any) -> None:
    """Refuses a layer that is one of several calls of a module, all of which a cache hears."""
    turn: Turn | None = None if isinstance(item, (str, nn.Module)) else getattr(item, "_turn", None)
    if turn is not None:
        raise NotCachedError(
            f"`{turn.name}` is call {turn.index + 1} of `{turn.path}`, and a cache keeps calls by their modules.",
            you_wrote=user_place().source,
            instead=f"[layer.output for layer in model.layers]; or cache[{turn.path!r}].outputs, of all its calls",
        )


def _meant(run: Run, catalogue: Catalogue, item: Any, module: nn.Module | None) -> list[nn.Module]:
    if module is not None:
        module = run.own(module)
        if module not in catalogue.paths:
            what = type(module).__name__
            raise UnknownNameError(
                f"This {what} is no module of the model that is traced.", you_wrote=user_place().source
            )
        return _hearable(run, catalogue, module)
    if isinstance(item, str):
        if any(sign in item for sign in "*?["):
            return _matching(run, catalogue, item)
        return _hearable(run, catalogue, catalogue.modules[_path_of(run, catalogue, item)])
    if isinstance(item, type):
        kind = item
        return _those(catalogue, lambda module: isinstance(module, kind), f"no module is a {kind.__name__}")
    if callable(item) and not getattr(item, "_holds_values", False):
        return _those(catalogue, item, "the function said no to every module")
    raise _no_choice(item)


def _path_of(run: Run, catalogue: Catalogue, name: str) -> str:
    """The path that is meant by a whole path, or by the end of just one."""
    path = locate(catalogue.children, run.tree.aliases, name)
    ends = [path] if path is not None else catalogue.ending(name, run.tree.aliases)
    if len(ends) == 1:
        return ends[0]
    what = f"the end of {len(ends)} paths" if ends else "no module"
    raise UnknownNameError(
        f"`{name}` is {what} of this {type(run.tree.root).__name__}.",
        you_wrote=user_place().source,
        nearest=nearest_paths(name, ends or catalogue.modules),
        instead=f'"*.{name}", which means all of them' if ends else _of_uniform(name),
    )


def _matching(run: Run, catalogue: Catalogue, pattern: str) -> list[nn.Module]:
    """A pattern is matched name by name against the end of each path: "h.*.mlp" is "transformer.h.*.mlp" too."""
    names = [re.compile(fnmatch.translate(name)) for name in pattern.split(".")]

    def matches(path: str) -> bool:
        end = path.split(".")[-len(names) :]
        return len(end) == len(names) and all(name.match(part) for name, part in zip(names, end, strict=True))

    paths, aliases = catalogue.paths, run.tree.aliases
    found = _accepted(catalogue, lambda module: any(map(matches, spellings(paths[module], aliases))))
    if not found:
        raise UnknownNameError(
            f"`{pattern}` matches no module of this {type(run.tree.root).__name__}.",
            you_wrote=user_place().source,
            nearest=nearest_paths(pattern, catalogue.modules),
            instead=_of_uniform(pattern),
        )
    return found


def _of_uniform(name: str) -> str | None:
    return f"{_LIST}; a cache is of modules, by the model's own names" if _UNIFORM.match(name) else None


def _those(catalogue: Catalogue, accepts: Callable[[nn.Module], bool], why: str) -> list[nn.Module]:
    found = _accepted(catalogue, accepts)
    if not found:
        raise UnknownNameError(
            f"`tracer.cache` was given a choice that leaves nothing: {why}.",
            you_wrote=user_place().source,
            it_gets="torch modules, as in: lambda module: isinstance(module, torch.nn.Linear)",
        )
    return found


def _accepted(catalogue: Catalogue, accepts: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """All that are accepted; where these are nothing but lists of modules, which are never called, those in them."""
    found = [module for module in catalogue.paths if accepts(module) and module not in catalogue.scripted]
    if all(catalogue.paths[module] in catalogue.lists for module in found):
        return [called for module in found for called in catalogue.called(module)]
    return found


def _hearable(run: Run, catalogue: Catalogue, module: nn.Module) -> list[nn.Module]:
    """The module, or those in it, where it is a list, which is never called."""
    if module in catalogue.scripted:
        raise ModelError(
            f"`{run.tree.label(module)}` runs inside TorchScript, which calls no hooks.",
            instead="cache the scripted module itself, or wrap the model before it is scripted",
        )
    if not (called := catalogue.called(module)):
        raise UnknownNameError(
            f"`{run.tree.label(module)}` is a list with no modules in it, and is never called.",
            you_wrote=user_place().source,
        )
    return called
