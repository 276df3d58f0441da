"""The numbers of a model under uniform names: how many layers, heads, neurons, and how wide.

Heads are told by the layers' own weights, where these are found; a config may speak of some layers only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from nnsight.anatomy.layout import found_at
from nnsight.core.history import user_place
from nnsight.errors import NotOnThisLayerError

if TYPE_CHECKING:
    from nnsight.anatomy.layer import LayerNode
    from nnsight.anatomy.uniform import Layers
    from nnsight.node import Node


class Numbers:
    """The numbers of a language model.

    Where layers differ in one, there is none for all: a `NotOnThisLayerError` says which layer has which, and
    `layers[i].attn` has its own.
    """

    raw: Node

    if TYPE_CHECKING:

        @property
        def layers(self) -> Layers: ...

        @property
        def W_U(self) -> Tensor: ...  # noqa: N802

    @property
    def n_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def n_heads(self) -> int:
        """How many heads of queries a layer's attention has."""
        return self._of_attention("n_heads", ("num_attention_heads",))

    @property
    def n_kv_heads(self) -> int:
        """How many heads keys and values have; fewer than `n_heads` where several share one."""
        return self._of_attention("n_kv_heads", ("num_key_value_heads", "num_kv_heads"))

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        said = self._told("hidden_size") or self._width_of_writers()
        return self._needed("d_model", "`hidden_size`, and no matrix that writes into the stream was found", said)

    @property
    def d_head(self) -> int:
        """The width of a head's queries and keys: of values too, but in latent attention."""
        return self._of_attention("d_head", ("head_dim",))

    @property
    def d_mlp(self) -> int:
        """How many neurons an MLP has: of the first layer that has neurons; of a mixture, as the config has it."""
        first = next(iter(self.layers.having("mlp.W_out")), None)
        if first is not None and (width := first.mlp.width) is not None:
            return width
        said = self._told("intermediate_size") or self._told("n_inner")
        if said is None and (width := self._told("hidden_size")) is not None:
            said = 4 * width
        return self._needed("d_mlp", "`intermediate_size`, and no neurons were found", said)

    @property
    def n_vocab(self) -> int:
        """How many tokens the vocabulary has."""
        return int(self._told("vocab_size") or self.W_U.shape[1])

    def _width_of_writers(self) -> int | None:
        """How wide the stream is that the layers write into, where their matrices tell it."""
        for name in ("mlp.W_out", "attn.W_O"):
            if (layer := next(iter(self.layers.having(name)), None)) is not None:
                part, matrix = name.split(".")
                return int(getattr(getattr(layer, part), matrix).shape[-1])
        return None

    def _of_attention(self, name: str, fields: tuple[str, ...]) -> int:
        """What all layers that attend have of this, else what the config says."""
        known = _known.setdefault(self.raw._module, {})
        key = name, _widths(self.raw._module, self.layers)  # layers may be cut off later, and matrices exchanged
        if key in known:
            return known[key]
        attending = [layer for layer in self.layers if layer.has("attn.q")]
        found = {layer.index: getattr(layer.attn, name) for layer in attending if layer.has(f"attn.{name}")}
        values = {*found.values()}
        _check_told(name, attending)
        if len(values) > 1:
            raise NotOnThisLayerError(
                f"The layers of this model differ: there is no `{name}` for all of them.",
                you_wrote=user_place().source,
                it_has=_listed(found),
                instead=f"model.layers[i].attn.{name}",
            )
        if values:
            known[key] = values.pop()
            return known[key]
        said = next((value for field in fields if (value := self._told(field))), None)
        if said is None and name == "n_kv_heads":
            said = 1 if self._is_multi_query() else self.n_heads
        elif said is None and name == "d_head":
            said = self.d_model // self.n_heads
        elif said is None:
            raise NotOnThisLayerError("This model has no attention heads.", you_wrote=user_place().source)
        return int(said)

    def _is_multi_query(self) -> bool:
        """Falcon's and GPT-BigCode's way to say it."""
        return bool(self._told("multi_query")) and not self._told("new_decoder_architecture")

    @staticmethod
    def _needed(name: str, lacks: str, said: Any) -> int:
        if said is None:
            text = f"There is no `{name}`: the config of this model has no {lacks}."
            raise NotOnThisLayerError(text, you_wrote=user_place().source)
        return int(said)

    def _told(self, field: str) -> Any:
        """What the config has under this name; None: nothing."""
        config: Any = self.raw._module.config
        config = config.get_text_config(decoder=True)
        try:
            return getattr(config, field, None)
        except RuntimeError as error:  # one that differs by layer refuses, in the newest transformers
            every = [getattr(one, field, None) for one in config.per_layer_config]
            if len({*every}) == 1:
                return every[0]
            raise NotOnThisLayerError(
                f"The layers of this model differ: there is no `{field}` for all of them.",
                you_wrote=user_place().source,
                it_has=_listed(dict(enumerate(every))),
            ) from error


def _check_told(name: str, attending: list[LayerNode]) -> None:
    """Raises where a layer's matrices have other shapes than those of its kind: one was exchanged for another."""
    heads = [layer.attn._heads() for layer in attending]
    told = [one.found for one in heads if one.sizes is not None]
    for layer, one in zip(attending, heads, strict=True):
        if one.sizes is None and one.found is not None and one.found in told:
            raise NotOnThisLayerError(
                f"There is no `{name}` for all layers: that of layer {layer.index} can't be told any more from its "
                "weights, which have other shapes than those of its kind.",
                you_wrote=user_place().source,
                instead=f"model.layers[i].attn.{name}",
            )


_known: WeakKeyDictionary[nn.Module, dict[tuple[str, Any], int]] = WeakKeyDictionary()


def _widths(root: nn.Module, layers: Layers) -> tuple[Any, ...]:
    """What changes where layers are cut off, or a matrix of attention is exchanged for one of another shape."""
    shapes: list[Any] = []
    for layer in layers._layers:
        if layer.attention is not None:
            attention = found_at(root, layer.attention)
            parts = () if attention is None else attention._modules.values()
            weights = [part and part._parameters.get("weight") for part in parts]
            shapes.append(tuple(None if weight is None else weight.shape for weight in weights))
    return tuple(shapes)


def _listed(of_layers: dict[int, Any]) -> str:
    """Each value, with the first layers that have it: `8 in layers 0, 1, 2 ..., 16 in layer 5`."""
    told = []
    for value in dict.fromkeys(of_layers.values()):
        having = [index for index, one in of_layers.items() if one == value]
        shown = ", ".join(map(str, having[:3])) + " ..." * (len(having) > 3)
        told.append(f"{value} in layer{'s' * (len(having) > 1)} {shown}")
    return "; ".join(told)
