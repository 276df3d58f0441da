"""Finds the neurons of a mixture's experts, in the call that computes one expert alone.

What the last product with a matrix is given are the activations. What the non-linearity is given is what an earlier
product makes, or a half of that, which, changed in one channel, changes the activations in that channel alone, and not
in proportion.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnsight.anatomy.layout import Piece, inside
from nnsight.anatomy.mlps.inside import Mixture, OfExpert, Own, Within
from nnsight.anatomy.mlps.products import Computed, Place, compute
from nnsight.anatomy.trial import same

_CHANNEL, _BY = 1, -2.0
_PIECES = (None, Piece(False), Piece(True), Piece(False, True), Piece(True, True))


def find_within(model: nn.Module, mixture: Mixture, inputs: Any) -> Within | str:
    """The neurons of one expert, or why they were not found.

    Args:
        model: A small model of the same architecture.
        mixture: Of one of its layers.
        inputs: What its module is given, `(args, kwargs)`.
    """
    path = mixture.path
    for number in _most_used(model, mixture, inputs):  # some experts hand on what they are given
        own = mixture.among_others(inputs, number, model) if mixture.is_stacked else mixture.own(inputs, number)
        one = _One(model, mixture, own, number)
        plain = one.compute({})
        if plain is not None and len(plain.given) > 1:
            return _found(path, one, plain)
    return f"what `{path}` multiplies with matrices for an expert is not known"


def _most_used(model: nn.Module, mixture: Mixture, inputs: Any) -> list[int]:
    """The experts, first those to which most tokens go."""
    if mixture.chosen is None:
        every = inside(inputs, mixture.hidden.at).unflatten(0, (mixture.count(model), -1))
        used: list[int] = every.any(-1).sum(-1).argsort(descending=True).tolist()
        return used
    numbers, counts = inside(inputs, mixture.chosen.at).unique(return_counts=True)
    found: list[int] = numbers[counts.argsort(descending=True)].tolist()
    return found


def _found(path: str, one: _One, plain: Computed) -> Within | str:
    last = len(plain.given) - 1
    act = plain.given[last]
    doubled, none = one.compute({(last, False, None): 2 * act}), one.compute({(last, False, None): 0 * act})
    if doubled is None or none is None or same(none.output, plain.output):
        return f"what `{path}` makes of an expert's last product is not known"
    if plain.whole is not None and not one.is_apart(plain, doubled):
        return f"what `{path}` makes of one expert's last product is not its own"
    if not same(doubled.output - none.output, 2 * (plain.output - none.output)):
        return f"what `{path}` makes of an expert's last product is not in proportion"
    places = [(k, True, piece) for k in range(last) for piece in _PIECES]
    kinds = {place: kind for place in places if (kind := _kind(one, plain, place)) is not None}
    bent = next((place for place, kind in kinds.items() if kind == "bent"), None)
    straight = next((place for place, kind in kinds.items() if kind == "straight"), None)
    w_pre, w_up = (None if place is None else one.matrix(plain, place[0], place[2]) for place in (bent, straight))
    w_in, w_gate = (w_up, w_pre) if straight is not None else (w_pre, None)
    pre = None if bent is None else (bent[0], bent[2])
    return Within(len(plain.given), pre, w_in, w_gate, one.matrix(plain, last, None))


def _kind(one: _One, plain: Computed, place: Place) -> str | None:
    """How the activations depend on that: channel by channel, in a straight line or "bent"; None: otherwise."""
    number, _, piece = place
    act, value = plain.given[-1], plain.made[number]
    if value.shape[-1] != act.shape[-1] * (1 if piece is None else 2):
        return None
    value = value if piece is None else piece.of(value)
    acts = []
    for factor in (_BY, 0.0):
        new = value.clone()
        new[..., _CHANNEL] *= factor
        made = one.compute({place: new})
        if made is None:
            return None
        acts.append(made.given[-1])
    others = torch.arange(act.shape[-1]) != _CHANNEL
    if any(not torch.equal(one[..., others], act[..., others]) for one in acts) or torch.equal(acts[0], act):
        return None
    turned, none = (one[..., _CHANNEL] for one in acts)
    return "straight" if same(turned - none, _BY * (act[..., _CHANNEL] - none)) else "bent"


class _One(NamedTuple):
    """One expert of a small model."""

    model: nn.Module
    mixture: Mixture
    own: Own
    number: int

    def compute(self, replaced: dict[Place, Tensor]) -> Computed | None:
        try:
            with torch.no_grad():
                return compute(self.mixture, self.model.get_submodule(self.mixture.path), self.own, replaced)
        except Exception:  # noqa: BLE001  a module may refuse other values in any way
            return None

    def is_apart(self, plain: Computed, changed: Computed) -> bool:
        """Whether what other experts make is the same, where all are computed together."""
        assert plain.whole is not None
        assert changed.whole is not None
        count = self.mixture.count(self.model)
        pairs = zip(plain.whole.chunk(count), changed.whole.chunk(count), strict=True)
        return all(torch.equal(*pair) for at, pair in enumerate(pairs) if at != self.number)

    def matrix(self, plain: Computed, number: int, piece: Piece | None) -> OfExpert | None:
        """The parameter with which a product makes what it does, but for a bias."""
        given, made = plain.given[number], plain.made[number]
        for before, behind, kind, weight in self._weights():
            for turned, matrix in ((False, weight), (True, weight.T)):
                if matrix.shape == (given.shape[-1], made.shape[-1]):
                    rest = made - given @ matrix.detach()
                    small = float(rest.abs().max()) <= 1e-5 * float(made.abs().max())
                    if small or (len(rest) > 1 and same(rest, rest[:1].expand_as(rest))):
                        return OfExpert(before, behind, turned, kind, piece)
        return None

    def _weights(self) -> Iterator[tuple[str, str | None, type, Tensor]]:
        """The matrices of this expert, with the names that they have for each, and whose they are."""
        path, count = self.mixture.path, self.mixture.count(self.model)
        module = self.model.get_submodule(path)
        for name, one in module.named_parameters():
            if one.ndim == 3 and len(one) > max(self.number, 1):
                yield f"{path}.{name}", None, _owner_of(module, name), one[self.number]
            elif one.ndim == 2 and len(one) % count == 0 and len(one) > count:
                yield f"{path}.{name}", None, _owner_of(module, name), one.unflatten(0, (count, -1))[self.number]
        for name, listed in module.named_modules():
            if isinstance(listed, nn.ModuleList) and len(listed) == count:
                before = f"{path}.{name}".rstrip(".")
                for behind, one in listed[self.number].named_parameters():
                    if one.ndim == 2:
                        yield before, behind, _owner_of(listed[self.number], behind), one


def _owner_of(module: nn.Module, name: str) -> type:
    """The class of the module, below this one, that has this parameter."""
    return type(module.get_submodule(name.rpartition(".")[0]))
