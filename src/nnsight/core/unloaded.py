"""Weights that were read before they were loaded, which are on `meta`: with a shape, and without numbers.

Torch takes one for numbers in places: a matrix on the CPU times one on `meta` is what happened to be in memory, and
what such a one is added to in place stays as it was. A program that reads `W = model.lm_head.weight` in front of its
first trace would have that without a word.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass

from nnsight.core.history import add_note
from nnsight.core.values import tensors_in
from nnsight.errors import ModelError

_WRITE = "model.dispatch() before it is read; or read it in the trace"


class Unloaded(Tensor):
    """A weight without numbers, or what was made of one: refused where numbers meet it.

    What is done to the weight itself is refused, or done again, when the weights are loaded.
    """

    _of: str
    _is_param: bool  # which makes it a `nn.Parameter`, for `isinstance`

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with DisableTorchFunctionSubclass():
            return _done(func, args, kwargs or {})

    def _plain(self) -> Tensor:
        with DisableTorchFunctionSubclass():
            return nn.Parameter(self.detach(), self.requires_grad) if self._is_param else self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self._plain(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)


def lent(weight: Any, name: str) -> Any:
    """The same tensor, which tells from now on where it meets numbers, if it has none."""
    if type(weight) in (Tensor, nn.Parameter) and weight.is_meta:
        is_parameter = isinstance(weight, nn.Parameter)
        weight.__class__ = Unloaded
        weight._of, weight._is_param = name, is_parameter
    return weight


def _done(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    tensors = [one for _, one in tensors_in((args, kwargs))]
    name = next(one._of for one in tensors if isinstance(one, Unloaded))
    done_to_one = isinstance(args[0], Unloaded) and _is_in_place(func) if args else False
    if not done_to_one and not all(one.device.type == "meta" for one in tensors):
        raise ModelError(_text(name), write=_WRITE)
    try:
        made = func(*args, **kwargs)
    except (RuntimeError, NotImplementedError) as error:  # of .item(), .cpu()
        add_note(error, f"{_text(name)} Write {_WRITE}.")
        raise
    for _, one in tensors_in(made):
        lent(one, name)
    return made


def _text(name: str) -> str:
    return f"`{name}` was read before the weights were loaded, and has no numbers: it is on `meta`."


def _is_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in ("__set__", "__setitem__") or name.startswith("__i")
    return name.endswith("_")
