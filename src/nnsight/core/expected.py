"""Notes on what Python and torch raise where a program takes a value for what it was in earlier versions.

There, values were proxies, blocks of transformers returned tuples, and gradients were had outside of the backward pass.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from nnsight.core.history import Access, add_note, raised_at
from nnsight.core.specs import TensorSpec, show_shape

if TYPE_CHECKING:
    from nnsight.core.run import Run

_OF_PROXIES = {
    "value": "What a block binds is the value itself.",
    "stop": "It is the trace that stops: tracer.stop()",
}
_OF_TUPLES = (
    "What a module returns as a tuple is assigned whole, module.output = (new, *module.output[1:]), or what is in it "
    "is changed in place, module.output[0][:] = new."
)
_OF_GRADIENTS = "A gradient is had in its backward pass: with loss.backward(): gradient = hidden.grad"
_OF_SAVING = "Nothing has to be saved: what a block binds is there after it. nnsight.save(x) takes any x."
_TOO_FEW = re.compile(r"too many indices for tensor of dimension (\d+)|Dimension out of range .* range of \[-(\d+), ")


def explain(error: BaseException, run: Run | None) -> None:
    """Adds a note to an error of a block, where it was raised for a value that is not what the program expects."""
    note = _note(error, run)
    if note is not None and note not in getattr(error, "__notes__", ()):  # of a trace inside this one
        add_note(error, note)


def _note(error: BaseException, run: Run | None) -> str | None:
    if isinstance(error, IndexError):
        return _of_one_less(error, run)
    if not isinstance(error, (AttributeError, TypeError)):
        return None
    name, of = (error.name, error.obj) if isinstance(error, AttributeError) else (None, None)
    line = _line_of(error)
    if "'NoneType'" in str(error):
        return _OF_GRADIENTS if ".grad" in line or (name == "save" and not line) else _of_none(run)
    if name == "save":
        return _OF_SAVING
    if isinstance(error, TypeError):
        of_a_tuple = "'tuple'" in str(error) or "to tuple" in str(error)
        return _OF_TUPLES if of_a_tuple and (".output" in line or ".input" in line) else None
    is_a_value = isinstance(of, (torch.Tensor, tuple, list, dict))
    return _OF_PROXIES.get(name) if name is not None and is_a_value else None


def _line_of(error: BaseException) -> str:
    """The line that raised it; empty where that can't be read."""
    place = raised_at(error)
    return "" if place is None else place.text


def _of_one_less(error: IndexError, run: Run | None) -> str | None:
    """For a tensor of one dimension less than the output that was read last: the first of the batch, not of a tuple."""
    found, read = _TOO_FEW.match(str(error)), _last_read(run)
    if found is None or read is None or run is None or not isinstance(read.shape, TensorSpec):
        return None
    if len(read.shape.shape) != int(found[1] or found[2]) + 1:
        return None
    name = run.tree.name_of(read.module, read.kind)
    return (
        f"`{name}` is a tensor, {show_shape(read.shape)}: `[0]` of it is the first of the batch. What was `.output[0]` "
        "where the module returned a tuple is `.output`."
    )


def _of_none(run: Run | None) -> str | None:
    """For an output that has None in it, as attention's has for its weights."""
    read = _last_read(run)
    if read is None or run is None or not isinstance(read.shape, list) or "NoneType" not in read.shape:
        return None
    is_attention = "attention" in type(read.module).__name__.lower()
    way_out = ' With attn_implementation="eager", attention returns its weights.' if is_attention else ""
    return f"`{run.tree.name_of(read.module, read.kind)}` is {show_shape(read.shape)}.{way_out}"


def _last_read(run: Run | None) -> Access | None:
    """The module's output that the block had last, if that is the last thing that it did."""
    last = run.history.last if run is not None and run.history else None
    return last if last is not None and last.verb == "read" and last.kind == "output" else None
