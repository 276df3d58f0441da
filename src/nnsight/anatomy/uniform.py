"""One set of names for every language model: `model.layers[i].attn.output`, `model.norm`, `model.project(hidden)`.

They stand beside the model's own names and lead to the same modules. Where each leads was found out by arithmetic
(discover.py); what passes is read and assigned at the module's own ports (node.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnsight.anatomy import attention
from nnsight.anatomy.layout import Layer, Layout, Made, Part
from nnsight.anatomy.sites import Site, site, sites
from nnsight.anatomy.values import module_at, read, read_sum, write, write_sum
from nnsight.core.escape import raise_escaped
from nnsight.core.history import user_place
from nnsight.errors import NotOnThisLayerError, UnknownIndexError, UnknownNameError, WriteError

if TYPE_CHECKING:
    from nnsight.node import Node


class Uniform:
    """A language model, or one run or row of it, under uniform names.

    Values of the residual stream, and what is added to it, are tensors, [prompt, token, model].

    Attributes:
        raw: The model under its own names.
        layers: Its layers, in order.
        embed: The token embedding's module.
        norm: The module that the residual stream goes through behind the last layer.
        unembed: The module that makes logits of it.
    """

    def __init__(self, raw: Node, layout: Layout) -> None:
        self.raw, self._layout = raw, layout

    @property
    def layers(self) -> Layers:
        return Layers(self.raw, self._layout.layers, range(len(self._layout.layers)))

    @property
    def embed(self) -> Node:
        return self._module("embed", self._layout.embed)

    @property
    def norm(self) -> Node:
        return self._module("norm", self._layout.norm)

    @property
    def unembed(self) -> Node:
        return self._module("unembed", self._layout.unembed)

    @property
    def logits(self) -> Tensor:
        """The logits, [prompt, token, vocabulary], scaled and capped as the model does. Assigning replaces them."""
        return read(self.raw, self._layout.logits)

    @logits.setter
    def logits(self, value: Any) -> None:
        write(self.raw, self._layout.logits, value)

    def project(self, hidden: Tensor) -> Tensor:
        """The logits that the model would make of this residual stream behind its last layer, [..., vocabulary].

        Args:
            hidden: [..., model], a layer's output, say: norm, unembedding, scale and soft cap follow.
        """
        for step in self._layout.tail:
            if step.path is not None and step.each:
                heads = module_at(self.raw, step.path)
                hidden = torch.stack([head(hidden) for head in heads], dim=1).flatten(0, 1)
            elif step.path is not None:
                made: Any = module_at(self.raw, step.path)(hidden)
                hidden = made[0] if isinstance(made, tuple) else made
            elif step.cap is not None:
                hidden = step.cap * torch.tanh(hidden / step.cap)
            else:
                hidden = hidden * step.scale
        return hidden

    def sites(self) -> Sites:
        """All places that have a tensor under a uniform name, each with its axes; of which model, it is asked."""
        return Sites(sites(self))

    def site(self, name: str) -> Site:
        """One place by its name, or by TransformerLens's: `layers.3.attn.z`, `blocks.3.attn.hook_z`.

        `.value` is read and assigned in a trace. Their `hook_q` and `hook_k` lead behind the rotation.

        Raises:
            UnknownNameError: The model has no such place.
        """
        return site(self, name)

    @property
    def n_layers(self) -> int:
        return len(self._layout.layers)

    @property
    def n_heads(self) -> int:
        heads = getattr(self._config(), "num_attention_heads", None)
        if heads is None:
            raise NotOnThisLayerError("This model has no attention heads.", you_wrote=user_place().source)
        return int(heads)

    @property
    def n_kv_heads(self) -> int:
        """How many heads keys and values have; fewer than `n_heads` where several share one."""
        config = self._config()
        if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
            return 1  # Falcon, and GPT-BigCode
        names = ("num_key_value_heads", "num_kv_heads")
        return int(next((n for name in names if (n := getattr(config, name, None))), self.n_heads))

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return int(self._config().hidden_size)

    @property
    def d_head(self) -> int:
        return int(getattr(self._config(), "head_dim", None) or self.d_model // self.n_heads)

    @property
    def d_mlp(self) -> int:
        config = self._config()
        return int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * self.d_model)

    @property
    def n_vocab(self) -> int:
        return int(self._config().vocab_size)

    @property
    def W_E(self) -> Tensor:  # noqa: N802  the field's name
        """The token embedding, [vocabulary, model]: the model's own weight."""
        embed: Any = self.embed
        weight: Tensor = embed.weight
        return weight

    @property
    def W_U(self) -> Tensor:  # noqa: N802
        """The unembedding, [model, vocabulary]: a view of the model's own weight."""
        unembed: Any = self.unembed
        weight: Tensor = unembed.weight.T
        return weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("raw", "logits") or name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        raise WriteError(
            f"`{name}` is not a value that can be assigned.",
            you_wrote=user_place().source,
            instead="model.layers[i].output = ..., model.embed.output = ..., model.logits = ...",
        )

    def _config(self) -> Any:
        config: Any = self.raw._module.config
        return config.get_text_config(decoder=True)

    def _module(self, name: str, path: str | None) -> Node:
        if path is None:
            raise NotOnThisLayerError(f"This model has no `{name}`.", you_wrote=user_place().source)
        return module_at(self.raw, path)

    def __repr__(self) -> str:
        layout = self._layout
        kinds = [type(module_at(self.raw, layer.path)._module).__name__ for layer in layout.layers]
        sums = dict.fromkeys(f"        {kind}: {layer}" for kind, layer in zip(kinds, layout.layers, strict=True))
        first = f"layers  {len(layout.layers)}, the first is `{layout.layers[0].path}`"
        tail = f"logits  {' -> '.join(map(str, layout.tail)) or 'the last output'}"
        return "\n".join([f"embed   `{layout.embed}`", first, *sums, tail])


