"""Models of transformers under uniform names: `model.layers[3].attn.output`, `model.uniform`."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from nnsight.anatomy.find import layout_of
from nnsight.anatomy.halves import HALVES
from nnsight.anatomy.layout import Layer, Layout, is_there, kept
from nnsight.anatomy.uniform import NAMES, Layers, Sites, Uniform, UniformName
from nnsight.core.history import user_place
from nnsight.errors import AnatomyError
from nnsight.models.adapted import Adapted

if TYPE_CHECKING:
    from nnsight.anatomy.sites import Site
    from nnsight.models.accepts import Accepts
    from nnsight.node import Node


class _Known(NamedTuple):
    """What was found of a module: its layers, the names that lead to the last one, and how many modules are beside it.

    `has_own`: it had something of its own that is called `layers`.
    """

    module: nn.Module
    layers: tuple[Layer, ...]
    indices: range
    above: tuple[str, ...]
    last: str
    n_beside: int
    layout: Layout
    has_own: bool

    @classmethod
    def of(cls, module: nn.Module, layout: Layout, *, has_own: bool) -> _Known:
        layers = layout.layers
        above, _, last = layers[-1].path.rpartition(".")
        beside = [layer for layer in layers if layer.path.rpartition(".")[0] == above]  # some may have been cut off
        is_here = not above or is_there(module, above)
        there = len(module.get_submodule(above)._modules) if is_here else 0
        n_beside = max(len(beside), there)
        names = tuple(above.split(".")) if above else ()
        return cls(module, layers, range(len(layers)), names, last, n_beside, layout, has_own)


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

        def project(self, hidden: Tensor) -> Tensor: ...
        def sites(self) -> Sites: ...
        def site(self, name: str) -> Site: ...

    _known: _Known | None = None
    _own_names = NAMES

    def _layout(self) -> Layout:
        known, module = self._known, self._module
        if known is None or known.module is not module:
            known = self._known = _Known.of(module, layout_of(module), has_own=self._has_own("layers"))
        return known.layout

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

    def _uniform_names_of(self, path: str) -> str | None:
        try:
            layers = self.uniform.layers
        except AnatomyError:
            return None
        index = next((layer.index for layer in layers if layer._layer.path == path), None)
        return None if index is None else f"model.uniform.layers[{index}]"

    def _uniform_of(self, name: str) -> str | None:
        if name in _SIZES:
            return f"model.{_SIZES[name]}, or what it is called in model.config"
        return self._way_to_layers(name, "") or super()._uniform_of(name)

    def _way_to_layers(self, name: str, below: str) -> str | None:
        if name not in _WAYS:
            return None
        try:
            uniform = self.uniform
        except AnatomyError:
            return None
        layers = {"layers": uniform.layers}
        if uniform._layout.encoder is not None:
            layers["encoder.layers"] = uniform.encoder.layers
        for way, those in layers.items():
            if those[0]._layer.path.startswith(below):
                here = "model" if self._is_uniform(way.partition(".")[0]) else "model.uniform"
                return f"{here}.{way}[0], which all models have; `{those[0].raw._spelled}` here"
        return None

    def __getattr__(self, name: str) -> Any:
        if name in NAMES and "_module" in self.__dict__:
            if name == "layers" and (layers := self._layers()) is not None:  # as below, with fewer calls
                return layers
            if self._is_uniform(name):
                return getattr(Uniform(self, self._layout()), name)
        return super().__getattr__(name)

    def _layers(self) -> Layers | None:
        """The layers that the model has still, where it has no `layers` of its own: on the way of every read of one."""
        module, known = self._module, self._known
        if known is None or known.module is not module:
            if self._has_own("layers"):
                return None
            self._layout()
            known = self._known
            assert known is not None
        _, layers, indices, above, last, n_beside, _, has_own = known
        if (has_own or "layers" in module._modules or "layers" in module.__dict__) and self._has_own("layers"):
            return None
        beside: Any = module
        try:
            for name in above:
                beside = beside._modules[name]
            modules = beside._modules
        except (KeyError, AttributeError):  # one above them was taken out
            modules = {}
        if last not in modules:
            layers = kept(module, layers)
        elif len(modules) > n_beside:
            layers = self._more_layers(known)
        else:
            return Layers(self, layers, indices)
        return Layers(self, layers, range(len(layers)))

    def _more_layers(self, known: _Known) -> tuple[Layer, ...]:
        """The layers, found anew where some came to them since."""
        layout = layout_of(known.module)
        if len(layout.layers) > len(known.layers):
            self._known = _Known.of(known.module, layout, has_own=known.has_own)
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


# What configs, and other libraries, call the numbers that have uniform names.
_SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd"), "d_model"),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer"), "n_layers"),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head"), "n_heads"),
    **dict.fromkeys(("num_key_value_heads", "n_key_value_heads"), "n_kv_heads"),
    **dict.fromkeys(("intermediate_size", "n_inner"), "d_mlp"),
    **dict.fromkeys(("vocab_size", "d_vocab"), "n_vocab"),
    "head_dim": "d_head",
}
# What leads to the layers of some, from the root or from what is there below it.
_WAYS = frozenset({"backbone", "blocks", "gpt_neox", "h", "layer", "layers", "model", "transformer"})


@lru_cache(maxsize=256)
def _of_class(kind: Any) -> frozenset[str]:
    """The uniform names that a class of modules has itself."""
    return frozenset(name for name in NAMES if hasattr(kind, name))
