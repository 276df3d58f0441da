"""One set of names for every language model: `model.layers[i].attn.output`, `model.norm`, `model.project(hidden)`.

They stand beside the model's own names and lead to the same modules. Where each leads was found out by arithmetic
(discover.py); what passes is read and assigned at the module's own ports (node.py).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, overload

import torch
from torch import Tensor, nn

from nnsight.anatomy.checked import check_tensor
from nnsight.anatomy.effective import is_plain
from nnsight.anatomy.halves import Half
from nnsight.anatomy.layer import LayerNode
from nnsight.anatomy.layout import Layer, Layout, Part, kept
from nnsight.anatomy.numbers import Numbers
from nnsight.anatomy.parts import module_at
from nnsight.anatomy.sites import Site, site, sites
from nnsight.anatomy.turns import in_turn
from nnsight.anatomy.values import read, write
from nnsight.core.escape import raise_escaped
from nnsight.core.history import no_such_name, user_place
from nnsight.core.specs import shape_of, show_shape
from nnsight.errors import BlockError, NotOnThisLayerError, UnknownIndexError, WriteError

if TYPE_CHECKING:
    from nnsight.node import Node

_FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


class Uniform(Numbers):
    """A language model, or one run or row of it, under uniform names.

    Values of the residual stream, and what is added to it, are tensors, [prompt, token, model].

    Attributes:
        raw: The model under its own names.
        layers: Its layers, in order.
        embed: The token embedding's module.
        norm: The module that the residual stream goes through behind the last layer.
        unembed: The module that makes logits of it.

    Where an encoder reads and a decoder answers, these are the decoder's.
    """

    raw: Node
    _layout: Layout

    def __init__(self, raw: Node, layout: Layout) -> None:
        own = vars(self)  # `__setattr__` is for values
        own["raw"], own["_layout"] = raw, layout

    @property
    def layers(self) -> Layers:
        """The layers, which hand one stream on: by number, by a slice, or `having` something."""
        layers = kept(self.raw._module, self._layout.layers)
        return Layers(self.raw, layers, range(len(layers)))

    @property
    def encoder(self) -> Half:
        """The half that reads, where a decoder answers: its `layers`, `embed`, `norm` and `output`."""
        half = self._layout.encoder
        if half is None:
            raise NotOnThisLayerError(
                "This model has no encoder beside its layers.",
                you_wrote=user_place().source,
                instead="model.layers, which are all that it has",
            )
        return Half(self.raw, "encoder", kept(self.raw._module, half.layers), half.embed, half.norm, half.output)

    @property
    def decoder(self) -> Half:
        """The half that answers, where an encoder reads; `model.layers` are its layers."""
        layout = self._layout
        if layout.encoder is None:
            self.encoder  # noqa: B018  which says that there are no halves
        return Half(self.raw, "decoder", kept(self.raw._module, layout.layers), layout.embed, layout.norm, None)

    @property
    def embed(self) -> Node:
        """The module that looks up the tokens' vectors."""
        return self._module("embed", self._layout.embed)

    @property
    def norm(self) -> Node:
        """The norm behind the last layer."""
        return self._module("norm", self._layout.norm)

    @property
    def unembed(self) -> Node:
        """The module that makes logits of the normed stream."""
        return self._module("unembed", self._layout.unembed)

    @property
    def logits(self) -> Tensor:
        """The logits, [prompt, token, vocabulary], scaled and capped as the model does. Assigning replaces them.

        Of a classifier, those of its classes: [prompt, class], or [prompt, token, class].
        """
        return read(self.raw, self._logits())

    @logits.setter
    def logits(self, value: Any) -> None:
        write(self.raw, self._logits(), value)

    def _logits(self) -> Part:
        if self._layout.logits is None:
            raise NotOnThisLayerError(
                f"A {type(self.raw._module).__name__} returns no logits.",
                you_wrote=user_place().source,
                instead="model.layers[-1].output, the stream behind its last layer; or tracer.result",
            )
        return self._layout.logits

    def project(self, hidden: Tensor) -> Tensor:
        """The logits that the model would make of this residual stream behind its last layer, [..., vocabulary].

        Args:
            hidden: [..., model], a layer's output, say: norm, unembedding, scale and soft cap follow.

        Raises:
            NotOnThisLayerError: The model makes no logits of each token.
        """
        if self._layout.layers[0].streams > 1:
            raise NotOnThisLayerError(
                f"The layers of a {type(self.raw._module).__name__} hand several residual streams on: no single one of "
                "them becomes the logits.",
                you_wrote=user_place().source,
                instead="model.unembed(model.norm(hidden)), of what the model itself makes of all of them",
            )
        if self._layout.tail is None:
            raise NotOnThisLayerError(
                f"A {type(self.raw._module).__name__} makes no logits of each token's stream.",
                you_wrote=user_place().source,
                instead="model.layers[-1].output, which is what its head is given, mostly behind model.norm",
            )
        check_tensor(hidden, "What `model.project` is given")
        for step in self._layout.tail:
            if step.path is not None and step.each:
                heads = module_at(self.raw, step.path)
                hidden = torch.stack([head(hidden) for head in heads], dim=1).flatten(0, 1)
            elif step.path is not None:
                module = module_at(self.raw, step.path)
                made: Any = module(_narrowed(hidden, module._module))
                hidden = made[0] if isinstance(made, tuple) else made
            elif step.bias is not None:
                hidden = hidden + self.raw._module.get_buffer(step.bias)
            elif step.by is not None:
                hidden = hidden * self.raw._module.get_parameter(step.by)
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
    def W_E(self) -> Tensor:  # noqa: N802  the field's name
        """The token embedding, [vocabulary, model]: the model's own weight."""
        return _own_weight(self.embed, "W_E")

    @property
    def W_U(self) -> Tensor:  # noqa: N802
        """The unembedding, [model, vocabulary]: a view of the model's own weight."""
        return _own_weight(self.unembed, "W_U").T

    def __getattr__(self, name: str) -> Any:
        if name == "logits":  # an AttributeError of the model's, which came out of the property
            raise_escaped()
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("raw", "logits") or name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        raise WriteError(
            f"`{name}` is not a value that can be assigned.",
            you_wrote=user_place().source,
            instead="model.layers[i].output = ..., model.embed.output = ..., model.logits = ...",
        )

    def _module(self, name: str, path: str | None) -> Node:
        if path is None:
            raise NotOnThisLayerError(f"This model has no `{name}`.", you_wrote=user_place().source)
        return module_at(self.raw, path)

    def __repr__(self) -> str:
        layout, layers = self._layout, kept(self.raw._module, self._layout.layers)
        kinds = [type(module_at(self.raw, layer.path)._module).__name__ for layer in layers]
        sums = dict.fromkeys(f"        {kind}: {layer}" for kind, layer in zip(kinds, layers, strict=True))
        first = f"layers  {len(layers)}, the first is `{layout.layers[0].path}`"
        steps = () if layout.tail is None else layout.tail
        tail = f"logits  {' -> '.join(map(str, steps)) or 'the last output'}" if layout.tail is not None else ""
        reads = [] if layout.encoder is None else [repr(self.encoder)]
        return "\n".join([*reads, f"embed   `{layout.embed}`", first, *sums, *filter(None, [tail])])


