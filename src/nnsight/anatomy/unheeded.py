"""What an implementation of attention is given, and takes no notice of: its eager counterpart must do without it too.

transformers 5.2.0 runs Gemma 2 with sdpa, which drops the soft cap of its scores. A pattern with the cap would be of
another attention than the one that made z.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from nnsight.core.history import warn_user
from nnsight.core.values import is_fake

Attend = Callable[[Mapping[str, Any]], Any]  # with what is given by name, on the values of one call; z is the first


def unheeded(chosen: Callable[..., Any], eager: Callable[..., Any], kwargs: Mapping[str, Any]) -> list[str]:
    """What eager attention has a parameter for that it can do without, and the chosen implementation none.

    These are few, mostly none. Whether `chosen` hands one on in some other way is told by calling it.
    """
    named, own = inspect.signature(chosen).parameters, inspect.signature(eager).parameters.items()
    optional = [name for name, one in own if name not in named and one.default is not inspect.Parameter.empty]
    return [name for name in optional if kwargs.get(name) is not None]


def without(names: list[str], kwargs: Mapping[str, Any], chosen: Attend, eager: Attend) -> Mapping[str, Any]:
    """`kwargs` less those of these names that make a difference to `eager`, and none to `chosen`, bit for bit."""
    sure = {**kwargs, "dropout": 0.0} if "dropout" in kwargs else kwargs
    found = set()
    for name in names:
        less = {one: value for one, value in sure.items() if one != name}
        with torch.no_grad():
            if _differs(eager, sure, less) and not _differs(chosen, sure, less):
                found.add(name)
    return {name: value for name, value in kwargs.items() if name not in found}


def _differs(attend: Attend, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    z = attend(one)[0]
    return not is_fake(z) and not torch.equal(z, attend(other)[0])


def warn(kind: str, left_out: Mapping[str, Any], implementation: str) -> None:
    """Warns at the line that asks for scores or a pattern: the model doesn't compute what its config says."""
    told = ", ".join(f"{name}={value}" for name, value in left_out.items())
    warn_user(
        f"The model attends with {implementation!r}, which takes no notice of {told} in a {kind}: scores and pattern "
        'are those that it computes, without it. With attn_implementation="eager" the model has it.',
        RuntimeWarning,
    )
