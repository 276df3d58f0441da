"""The layout of a model: found once for each architecture, on a tiny random model of the same config."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from nnsight.anatomy.discover import discover
from nnsight.anatomy.layout import Layer, Layout, Part
from nnsight.anatomy.mlps.find import find_insides
from nnsight.anatomy.mlps.inside import Inside
from nnsight.anatomy.tiny import tiny_ids, tiny_model
from nnsight.anatomy.tiny.inputs import has_encoder, parts_of
from nnsight.anatomy.trial import Trial
from nnsight.core.history import add_note
from nnsight.core.modes import without_modes
from nnsight.errors import AnatomyError, Error

_MOST_KEPT = 64


def _scaled_by_width(layout: Layout, config: Any) -> Layout:
    """MiniCPM divides by how many times wider it is than a base model: another number in a tiny one."""
    return _with_scale(layout, config.dim_model_base / config.hidden_size)


def _scaled_by_root(layout: Layout, config: Any) -> Layout:
    """T5 divides by the root of its width, where it unembeds with the embedding."""
    return _with_scale(layout, config.d_model**-0.5)


def _with_scale(layout: Layout, scale: float) -> Layout:
    if layout.tail is None:
        return layout
    return replace(layout, tail=tuple(step if step.scale == 1 else replace(step, scale=scale) for step in layout.tail))


# What a tiny model of the same config can't show, by the type of the config.
ADAPTERS: dict[str, Callable[[Layout, Any], Layout]] = {
    "minicpm3": _scaled_by_width,
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5", "switch_transformers", "pop2piano"), _scaled_by_root),
}

_known: OrderedDict[Any, Layout] = OrderedDict()
_known_insides: OrderedDict[Any, dict[str, Inside]] = OrderedDict()
_insides: WeakKeyDictionary[nn.Module, dict[str, Inside]] = WeakKeyDictionary()
_lock = threading.Lock()


def layout_of(module: nn.Module) -> Layout:
    """Where a language model of transformers has what all have. Its weights are not looked at.

    Raises:
        AnatomyError: There is no config, no tiny model could be made or run, or its sums were not found.
    """
    config: Any = getattr(module, "config", None)
    if config is None:
        raise AnatomyError(f"A {type(module).__name__} has no config to make a tiny model from.")
    key = type(module), config.to_json_string(use_diff=False)
    with _lock:
        if key not in _known:
            _known[key] = _found_in(module, config)
            while len(_known) > _MOST_KEPT:
                _known.popitem(last=False)
        return _known[key]


def insides_of(module: nn.Module) -> dict[str, Inside]:
    """What is inside each layer's MLP, by the layer's path: found when it is first asked for, kept as the layout is."""
    known = _insides.get(module)
    if known is None:
        layout, config = layout_of(module), cast(Any, module).config
        key = type(module), config.to_json_string(use_diff=False)
        with _lock:
            if key not in _known_insides:
                with _undisturbed():
                    _known_insides[key] = find_insides(trial_of(type(module), config), layout)
                while len(_known_insides) > _MOST_KEPT:
                    _known_insides.popitem(last=False)
            known = _insides[module] = _known_insides[key]
    return known


def _found_in(module: nn.Module, config: Any) -> Layout:
    try:
        return _found(type(module), config)
    except AnatomyError as error:
        parts = [] if has_encoder(module) else parts_of(module)
        if len(parts) > 1 and parts[0] not in str(error):
            add_note(error, f"Its parts are models, too: {', '.join(parts)}.")
        raise


def _found(kind: type[nn.Module], config: Any) -> Layout:
    with _undisturbed():
        layout = _discovered(trial_of(kind, config))
        if _scales(layout):  # else nothing could differ
            _check_learns_none(layout, _discovered(trial_of(kind, config, seed=1)))
    adapt = ADAPTERS.get(config.model_type)
    return layout if adapt is None else adapt(layout, config)


def _discovered(trial: Trial) -> Layout:
    try:
        return discover(trial)
    except Error:
        raise
    except Exception as error:  # the modules of a model may do anything to tensors
        what = f"What the layers of a {type(trial.model).__name__} do couldn't be found out."
        raise AnatomyError(what, because=f"{type(error).__name__}: {error}"[:300]) from error


def _scales(layout: Layout) -> dict[str, list[float]]:
    """The numbers other than 1 that something is multiplied by, by the path of the layer, or "" behind them."""
    reading = () if layout.encoder is None else layout.encoder.layers
    found = {layer.path: _scales_in(layer) for layer in (*reading, *layout.layers)}
    found[""] = [step.scale for step in layout.tail or () if step.scale != 1]
    return {path: scales for path, scales in found.items() if scales}


def _scales_in(layer: Layer) -> list[float]:
    numbers = [one.scale if isinstance(one, Part) else one for one in layer.made if isinstance(one, (Part, float))]
    return [number for number in numbers if number != 1]


def _check_learns_none(layout: Layout, other: Layout) -> None:
    """Raises where a number depends on what a model has learned, as `tanh(gate)` does: another draw has another."""
    drawn = _scales(other)
    for path, scales in _scales(layout).items():
        others = drawn.get(path, [])
        if len(others) != len(scales) or not all(map(partial(math.isclose, rel_tol=1e-3), scales, others)):
            adds = f"What `{path}` adds is no sum of what its modules return, each times a number."
            raise AnatomyError(
                adds if path else "What is between the last layer and the logits can't be told.",
                because="something is multiplied by what is made of numbers that were learned, and not by one of these",
            )


def _fill_bias(model: nn.Module) -> None:
    """Draws a bias of the logits that is a buffer, of zeros in a new model: else it couldn't be seen."""
    bias = dict(model.named_buffers()).get("final_logits_bias")
    if bias is not None:
        bias.normal_(generator=torch.Generator().manual_seed(0))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A discovery is nobody's forward pass: not the run's in whose block a name is first asked for."""
    with without_modes(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        yield


def trial_of(kind: type[nn.Module], config: Any, seed: int = 0) -> Trial:
    """A recorded pass of a tiny model of this class, whose parameters are drawn by the seed.

    Raises:
        AnatomyError: It can't be made or run.
    """
    try:
        model = tiny_model(config, kind, seed=seed)
        ids, others = tiny_ids(model)
        main = getattr(model, "main_input_name", "input_ids")
        _fill_bias(model)
        return Trial(model, others if "inputs_embeds" in others else {main: ids, **others})
    except Error:
        raise
    except Exception as error:  # any architecture may fail in any way when it is made small
        what = f"No tiny {kind.__name__} could be made and run, in which the uniform names would be looked for."
        raise AnatomyError(what, because=f"{type(error).__name__}: {error}"[:300]) from error
