"""What may be assigned under a uniform name: a tensor, of the shape that is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from nnsight.block.rows import RowRun
from nnsight.core.hidden import Hidden
from nnsight.core.history import user_place
from nnsight.core.no_value import NoValue
from nnsight.core.specs import shape_of, show_shape
from nnsight.errors import WriteError

if TYPE_CHECKING:
    from nnsight.core.run import Run


def check_tensor(value: Any, what: str = "A value under a uniform name") -> None:
    """Refuses what is no tensor; `what`: what is one."""
    if isinstance(value, Hidden):
        value._raise()
    if isinstance(value, NoValue):
        raise value._is_no_value("a tensor is meant")
    if not isinstance(value, Tensor):
        raise WriteError(
            f"{what} is a tensor, not {_a(value)}.", you_wrote=user_place().source, instead=_as_tensor(value)
        )


def _a(value: Any) -> str:
    kind = type(value).__name__
    return f"{'an' if kind.startswith((*'aeiou', 'nd')) else 'a'} {kind}"


def _as_tensor(value: Any) -> str | None:
    """What to write for something that was given in the place of a tensor."""
    if isinstance(value, (bool, int, float)):
        return f"`[:] = {value!r}` behind that name, to fill the tensor that is there; or torch.full_like(tensor, ...)"
    if isinstance(value, (list, tuple)) and value and all(isinstance(one, Tensor) for one in value):
        return "one of them, or all in one: torch.stack(tensors)"
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        return "its first item, value[0]"
    return "torch.as_tensor(value)" if hasattr(value, "__array__") else None


def check_shape(name: str, old: Tensor, new: Tensor, run: Run | RowRun | None = None) -> None:
    if old.shape != new.shape:
        fits = isinstance(run, RowRun) and old.ndim == new.ndim  # but for the number of tokens, mostly
        raise WriteError(
            f"`{name}` has another shape than what you assigned.",
            you_wrote=user_place().source,
            it_has=show_shape(shape_of(old)),
            you_gave=show_shape(shape_of(new)),
            instead="the positions that correspond: b.layer.output[:, -3:] = a.layer.output[:, -3:]" if fits else None,
        )
