"""The experts of a mixture, and what is added beside those that are chosen: under uniform names, each by its number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex

from torch import Tensor

from nnsight.anatomy.layout import Part
from nnsight.anatomy.mlps.apart import read_output, write_output
from nnsight.anatomy.mlps.expert_neurons import MATRICES, ExpertNeurons
from nnsight.anatomy.mlps.inside import Mixture
from nnsight.anatomy.values import read, read_sum, write, write_sum
from nnsight.core.escape import raise_escaped
from nnsight.core.history import user_place
from nnsight.core.no_value import NoValue
from nnsight.errors import BlockError, UnknownIndexError, UnknownNameError, WriteError

if TYPE_CHECKING:
    from nnsight.node import Node


class Experts:
    """The experts of one layer, by their numbers."""

    __slots__ = ("_index", "_mixture", "_root")

    def __init__(self, root: Node, mixture: Mixture, index: int) -> None:
        self._root, self._mixture, self._index = root, mixture, index

    def __len__(self) -> int:
        return self._mixture.count(self._root._module)

    def __getitem__(self, number: SupportsIndex) -> Expert:
        count = len(self)
        try:
            number = index(number)  # a number in `chosen` is a tensor
        except TypeError:
            raise BlockError(
                f"An expert is asked for by its number, not by {number!r}.",
                you_wrote=user_place().source,
                instead=f"model.layers[{self._index}].mlp.experts[3]",
            ) from None
        if not -count <= number < count:
            raise UnknownIndexError(
                f"Layer {self._index} has no expert {number}.",
                you_wrote=user_place().source,
                it_has=f"{count} experts: 0 to {count - 1}",
            )
        return Expert(self._root, self._mixture, number % count, self._index)

    def __setitem__(self, number: Any, value: Any) -> None:
        raise WriteError(
            f"An expert of layer {self._index} is not a value that can be assigned.",
            you_wrote=user_place().source,
            instead=f"mlp.experts[{number!r}].output = ...",
        )

    def __iter__(self) -> Iterator[Expert]:
        return map(self.__getitem__, range(len(self)))

    def __getattr__(self, name: str) -> Any:
        raise _unknown(name, "mlp.experts", "mlp.experts[3].output, or mlp.output, which is the sum")

    def __repr__(self) -> str:
        return f"layer {self._index}.mlp.experts: {len(self)}, computed together in `{self._mixture.path}`"


class Expert(NoValue):
    """One expert of a layer.

    Attributes:
        number: The first is 0.
    """

    __slots__ = ("_index", "_mixture", "_root", "number")

    def __init__(self, root: Node, mixture: Mixture, number: int, index: int) -> None:
        self._root, self._mixture, self.number, self._index = root, mixture, number, index

    @property
    def output(self) -> Tensor:
        """What this expert adds, [prompt, token, model]: times its weight, and 0 for tokens that don't go to it.

        Together with those of the other experts, and `shared.output` where there is one, it is what the MLP adds; where
        a norm stands behind that, what the norm is given. Computed for this, mostly: the model computes the sum alone.
        """
        if self._mixture.is_stacked:
            return read(self._root, self._part())
        return read_output(self._root, self._mixture, self.number, repr(self))

    @output.setter
    def output(self, value: Any) -> None:
        if self._mixture.is_stacked:
            write(self._root, self._part(), value)
        else:
            write_output(self._root, self._mixture, self.number, repr(self), value)

    @property
    def act(self) -> Tensor:
        """The activations of this expert's neurons, [prompt, token, d_mlp]: what its down projection is given.

        0 for tokens that don't go to it, where nothing else can be assigned either. Through `W_out`, times the weight
        of each token and with a bias if there is one, they are `output`. What is changed is computed on from there.
        """
        return self._neurons.read("act")

    @act.setter
    def act(self, value: Any) -> None:
        self._neurons.write("act", value)

    @property
    def pre(self) -> Tensor:
        """What the non-linearity is given for these, [prompt, token, d_mlp]: of a gated expert in the gate."""
        return self._neurons.read("pre")

    @pre.setter
    def pre(self, value: Any) -> None:
        self._neurons.write("pre", value)

    @property
    def W_in(self) -> Tensor:  # noqa: N802  the field's names
        """From the stream to its neurons, [model, d_mlp]: a view of the model's own weight. Of a gated one, ungated."""
        return self._neurons.matrix("W_in")

    @property
    def W_gate(self) -> Tensor:  # noqa: N802
        """From the stream to what the non-linearity of a gated expert is given, [model, d_mlp]: a view."""
        return self._neurons.matrix("W_gate")

    @property
    def W_out(self) -> Tensor:  # noqa: N802
        """From its neurons to the stream, [d_mlp, model]: a view of the model's own weight."""
        return self._neurons.matrix("W_out")

    def effective(self, name: str) -> Tensor:
        """A copy of "W_in", "W_gate" or "W_out" as it is multiplied with, also where it has no view.

        Raises:
            NotOnThisLayerError: There is no such weight, or the matrices of all experts are packed together.
            UnknownNameError: There is no such name.
        """
        if name not in MATRICES:
            raise _unknown(str(name), "mlp.experts[...].effective", ", ".join(MATRICES))
        return self._neurons.effective(name)

    @property
    def _neurons(self) -> ExpertNeurons:
        return ExpertNeurons(self._root, self._mixture, self.number, self._index)

    def _part(self) -> Part:
        """Where it is, in a mixture whose module returns what each expert makes."""
        mixture = self._mixture
        return replace(mixture.slab(self._root._module, self.number), scale=mixture.factor)

    def __getattr__(self, name: str) -> Any:
        raise_escaped()  # an AttributeError of the model's, which came out of the property
        raise _unknown(name, "mlp.experts[...]", ".output, what the expert adds; .act and .pre, its neurons")

    def _names(self) -> tuple[str, str]:
        return repr(self), f"model.{self!r}"

    def __repr__(self) -> str:
        return f"layers[{self._index}].mlp.experts[{self.number}]"


class Shared(NoValue):
    """What a layer's MLP adds beside its experts that are chosen: a shared expert, mostly."""

    __slots__ = ("_index", "_parts", "_root")

    def __init__(self, root: Node, parts: tuple[Part, ...], index: int) -> None:
        self._root, self._parts, self._index = root, parts, index

    @property
    def output(self) -> Tensor:
        """What is added, [prompt, token, model]: the rest of the sum, where no module returns it as it is added."""
        return read_sum(self._root, self._parts)

    @output.setter
    def output(self, value: Any) -> None:
        write_sum(self._root, self._parts, value)

    def __getattr__(self, name: str) -> Any:
        raise_escaped()
        raise _unknown(name, "mlp.shared", ".output, what is added beside the chosen experts")

    def _names(self) -> tuple[str, str]:
        label = f"layers[{self._index}].mlp.shared"
        return label, f"model.{label}"

    def __repr__(self) -> str:
        return f"layers[{self._index}].mlp.shared: {' + '.join(map(str, self._parts))}"


def _unknown(name: str, of: str, instead: str) -> Exception:
    if name.startswith("__"):
        return AttributeError(name)
    return UnknownNameError(f"`{of}` has no `{name}`.", you_wrote=user_place().source, instead=instead)
