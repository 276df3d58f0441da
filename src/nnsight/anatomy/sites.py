"""All places under uniform names, by one string each; TransformerLens's names lead to the same places."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nnsight.anatomy.lens_names import MID, OF_LAYERS, OF_MODELS, ours
from nnsight.core.history import user_place
from nnsight.core.no_value import NoValue
from nnsight.core.spelling import nearest
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


class Site(NoValue):
    """One place of a model, or of one run or row of it.

    Attributes:
        name: Its uniform name, `layers.3.attn.z`.
        axes: What the axes of its value are, in order: ("prompt", "token", "head", "d_head").
    """

    _is = "a place, not a value"
    _meant = "value"

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

    def _names(self) -> tuple[str, str]:
        return f"site({self.name!r})", f"model.site({self.name!r})"

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
        of_tokens = layout.tail is not None or layout.layers[0].streams > 1
        yield Site(uniform, "logits", _LOGITS if of_tokens else ("prompt", "class"))


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
    known = _known(name)
    every = {one.name: one for one in sites(uniform)}
    if known in every:
        return every[known]
    if expert := re.fullmatch(r"layers\.(\d+)\.(mlp\.experts\.\d+\.(output|pre|act))", known):
        index = int(expert[1])
        if index < len(uniform.layers) and uniform.layers[index].has(expert[2]):
            return Site(uniform, known, _STREAM if expert[3] == "output" else (*_STREAM[:-1], "d_mlp"))
    raise UnknownNameError(
        f"This model has no site `{name}`.",
        you_wrote=user_place().source,
        nearest=nearest(known, every, n=3),
        instead=_middle(known) or "print(model.sites())",
    )


def _known(name: str) -> str:
    """The uniform name of a place, from that or TransformerLens's; layers may be written `layers[3]`."""
    name = re.sub(r"\[(\d+)\]", r".\1", name)
    name = re.sub(r"^decoder\.(?=layers\.|embed\.|norm\.)", "", name)  # the decoder's are the model's
    match = re.fullmatch(r"(blocks|encoder|decoder)\.(\d+)\.(.+)", name)
    if match is None:
        return OF_MODELS.get(name, name)
    half, layer, rest = match.groups()
    return f"{'encoder.' * (half == 'encoder')}layers.{layer}.{OF_LAYERS.get(rest, rest)}"


def _middle(name: str) -> str | None:
    """What to write for the stream between attention and MLP, which is no site."""
    match = re.fullmatch(rf"layers\.(\d+)\.{MID}", name)
    return ours(f"model.layers[{match[1]}]", MID) if match else None
