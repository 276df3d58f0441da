"""Parts of a forward pass that the backward pass computes a second time: gradient checkpointing.

The second time, no block waits: what was written in such a part is not there, and the gradients would be those of
another model. So a write is refused, at its line. That a run stands in such a part is told by its frames.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from nnsight.core.graphless import CHECKPOINT
from nnsight.core.history import PACKAGE, History, user_place
from nnsight.core.state import RunState, Visit
from nnsight.core.values import tensors_in
from nnsight.errors import WriteError

_CALLS = nn.Module._call_impl.__code__.co_filename
_INSTEAD = (
    "model.gradient_checkpointing_disable(), as transformers has it, or no checkpoint in the model's own forward\n"
    "with torch.no_grad(), model.trace(...):    where no gradient is needed"
)


class Had(NamedTuple):
    """A tensor that the block had in a part which is computed again, and where: the innermost one."""

    part: weakref.ref[Any]
    tensor: weakref.ref[torch.Tensor]
    module: nn.Module
    kind: str


def note_versions(state: RunState, frames: list[FrameType]) -> None:
    """Notes what the values are where the run stands, if that is a part which is computed again.

    And those that the block had in it before: the model may still use them.
    """
    visit = state.visit
    assert visit is not None
    port = visit.port
    inputs = dict(parts_around(frames, leaves=port is not None and port.kind == "output"))
    parts = list(inputs)
    state.had = [one for one in state.had if one.part in parts]
    if not parts:
        return
    assert port is not None
    value = (visit.args, visit.kwargs, visit.output, *inputs.values())
    tensors = [tensor for _, tensor in tensors_in(value) if not tensor.is_inference()]
    state.had += [Had(parts[0], weakref.ref(tensor), port.module, port.kind) for tensor in tensors]
    alive = [(one, tensor) for one in state.had if (tensor := one.tensor()) is not None]
    visit.versions = [(tensor, tensor._version, one.module, one.kind) for one, tensor in alive]


def parts_around(frames: list[FrameType], *, leaves: bool) -> Iterator[tuple[weakref.ref[Any], Any]]:
    """Of what the backward pass computes again, the parts in which the model stands, innermost first, and their inputs.

    What is written in one of them would be missing then.

    Args:
        frames: Where the model is paused, innermost first.
        leaves: Whether it is the output of a module. That of the very module which is checkpointed leaves the part, so
            that a checkpoint which is not reentrant takes it as it is.
    """
    at_its_edge = leaves
    for frame in frames:
        code = frame.f_code
        if code.co_filename == CHECKPOINT:
            if code.co_name == "forward" and any(getattr(ctx := frame.f_locals.get("ctx"), "needs_input_grad", ())):
                yield weakref.ref(ctx), frame.f_locals.get("args")
            if not at_its_edge and _keeps_inputs(gen := _entered_in(frame)):
                yield weakref.ref(gen), frame.f_locals.get("args")
        elif code.co_filename != _CALLS and not code.co_filename.startswith(PACKAGE):
            at_its_edge = False


def _entered_in(frame: FrameType) -> Any:
    """The checkpoint that is not reentrant which one of torch's frames has entered, a generator of torch's own."""
    holds = "gen" in frame.f_code.co_varnames  # `checkpoint`; from torch 2.14 on, what it calls
    return frame.f_locals.get("gen") if holds else None


def _keeps_inputs(entered: Any) -> bool:
    """Whether a checkpoint that is not reentrant began with gradients on: only then it keeps what to begin from."""
    frame: FrameType | None = getattr(entered, "gi_frame", None)
    if frame is None or (kept := frame.f_locals.get("new_frame")) is None:
        return False
    if hasattr(kept, "input_saver"):  # torch 2.11 and older: a tensor of no values, whose graph node has them
        return getattr(kept.input_saver, "grad_fn", None) is not None
    return bool(kept.saved_args) or not frame.f_locals.get("args")


def close_checkpoints(error: BaseException) -> None:
    """Closes those that an error has left, innermost first, on the side that has opened them.

    In torch 2.11 and older, they are open for as long as its traceback is kept, with hooks in force that the other
    side, where it is given up, hasn't got.
    """
    left = []
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == CHECKPOINT:
            left.append(_entered_in(traceback.tb_frame))
        traceback = traceback.tb_next
    for entered in reversed(left):
        if entered is not None:
            entered.close()


def refuse(label: str, changed_in_place: str | None = None) -> WriteError:
    """`changed_in_place`: the line at which what was changed had been had."""
    return WriteError(
        f"`{label}` can't be changed here: it stands in a checkpoint, which the backward pass computes again, without "
        "the change. The gradients would be wrong.",
        you_wrote=None if changed_in_place else user_place().source,
        changed_in_place=f"what was had at {changed_in_place}" if changed_in_place else None,
        instead=_INSTEAD,
    )


def was_changed(visit: Visit) -> bool:
    """Whether a value was changed in place since the run came to this place, in a part that is computed again."""
    return next(_changed(visit), None) is not None


def check_in_place(visit: Visit, name_of: Callable[[nn.Module, str], str], history: History) -> None:
    """Raises before the model goes on with a value that was changed in place."""
    for module, kind in _changed(visit):
        here = [access for access in history if access.module is module]
        raise refuse(name_of(module, kind), changed_in_place=here[-1].place.quoted if here else None)


def _changed(visit: Visit) -> Iterator[tuple[nn.Module, str]]:
    for tensor, version, module, kind in visit.versions or ():
        if tensor._version != version:
            yield module, kind
