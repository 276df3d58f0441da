"""What attention has of each of its heads: weights, biases, and what it adds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from torch import Tensor

from nnsight.anatomy.effective import check_name
from nnsight.anatomy.heads.result import read_result, write_result
from nnsight.anatomy.heads.weights import Heads
from nnsight.anatomy.layout import Layer
from nnsight.core.history import user_place
from nnsight.errors import WriteError

if TYPE_CHECKING:
    from nnsight.node import Node

T = TypeVar("T", Tensor, "Tensor | None")
Self = TypeVar("Self", bound="_Parameter[Any]")


class _Parameter(Generic[T]):
    """A part of a parameter: a view, which is written into, and not assigned."""

    def __init__(self, name: str, what: str) -> None:
        self._name, self.__doc__ = name, what

    @overload
    def __get__(self: Self, node: None, owner: type) -> Self: ...
    @overload
    def __get__(self, node: HeadNames, owner: type) -> T: ...

    def __get__(self, node: HeadNames | None, owner: type) -> Any:
        if node is None:
            return self
        heads, letter = node._heads(), self._name[-1].lower()
        return heads.weight(letter) if self._name[0] == "W" else heads.bias(letter)

    def __set__(self, node: HeadNames, value: Any) -> None:
        raise WriteError(
            f"`{node._name}.{self._name}` is a view of the model's parameter: it is written into, and not assigned.",
            you_wrote=user_place().source,
            instead=f"with torch.no_grad(): layer.{node._name}.{self._name}[:] = ...",
        )


class _Size:
    """A number of a layer's own heads."""

    def __init__(self, name: str, what: str) -> None:
        self._name, self.__doc__ = name, what

    @overload
    def __get__(self, node: None, owner: type) -> _Size: ...
    @overload
    def __get__(self, node: HeadNames, owner: type) -> int: ...

    def __get__(self, node: HeadNames | None, owner: type) -> Any:
        return self if node is None else getattr(node._heads().needed_sizes(self._name), SIZES[self._name])

    def __set__(self, node: HeadNames, value: Any) -> None:
        raise WriteError(
            f"`{node._name}.{self._name}` is a number of the model's, and not a value that can be assigned.",
            you_wrote=user_place().source,
        )


_EFFECTIVE = tuple(f"{kind}_{letter}" for kind in "Wb" for letter in "QKVO")
SIZES = {"n_heads": "heads", "n_kv_heads": "kv_heads", "d_head": "d_head"}  # what Sizes calls them


class HeadNames:
    """The names of what belongs to each head of a layer's attention.

    Weights and biases are views of the model's own parameters: writing into one writes the parameter. They are had
    outside of a trace too; before the weights are loaded (`model.dispatch()`), they are on `meta`.
    """

    _root: Node
    _layer: Layer
    _index: int
    _name: str

    @property
    def _attending(self) -> str | None:
        raise NotImplementedError

    W_Q: _Parameter[Tensor] = _Parameter("W_Q", "What makes queries of the input, [head, model, d_head]: a view.")
    W_K: _Parameter[Tensor] = _Parameter("W_K", "What makes keys of the input, [kv_head, model, d_head]: a view.")
    W_V: _Parameter[Tensor] = _Parameter("W_V", "What makes values of the input, [kv_head, model, d_head]: a view.")
    W_O: _Parameter[Tensor] = _Parameter("W_O", "What makes of z what is added, [head, d_head, model]: a view.")
    b_Q: _Parameter[Tensor | None] = _Parameter("b_Q", "What is added to queries, [head, d_head]; None: nothing is.")  # noqa: N815
    b_K: _Parameter[Tensor | None] = _Parameter("b_K", "What is added to keys, [kv_head, d_head]; None: nothing is.")  # noqa: N815
    b_V: _Parameter[Tensor | None] = _Parameter("b_V", "What is added to values, [kv_head, d_head]; None: nothing is.")  # noqa: N815
    b_O: _Parameter[Tensor | None] = _Parameter("b_O", "What is added behind `W_O`, [model]; None: nothing is.")  # noqa: N815

    n_heads = _Size("n_heads", "How many heads of queries this layer's attention has.")
    n_kv_heads = _Size("n_kv_heads", "How many heads its keys and values have.")
    d_head = _Size("d_head", "How wide the queries and keys of a head are.")

    def effective(self, name: str) -> Tensor | None:
        """A copy of a weight or a bias as the module multiplies with it, and adds it: also where it has no view.

        A quantised matrix comes dequantised, in the type in which the module returns; an adapted one with its
        adapters, a parametrised one as it is made. A module that rounds its inputs too makes with this what it
        returns but for that rounding. The model is called with the identity for it.

        Args:
            name: "W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V" or "b_O".

        Returns:
            Of the shape that the view has: `[head, model, d_head]`, of "W_O" `[head, d_head, model]`; biases
            `[head, d_head]`, "b_O" `[model]`, and None where nothing is added.

        Raises:
            NotOnThisLayerError: No module of this layer's multiplies with it.
            UnknownNameError: There is no such name.
        """
        check_name(name, _EFFECTIVE, self._name, "weights and biases")
        heads, letter = self._heads(), name[-1].lower()
        return heads.effective_weight(letter) if name[0] == "W" else heads.effective_bias(letter)

    @property
    def result(self) -> Tensor:
        """What each head adds, [prompt, token, head, model]: its `z` through its `W_O`.

        Made when it is asked for. Summed over heads, with `b_O`, it is what the output projection returns. Where that
        is quantised, adapted or parametrised, it is what that makes of each head's part alone. Assigning replaces the
        sum.
        """
        return read_result(self._heads(), self._result)

    @result.setter
    def result(self, value: Any) -> None:
        write_result(self._heads(), self._result, value)

    @property
    def _result(self) -> str:
        return f"layers[{self._index}].{self._name}.result"

    def _heads(self) -> Heads:
        layer = self._layer
        if layer.attention != self._attending:
            layer = replace(layer, attention=self._attending)
        return Heads(self._root, layer, self._name)

    def _has_of_heads(self, name: str) -> bool:
        if name in SIZES:
            return self._heads().sizes is not None
        if name == "result":
            return not self._heads().lacks_result()
        return not self._heads().lacks(name[-1].lower())


OF_HEADS = tuple(name for name in vars(HeadNames) if not name.startswith("_") and name != "effective")
