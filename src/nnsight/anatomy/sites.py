"""All places under uniform names, by one string each; TransformerLens's names lead to the same places."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nnsight.core.history import user_place
from nnsight.errors import UnknownNameError

if TYPE_CHECKING:
    from nnsight.anatomy.halves import Half
    from nnsight.anatomy.uniform import Layers, Uniform

_STREAM = ("prompt", "token", "model")
_PATTERN = ("prompt", "head", "query", "key")
_OF_CROSSING = {
    "cross_attn.input": _STREAM,
    "cross_attn.q": ("prompt", "token", "head", "d_head"),
    "cross_attn.k": ("prompt", "encoder token", "kv_head", "d_head"),
    "cross_attn.v": ("prompt", "encoder token", "kv_head", "d_head"),
    "cross_attn.scores": _PATTERN,
    "cross_attn.pattern": _PATTERN,
    "cross_attn.z": ("prompt", "token", "head", "d_head"),
    "cross_attn.result": ("prompt", "token", "head", "model"),
    "cross_attn.output": _STREAM,
}
_OF_LAYERS = {
    "input": _STREAM,
    "attn.input": _STREAM,
    "attn.q": ("prompt", "token", "head", "d_head"),
    "attn.k": ("prompt", "token", "kv_head", "d_head"),
    "attn.v": ("prompt", "token", "kv_head", "d_head"),
    "attn.scores": _PATTERN,
    "attn.pattern": _PATTERN,
    "attn.z": ("prompt", "token", "head", "d_head"),
    "attn.result": ("prompt", "token", "head", "model"),
    "attn.output": _STREAM,
    **_OF_CROSSING,
    "mlp.input": _STREAM,
    "mlp.pre": ("prompt", "token", "d_mlp"),
    "mlp.act": ("prompt", "token", "d_mlp"),
    "mlp.router_logits": ("prompt", "token", "expert"),
    "mlp.chosen": ("prompt", "token", "k"),
    "mlp.routing_weights": ("prompt", "token", "k"),
    "mlp.shared.output": _STREAM,
    "mlp.output": _STREAM,
    "output": _STREAM,
}
_LOGITS = ("prompt", "token", "vocabulary")  # of a classifier of tokens, classes

# The names that TransformerLens has, and ours.
_LENS = {"hook_embed": "embed.output", "ln_final": "norm.output", "unembed": "logits"}
_LENS_OF_LAYERS = {
    "hook_resid_pre": "input",
    "hook_resid_post": "output",
    "hook_attn_out": "attn.output",
    "hook_mlp_out": "mlp.output",
    "hook_cross_attn_out": "cross_attn.output",
    "attn.hook_result": "attn.result",
    "attn.hook_attn_scores": "attn.scores",
    "attn.hook_rot_q": "attn.q",
    "attn.hook_rot_k": "attn.k",
    "mlp.hook_pre": "mlp.pre",
    "mlp.hook_post": "mlp.act",
    "mlp.hook_expert_indices": "mlp.chosen",
    **{f"attn.hook_{name}": f"attn.{name}" for name in ("q", "k", "v", "z", "pattern")},
    "cross_attn.hook_attn_scores": "cross_attn.scores",
    "cross_attn.hook_result": "cross_attn.result",
    **{f"cross_attn.hook_{name}": f"cross_attn.{name}" for name in ("q", "k", "v", "z", "pattern")},
}


class Site:
    """One place of a model, or of one run or row of it.

    Attributes:
        name: Its uniform name, `layers.3.attn.z`.
        axes: What the axes of its value are, in order: ("prompt", "token", "head", "d_head").
    """

    def __init__(self, uniform: Uniform, name: str, axes: tuple[str, ...]) -> None:
        self._uniform, self.name, self.axes = uniform, name, axes

    @property
    def value(self) -> Tensor:
        """What stands there in a trace; the model runs up to there. Assigning replaces it."""
        owner, last = self._owner()
        value: Tensor = getattr(owner, last)
        return value

    @value.setter
    def value(self, value: Any) -> None:
        owner, last = self._owner()
        setattr(owner, last, value)

    def _owner(self) -> tuple[Any, str]:
        owner: Any = self._uniform
        *path, last = self.name.split(".")
        for step in path:
            owner = owner[int(step)] if step.isdecimal() else getattr(owner, step)
        return owner, last

    def __repr__(self) -> str:
        return f"{self.name}  [{', '.join(self.axes)}]"


def sites(uniform: Uniform) -> Iterator[Site]:
    """Every place of a model that has a tensor under a uniform name, as a forward pass comes by in most layers.

    But for single experts, which are too many to be listed.
    """
    if uniform._layout.encoder is not None:
        yield from _of_encoder(uniform, uniform.encoder)
    yield Site(uniform, "embed.output", _STREAM)
    yield from _of_layers(uniform, uniform.layers, "layers")
    layout = uniform._layout
    if layout.norm is not None:
        yield Site(uniform, "norm.output", _STREAM)
    if layout.logits is not None:
        yield Site(uniform, "logits", _LOGITS if layout.tail is not None else ("prompt", "class"))


def _of_encoder(uniform: Uniform, encoder: Half) -> Iterator[Site]:
    if encoder.has("embed"):
        yield Site(uniform, "encoder.embed.output", _STREAM)
    yield from _of_layers(uniform, encoder.layers, "encoder.layers")
    yield Site(uniform, "encoder.output", _STREAM)


def _of_layers(uniform: Uniform, layers: Layers, prefix: str) -> Iterator[Site]:
    for layer in layers:
        for name, axes in _OF_LAYERS.items():
            if layer.has(name):
                yield Site(uniform, f"{prefix}.{layer.index}.{name}", axes)


def site(uniform: Uniform, name: str) -> Site:
    """The place of this name.

    Raises:
        UnknownNameError: There is none.
    """
    ours = _ours(name)
    every = {one.name: one for one in sites(uniform)}
    if ours in every:
        return every[ours]
    if expert := re.fullmatch(r"layers\.(\d+)\.(mlp\.experts\.\d+\.output)", ours):
        index = int(expert[1])
        if index < len(uniform.layers) and uniform.layers[index].has(expert[2]):
            return Site(uniform, ours, _STREAM)
    near = difflib.get_close_matches(ours, every, n=3)
    raise UnknownNameError(
        f"This model has no site `{name}`.",
        you_wrote=user_place().source,
        nearest=", ".join(f"`{one}`" for one in near),
        instead="print(model.sites())",
    )


def _ours(name: str) -> str:
    """The uniform name of a place, from that or TransformerLens's; layers may be written `layers[3]`."""
    name = re.sub(r"\[(\d+)\]", r".\1", name)
    name = re.sub(r"^decoder\.(?=layers\.|embed\.|norm\.)", "", name)  # the decoder's are the model's
    match = re.fullmatch(r"(blocks|encoder|decoder)\.(\d+)\.(.+)", name)
    if match is None:
        return _LENS.get(name, name)
    half, layer, rest = match.groups()
    return f"{'encoder.' * (half == 'encoder')}layers.{layer}.{_LENS_OF_LAYERS.get(rest, rest)}"
