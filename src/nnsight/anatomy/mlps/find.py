"""What is inside the MLP of each layer: layers of one kind are looked at once."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from nnsight.anatomy.layout import Layer, Layout
from nnsight.anatomy.mlps.inside import Inside, Mixture
from nnsight.anatomy.mlps.neurons import find_neurons
from nnsight.anatomy.mlps.routing import Recording, find_mixture
from nnsight.anatomy.trial import Trial


def find_insides(trial: Trial, layout: Layout) -> dict[str, Inside]:
    """The inside of each layer's MLP by the layer's path, from a recorded pass of a small model with this layout."""
    recording = Recording(trial)
    known: dict[Any, tuple[str, Inside]] = {}
    found: dict[str, Inside] = {}
    encoder = () if layout.encoder is None else layout.encoder.layers
    for layer in (*encoder, *layout.layers):
        if layer.path in found:  # another call of the same module
            continue
        of_one = trial if layer.turn is None else trial.in_call(trial.calls[layer.path])
        kind = _kind(of_one, layer)
        if kind not in known:
            known[kind] = layer.path, _find(of_one, recording, layer)
        path, inside = known[kind]
        found[layer.path] = inside if path == layer.path else _moved(inside, path, layer.path)
    return found


def _find(trial: Trial, recording: Recording, layer: Layer) -> Inside:
    if not layer.mlp:
        return Inside()
    mixture = find_mixture(trial, recording, layer)
    if isinstance(mixture, Mixture):
        return Inside(mixture=mixture, lacks="it is a mixture of experts")
    neurons = find_neurons(trial, layer)
    why = mixture or _why_no_mixture(trial, layer)
    return Inside(lacks=why or neurons) if isinstance(neurons, str) else Inside(neurons, lacks=why)


def _why_no_mixture(trial: Trial, layer: Layer) -> str:
    """Why a layer with the weights of several experts is not known to be a mixture; "" where it has no such."""
    module = trial.model.get_submodule(layer.path)
    if not any(weight.ndim == 3 and len(weight) > 1 for weight in module.parameters()):
        return ""
    return "its experts are in modules that are given neither their numbers nor every token"


def _kind(trial: Trial, layer: Layer) -> Any:
    """What is the same for two layers whose MLPs are built alike."""
    below = len(layer.path)
    module = trial.model.get_submodule(layer.path)
    modules = tuple((path, type(one)) for path, one in module.named_modules())
    calls = tuple(
        (path, trial.calls[full].count) for path, _ in modules if (full := f"{layer.path}.{path}") in trial.calls
    )
    return modules, calls, tuple(replace(part, path=part.path[below:]) for part in layer.mlp)


def _moved(thing: Any, old: str, new: str) -> Any:
    """The same in another layer: paths that begin with the one begin with the other."""
    if isinstance(thing, str):
        return new + thing[len(old) :] if thing == old or thing.startswith(f"{old}.") else thing
    if isinstance(thing, tuple):
        return tuple(_moved(one, old, new) for one in thing)
    if is_dataclass(thing) and not isinstance(thing, type):
        return replace(thing, **{one.name: _moved(getattr(thing, one.name), old, new) for one in fields(thing)})
    return thing