NAMES = frozenset(name for name in vars(Uniform) if not name.startswith("_"))


class UniformName:
    """A uniform name that a scope of the model has: bound to its run, or to one row."""

    def __init__(self, name: str, layout: Layout) -> None:
        self._name, self._layout = name, layout

    def __get__(self, scope: Any, owner: type | None = None) -> Any:
        uniform = Uniform(scope, self._layout)
        return uniform if self._name == "uniform" else getattr(uniform, self._name)

    def __set__(self, scope: Any, value: Any) -> None:
        setattr(Uniform(scope, self._layout), self._name, value)


class Sites(tuple[Site, ...]):
    """Places of a model, one a line where they are printed."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "\n".join(map(repr, self))


class Layers:
    """The layers of a model, or some of them."""

    __slots__ = ("_indices", "_layers", "_root")

    def __init__(self, root: Node, layers: tuple[Layer, ...], indices: Sequence[int]) -> None:
        self._root, self._layers, self._indices = root, layers, indices

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return Layers(self._root, self._layers, self._indices[key])
        if isinstance(key, str):
            raise TypeError(f"a layer is asked for by its number, `model.layers[3]`, not by {key!r}")
        try:
            return self._node(self._indices[key])
        except IndexError:
            count = len(self._indices)
            raise UnknownIndexError(
                f"There is no layer {key}.",
                you_wrote=user_place().source,
                it_has=f"{count} layers: 0 to {count - 1}, or -{count} to -1",
            ) from None

    def _node(self, index: int) -> LayerNode:
        return LayerNode(self._root, self._layers[index], index)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[LayerNode]:
        return map(self._node, self._indices)

    def having(self, name: str) -> Layers:
        """The layers that have this: `model.layers.having("attn")`, `"mlp"`, `"attn.pattern"`."""
        return Layers(self._root, self._layers, [node.index for node in self if node.has(name)])

    def __repr__(self) -> str:
        return "\n".join(map(repr, self)) or "no layers"


class LayerNode:
    """One layer. Names that are not here are the module's own, as in `raw`.

    Attributes:
        raw: The layer's module under its own names.
        index: The first layer is 0.
    """

    index: int
    _root: Node
    _layer: Layer

    def __init__(self, root: Node, layer: Layer, index: int) -> None:
        own = vars(self)
        own["_root"], own["_layer"], own["index"] = root, layer, index

    @property
    def raw(self) -> Node:
        return module_at(self._root, self._layer.path)

    @property
    def input(self) -> Tensor:
        """The residual stream before the layer, [prompt, token, model]. Assigning replaces it."""
        return read(self._root, self._layer.input)

    @input.setter
    def input(self, value: Any) -> None:
        write(self._root, self._layer.input, value)

    @property
    def output(self) -> Tensor:
        """The residual stream behind the layer, [prompt, token, model]. Assigning replaces it."""
        return read(self._root, self._layer.output)

    @output.setter
    def output(self, value: Any) -> None:
        write(self._root, self._layer.output, value)

    @property
    def attn(self) -> Attention:
        """What mixes tokens: attention, or what stands in its place (a state space, a convolution)."""
        return Attention(self._root, self._layer, self.index, "attn")

    @property
    def mlp(self) -> Added:
        """What works on each token alone: an MLP, or a mixture of experts."""
        return Added(self._root, self._layer, self.index, "mlp")

    @property
    def words(self) -> str:
        """How the output is made of the input, in words: `input + attn.output[0] + mlp.output`."""
        return str(self._layer)

    @property
    def made(self) -> Made:
        """The same as data: what is added, and the norms' paths and numbers that are applied to the whole, in order."""
        return self._layer.made

    @property
    def is_plain(self) -> bool:
        """Whether the output is the input with `attn.output` and `mlp.output` added, and nothing else."""
        return all(isinstance(one, Part) for one in self._layer.made)

    def has(self, name: str) -> bool:
        """Whether the layer has this: "attn", "mlp" or a name below them."""
        first, _, rest = name.partition(".")
        if first not in ("attn", "mlp"):
            return not rest and (first in ("input", "output") or first in self.raw)
        return bool(getattr(self._layer, first)) and getattr(self, first).has(rest)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_layer" not in vars(self):
            raise AttributeError(name)
        if name in _LAYER_VALUES:  # an AttributeError of the model's, which came out of the property
            raise_escaped()
        return getattr(self.raw, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _LAYER_VALUES:
            object.__setattr__(self, name, value)
        else:
            setattr(self.raw, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.raw)})

    def __repr__(self) -> str:
        return f"layer {self.index}, `{self._layer.path}`: {self._layer}"