NAMES = frozenset(name for name in dir(Uniform) if not name.startswith("_"))


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


def _narrowed(hidden: Tensor, module: nn.Module) -> Tensor:
    """A stream that is wider than the weights of what makes logits of it, as Mamba's is: the model narrows it too."""
    weight = module.weight if type(module) is nn.Linear else hidden
    return hidden.to(weight.dtype) if {weight.dtype, hidden.dtype} <= _FLOATS else hidden


class Layers:
    """The layers of a model, or some of them."""

    __slots__ = ("_indices", "_layers", "_root")

    def __init__(self, root: Node, layers: tuple[Layer, ...], indices: Sequence[int]) -> None:
        self._root, self._layers, self._indices = root, layers, indices

    @overload
    def __getitem__(self, key: int) -> LayerNode: ...
    @overload
    def __getitem__(self, key: slice) -> Layers: ...

    def __getitem__(self, key: Any) -> Any:
        try:
            if type(key) is int:  # the usual case
                index = self._indices[key]
                layer = self._layers[index]
                root = self._root if layer.turn is None else in_turn(self._root, layer.turn)
                return LayerNode(root, layer, index)
            if isinstance(key, slice):
                return Layers(self._root, self._layers, self._indices[key])
            if not hasattr(key, "__index__"):
                raise self._no_number(key)
            return self[operator.index(key)]
        except IndexError:
            count = len(self._indices)
            raise UnknownIndexError(
                f"There is no layer {key}.",
                you_wrote=user_place().source,
                it_has=f"{count} layers: 0 to {count - 1}, or -{count} to -1",
            ) from None

    def _no_number(self, key: Any) -> BlockError:
        """For what was given for the number of a layer: several, or the half of twelve, or a text."""
        is_whole = key.is_integer() if isinstance(key, float) else isinstance(key, str) and key.isdecimal()
        whole = int(key) if is_whole else 3
        several = f"[model.layers[i] for i in {key!r}]"
        return BlockError(
            "A layer is asked for by its number, and several by a slice.",
            you_wrote=user_place().source,
            instead=several if isinstance(key, (tuple, list)) else f"model.layers[{whole}]",
        )

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        at = self[key].index if isinstance(key, int) else 0  # the first one is shown for a slice
        above, _, name = self._layers[at].path.rpartition(".")
        child = name if name.isdigit() else repr(name)
        raise WriteError(
            "A layer is a module, and not assigned under its uniform name.",
            you_wrote=user_place().source,
            instead=f"model.layers[{at}].output = ..., or for another module model.get({above!r})[{child}] = ...",
        )

    def __delitem__(self, key: Any) -> NoReturn:
        at = self[key].index if isinstance(key, int) else 0
        raise BlockError(
            "A layer can't be taken out of its place.",
            you_wrote=user_place().source,
            instead=f"model.layers[{at}].output = model.layers[{at}].input, for it to change nothing",
        )

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[LayerNode]:
        return map(self.__getitem__, range(len(self._indices)))

    def __getattr__(self, name: str) -> NoReturn:
        raise no_such_name(
            name,
            f"`model.layers` has no `{name}`: it is all of them.",
            f'model.layers[{name}]    or model.site("layers.{name}.output").value'
            if name.isdigit()
            else f"model.layers[3].{name}    or [layer.{name} for layer in model.layers]",
        )

    def having(self, name: str) -> Layers:
        """The layers that have this: `model.layers.having("attn")`, `"mlp"`, `"attn.pattern"`."""
        return Layers(self._root, self._layers, [node.index for node in self if node.has(name)])

    def __repr__(self) -> str:
        return "\n".join(map(repr, self)) or "no layers"


def _own_weight(node: Any, name: str) -> Tensor:
    """The weight of a module; an adapter's layer works with more than the one that it shows."""
    module = node._module
    if "base_layer" in module._modules:
        raise NotOnThisLayerError(
            f"`{name}` is no weight of the model alone: an adapter stands at `{node._label}`.",
            you_wrote=user_place().source,
            instead=f"model.{node._label}.base_layer.weight, without it; or model.load_adapter(None)",
        )
    weight: Tensor = node.weight
    if not is_plain(weight):
        raise NotOnThisLayerError(
            f"`{name}` is not kept as a matrix of numbers: `{node._label}`, a {type(module).__name__}, is quantized.",
            you_wrote=user_place().source,
            it_is=show_shape(shape_of(weight)),
            instead="model.project(hidden), which is right all the same" if name == "W_U" else None,
        )
    return weight
