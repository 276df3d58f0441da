"""`W_Q`, `W_K`, `W_V`, `W_O` and their biases: views of the model's own parameters, head by head."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nnsight.anatomy.effective import (
    Call,
    caller,
    constant_of,
    input_like,
    matrix_of,
    why_not_by_heads,
    widths_of,
)
from nnsight.anatomy.heads.known import projections_of
from nnsight.anatomy.heads.matrices import Matrix, Projections, Sizes, Stretch, stretch_of
from nnsight.anatomy.heads.sizes import numbers_of, sizes_in
from nnsight.anatomy.layout import Layer, is_there
from nnsight.anatomy.parts import module_at
from nnsight.core.history import user_place
from nnsight.core.unloaded import Unloaded
from nnsight.errors import NotOnThisLayerError

if TYPE_CHECKING:
    from nnsight.node import Node

LETTERS = ("q", "k", "v", "o")
_UNTOLD = "how many heads there are, and how wide, can't be told from its config and the shapes of its weights"
_BIAS = "bias"  # of all classes that torch and transformers have for a matrix


class Heads:
    """Where the weights of one layer's heads stand, in one model.

    Attributes:
        found: What was found in a tiny model, if its attention could be looked into.
        sizes: The heads, if their number and width could be told.
    """

    def __init__(self, root: Node, layer: Layer, called: str = "attn") -> None:
        self._root, self._layer, self._called = root, layer, called
        found = projections_of(root._module, layer)
        self.found = found if isinstance(found, Projections) else None
        self._unseen = found if isinstance(found, str) else ""
        self.sizes = None if self.found is None else self._sizes(self.found)

    def lacks(self, letter: str) -> str:
        """Why there is no weight of this letter: "q", "k", "v" or "o". An empty string where there is one."""
        matrix = self._there(letter)
        if isinstance(matrix, str):
            return matrix
        if not self.is_plain(matrix):
            return f"{self._named(matrix)}, has no plain matrix: it is quantized, adapted or parametrized"
        return _UNTOLD if self.sizes is None else ""

    def lacks_result(self) -> str:
        """Why it can't be told what each head adds. An empty string where it can."""
        matrix = self._there("o")
        if isinstance(matrix, str):
            return matrix
        if self.sizes is None:
            return _UNTOLD
        if self.is_plain(matrix):
            return ""
        n_in = self.sizes.heads * self.sizes.d_value
        why = why_not_by_heads(self.module(matrix), self._root._module, n_in, self.sizes.heads)
        return why and f"{self._named(matrix)}, is quantized, adapted or parametrized: {why}"

    def _there(self, letter: str) -> Matrix | str:
        """The matrix of this letter, plain or not, or why there is none."""
        if self.found is None:
            return self._unseen
        matrix = self.found.matrix(letter)
        if matrix is None:
            return self.found.lacks[letter]
        return matrix if self._has(matrix) else f"another module stands in its place, without `{self._path(matrix)}`"

    def is_plain(self, matrix: Matrix) -> bool:
        """Whether its weight is an ordinary parameter, of which there are views."""
        return _parameter(self.module(matrix), matrix) is not None

    def _named(self, matrix: Matrix) -> str:
        return f"`{self._path(matrix)}`, a {type(self.module(matrix)).__name__}"

    def needed_sizes(self, name: str) -> Sizes:
        """The heads, for who needs their number or width: `name`.

        Raises:
            NotOnThisLayerError: They couldn't be told.
        """
        if self.sizes is None:
            raise NotOnThisLayerError(
                f"There is no `{self._called}.{name}` on this layer, `{self._layer.path}`.",
                you_wrote=user_place().source,
                because=_UNTOLD if self.found is not None else self._unseen,
                instead=f'for layer in model.layers.having("{self._called}.{name}"):',
            )
        return self.sizes

    def weight(self, letter: str) -> Tensor:
        """[head, model, d_head] for "q", "k", "v"; [head, d_head, model] for "o"."""
        matrix = self.matrix(letter)
        weight: Tensor = getattr(self.node(matrix), matrix.weight)
        return self._of_heads(weight.mT if matrix.out_first else weight, matrix, letter)

    def effective_weight(self, letter: str) -> Tensor:
        """The same as a copy, also where there is no view: what the module multiplies with."""
        matrix = self._effective(letter, "W")
        if self.is_plain(matrix):
            return self.weight(letter).detach().clone()
        with torch.no_grad():
            made = matrix_of(*self._asked(matrix))
        return self._of_heads(made, matrix, letter)

    def effective_bias(self, letter: str) -> Tensor | None:
        """What the module adds, as a copy, [head, d_head], or [model] for "o"; None: nothing."""
        matrix = self._effective(letter, "b")
        if self.is_plain(matrix):
            bias = self.bias(letter)
            return None if bias is None else bias.detach().clone()
        with torch.no_grad():
            made = constant_of(*self._asked(matrix))
        if not bool(made.any()):
            return None
        return made if letter == "o" else _cut(made, self._stretch(matrix, letter), 0)

    def _asked(self, matrix: Matrix) -> tuple[Call, Tensor, int]:
        """What is called to learn of a matrix, what its inputs are like, and how many there are."""
        module = self.module(matrix)
        return caller(self.node(matrix)), input_like(module, self._root._module), _widths(module, matrix)[0]

    def _effective(self, letter: str, kind: str) -> Matrix:
        matrix = self._there(letter)
        if isinstance(matrix, str):
            because = matrix
        elif not _is_told(self.module(matrix), matrix):
            because = f"{self._named(matrix)}, does not say how many inputs it has"
        elif self.sizes is None:
            because = _UNTOLD
        else:
            return matrix
        raise self._missing(f'effective("{kind}_{letter.upper()}")', because, f"{kind}_{letter.upper()}")

    def _of_heads(self, outs_last: Tensor, matrix: Matrix, letter: str) -> Tensor:
        if letter == "o":
            assert self.sizes is not None
            return outs_last.unflatten(0, (self.sizes.heads, self.sizes.d_value))
        return _cut(outs_last, self._stretch(matrix, letter), 1).movedim(1, 0)

    def bias(self, letter: str) -> Tensor | None:
        """[head, d_head] for "q", "k", "v"; [model] for "o". None where there is none."""
        matrix = self.matrix(letter, f"b_{letter.upper()}")
        name = self.bias_name(matrix)
        if name is None:
            return None
        bias: Tensor = getattr(self.node(matrix), name)
        return bias if letter == "o" else _cut(bias, self._stretch(matrix, letter), 0)

    def bias_name(self, matrix: Matrix) -> str | None:
        """The parameter that is its bias: the model's own module may have one that its config does not tell of."""
        name = matrix.bias or _BIAS
        return None if self.module(matrix)._parameters.get(name) is None else name

    def cut(self, outputs: Tensor, letter: str) -> Tensor:
        """The heads in what the matrix of this letter returns, [..., out]: [..., head, d_head], a view."""
        return _cut(outputs, self._stretch(self.matrix(letter), letter), -1)

    def matrix(self, letter: str, name: str = "") -> Matrix:
        """The matrix of this letter, which has views.

        Raises:
            NotOnThisLayerError: There is none.
        """
        matrix, because = self._there(letter), self.lacks(letter)
        if because or isinstance(matrix, str):
            name = name or f"W_{letter.upper()}"
            is_there = not isinstance(matrix, str) and self.sizes is not None and _is_told(self.module(matrix), matrix)
            raise self._missing(name, because, name, copy=is_there)
        return matrix

    def projection(self) -> Matrix:
        """The matrix that z goes through, plain or not.

        Raises:
            NotOnThisLayerError: What each head adds can't be told.
        """
        matrix, because = self._there("o"), self.lacks_result()
        if because or isinstance(matrix, str):
            is_there = not isinstance(matrix, str) and self.sizes is not None
            raise self._missing("result", because, "result", z=is_there)
        return matrix

    def _missing(
        self, name: str, because: str, having: str, *, copy: bool = False, z: bool = False
    ) -> NotOnThisLayerError:
        called = self._called
        near = f'{called}.z, each head\'s part times layer.{called}.effective("W_O"), which is near that' if z else None
        return NotOnThisLayerError(
            f"There is no `{called}.{name}` on this layer, `{self._layer.path}`.",
            you_wrote=user_place().source,
            because=because,
            a_copy=f'layer.{called}.effective("{name}")' if copy else None,
            there_is=near,
            instead=f'for layer in model.layers.having("{called}.{having}"):',
        )

    def node(self, matrix: Matrix, root: Node | None = None) -> Node:
        """Its module: of the model, or of one run of it."""
        return module_at(self._root if root is None else root, self._path(matrix))

    def _path(self, matrix: Matrix) -> str:
        return f"{self._layer.path}.{matrix.path}"

    def module(self, matrix: Matrix) -> nn.Module:
        return self._root._module.get_submodule(self._path(matrix))

    def _has(self, matrix: Matrix) -> bool:
        return is_there(self._root._module, self._path(matrix))

    def _stretch(self, matrix: Matrix, letter: str) -> Stretch:
        assert self.sizes is not None
        stretch = stretch_of(matrix, letter, self.sizes, _widths(self.module(matrix), matrix)[1])
        assert stretch is not None  # that it fits is how the sizes were told
        return stretch

    def _sizes(self, found: Projections) -> Sizes | None:
        widths: dict[str, int] = {}
        for letter in LETTERS:
            matrix = found.matrix(letter)
            if matrix is not None and self._has(matrix) and _is_told(self.module(matrix), matrix):
                widths[letter] = _widths(self.module(matrix), matrix)[0 if letter == "o" else 1]
        root = self._root._module
        attention = root.get_submodule(str(self._layer.attention))
        known = _sizes_of.get(attention)
        if known is None or known[0] != widths:
            known = _sizes_of[attention] = (widths, sizes_in(numbers_of(root, attention), found, widths))
        return known[1]


