"""The two halves of a model that reads with an encoder and answers with a decoder, under uniform names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from nnsight.anatomy.added import Attention
from nnsight.anatomy.layout import Layer, Part
from nnsight.anatomy.parts import module_at
from nnsight.anatomy.values import read, write
from nnsight.core.escape import raise_escaped
from nnsight.core.history import user_place
from nnsight.core.no_value import NoValue
from nnsight.core.spelling import nearest
from nnsight.errors import NotOnThisLayerError, UnknownNameError, WriteError

if TYPE_CHECKING:
    from nnsight.anatomy.uniform import Layers
    from nnsight.node import Node

HALVES = frozenset({"encoder", "decoder"})


class Half(NoValue):
    """An encoder, or a decoder.

    Attributes:
        layers: Its layers, in order.
        embed: The module that looks its tokens up.
        norm: The module behind its last layer.
        output: What comes out of it, [prompt, token, model]: of an encoder, what the decoder reads.
    """

    def __init__(
        self, root: Node, name: str, layers: tuple[Layer, ...], embed: str | None, norm: str | None, output: Part | None
    ) -> None:
        vars(self).update(_root=root, _name=name, _layers=layers, _embed=embed, _norm=norm, _output=output)

    @property
    def layers(self) -> Layers:
        from nnsight.anatomy.uniform import Layers

        return Layers(self._root, self._layers, range(len(self._layers)))

    @property
    def n_layers(self) -> int:
        return len(self._layers)

    @property
    def embed(self) -> Node:
        return self._module("embed", self._embed)

    @property
    def norm(self) -> Node:
        return self._module("norm", self._norm)

    @property
    def output(self) -> Tensor:
        """What the decoder is given of the encoder, [prompt, token, model]; of the decoder, its last layer's output."""
        return read(self._root, self._output or self._layers[-1].output)

    @output.setter
    def output(self, value: Any) -> None:
        write(self._root, self._output or self._layers[-1].output, value)

    def has(self, name: str) -> bool:
        """Whether it has this: "embed", "norm"."""
        return {"embed": self._embed, "norm": self._norm}.get(name) is not None

    def _module(self, name: str, path: str | None) -> Node:
        if path is None:
            raise NotOnThisLayerError(f"The {self._name} has no `{name}`.", you_wrote=user_place().source)
        return module_at(self._root, path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise_escaped()  # an AttributeError of the model's, which came out of a property
        has = [one for one in dir(type(self)) if not one.startswith("_")]
        raise UnknownNameError(
            f"`{self._name}` has no `{name}`.",
            you_wrote=user_place().source,
            nearest=nearest(name, has),
            it_has=", ".join(has),
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "output":
            raise WriteError(
                f"`{self._name}.{name}` is not a value that can be assigned.",
                you_wrote=user_place().source,
                instead=f"{self._name}.layers[i].output = ..., {self._name}.output = ...",
            )
        object.__setattr__(self, name, value)

    def _names(self) -> tuple[str, str]:
        return self._name, f"model.{self._name}"

    def __repr__(self) -> str:
        first = self._layers[0]
        return f"{self._name}: {len(self._layers)} layers, the first is `{first.path}`\n        {first}"

    if TYPE_CHECKING:
        _root: Node
        _name: str
        _layers: tuple[Layer, ...]
        _embed: str | None
        _norm: str | None
        _output: Part | None


class CrossAttention(Attention):
    """The attention of a decoder's layer to what the encoder read; keys and values are of the encoder's tokens."""

    @property
    def _attending(self) -> str | None:
        path: str | None = self._layer.cross_attention
        return path