_LAYER_VALUES = frozenset({"input", "output"})


class Added:
    """What a layer adds to the residual stream by mixing tokens (`attn`), or for each token alone (`mlp`)."""

    def __init__(self, root: Node, layer: Layer, index: int, name: str) -> None:
        vars(self).update(_root=root, _layer=layer, _index=index, _name=name)

    @property
    def input(self) -> Tensor:
        """What the module in which this is computed is given, [prompt, token, model]: the stream behind a norm, mostly.

        Assigning replaces it.
        """
        return read(self._root, self._input())

    @input.setter
    def input(self, value: Any) -> None:
        write(self._root, self._input(), value)

    def _input(self) -> Part:
        part: Part | None = getattr(self._layer, f"{self._name}_input")
        if part is None:
            raise NotOnThisLayerError(
                f"Layer {self._index}, `{self._layer.path}`, has no single `{self._name}.input`.",
                you_wrote=user_place().source,
                it_is=" + ".join(map(str, self.parts)),
                instead=f'for layer in model.layers.having("{self._name}.input"):',
            )
        return part

    @property
    def output(self) -> Tensor:
        """Exactly what is added to the residual stream, [prompt, token, model]: behind a norm and a scale, if any."""
        return read_sum(self._root, self.parts)

    @output.setter
    def output(self, value: Any) -> None:
        write_sum(self._root, self.parts, value)

    def has(self, name: str) -> bool:
        if name == "input":
            return getattr(self._layer, f"{self._name}_input") is not None
        return name in ("", "output") and bool(getattr(self._layer, self._name))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The modules' values whose sum it is."""
        parts: tuple[Part, ...] = getattr(self._layer, self._name)
        if not parts:
            what = {"attn": "mixes tokens", "mlp": "works on each token alone"}[self._name]
            raise NotOnThisLayerError(
                f"Layer {self._index}, `{self._layer.path}`, has no `{self._name}`: nothing in it {what}.",
                you_wrote=user_place().source,
                it_is=str(self._layer),
                instead=f'for layer in model.layers.having("{self._name}"):',
            )
        return parts

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise_escaped()  # an AttributeError of the model's, which came out of a property
        near = difflib.get_close_matches(name, [one for one in dir(type(self)) if not one.startswith("_")], n=1)
        raise UnknownNameError(
            f"`layers[{self._index}].{self._name}` has no `{name}`.",
            you_wrote=user_place().source,
            nearest=", ".join(f"`{one}`" for one in near),
            instead=f"layers[{self._index}].raw, for the module's own names",
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(vars(type(self)).get(name, vars(Added).get(name)), property):
            getattr(self, name)
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        parts = " + ".join(map(str, getattr(self._layer, self._name))) or "nothing"
        return f"layer {self._index}.{self._name}: {parts}"


class Attention(Added):
    """The attention of a layer: what it adds, and what is inside."""

    @property
    def q(self) -> Tensor:
        """The queries, [prompt, token, head, d_head], after rotary embedding."""
        return self._read("q")

    @q.setter
    def q(self, value: Any) -> None:
        self._write("q", value)

    @property
    def k(self) -> Tensor:
        """The keys, [prompt, token, kv_head, d_head], after rotary embedding, with those of a cache."""
        return self._read("k")

    @k.setter
    def k(self, value: Any) -> None:
        self._write("k", value)

    @property
    def v(self) -> Tensor:
        """The values, [prompt, token, kv_head, d_head], with those of a cache."""
        return self._read("v")

    @v.setter
    def v(self, value: Any) -> None:
        self._write("v", value)

    @property
    def z(self) -> Tensor:
        """What each head has gathered, [prompt, token, head, d_head], before the output projection."""
        return self._read("z")

    @z.setter
    def z(self, value: Any) -> None:
        self._write("z", value)

    @property
    def scores(self) -> Tensor:
        """What softmax is given, [prompt, head, query, key]: scaled, capped, masked. Has the layer attend eagerly."""
        return self._read("scores")

    @scores.setter
    def scores(self, value: Any) -> None:
        self._write("scores", value)

    @property
    def pattern(self) -> Tensor:
        """How much each query attends to each key, [prompt, head, query, key]. Has the layer attend eagerly."""
        return self._read("pattern")

    @pattern.setter
    def pattern(self, value: Any) -> None:
        self._write("pattern", value)

    def has(self, name: str) -> bool:
        return super().has(name) or (name in INTERIOR and self._layer.attention is not None)

    @property
    def module(self) -> Node:
        """The module in whose forward attention is computed, under its own names."""
        return self._module("module")

    def _read(self, name: str) -> Tensor:
        return attention.read(self._module(name), name)

    def _write(self, name: str, value: Any) -> None:
        attention.write(self._module(name), name, value)

    def _module(self, name: str) -> Node:
        path = self._layer.attention
        if path is None:
            raise NotOnThisLayerError(
                f"Layer {self._index}, `{self._layer.path}`, has no `attn.{name}`: no attention is computed in it.",
                you_wrote=user_place().source,
                it_is=str(self._layer),
                instead=f'for layer in model.layers.having("attn.{name}"):',
            )
        return module_at(self._root, path)


INTERIOR = attention.NAMES
