"""The MLP of a layer under uniform names: what it adds, its neurons, and of a mixture of experts router and experts."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from nnsight.anatomy.added import Added, Inner
from nnsight.anatomy.effective import caller, check_name
from nnsight.anatomy.find import insides_of
from nnsight.anatomy.layout import Part, is_there
from nnsight.anatomy.mlps import router
from nnsight.anatomy.mlps.expert_neurons import ExpertNeurons
from nnsight.anatomy.mlps.experts import Experts, Shared
from nnsight.anatomy.mlps.inside import Inside, Matrix, Mixture, Routed
from nnsight.anatomy.parts import module_at
from nnsight.anatomy.values import read, write
from nnsight.block.rows import whole_of
from nnsight.core.history import user_place
from nnsight.core.values import is_fake
from nnsight.errors import NotOnThisLayerError, WriteError
from nnsight.views import Views

NEURONS = ("pre", "act")
ROUTING = ("router_logits", "chosen", "routing_weights")
_MATRICES = {"W_in": "w_in", "W_gate": "w_gate", "W_out": "w_out"}
_NODES = ("experts", "shared")


class Mlp(Added):
    """The MLP of a layer: what it adds, and what is inside.

    Which of these it has, is found when one is first asked for.
    """

    pre = Inner("pre", "What the non-linearity is given, [prompt, token, d_mlp]; of a gated MLP in the gate.")
    act = Inner("act", "The neurons' activations, [prompt, token, d_mlp]: what the down projection is given.")
    router_logits = Inner("router_logits", "What the router computes for each expert, [prompt, token, expert].")
    chosen = Inner("chosen", "The experts that each token goes to, as numbers, [prompt, token, k].")
    routing_weights = Inner("routing_weights", "What their outputs are multiplied with, [prompt, token, k].")

    def _read(self, name: str) -> Tensor:
        where = self._where(name)
        value = router.read(self._root, where) if isinstance(where, Routed) else read(self._root, where)
        if name == "chosen":
            self._watch_chosen(where, value)
        return value

    def _write(self, name: str, value: Any) -> None:
        where = self._where(name)
        if name == "chosen":
            check_chosen(value, len(self.experts), you_wrote=user_place().source)
        if isinstance(where, Routed):
            router.write(self._root, where, value)
        else:
            write(self._root, where, value)

    def _watch_chosen(self, where: Part, value: Tensor) -> None:
        """Has what is changed in them in place checked, before the model goes on."""
        run = module_at(self._root, where.path)._run()
        visit = whole_of(run).state.visit
        if visit is not None and visit.port is not None:  # not of a call that is over
            Views.of(run).watch(value, partial(check_chosen, count=len(self.experts)))

    @property
    def experts(self) -> Experts:
        """The experts, by their numbers: `experts[3].output`, [prompt, token, model]."""
        return Experts(self._root, self._mixture("experts"), self._index)

    @property
    def shared(self) -> Shared:
        """What is added beside the experts that are chosen: `shared.output`, [prompt, token, model]."""
        parts = self._mixture("shared").shared
        if not parts:
            raise self._lacks("shared", "its experts are all that it adds")
        return Shared(self._root, parts, self._index)

    @property
    def W_in(self) -> Tensor:  # noqa: N802  the field's names
        """From the stream to the neurons, [model, d_mlp]: a view of the model's own weight. Of a gated MLP, ungated."""
        return self._matrix("W_in")

    @property
    def W_gate(self) -> Tensor:  # noqa: N802
        """From the stream to what the non-linearity of a gated MLP is given, [model, d_mlp]: a view."""
        return self._matrix("W_gate")

    @property
    def W_out(self) -> Tensor:  # noqa: N802
        """From the neurons to the stream, [d_mlp, model]: a view of the model's own weight."""
        return self._matrix("W_out")

    def effective(self, name: str) -> Tensor:
        """A copy of a weight as its module multiplies with it, also where it has no view: as attention's `effective`.

        Args:
            name: "W_in", "W_gate" or "W_out".

        Returns:
            Of the shape that the view has.

        Raises:
            NotOnThisLayerError: There is no such weight.
            UnknownNameError: There is no such name.
        """
        check_name(name, _MATRICES, "mlp", "weights")
        matrix: Matrix = self._where(name)
        return matrix.effective(self._root._module, caller(module_at(self._root, matrix.path)), name)

    @property
    def width(self) -> int | None:
        """How many neurons there are; None where the weights don't tell: there are none, or they are quantized."""
        neurons = self.inside.neurons
        if neurons is None or neurons.w_out is None or not neurons.w_out.is_plain(self._root._module):
            return None
        return int(self.W_out.shape[0])

    @property
    def inside(self) -> Inside:
        """Where all that is, as data."""
        root = self._root._module
        inside = insides_of(root)[self._layer.path]
        found = inside.neurons.act.path if inside.neurons is not None else inside.mixture and inside.mixture.path
        if found and not is_there(root, found):
            return Inside(lacks=f"another module stands in its place, without `{found}`")
        return inside

    def has(self, name: str) -> bool:
        if super().has(name):
            return True
        first, _, rest = name.partition(".")
        if first in ("experts", "shared"):
            mixture = self.inside.mixture
            return mixture is not None and (first == "experts" or bool(mixture.shared)) and self._has_below(first, rest)
        found = None if rest else self._found(first)
        return found.is_plain(self._root._module) if isinstance(found, Matrix) else found is not None

    def _has_below(self, first: str, rest: str) -> bool:
        if first == "experts" and rest:
            number, _, rest = rest.partition(".")
            if not number.isdecimal() or int(number) >= len(self.experts):
                return False
            if rest not in ("", "output"):
                return ExpertNeurons(self._root, self._mixture(first), int(number), self._index).has(rest)
        return rest in ("", "output")

    def _found(self, name: str) -> Part | Routed | Matrix | None:
        """Where that is; None where the layer lacks it."""
        inside = self.inside
        if inside.neurons is not None and (name in NEURONS or name in _MATRICES):
            found: Part | Matrix | None = getattr(inside.neurons, _MATRICES.get(name, name))
            return found
        if inside.mixture is not None and name in ROUTING:
            own = {"router_logits": "router", "routing_weights": "weights"}
            routing: Part | Routed | None = getattr(inside.mixture, own.get(name, name))
            return routing
        return None

    def _where(self, name: str) -> Any:
        if not self._layer.mlp:
            return self.parts  # which says so
        found = self._found(name)
        if found is None:
            raise self._lacks(name, self._why(name))
        return found

    def _matrix(self, name: str) -> Tensor:
        matrix: Matrix = self._where(name)
        return matrix.of(self._root._module, name)

    def _mixture(self, name: str) -> Mixture:
        if not self._layer.mlp:
            self.parts  # noqa: B018  which says so
        mixture = self.inside.mixture
        if mixture is None:
            raise self._lacks(name, self._why(name))
        return mixture

    def _why(self, name: str) -> str:
        inside = self.inside
        if inside.mixture is not None:
            if name not in ROUTING:
                return f"it is a mixture of experts, and each has its own: mlp.experts[3].{name}"
            scores = "its router hands on a score for each expert, and no numbers of experts"
            return "its router's logits are not found" if name == "router_logits" else scores
        if inside.neurons is None or ((name in ROUTING or name in _NODES) and inside.lacks):
            return inside.lacks
        if name == "W_gate" and not inside.neurons.is_gated:
            return "it is not gated"
        return "its weight is not found" if name in _MATRICES else "it is no mixture of experts"

    def _lacks(self, name: str, why: str) -> NotOnThisLayerError:
        return NotOnThisLayerError(
            f"Layer {self._index}, `{self._layer.path}`, has no `mlp.{name}`: {why}.",
            you_wrote=user_place().source,
            it_is=str(self._layer),
            instead=f'for layer in model.layers.having("mlp.{name}"):',
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _NODES or name in _MATRICES:
            raise WriteError(
                f"`mlp.{name}` is not a value that can be assigned.",
                you_wrote=user_place().source,
                instead=f"mlp.{name}.output = ..."
                if name == "shared"
                else "mlp.experts[0].output = ..., mlp.act = ...",
            )
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        lacking = (name for name in (*NEURONS, *ROUTING, *_MATRICES, *_NODES) if not self.has(name))
        return sorted({*super().__dir__()} - {*lacking})


def check_chosen(value: Any, count: int, **facts: str) -> None:
    """Raises for numbers of no expert, which would be left out in silence, or fail somewhere in the model."""
    if not isinstance(value, Tensor) or is_fake(value) or value.numel() == 0:
        return
    if value.is_floating_point() or bool(((value < 0) | (value >= count)).any()):
        raise WriteError(
            f"`mlp.chosen` has the numbers of experts, 0 to {count - 1}.",
            **facts,
            you_gave=f"{value.dtype}".removeprefix("torch.") + f", {value.min():g} to {value.max():g}",
        )
