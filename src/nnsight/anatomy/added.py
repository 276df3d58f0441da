"""What a layer adds to the residual stream, by attention or by its MLP, and what is inside attention."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, overload

from torch import Tensor

from nnsight.anatomy import attention
from nnsight.anatomy.heads.names import OF_HEADS, HeadNames
from nnsight.anatomy.layout import Layer, Part
from nnsight.anatomy.lens_names import ours
from nnsight.anatomy.parts import module_at
from nnsight.anatomy.values import read, read_sum, write, write_sum
from nnsight.core.escape import raise_escaped
from nnsight.core.history import user_place
from nnsight.core.no_value import MadeAnew
from nnsight.core.spelling import nearest, quoted
from nnsight.errors import NotOnThisLayerError, UnknownNameError

if TYPE_CHECKING:
    from nnsight.node import Node


DOES = {"attn": "mixes tokens", "mlp": "works on each token alone", "cross_attn": "reads what an encoder read"}


class Added(MadeAnew):
    """What a layer adds to the residual stream by mixing tokens (`attn`), or for each token alone (`mlp`)."""

    _root: Node
    _layer: Layer
    _index: int
    _name: str
    _holds_values: ClassVar[bool] = True  # to who is given it as something that can be called: `tracer.cache`

    def __init__(self, root: Node, layer: Layer, index: int, name: str) -> None:
        vars(self).update(_root=root, _layer=layer, _index=index, _name=name)

    @property
    def input(self) -> Tensor:
        """What the module in which this is computed is given, [prompt, token, model]: the stream behind a norm, mostly.

        Assigning replaces it.
        """
        return read(self._root, self._input())

    @input.setter
    def input(self, value: Any) -> None:
        write(self._root, self._input(), value)

    def _input(self) -> Part:
        part: Part | None = getattr(self._layer, f"{self._name}_input")
        if part is None:
            parts = self.parts
            each = [f"model.get({one.path!r}).input" for one in parts] if len(parts) > 1 else []
            raise NotOnThisLayerError(
                f"Layer {self._index}, `{self._layer.path}`, has no single `{self._name}.input`"
                + (": each of the modules that make it is given its own." if each else "."),
                you_wrote=user_place().source,
                it_is=" + ".join(map(str, parts)),
                each_has=" and ".join(each),
                instead=f'for layer in model.layers.having("{self._name}.input"):',
            )
        return part

    @property
    def output(self) -> Tensor:
        """Exactly what is added to the residual stream, [prompt, token, model]: behind a norm and a scale, if any."""
        return read_sum(self._root, self.parts)

    @output.setter
    def output(self, value: Any) -> None:
        write_sum(self._root, self.parts, value)

    def has(self, name: str) -> bool:
        """Whether there is a value of this name: "output", "q"."""
        if name == "input":
            return getattr(self._layer, f"{self._name}_input") is not None
        return name in ("", "output") and bool(getattr(self._layer, self._name))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The modules' values whose sum it is."""
        parts: tuple[Part, ...] = getattr(self._layer, self._name)
        if self._layer.streams > 1:
            raise NotOnThisLayerError(
                f"Layer {self._index}, `{self._layer.path}`, mixes {self._layer.streams} residual streams: what "
                f"`{self._name}` adds to each is not known.",
                you_wrote=user_place().source,
                there_is=f"attn.q, .k, .v, .z, .pattern and the like; model.layers[{self._index}].raw for the modules",
            )
        if not parts:
            what = DOES[self._name]
            raise NotOnThisLayerError(
                f"Layer {self._index}, `{self._layer.path}`, has no `{self._name}`: nothing in it {what}.",
                you_wrote=user_place().source,
                it_is=str(self._layer),
                instead=f'for layer in model.layers.having("{self._name}"):',
            )
        return parts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module in which all this is computed, on a value of one's own, as `raw.mlp(...)` does.

        In a trace that is its forward, with no effect on the run.

        Raises:
            NotOnThisLayerError: There is no single module that is given what `.input` has, and returns `.output`.
        """
        given, parts = getattr(self._layer, f"{self._name}_input"), self.parts
        made_by = None if given is None else Part(given.path, "output")
        if len(parts) != 1 or given.flat or replace(parts[0], at=(), changes=False) != made_by:
            raise NotOnThisLayerError(
                f"`layers[{self._index}].{self._name}` can't be called: no single module makes it of what it is given.",
                you_wrote=user_place().source,
                it_is=" + ".join(map(str, parts)),
                instead=f"model.layers[{self._index}].raw, for the module's own names, each of which can be called",
            )
        return module_at(self._root, given.path)(*args, **kwargs)

    def _read(self, name: str) -> Tensor:
        """The value of an `Inner`."""
        raise NotImplementedError

    def _write(self, name: str, value: Any) -> None:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise_escaped()  # an AttributeError of the model's, which came out of a property
        known = [one for one in dir(type(self)) if not one.startswith("_")]
        near = quoted([one for one in known if one.lower() == name.lower()]) or nearest(name, known, n=1)
        elsewhere = ours(f"model.layers[{self._index}]", f"{self._name}.{name}") or self._elsewhere(name)
        raise UnknownNameError(
            f"`layers[{self._index}].{self._name}` has no `{name}`.",
            you_wrote=user_place().source,
            nearest=near,
            instead=elsewhere or (None if near else f"model.layers[{self._index}].raw, for the module's own names"),
        )

    def _names(self) -> tuple[str, str]:
        label = f"layers[{self._index}].{self._name}"
        return label, f"model.{label}"

    def _stands_for(self) -> tuple[Any, ...]:
        return self._root, self._layer.path, self._index, self._name

    def _elsewhere(self, name: str) -> str | None:
        """What to write for a name that another part of the layer has, or the model, or the module behind this."""
        from nnsight.anatomy.mlps.names import Mlp  # which are made of what is here
        from nnsight.anatomy.uniform import NAMES

        kinds: dict[str, type] = {"attn": Attention, "mlp": Mlp}
        for part, kind in kinds.items():
            if part != self._name and hasattr(kind, name):
                return f"model.layers[{self._index}].{part}.{name}"
        if name in NAMES:
            return f"model.{name}"
        given = getattr(self._layer, f"{self._name}_input")
        return None if given is None else _spelled(module_at(self._root, given.path), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(inspect.getattr_static(type(self), name, None), "__set__"):
            getattr(self, name)
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        parts = " + ".join(map(str, getattr(self._layer, self._name))) or "nothing"
        return f"layer {self._index}.{self._name}: {parts}"


def _spelled(node: Node, name: str) -> str | None:
    """What leads to this child, value or method of a module; None where it has none. Nothing is read for it."""
    has = not name.startswith("_") and (hasattr(type(node), name) or hasattr(node._module, name))
    return f"{node._spelled}.{name}" if has else None


class Inner:
    """One of the values inside attention or an MLP, read and assigned: a tensor."""

    def __init__(self, name: str, what: str) -> None:
        self._name, self.__doc__ = name, what

    @overload
    def __get__(self, node: None, owner: type) -> Inner: ...
    @overload
    def __get__(self, node: Added, owner: type) -> Tensor: ...

    def __get__(self, node: Added | None, owner: type) -> Any:
        return self if node is None else node._read(self._name)

    def __set__(self, node: Added, value: Any) -> None:
        node._write(self._name, value)

    fset = __set__  # as a property has, of what can be assigned


class Attention(Added, HeadNames):
    """The attention of a layer: what it adds, what is inside, and what belongs to each head."""

    q = Inner("q", "The queries, [prompt, token, head, d_head], behind rotary embedding.")
    k = Inner("k", "The keys, [prompt, token, kv_head, d_head], behind rotary embedding, with those of a cache.")
    v = Inner("v", "The values, [prompt, token, kv_head, d_head], with those of a cache.")
    z = Inner("z", "What each head has gathered, [prompt, token, head, d_head], before the output projection.")
    scores = Inner("scores", "What softmax is given, [prompt, head, query, key]. Has the layer attend eagerly.")
    pattern = Inner("pattern", "What softmax returns, [prompt, head, query, key]. Has the layer attend eagerly.")

    def _read(self, name: str) -> Tensor:
        return attention.read(self._module(name), name)

    def _write(self, name: str, value: Any) -> None:
        attention.write(self._module(name), name, value)

    @property
    def input(self) -> Tensor:
        """What the attention is given, [prompt, token, model]: the stream behind a norm, mostly.

        Assigning replaces it.
        """
        self._expect()
        return super().input

    @input.setter
    def input(self, value: Any) -> None:
        self._expect()
        write(self._root, self._input(), value)

    def _expect(self) -> None:
        path = self._attending
        if path is not None:  # what is inside may be asked for behind its input
            attention.expect(module_at(self._root, path))

    def has(self, name: str) -> bool:
        if name in OF_HEADS:
            return self._attending is not None and self._has_of_heads(name)
        return super().has(name) or (name in INTERIOR and self._attending is not None)

    def _elsewhere(self, name: str) -> str | None:
        if self._attending is not None and _spelled(self.module, name) is not None:
            return f"model.layers[{self._index}].{self._name}.module.{name}"
        return super()._elsewhere(name)

    def __getitem__(self, head: Any) -> Any:
        here = f"model.layers[{self._index}].{self._name}"
        of_head = f"{here}.z[:, :, {head!r}] for what that head gathers, {here}.result[:, :, {head!r}] for what it adds"
        raise self._is_no_value("it has no items", of_head if isinstance(head, int) else None)

    @property
    def _attending(self) -> str | None:
        """The module in whose forward attention is computed, if there is one."""
        path: str | None = self._layer.attention
        return path

    @property
    def module(self) -> Node:
        """The module in whose forward attention is computed, under its own names."""
        return self._module("module")

    def _module(self, name: str) -> Node:
        path = self._attending
        if path is None:
            lacks = f"`{self._name}.{name}`: no attention is computed in it"
            raise NotOnThisLayerError(
                f"Layer {self._index}, `{self._layer.path}`, has no {lacks}.",
                you_wrote=user_place().source,
                it_is=str(self._layer),
                instead=f'for layer in model.layers.having("{self._name}.{name}"):',
            )
        return module_at(self._root, path)


INTERIOR = attention.NAMES
