"""The neurons of one expert of a mixture, read and assigned: in the call that computes it alone.

The model computes its experts together, and hands out none of this. So that one expert is computed again by the model's
own module, and its products with matrices are met there. What is assigned is put in their place, and what the expert
adds then is put into the sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnsight.anatomy.checked import check_shape, check_tensor
from nnsight.anatomy.effective import caller, input_like, matrix_of, widths_of
from nnsight.anatomy.mlps.apart import Had, add, as_added, at_output, check_current, had_of, inputs_of, lead_through
from nnsight.anatomy.mlps.inside import Mixture, OfExpert, Own, Within
from nnsight.anatomy.mlps.products import Place, compute
from nnsight.anatomy.parts import module_at, standing
from nnsight.block.rows import RowRun
from nnsight.core.history import user_place
from nnsight.core.run import Run
from nnsight.core.state import Visit
from nnsight.core.values import is_fake
from nnsight.errors import NotOnThisLayerError, WriteError
from nnsight.views import Views

if TYPE_CHECKING:
    from nnsight.node import Node

NAMES = ("pre", "act")
_CHANGED = "it is quantized, adapted or parametrized"
_ROUNDING = 64  # units, by which a product may differ from itself
MATRICES = {"W_in": "w_in", "W_gate": "w_gate", "W_out": "w_out"}


@dataclass
class ExpertNeurons:
    """The neurons of one expert.

    Attributes:
        root: The model, or a scope of it.
        mixture: Of which layer's experts it is one.
        number: Which of them.
        index: Which layer.
    """

    root: Node
    mixture: Mixture
    number: int
    index: int

    def __post_init__(self) -> None:
        if self.mixture.is_stacked:  # what this one adds is a part of what the module returns
            self.mixture = replace(self.mixture, out=self.mixture.slab(self.root._module, self.number))

    def has(self, name: str) -> bool:
        within = self.mixture.within
        if not isinstance(within, Within) or not self._has_weights(within):
            return False
        if name in MATRICES:
            found: OfExpert | None = getattr(within, MATRICES[name])
            return found is not None and found.is_plain(self.root._module, self.number)
        return self._is_known(within) and (name == "act" or (name == "pre" and within.pre is not None))

    def matrix(self, name: str) -> Tensor:
        found, root = self._matrix(name), self.root._module
        if not found.is_plain(root, self.number):
            is_one = found.behind is not None and widths_of(root.get_submodule(found.path(self.number))) is not None
            copy = f'mlp.experts[{self.number}].effective("{name}")' if is_one else None
            raise self._lacks(name, f"{self._named(found)}, has no plain matrix: {_CHANGED}", a_copy=copy)
        return found.of(root, self.number, self.mixture.count(root))

    def effective(self, name: str) -> Tensor:
        """A copy of a matrix as it is multiplied with, also where it has no view."""
        found, root = self._matrix(name), self.root._module
        if found.is_plain(root, self.number):
            return self.matrix(name).detach().clone()
        module = root.get_submodule(found.path(self.number))
        widths = widths_of(module)
        if found.behind is None or widths is None:
            why = f"{self._named(found)}, has the matrices of all experts in a form of its own: {_CHANGED}"
            raise self._lacks(name, why, there_is="mlp.experts[...].output, which is right all the same")
        with torch.no_grad():
            call = caller(module_at(self.root, found.path(self.number)))
            weight = matrix_of(call, input_like(module, root), widths[0])
        return weight if found.piece is None else found.piece.of(weight)

    def _matrix(self, name: str) -> OfExpert:
        within = self.mixture.within
        if not isinstance(within, Within) or not self._has_weights(within):
            within = self._within(name)  # which says why
        found: OfExpert | None = getattr(within, MATRICES[name])
        if found is None:
            raise self._lacks(name, "it is not gated" if name == "W_gate" else "its weight is not found")
        return found

    def _named(self, found: OfExpert) -> str:
        path = found.path(self.number)
        return f"`{path}`, a {type(self.root._module.get_submodule(path)).__name__}"

    def read(self, name: str) -> Tensor:
        self._place(name)
        node = module_at(self.root, self.mixture.path)
        run, visit = at_output(node)
        if visit.port is None:  # of a call of the block's own, which is over
            return self._values(node, run, visit, {})[name]
        had = had_of(node, run, self.mixture, self.number, visit)
        if name not in had.inner:
            view = had.inner[name] = self._values(node, run, visit, had.replaced)[name].clone()
            if view.requires_grad and torch.is_grad_enabled() and visit.versions is None:
                made = self._values(node, run, visit, {**had.replaced, name: view})["output"]
                lead_through(node, run, self.mixture, made, had.adds)
            Views.of(run).add(_Maker(self, name), node, (), view)
        return had.inner[name]

    def write(self, name: str, value: Any) -> None:
        self._place(name)
        check_tensor(value)
        node = module_at(self.root, self.mixture.path)
        run, visit = at_output(node)
        if visit.port is None:
            raise WriteError(f"`{self}.{name}` is of a call that is over.", you_wrote=user_place().source)
        had = had_of(node, run, self.mixture, self.number, visit)
        if name in had.inner and value is had.inner[name]:  # a change in place is written back as such
            return
        check_shape(f"{self}.{name}", self._values(node, run, visit, had.replaced)[name], value)
        had.inner.pop(name, None)
        self.put(node, name, value)

    def had(self, node: Node) -> Had:
        run, visit = at_output(node)
        return had_of(node, run, self.mixture, self.number, visit)

    def put(self, node: Node, name: str, value: Tensor) -> None:
        """Has the model go on with what the expert adds then."""
        run, visit = at_output(node)
        had = self.had(node)
        self._check_own(node, run, visit, name, value)
        behind = None
        if had.is_changed or self._is_changed(node, run, visit, had):
            behind = "output"
        elif name == "pre" and "act" in had.replaced:
            behind = "act"
        if behind is not None:
            raise WriteError(
                f"`{self}.{behind}` was changed before `{name}`, which is in front of it: that change would be lost.",
                you_wrote=user_place().source,
                instead=f"{name} first, and then {behind}",
            )
        if name == "pre":
            had.inner.pop("act", None)  # another one comes of it
        had.replaced[name] = value.clone()
        made = self._values(node, run, visit, had.replaced)["output"]
        add(node, self.mixture, made - had.adds)
        had.adds, had.view = made, None

    def _is_changed(self, node: Node, run: Run | RowRun, visit: Visit, had: Had) -> bool:
        """Whether something else stands where a stacked mixture returns what this one makes."""
        if not self.mixture.is_stacked:
            return False
        stands = as_added(run, self.mixture, visit, standing(run, self.mixture.out, visit.output))
        if is_fake(stands):
            return False
        made = self._values(node, run, visit, had.replaced)["output"].detach()
        most = _ROUNDING * torch.finfo(made.dtype).eps * float(made.abs().max())
        return float((stands.detach() - made).abs().max()) > most

    def _values(self, node: Node, run: Run | RowRun, visit: Visit, replaced: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the expert adds, and what is inside it, [prompt, token, ...]."""
        own = self._own(node, run, visit)
        tokens = standing(run, self.mixture.out, visit.output).shape[:-1]
        if own.tokens is None:
            none = own.hidden.new_zeros((*tokens, self._width()))
            return {
                "output": as_added(run, self.mixture, visit, torch.zeros_like(own.hidden)),
                "pre": none,
                "act": none,
            }
        rows = {self._place(name): value.flatten(0, -2)[own.tokens] for name, value in replaced.items()}
        computed, within = compute(self.mixture, node, own, rows), self._within("act")
        if computed is None or len(computed.given) != within.n_products:
            raise self._lacks("act", "this expert is computed without the products that the others have")
        found = {"act": computed.given[-1]}
        if within.pre is not None:
            number, piece = within.pre
            made = computed.made[number]
            found["pre"] = made if piece is None else piece.of(made)
        values = {name: own.among_all(one).reshape(*tokens, -1) for name, one in found.items()}
        return {"output": as_added(run, self.mixture, visit, own.among_all(computed.output)), **values}

    def _own(self, node: Node, run: Run | RowRun, visit: Visit) -> Own:
        inputs = inputs_of(node, run, visit)
        if self.mixture.is_stacked:
            return self.mixture.among_others(inputs, self.number, self.root._module)
        return self.mixture.own(inputs, self.number)

    def _width(self) -> int:
        """How many neurons it has, where none of them is computed."""
        if self.has("W_out"):
            return len(self.matrix("W_out"))
        found, root = self._within("act").w_out, self.root._module
        widths = None if found is None else widths_of(root.get_submodule(found.path(self.number)))
        if widths is None:
            raise self._lacks("act", "no token goes to this expert, and how many neurons it has is not known")
        return widths[0]

    def _check_own(self, node: Node, run: Run | RowRun, visit: Visit, name: str, value: Tensor) -> None:
        """Refuses what would be lost: neurons of tokens that don't go to this expert."""
        own = self._own(node, run, visit)
        if is_fake(own.hidden) or is_fake(value):
            return
        rest = value.detach().flatten(0, -2).clone()
        if own.tokens is not None:
            rest[own.tokens] = 0
        lost = int(rest.any(-1).sum())
        if lost:
            raise WriteError(
                f"`{self}.{name}` is of the tokens that go to this expert, and {lost} of those that you changed don't.",
                you_wrote=user_place().source,
                instead=f"goes = (mlp.chosen == {self.number}).any(-1); mlp.experts[{self.number}].{name}[goes] = ...",
                or_else="mlp.router_logits = ..., which says where tokens go",
            )

    def _place(self, name: str) -> Place:
        within = self._within(name)
        if name == "act":
            return within.n_products - 1, False, None
        if within.pre is None:
            raise self._lacks(name, "what its non-linearity is given was not found")
        number, piece = within.pre
        return number, True, piece

    def _within(self, name: str) -> Within:
        within = self.mixture.within
        if not isinstance(within, Within):
            raise self._lacks(name, within)
        if not self._has_weights(within):
            raise self._lacks(name, "this expert has no matrices, and hands on what it is given")
        if not self._is_known(within):
            assert within.w_out is not None
            raise self._lacks(name, f"{self._named(within.w_out)}, multiplies in a way of its own: {_CHANGED}")
        return within

    def _is_known(self, within: Within) -> bool:
        """Whether its products are those that were found: not so where another class computes them."""
        every = [one for one in (within.w_in, within.w_gate, within.w_out) if one is not None]
        return all(one.is_known(self.root._module, self.number) for one in every)

    def _has_weights(self, within: Within) -> bool:
        """LongCat has experts behind those that have weights."""
        one = within.w_out
        if one is None or one.behind is not None:
            return True
        owner, _, name = one.before.rpartition(".")
        weight = getattr(self.root._module.get_submodule(owner), name, None)
        return not isinstance(weight, Tensor) or weight.ndim != 3 or self.number < len(weight)

    def _lacks(self, name: str, why: str, **facts: str | None) -> NotOnThisLayerError:
        return NotOnThisLayerError(
            f"`{self}` has no `{name}`: {why}.",
            you_wrote=user_place().source,
            **facts,
            instead=f'for layer in model.layers.having("mlp.experts.{self.number}.{name}"):',
        )

    def __str__(self) -> str:
        return f"layers[{self.index}].mlp.experts[{self.number}]"


class _Maker:
    """What views.py asks for: how a change in place comes back into the sum."""

    kind = "output"

    def __init__(self, neurons: ExpertNeurons, name: str) -> None:
        self.mixture, self.number, self.index = neurons.mixture, neurons.number, neurons.index
        self.inner, self.name, self._root = name, f"{neurons}.{name}", neurons.root._weakly()

    def pick(self, node: Node, visit: Visit) -> tuple[()]:
        return ()  # other experts' changes of the same sum are none of this one's

    def write_back(self, node: Node, view: Tensor, _: Any) -> None:
        root = self._root()
        if root is None:  # its trace is gone
            return
        neurons = ExpertNeurons(root, self.mixture, self.number, self.index)
        check_current(self.name, view, neurons.had(node).inner.get(self.inner))
        neurons.put(node, self.inner, view)
