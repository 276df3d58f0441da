"""Where a model keeps what all language models have: what discovery finds (discover.py), as plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from nnsight.core.turns import Turn

Place = tuple[int | str, ...]


@dataclass(frozen=True)
class Piece:
    """One of two parts of an array's last axis: of two that follow each other, or of two that take turns."""

    second: bool
    takes_turns: bool = False

    def of(self, array: Tensor) -> Tensor:
        """A view of it."""
        half = array.shape[-1] // 2
        if self.takes_turns:
            return array[..., int(self.second) :: 2]
        return array[..., half:] if self.second else array[..., :half]

    def __str__(self) -> str:
        if self.takes_turns:
            return f"[..., {int(self.second)}::2]"
        return "[second half]" if self.second else "[first half]"


@dataclass(frozen=True)
class Slab:
    """One of several parts of an array's first axis that follow each other."""

    index: int
    count: int

    def of(self, array: Tensor) -> Tensor:
        """A view of it."""
        return array.unflatten(0, (self.count, -1))[self.index]

    def __str__(self) -> str:
        return f"[{self.index} of {self.count}]"


@dataclass(frozen=True)
class Part:
    """A tensor that passes a module's port.

    Attributes:
        path: The module, below the root; "" is the root itself.
        port: "input" (one of all the inputs, `(args, kwargs)`) or "output".
        at: Where in the port's value it is: () for the value itself, (0,) for the first of a tuple, ("logits",).
        scale: What it is multiplied by on its way into the residual stream.
        changes: Whether the model itself changes that tensor in place afterwards, so that it isn't what was added.
        shared: Whether others read the very tensor that a module is given: a change of it in place would be theirs too.
        flat: Whether prompts and tokens are one axis there, [prompt * token, model].
        piece: Which part of that tensor it is; None: all.
        by: A parameter, below the root, that it is multiplied by besides, a number for each channel or for all of them;
            None: none is.
    """

    path: str
    port: str
    at: Place = ()
    scale: float = 1.0
    changes: bool = False
    shared: bool = False
    flat: bool = False
    piece: Piece | Slab | None = None
    by: str | None = None

    @cached_property
    def names(self) -> tuple[str, ...] | None:
        """The names that lead to the module, where this is the very value that it returns; else None."""
        is_output = self == Part(self.path, "output") and bool(self.path)
        return tuple(self.path.split(".")) if is_output else None

    def __str__(self) -> str:
        inside = "".join(f"[{step!r}]" for step in self.at) + str(self.piece or "")
        scaled = "" if self.scale == 1 else f"{self.scale:.6g} * "
        scaled += "" if self.by is None else f"{self.by} * "
        return f"{scaled}{self.path}.{'inputs' if self.port == 'input' else self.port}{inside}"


@dataclass(frozen=True)
class Stretch:
    """What is done to each channel of the whole stream: it is multiplied, and shifted, by parameters of the model's.

    Attributes:
        scale: The parameter that multiplies, below the root; None: nothing does.
        bias: The parameter that is added; None: nothing is.
        bias_first: Whether it is added before the multiplication.
    """

    scale: str | None
    bias: str | None
    bias_first: bool = False

    def of(self, root: nn.Module, stream: Tensor) -> Tensor:
        scale = 1.0 if self.scale is None else root.get_parameter(self.scale)
        bias = 0.0 if self.bias is None else root.get_parameter(self.bias)
        return (stream + bias) * scale if self.bias_first else stream * scale + bias


Made = tuple[Part | str | float | Stretch, ...]


