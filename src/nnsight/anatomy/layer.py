"""One layer under uniform names: its stream, and what it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from nnsight.anatomy.added import DOES, Attention
from nnsight.anatomy.halves import CrossAttention
from nnsight.anatomy.layout import Layer, Made, Part
from nnsight.anatomy.lens_names import ours
from nnsight.anatomy.parts import module_at
from nnsight.anatomy.values import read, write
from nnsight.core.escape import let_escape, raise_escaped
from nnsight.core.history import add_note, user_place
from nnsight.core.no_value import MadeAnew
from nnsight.errors import NotOnThisLayerError, UnknownNameError, WriteError

if TYPE_CHECKING:
    from nnsight.anatomy.mlps.names import Mlp
    from nnsight.node import Node


_LAYER_VALUES = frozenset({"input", "output"})


class LayerNode(MadeAnew):
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
        """The layer as the model's own module, under the model's own names."""
        return module_at(self._root, self._layer.path)

    @property
    def input(self) -> Tensor:
        """The residual stream before the layer, [prompt, token, model]. Assigning replaces it."""
        return read(self._root, self._stream("input"))

    @input.setter
    def input(self, value: Any) -> None:
        write(self._root, self._stream("input"), value)

    @property
    def output(self) -> Tensor:
        """The residual stream behind the layer, [prompt, token, model]. Assigning replaces it."""
        part = self._layer.output if self._layer.streams == 1 else self._stream("output")
        if (names := part.names) is not None:  # the usual case of `read`, with fewer calls
            try:
                node = self._root._at(names)
                value: Tensor = node._run().read(node._module, "output").output
            except AttributeError as error:  # the model's own
                let_escape(error)
                raise
            return value
        return read(self._root, part)

    @output.setter
    def output(self, value: Any) -> None:
        write(self._root, self._stream("output"), value)

    def _stream(self, name: str) -> Part:
        part: Part = getattr(self._layer, name)
        if self._layer.streams > 1:
            at = "".join(f"[{step!r}]" for step in part.at)
            is_first = name == "input" and part.at == (0, 0)
            where = "input" if is_first else f"{name if name == 'output' else 'inputs'}{at}"
            raise NotOnThisLayerError(
                f"Layer {self.index}, `{self._layer.path}`, has no single `{name}`: it hands "
                f"{self._layer.streams} residual streams on, that are mixed in it.",
                you_wrote=user_place().source,
                instead=f"model.layers[{self.index}].raw.{where}, all of them: an axis more",
            )
        return part

    @property
    def attn(self) -> Attention:
        """What mixes tokens: attention, or what stands in its place (a state space, a convolution)."""
        return Attention(self._root, self._layer, self.index, "attn")

    @property
    def mlp(self) -> Mlp:
        """What works on each token alone: an MLP, or a mixture of experts."""
        from nnsight.anatomy.mlps.names import Mlp  # half a dozen files, for those who ask

        return Mlp(self._root, self._layer, self.index, "mlp")

    @property
    def cross_attn(self) -> Attention:
        """What a decoder's layer takes from what its encoder read."""
        return CrossAttention(self._root, self._layer, self.index, "cross_attn")

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
        """Whether the output is the input with the outputs of `attn`, `cross_attn` and `mlp` added, and no more."""
        return self._layer.streams == 1 and all(isinstance(one, Part) for one in self._layer.made)

    def has(self, name: str) -> bool:
        """Whether the layer has this: "attn", "mlp" or a name below them."""
        first, _, rest = name.partition(".")
        if first not in ("attn", "mlp", "cross_attn"):
            is_stream = first in _LAYER_VALUES and self._layer.streams == 1
            return not rest and (is_stream or (first not in _LAYER_VALUES and first in self.raw))
        is_there = bool(getattr(self._layer, first)) or (first == "attn" and self._layer.attention is not None)
        return is_there and getattr(self, first).has(rest)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_layer" not in vars(self):
            raise AttributeError(name)
        if name == "raw":  # the layer was taken out of the model, which is told
            return module_at(self._root, self._layer.path)
        if name in _LAYER_VALUES:  # an AttributeError of the model's, which came out of the property
            raise_escaped()
        try:
            return getattr(self.raw, name)
        except UnknownNameError as error:
            from nnsight.anatomy.uniform import NAMES  # which is made of layers

            if written := ours(f"model.layers[{self.index}]", name):
                add_note(error, f"Here it is `{written}`.")
            for part in ("attn", "mlp"):
                if not name.startswith("_") and hasattr(type(getattr(self, part)), name):
                    add_note(error, f"`model.layers[{self.index}].{part}.{name}` is one.")
            if name in NAMES:
                add_note(error, f"`model.{name}` is one.")
            raise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer's module, as `raw(...)` does."""
        return self.raw(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _LAYER_VALUES:
            object.__setattr__(self, name, value)
        elif name in DOES:
            raise WriteError(
                f"`layers[{self.index}].{name}` is not a value that can be assigned.",
                you_wrote=user_place().source,
                instead=f"model.layers[{self.index}].{name}.output = ...",
            )
        else:
            setattr(self.raw, name, value)

    def __delattr__(self, name: str) -> None:
        if hasattr(type(self), name):
            super().__delattr__(name)
        else:
            delattr(self.raw, name)

    def _names(self) -> tuple[str, str]:
        return f"layers[{self.index}]", f"model.layers[{self.index}]"

    def _stands_for(self) -> tuple[Any, ...]:
        return self._root, self._layer.path, self.index

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.raw)})

    def __repr__(self) -> str:
        turn = self._layer.turn
        call = "" if turn is None else f", call {turn.index + 1}"
        return f"layer {self.index}, `{self._layer.path}`{call}: {self._layer}"
