"""`NNsight`: a whole model, wrapped. It is the root of its tree."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nnsight.aliases import aliases_of
from nnsight.block.plain import check_axis
from nnsight.block.tracer import Tracer
from nnsight.core.tree import Tree
from nnsight.envoy import Envoy
from nnsight.kinds import Kinds
from nnsight.scopes import RowScope
from nnsight.stub import write_stub


class NNsight(Envoy):
    """Any PyTorch module, wrapped: its inner values can be read, changed and recomputed while it runs.

    Wrapping changes nothing on the module. A module that nobody asks about is never touched.

    Args:
        module: The model.
        rename: Further names for modules: `{"transformer.h": "layers", "mlp": ["ff", "feed_forward"]}`. A name or path
            is looked for below every module, `*` stands for one name, a class for the one child of it. The original
            names stay.
        envoys: A subclass of Envoy for all modules below, or such classes for a class of modules or for what a path
            ends with: `{torch.nn.Linear: MyLinear, "attn": MyAttention, "layers.*": MyLayer}`.
        batch_axis: On which axis of its inputs the rows are, for `as (a, b)` and `tracer.invoke`; None: on the first,
            and on the second for modules of torch's that say so, as an `nn.LSTM` without `batch_first`.

    Raises:
        InputError: `envoys` has something else, or paths of which none is a module's; `batch_axis` is no axis.
        RenameError: No key of `rename` finds a module, one finds several, or a new name is taken.
        TypeError: `module` is no `torch.nn.Module`.

    Example:
        >>> import nnsight, torch
        >>> model = nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()))
        >>> with model.trace(torch.ones(2, 4)):
        ...     hidden = model[0].output
        >>> hidden.shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        rename: Mapping[Any, str | Iterable[str]] | None = None,
        envoys: Any = None,
        batch_axis: int | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            hint = f": LanguageModel({module!r}) looks a model up by its name" if isinstance(module, str) else ""
            hint = ": it is wrapped already" if isinstance(module, Envoy) else hint
            raise TypeError(f"NNsight wraps a torch.nn.Module, not a {type(module).__name__}{hint}")
        check_axis(batch_axis)
        self._batch_axis = batch_axis
        super().__init__(module, Tree(module, aliases_of(module, rename, _taken()) if rename else None))
        self._tree.kinds = None if envoys is None else Kinds(envoys, Envoy, self._tree)
        self._begin_tree()

    _has_weights: bool = True  # else they are loaded when they are needed

    @property
    def _model(self) -> nn.Module:
        """The module, as programs written for the existing package call it."""
        return self._module

    def write_stub(self, path: str | Path) -> Path:
        """Writes this model's tree as a Python module, with which an editor completes it and a type checker knows it.

        `from gpt2_tree import Model`, and `Model(...)` in place of this class: at run time they are the same.

        Args:
            path: Where to: "gpt2_tree.py". A stub that is there is written anew.

        Returns:
            The path.

        Raises:
            InputError: Such a file can't be imported, or one is there that is no stub.
        """
        return write_stub(self, path)

    def _begin_tree(self) -> None:
        self._tree.top = weakref.ref(self)
        self._tree.family.append(self._tree.top)

    def _family(self) -> list[Any]:
        """This model, and all living views that share its modules."""
        return [one for reference in self._tree.family if (one := reference()) is not None]

    def _replace_module(self, module: nn.Module) -> None:
        """Puts another module of the same structure in place of the root, for all views.

        Envoys that were obtained before stay valid.
        """
        for envoy in self._family():
            path = envoy._tree.path(envoy._module)
            _point(envoy, module.get_submodule(path))
            envoy._tree.replace_root(module)

    def _follow_modules(self) -> None:
        """Has all Envoys be those of the modules that stand at their paths now."""
        for envoy in self._family():
            _follow(envoy)
            envoy._tree.forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_tree()


def _taken() -> frozenset[str]:
    """Names that modules, tracers and rows have: a module of such a name could not be had there by it.

    `model` can: `tracer.model` has a child called so, as a Llama has, and so has what `rename` makes one.
    """
    return frozenset({*dir(Envoy), *dir(RowScope), *dir(Tracer), "positions", "lengths", "save"}) - {"model"}


def _follow(envoy: Envoy) -> None:
    for name, child in list(envoy._children.items()):
        module = envoy._module._modules.get(name)
        if module is None:
            del envoy._children[name]
        elif child._module is module:
            _follow(child)
        else:
            child._module, child._children, child._below_known = module, {}, {}


def _point(envoy: Envoy, module: nn.Module) -> None:
    for name, attached in envoy._module._modules.items():
        if name not in module._modules:
            module._modules[name] = attached
    envoy._module = module
    for name, child in envoy._children.items():
        if (below := module._modules.get(name)) is not None and child._module is not below:
            _point(child, below)
