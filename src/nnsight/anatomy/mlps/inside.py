"""What is inside a layer's MLP or mixture of experts: what neurons.py and routing.py find, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnsight.anatomy.effective import input_like, is_plain, matrix_of, widths_of
from nnsight.anatomy.layout import Part, Piece, Slab, found_at, inside, with_inside
from nnsight.core.specs import shape_of, show_shape
from nnsight.core.values import is_fake
from nnsight.errors import NotOnThisLayerError


@dataclass(frozen=True)
class Matrix:
    """The weight of a module, or of its output's first or second half, as a matrix that rows are multiplied with.

    Attributes:
        path: The module, below the root.
        turned: Whether the module keeps it the other way round, [output, input], as `nn.Linear` does.
        kind: The module's class. Where a model has another one there, the weights are quantized or adapted.
        piece: Which part of its outputs; None: all.
    """

    path: str
    turned: bool
    kind: type
    piece: Piece | Slab | None = None

    def is_plain(self, root: nn.Module) -> bool:
        """Whether the module keeps it as numbers of its own: a quantized one doesn't, nor does an adapter's layer."""
        module = root.get_submodule(self.path)
        weight = module._parameters.get("weight")
        return type(module) is self.kind and is_plain(weight) and weight is not None and weight.ndim == 2

    def of(self, root: nn.Module, name: str) -> Tensor:
        """A view of it, [input, output]; `name` is what errors call it."""
        module = root.get_submodule(self.path)
        weight: Tensor = module.weight  # type: ignore[assignment]
        if not self.is_plain(root):
            adapted = "base_layer" in module._modules or "original_module" in module._modules
            why = "an adapter is a part of it" if adapted else "it is quantized or parametrized"
            raise NotOnThisLayerError(
                f"The weight of `{self.path}` is not kept as a matrix of numbers: {why}.",
                it_is=None if adapted else show_shape(shape_of(weight)),
                a_copy=None if widths_of(module) is None else f'layer.mlp.effective("{name}")',
                instead=f"model.{self.path}.base_layer.weight, without it; or model.load_adapter(None)"
                if adapted
                else None,
            )
        weight = weight.T if self.turned else weight
        return weight if self.piece is None else self.piece.of(weight)

    def effective(self, root: nn.Module, call: Callable[[Tensor], Tensor], name: str) -> Tensor:
        """A copy of what the module multiplies with, [input, output]; `call` is the module in this run."""
        module = root.get_submodule(self.path)
        widths = widths_of(module)
        with torch.no_grad():
            if widths is None or self.is_plain(root):
                return self.of(root, name).clone()
            weight = matrix_of(call, input_like(module, root), widths[0])
        return weight if self.piece is None else self.piece.of(weight)


@dataclass(frozen=True)
class Neurons:
    """The inside of an MLP.

    Attributes:
        pre: What the non-linearity is given.
        act: What the down projection is given.
        product: That in front of the norm, where one stands in front of the down projection.
        out: What the down projection returns.
        into: What that is times a factor: what the MLP adds, or what is given to the norm in front of that.
        factor: That factor.
        is_gated: Whether the activation is multiplied with something else that the neurons are given.
        w_in: From the model to the neurons; of a gated MLP what the activation is multiplied with.
        w_gate: Of a gated MLP what goes through the activation.
        w_out: From the neurons to the model.
    """

    pre: Part
    act: Part
    product: Part
    out: Part
    into: Part
    factor: float
    is_gated: bool
    w_in: Matrix | None
    w_gate: Matrix | None
    w_out: Matrix | None


@dataclass(frozen=True)
class Routed:
    """Where a router's product with its weight is computed inside a module that hands it to no other.

    Attributes:
        owner: The module in whose forward it is.
        weight: The parameter, below the root: [expert, model].
        flat: Whether prompts and tokens are one axis there.
    """

    owner: str
    weight: str
    flat: bool


@dataclass(frozen=True)
class Mixture:
    """The inside of a mixture of experts.

    Attributes:
        router: Where the router's logits are; None: they were not found.
        path: The module that computes all experts.
        hidden: What it is given for each token.
        chosen: The indices of the experts that each token goes to.
        weights: What those are multiplied with.
        out: What the module returns: the sum over experts.
        into: What that is added up in: what the MLP adds, or what is given to the norm behind it.
        factor: What the sum is multiplied with on its way there.
        norm: The norm that is between that and the residual stream, if there is one.
        shared: What makes up the rest of it, summed; () where there is none.
        counted: A parameter, or a list of modules, that has one entry for each expert.
        wide: Whether the module has to be given as many indices for each token as it is given by the model.
        within: The neurons of an expert, or why they were not found.

    In a stacked one, as in Llama 4, the module is given all tokens for each expert, one expert after the other, times a
    score, and returns what each makes of them: no indices, and no weights, and `out` is those.
    """

    router: Part | Routed | None
    path: str
    hidden: Part
    chosen: Part | None
    weights: Part | None
    out: Part
    into: Part
    factor: float
    norm: str | None
    shared: tuple[Part, ...]
    counted: str
    wide: bool = False
    within: Within | str = "its experts were not looked into"

    @property
    def is_stacked(self) -> bool:
        return self.chosen is None

    def count(self, root: nn.Module) -> int:
        """How many experts there are."""
        owner, _, name = self.counted.rpartition(".")
        module = root.get_submodule(owner)
        held = getattr(module, name)
        widths = None if not isinstance(held, Tensor) or is_plain(held) else widths_of(module)
        return len(held) if widths is None else widths[1]  # a router that is quantized may be packed

    def slab(self, root: nn.Module, index: int) -> Part:
        """Where a stacked one returns what one expert makes."""
        return replace(self.out, flat=True, piece=Slab(index, self.count(root)))

    def among_others(self, inputs: Any, index: int, root: nn.Module) -> Own:
        """What the module is given for one expert of a stacked one, which is computed with the others only."""
        slab = Slab(index, self.count(root))
        tokens = slab.of(inside(inputs, self.hidden.at))
        return Own(inputs, tokens, None if is_fake(tokens) else torch.arange(len(tokens)), None, slab)

    def own(self, inputs: Any, index: int) -> Own:
        """What the module is given for one expert alone, on the tokens that go to it.

        Args:
            inputs: What the module is given for all, `(args, kwargs)`.
            index: Which expert.
        """
        assert self.chosen is not None
        assert self.weights is not None
        hidden, chosen, weights = (inside(inputs, part.at) for part in (self.hidden, self.chosen, self.weights))
        if is_fake(hidden):  # of a scan: which tokens go where is a matter of values
            return Own(inputs, hidden, None, None)
        rows, is_chosen = hidden.flatten(0, -2), (chosen == index).flatten(0, -2)
        tokens = is_chosen.any(-1).nonzero().squeeze(-1)
        if not len(tokens):
            return Own(inputs, hidden, None, None)
        own = (weights.flatten(0, -2) * is_chosen).sum(-1, keepdim=True)[tokens]
        times = own
        if self.wide:
            own = functional.pad(own, (0, chosen.shape[-1] - 1))
        indices = torch.full_like(own, index, dtype=chosen.dtype)
        given = {self.hidden: rows[tokens], self.chosen: indices, self.weights: own}
        for part, value in given.items():
            like = inside(inputs, part.at)
            inputs = with_inside(inputs, part.at, value.reshape(*[1] * (like.ndim - 2), *value.shape))
        return Own(inputs, hidden, tokens, times)

    def alone(self, experts: Callable[..., Tensor], inputs: Any, index: int) -> Tensor:
        """What one expert makes, times its weight: 0 for the tokens that don't go to it. Computed on the others alone.

        Args:
            experts: Computes all of them.
            inputs: What that is given, `(args, kwargs)`.
            index: Which expert.

        Returns:
            Of the shape of what the module returns.
        """
        own = self.own(inputs, index)
        if own.tokens is None:
            return torch.zeros_like(own.hidden)
        args, kwargs = own.inputs
        return own.among_all(experts(*args, **kwargs))


class Own(NamedTuple):
    """What a module that computes experts is given for one of them alone.

    Attributes:
        inputs: `(args, kwargs)`.
        hidden: What it is given for all tokens.
        tokens: Those that go to this expert, as numbers among all rows; None: none does, or it can't be told.
        times: The weight of each, [own token, 1].
        slab: Where it stands among the others, in a mixture that can't be computed without these; `hidden` is its own.
    """

    inputs: Any
    hidden: Tensor
    tokens: Tensor | None
    times: Tensor | None
    slab: Slab | None = None

    def among_all(self, own: Tensor) -> Tensor:
        """What there is for its own tokens among all rows, in the shape of `hidden` but for the last axis: else 0."""
        own = own.flatten(0, -2)
        shape = (*self.hidden.shape[:-1], own.shape[-1])
        if self.tokens is None:
            return own.new_zeros(shape)
        if self.slab is not None:
            return own.view(shape)
        return (
            own.new_zeros((self.hidden.shape[:-1].numel(), own.shape[-1])).index_copy(0, self.tokens, own).view(shape)
        )


@dataclass(frozen=True)
class OfExpert:
    """A matrix that each expert has one of.

    Attributes:
        before: A parameter, [expert, ...] or [expert * ..., ...], or the list of modules that has one module for each.
        behind: Of a list, the parameter below an expert's module; None: `before` is the parameter.
        turned: Whether it is kept as [output, input].
        kind: The class of the module that has the parameter.
        piece: Which part of its outputs; None: all.
    """

    before: str
    behind: str | None
    turned: bool
    kind: type
    piece: Piece | None = None

    def path(self, number: int) -> str:
        """The module that has the parameter, for this expert."""
        whole = self.before if self.behind is None else f"{self.before}.{number}.{self.behind}"
        return whole.rpartition(".")[0]

    def is_known(self, root: nn.Module, number: int) -> bool:
        """Whether the module is of the class that it was found with: else it is quantized or adapted."""
        module = found_at(root, self.path(number))
        return type(module) is self.kind

    def is_plain(self, root: nn.Module, number: int) -> bool:
        """Whether it is kept as numbers of its own."""
        return self.is_known(root, number) and is_plain(self._kept(root, number))

    def of(self, root: nn.Module, number: int, count: int) -> Tensor:
        """The matrix of one expert of so many, [input, output]: a view."""
        weight: Tensor = self._kept(root, number)
        if self.behind is None:
            weight = weight[number] if weight.ndim == 3 else weight.unflatten(0, (count, -1))[number]
        weight = weight.T if self.turned else weight
        return weight if self.piece is None else self.piece.of(weight)

    def _kept(self, root: nn.Module, number: int) -> Any:
        name = (self.before if self.behind is None else self.behind).rpartition(".")[2]
        return getattr(root.get_submodule(self.path(number)), name, None)


@dataclass(frozen=True)
class Within:
    """The neurons of a mixture's experts, in the call that computes one of them alone: its products, by their numbers.

    Attributes:
        n_products: How many products with matrices there are. What the last one is given are the activations.
        pre: The product, and the part of what it makes, that the non-linearity is given; None: it was not found.
        w_in: As in `Neurons`.
        w_gate: The same.
        w_out: The same.
    """

    n_products: int
    pre: tuple[int, Piece | None] | None
    w_in: OfExpert | None
    w_gate: OfExpert | None
    w_out: OfExpert | None


@dataclass(frozen=True)
class Inside:
    """The inside of a layer's MLP.

    Attributes:
        neurons: Where it has neurons of its own.
        mixture: Where it is a mixture of experts.
        lacks: Why it has neither, or why it has no other than that.
    """

    neurons: Neurons | None = None
    mixture: Mixture | None = None
    lacks: str = ""