@dataclass(frozen=True)
class Layer:
    """One layer: where the residual stream comes in and goes out, and what is added to it in between.

    Attributes:
        path: The layer's module.
        input: The residual stream before it.
        output: The residual stream behind it.
        attn: What mixes tokens, summed; () where nothing does.
        mlp: What works on each token alone, summed; () where nothing does.
        attention: The module in whose forward attention is computed, if there is one in the layer.
        made: How the output is made of the input, in order: a part is added; a norm, a module's path, is applied to the
            whole stream, as in BERT; or that is multiplied by a number, or stretched channel by channel.
        attn_input: What is given to the module in which `attn` is computed, where it is one.
        mlp_input: The same of `mlp`.
        cross_attn: What is added of what an encoder read; () where nothing is.
        cross_attention: The module in whose forward attention to that is computed.
        cross_attn_input: As `attn_input`.
        turn: Which call of its module it is, where one module is several layers.
        streams: How many residual streams it is given and hands on. Where that is more than one they are mixed: `input`
            and `output` are all of them, and what is added to each is not known.
    """

    path: str
    input: Part
    output: Part
    attn: tuple[Part, ...]
    mlp: tuple[Part, ...]
    attention: str | None
    made: Made
    attn_input: Part | None = None
    mlp_input: Part | None = None
    cross_attn: tuple[Part, ...] = ()
    cross_attention: str | None = None
    cross_attn_input: Part | None = None
    turn: Turn | None = None
    streams: int = 1

    def __str__(self) -> str:
        """The sum in words: `input + attn.output[0] + mlp.output`."""
        if self.streams > 1:
            return f"{self.streams} streams, mixed"
        words, below = "input", len(self.path) + 1
        for one in self.made:
            if isinstance(one, Part):
                by = None if one.by is None else one.by[below:]
                words = f"{words} + {replace(one, path=one.path[below:], by=by)}"
            elif isinstance(one, str):
                words = f"{one[below:]}({words})"
            elif isinstance(one, Stretch):
                named = " and ".join(name[below:] for name in (one.scale, one.bias) if name is not None)
                words = f"({words}, with {named})"
            else:
                words = f"{one:.6g} * ({words})"
        return words


@dataclass(frozen=True)
class Step:
    """One step from the last layer to the logits: a module that is called, or arithmetic.

    Attributes:
        path: The module; None for arithmetic.
        each: Whether it is a list of modules, each of which is called with the same: their outputs become more rows.
        scale: What the values are multiplied by.
        cap: `cap * tanh(x / cap)`, where there is such a bound.
        bias: A buffer of the model's own that is added.
        by: A parameter of the model's own, one number, that the values are multiplied by.
    """

    path: str | None
    scale: float = 1.0
    cap: float | None = None
    each: bool = False
    bias: str | None = None
    by: str | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"`{self.path}`"
        if self.bias is not None:
            return f"+ `{self.bias}`"
        if self.by is not None:
            return f"* `{self.by}`"
        return f"* {self.scale:.6g}" if self.cap is None else f"cap {self.cap:.6g}"


@dataclass(frozen=True)
class Encoder:
    """The half of a model that reads, where a decoder answers.

    Attributes:
        layers: In order.
        embed: The module that looks its tokens up, if it reads tokens.
        norm: The module behind its last layer, if there is one.
        output: What the decoder is given of it.
    """

    layers: tuple[Layer, ...]
    embed: str | None
    norm: str | None
    output: Part


@dataclass(frozen=True)
class Layout:
    """Where a language model has what all have.

    Attributes:
        layers: In order.
        embed: The token embedding's module.
        norm: The module behind the last layer, if there is one.
        unembed: The module that makes logits, before they are scaled.
        logits: The logits in the model's output, if it has any.
        tail: What lies between the last layer and the logits; None where they aren't made of each token alone.
        encoder: What reads for it, if these are a decoder's.
    """

    layers: tuple[Layer, ...]
    embed: str
    norm: str | None
    unembed: str | None
    logits: Part | None
    tail: tuple[Step, ...] | None
    encoder: Encoder | None = None


def inside(value: Any, at: Place) -> Any:
    """The part of a port's value at this place."""
    for step in at:
        value = value[step]
    return value


def with_inside(value: Any, at: Place, new: Any) -> Any:
    """A port's value with another part at this place: containers on the way are made anew."""
    if not at:
        return new
    step, *rest = at
    part = with_inside(value[step], tuple(rest), new)
    if isinstance(value, tuple):
        items = [part if i == step else item for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    copied = value.copy() if type(value) in (list, dict) else _copy(value)
    copied[step] = part
    return copied


def _copy(value: Any) -> Any:
    import copy

    return copy.copy(value)


def kept(root: nn.Module, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The layers that a model has still: somebody may have cut off its last ones, or taken some out."""
    if is_there(root, layers[-1].path):
        return layers
    return tuple(layer for layer in layers if is_there(root, layer.path))


def is_there(root: nn.Module, path: str) -> bool:
    """Whether a model has a module still in which something was found."""
    return found_at(root, path) is not None


def found_at(root: nn.Module, path: str) -> nn.Module | None:
    """The module that a model has there still, if it has one."""
    found: nn.Module | None = root
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found
