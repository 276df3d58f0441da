"""Models of transformers under uniform names: `model.layers[3].attn.output`, `model.uniform`."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nnsight.anatomy.find import layout_of
from nnsight.anatomy.halves import HALVES
from nnsight.anatomy.layout import Layer, Layout, kept
from nnsight.anatomy.uniform import NAMES, Layers, Uniform, UniformName
from nnsight.models.adapted import Adapted

if TYPE_CHECKING:
    from nnsight.models.accepts import Accepts
    from nnsight.node import Node


class Named(Adapted):
    """A model with the names that all models of layers have, beside its own.

    They are found when one is first asked for.
    """

    def _takes(self) -> Accepts:
        raise NotImplementedError

    @property
    def uniform(self) -> Uniform:
        """The model under the names that all models have: `model.uniform.layers[3].attn.output`.

        Most are had on the model itself: `model.layers[3]`, where it has no child or attribute of that name.

        Raises:
            AnatomyError: Its layers, or what they add, could not be found.
        """
        return Uniform(self, self._layout())

    if TYPE_CHECKING:  # had by `__getattr__`, where the model has none of its own of that name
        layers: Layers
        embed: Node
        norm: Node
        unembed: Node
        logits: Tensor
        n_layers: int
        n_heads: int
        n_kv_heads: int
        d_model: int
        d_head: int
        d_mlp: int
        n_vocab: int
        W_E: Tensor
        W_U: Tensor
        project = Uniform.project
        sites = Uniform.sites
        site = Uniform.site

    _known_layout: tuple[nn.Module, Layout] | None = None
    _known_layers: tuple[nn.Module, tuple[Layer, ...], tuple[str, ...]] | None = None  # and the names of the last one

    def _layout(self) -> Layout:
        known = self._known_layout
        if known is None or known[0] is not self._module:
            known = self._known_layout = (self._module, layout_of(self._module))
        return known[1]

    def _is_uniform(self, name: str) -> bool:
        """Whether the model has a uniform name on itself: what it has itself under that name comes first."""
        if name not in NAMES or (name in HALVES and not self._takes().translates):
            return False
        return not self._has_own(name)

    def _has_own(self, name: str) -> bool:
        """Whether the module has this itself, or `rename=` has given it; without the cost of torch's `__getattr__`."""
        module = self._module
        if name in module._modules or name in vars(module) or (self._tree.aliases and name in self._further_names()):
            return True
        kind: Any = type(module)
        return name in _of_class(kind) if kind.__getattr__ is nn.Module.__getattr__ else hasattr(module, name)

    def _of_its_class(self, name: str) -> Any:
        """What a scope of the model asks: the uniform names, bound to its run or row."""
        if name == "uniform" or self._is_uniform(name):
            return UniformName(name, self._layout())
        return super()._of_its_class(name)

    def __getattr__(self, name: str) -> Any:
        if name in NAMES and "_module" in self.__dict__:
            if name == "layers" and (layers := self._layers()) is not None:  # as below, with fewer calls
                return Layers(self, layers, range(len(layers)))
            if self._is_uniform(name):
                return getattr(Uniform(self, self._layout()), name)
        return super().__getattr__(name)

    def _layers(self) -> tuple[Layer, ...] | None:
        """The layers that the model has still, where it has no `layers` of its own: on the way of every read of one."""
        module, known = self._module, self._known_layers
        if known is None or known[0] is not module or "layers" in module._modules or "layers" in module.__dict__:
            if self._has_own("layers"):
                return None
            layers = self._layout().layers
            known = self._known_layers = module, layers, tuple(layers[-1].path.split("."))
        last: nn.Module | None = module
        for name in known[2]:
            if last is None:
                break
            last = last._modules.get(name)
        return known[1] if last is not None else kept(module, known[1])

    def __setattr__(self, name: str, value: Any) -> None:
        if name in NAMES and self._is_uniform(name):
            setattr(self.uniform, name, value)
        else:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(NAMES if self._takes().translates else NAMES - HALVES)})


@lru_cache(maxsize=256)
def _of_class(kind: Any) -> frozenset[str]:
    """The uniform names that a class of modules has itself."""
    return frozenset(name for name in NAMES if hasattr(kind, name))
