"""Models of transformers under uniform names: `model.layers[3].attn.output`, `model.uniform`."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from nnsight.anatomy.find import layout_of
from nnsight.anatomy.halves import HALVES
from nnsight.anatomy.layout import Layer, Layout, is_there, kept
from nnsight.anatomy.uniform import NAMES, Layers, Uniform, UniformName
from nnsight.core.history import user_place
from nnsight.errors import AnatomyError
from nnsight.models.adapted import Adapted

if TYPE_CHECKING:
    from nnsight.models.accepts import Accepts
    from nnsight.node import Node


class _Known(NamedTuple):
    """The layers of a module, the names that lead to the last one, and how many modules there are beside it."""

    module: nn.Module
    layers: tuple[Layer, ...]
    above: tuple[str, ...]
    last: str
    n_beside: int

    @classmethod
    def of(cls, module: nn.Module, layout: Layout) -> _Known:
        layers = layout.layers
        above, _, last = layers[-1].path.rpartition(".")
        beside = [layer for layer in layers if layer.path.rpartition(".")[0] == above]  # some may have been cut off
        is_here = not above or is_there(module, above)
        there = len(module.get_submodule(above)._modules) if is_here else 0
        return cls(module, layers, tuple(above.split(".")) if above else (), last, max(len(beside), there))


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
    _known_layers: _Known | None = None
    _when_found: _Known | None = None  # the same, as it was when the layout was found

    def _layout(self) -> Layout:
        known = self._known_layout
        if known is None or known[0] is not self._module:
            known = self._known_layout = (self._module, layout_of(self._module))
            self._when_found = _Known.of(*known)
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
        if known is None or known.module is not module or "layers" in module._modules or "layers" in module.__dict__:
            if self._has_own("layers"):
                return None
            layout, found = self._layout(), self._when_found
            is_same = found is not None and found.module is module and found.layers is layout.layers
            known = self._known_layers = found if found is not None and is_same else _Known.of(module, layout)
        beside: nn.Module | None = module
        for name in known.above:
            if beside is None:
                break
            beside = beside._modules.get(name)
        if beside is None or known.last not in beside._modules:
            return kept(module, known.layers)
        return known.layers if len(beside._modules) <= known.n_beside else self._more_layers(known)

    def _more_layers(self, known: _Known) -> tuple[Layer, ...]:
        """The layers, found anew where some came to them since."""
        layout = layout_of(known.module)
        if len(layout.layers) > len(known.layers):
            self._known_layout = known.module, layout
            self._known_layers = _Known.of(known.module, layout)
            return layout.layers
        raise AnatomyError(
            f"Layers were added to this model, and its config, by which they are found, counts {len(known.layers)}.",
            you_wrote=user_place().source,
            instead="model.config.num_hidden_layers = ..., or what it is called there",
        )

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
