"""`model.write_stub(path)`: the tree of one model as Python classes, for editors and type checkers.

At run time the classes have nothing in them: the root's is a subclass of the model's, and the others aren't there.
"""

from __future__ import annotations

import keyword
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nnsight.core.history import user_place
from nnsight.errors import InputError
from nnsight.node import CONTAINERS

if TYPE_CHECKING:
    from nnsight.envoy import Envoy
    from nnsight.root import NNsight

_FIRST = '"""The module tree of '

_HEAD = '''{first}{what}, for editors and type checkers.

Made by `model.write_stub("{file}")` of nnsight {version}:

    from {stem} import Model

    model = Model({argument})
"""
# mypy: ignore-errors
# pyright: basic
# ruff: noqa

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Iterator, Literal, TypeVar, overload

{imports}

if TYPE_CHECKING:
{known}

    T = TypeVar("T")

    class Modules(nnsight.Envoy, Generic[T]):
        """Modules that are had by their number."""

        @overload
        def __getitem__(self, key: int) -> T: ...
        @overload
        def __getitem__(self, key: slice) -> list[T]: ...
        @overload
        def __getitem__(self, key: str) -> Any: ...
        def __iter__(self) -> Iterator[T]: ...
'''


def write_stub(model: NNsight, path: str | Path) -> Path:
    """Writes the classes of a model's tree into a module; what `NNsight.write_stub` does."""
    path = Path(path)
    if path.suffix not in (".py", ".pyi") or not path.stem.isidentifier() or keyword.iskeyword(path.stem):
        raise InputError(
            f"{path.name!r} can't be imported.",
            you_wrote=user_place().source,
            instead='model.write_stub("gpt2_tree.py")',
        )
    if path.exists() and not path.read_text(encoding="utf-8").startswith(_FIRST):
        raise InputError(
            f"{str(path)!r} is there, and is no stub: it would be lost.",
            you_wrote=user_place().source,
            instead="another path",
        )
    path.write_text(_Stub(model).text(path), encoding="utf-8")
    return path


class _Stub:
    """The classes of one model: one for each structure, however many modules have it."""

    def __init__(self, model: NNsight) -> None:
        self._model = model
        self._imports = {"from torch import Tensor"}
        self._names: dict[Any, str] = {}  # by structure
        self._bodies: dict[str, list[str]] = {}

    def text(self, path: Path) -> str:
        from nnsight import __version__

        body = self._lines(self._model)
        base = self._spelt(type(self._model))
        module = self._model._module
        head = _HEAD.format(
            first=_FIRST,
            what=type(module).__name__,
            file=path.name,
            version=__version__,
            stem=path.stem,
            argument=repr(self._model.repo_id) if getattr(self._model, "repo_id", None) else "...",
            imports="\n".join(sorted({"import nnsight", f"import {base.rpartition('.')[0]}"})),
            known="\n".join(f"    {line}" for line in sorted(self._imports)),
        )
        classes = [
            "\n".join([f"    class {name}({first}):", *(f"        {line}" if line else "" for line in rest), ""])
            for name, (first, *rest) in self._bodies.items()
        ]
        root = ["", f"class Model({base}):", f'    """A {type(module).__name__}."""', "", "    _is_stub = True", ""]
        known = ["    if TYPE_CHECKING:", *(f"        {line}" for line in body or ["pass"])]
        return "\n".join([head, *classes, *root, *known, ""])

    def _lines(self, envoy: Envoy) -> list[str]:
        """What one module has: children, tensors, numbers."""
        lines = dict(self._children(envoy))
        module = envoy._module
        values = [*module._parameters.items(), *module._buffers.items()]
        values += [(name, one) for name, one in vars(module).items() if type(one) in (int, float, bool, str)]
        for name, value in values:
            if name != "training" and not name.startswith("_") and not hasattr(type(envoy), name) and _can_be(name):
                lines[name] = _kind(value)
        config = getattr(module, "config", None)
        if envoy is self._model and config is not None and (spelt := self._importable(type(config))):
            lines["config"] = spelt
        return [f"{name}: {kind}" for name, kind in lines.items()]

    def _children(self, envoy: Envoy) -> Iterator[tuple[str, str]]:
        names = [name for name, module in envoy._module._modules.items() if module is not None]
        for name, target in [*((name, None) for name in names), *envoy._further_names().items()]:
            child = envoy._child(name) if target is None else envoy.root._below(target.partition(".")[2])
            if child is None or child is envoy:
                continue
            spelt = name if not hasattr(type(envoy), name) or target is not None else f"E_{name}"
            if _can_be(spelt):
                yield spelt, self._class_of(child)

    def _class_of(self, envoy: Envoy) -> str:
        """The name of the class of such modules, which is written the first time."""
        module = envoy._module
        if isinstance(module, CONTAINERS) and not isinstance(module, nn.ModuleDict) and len(module._modules) > 0:
            return self._container(envoy)
        lines, base = self._lines(envoy), self._spelt(type(envoy))
        if not lines:
            return base
        return self._named(type(module).__name__, (f"{base}", f'"""As `{envoy._label}`."""', "", *lines))

    def _container(self, envoy: Envoy) -> str:
        """Modules in a row; where they are of several classes, each number has its own."""
        kinds = [self._class_of(child) for child in envoy]  # type: ignore[arg-type]  # an Envoy's are Envoys
        every = list(dict.fromkeys(kinds))
        union = " | ".join(every)
        if len(every) == 1:
            return f"Modules[{union}]"
        lines = []
        for one in every:
            where = ", ".join(str(i) for i, kind in enumerate(kinds) if kind == one)
            lines += ["@overload", f"def __getitem__(self, key: Literal[{where}]) -> {one}: ..."]
        for key, kind in (("int", union), ("slice", f"list[{union}]"), ("str", "Any")):
            lines += ["@overload", f"def __getitem__(self, key: {key}) -> {kind}: ..."]
        doc = f'"""As `{envoy._label}`."""'
        return self._named(type(envoy._module).__name__, (f"Modules[{union}]", doc, "", *lines))

    def _named(self, name: str, body: tuple[str, ...]) -> str:
        structure = (name, body[0], body[3:])
        if structure not in self._names:
            taken = {*self._names.values(), "Model", "Modules", "Tensor", "T", "Any", "Iterator", "Literal", "Generic"}
            name = name if _can_be(name) else f"{name}_"
            free = (one for i in range(1, len(taken) + 2) if (one := name if i == 1 else f"{name}{i}") not in taken)
            name = self._names[structure] = next(free)
            self._bodies[name] = list(body)
        return self._names[structure]

    def _spelt(self, kind: type) -> str:
        """A class of ours or of the user's own, as the stub names it: the first that can be imported."""
        return next(spelt for one in kind.__mro__ if "_is_stub" not in vars(one) and (spelt := self._importable(one)))

    def _importable(self, kind: type) -> str | None:
        import nnsight

        if kind.__name__ in nnsight.__all__ and getattr(nnsight, kind.__name__) is kind:
            return f"nnsight.{kind.__name__}"
        module = sys.modules.get(kind.__module__)
        if kind.__module__ == "__main__" or getattr(module, kind.__qualname__, None) is not kind:
            return None
        self._imports.add(f"import {kind.__module__}")
        return f"{kind.__module__}.{kind.__qualname__}"


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    return "Tensor" if isinstance(value, torch.Tensor) else type(value).__name__


def _can_be(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)