_sizes_of: WeakKeyDictionary[nn.Module, tuple[dict[str, int], Sizes | None]] = WeakKeyDictionary()


def _parameter(module: nn.Module, matrix: Matrix) -> nn.Parameter | None:
    """The weight, where the module is what it was in the tiny model, and its weight an ordinary parameter."""
    weight = module._parameters.get(matrix.weight)
    if weight is None or type(module) is not matrix.kind or type(weight) not in (nn.Parameter, Unloaded):
        return None
    return weight if weight.is_floating_point() and weight.ndim == 2 else None


def _is_told(module: nn.Module, matrix: Matrix) -> bool:
    return _parameter(module, matrix) is not None or widths_of(module) is not None


def _widths(module: nn.Module, matrix: Matrix) -> tuple[int, int]:
    """How many inputs and outputs a matrix has."""
    plain = _parameter(module, matrix)
    if plain is None:
        widths = widths_of(module)
        assert widths is not None  # else there are no sizes
        return widths
    first, second = plain.shape
    return (second, first) if matrix.out_first else (first, second)


def _cut(array: Tensor, at: Stretch, axis: int) -> Tensor:
    """The heads along the last axis, which becomes two: a view."""
    behind = at.start + (at.n_heads - 1) * at.step + at.width
    return array.narrow(axis, at.start, behind - at.start).unfold(axis, at.width, at.step)
