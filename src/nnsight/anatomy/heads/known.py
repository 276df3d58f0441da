"""The matrices of each layer's attention: found once for each config, when they are first asked for.

Layers of one kind have the same: a tiny model of the first layers, of each kind one, is looked at.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from nnsight.anatomy.find import layout_of
from nnsight.anatomy.heads.find import find_projections
from nnsight.anatomy.heads.matrices import Projections
from nnsight.anatomy.layout import Layer, Layout, is_there
from nnsight.anatomy.tiny import tiny_model
from nnsight.core.modes import without_modes

# More heads than in the tiny model of the layout, since some orders look alike where there are few; and as wide as no
# count of heads is.
_TINY = {"heads": 8, "least": 12}
_MOST_KEPT = 64

Found = dict[str, Projections | str]  # of each attention module's path; or why there is nothing

_of_config: dict[Any, Found] = {}
_of_model: WeakKeyDictionary[nn.Module, Found] = WeakKeyDictionary()
_lock = threading.Lock()


def projections_of(root: nn.Module, layer: Layer) -> Projections | str:
    """What was found of a layer's attention in a tiny model; or why there is nothing."""
    if layer.attention is None:
        return "no attention is computed in it"
    found = _of_model.get(root)
    if found is None:
        config: Any = root.config
        missing = tuple(layer.attention for layer in _attending(layout_of(root)) if not _stands(root, layer))
        key = type(root), config.to_json_string(use_diff=False), missing  # layers may have been taken out
        with _lock:
            if key not in _of_config:
                _of_config[key] = _find(root, config, layout_of(root))
                while len(_of_config) > _MOST_KEPT:
                    _of_config.pop(next(iter(_of_config)))
            found = _of_model[root] = _of_config[key]
    return found.get(layer.attention, "its layers are other ones than those that were looked at")


def _find(root: nn.Module, config: Any, layout: Layout) -> Found:
    halves = () if layout.encoder is None else layout.encoder.layers
    every = (*halves, *layout.layers)
    layers = [layer for layer in _attending(layout) if _stands(root, layer)]
    kinds = [_kind(root, layer) for layer in layers]
    firsts = [layer for i, layer in enumerate(layers) if kinds[i] not in kinds[:i]]
    # Nobody's forward pass, as the discovery of the layout.
    with without_modes(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        try:
            paths = [layer.path for layer in every]
            count = len(every) if halves else 1 + max((paths.index(layer.path) for layer in firsts), default=-1)
            model = _tiny(root, config, [layer for layer in layers if layer.path in paths[:count]], count)
            others = [layer for layer in every[:count] if layer.attention is None and layer.cross_attention is None]
            looked_at = find_projections(model, firsts, others)
        except Exception as error:  # noqa: BLE001  a model may fail in any way when it is made small
            because = f"no tiny model could be run with its matrices replaced: {type(error).__name__}: {error}"[:200]
            return {str(layer.attention): because for layer in layers}
    of_kind = {kinds[layers.index(layer)]: one for layer, one in zip(firsts, looked_at, strict=True)}
    unseen = "what is inside its attention could not be looked into"
    return {str(layer.attention): of_kind[kind] or unseen for layer, kind in zip(layers, kinds, strict=True)}


def _attending(layout: Layout) -> list[Layer]:
    """All that attend: of layers that attend to an encoder too, each twice."""
    every = (*(() if layout.encoder is None else layout.encoder.layers), *layout.layers)
    layers = [layer for layer in every if layer.attention is not None]
    return layers + [replace(one, attention=one.cross_attention) for one in every if one.cross_attention is not None]


def _stands(root: nn.Module, layer: Layer) -> bool:
    return is_there(root, str(layer.attention))


def _tiny(root: nn.Module, config: Any, layers: Sequence[Layer], count: int) -> nn.Module:
    """A tiny model of the first few layers, if its layers can be cut there: if each of these is of its kind then."""
    try:
        model = tiny_model(config, type(root), n_layers=max(count, 2), **_TINY)
        if _pattern(model, layers) == _pattern(root, layers):
            return model
    except Exception:  # noqa: BLE001  as above; with all its layers it may run
        pass
    return tiny_model(config, type(root), **_TINY)


def _pattern(root: nn.Module, layers: Sequence[Layer]) -> list[int]:
    """Which layers are of one kind: for each, the first that is."""
    kinds = [_kind(root, layer, shapes=False) for layer in layers]
    return [kinds.index(kind) for kind in kinds]


def _kind(root: nn.Module, layer: Layer, *, shapes: bool = True) -> Any:
    """What two layers have in common that have the same modules, weights of the same shapes, and the same flags."""
    module = root.get_submodule(layer.path)
    parts = [(name, type(one)) for name, one in module.named_modules()]
    sizes = [(name, tuple(one.shape)) for name, one in module.named_parameters()] if shapes else []
    attention = vars(root.get_submodule(str(layer.attention)))
    said = [(name, value) for name, value in sorted(attention.items()) if isinstance(value, (bool, str))]
    flags = [(name, value) for name, value in said if name != "training" and name[0] != "_"]
    return str(layer.attention)[len(layer.path) :], tuple(parts), tuple(sizes), tuple(flags)
