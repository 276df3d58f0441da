"""Why a tensor has no graph, so that there is no gradient of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from nnsight.core.history import TORCH

if TYPE_CHECKING:
    from nnsight.core.origins import Handed
    from nnsight.core.run import Run

CHECKPOINT = str(Path(TORCH, "utils", "checkpoint.py"))


class Reason(NamedTuple):
    """Why a tensor has no graph, and what to write instead."""

    because: str
    instead: str


def reason_of_run(run: Run) -> Reason | None:
    """Why what a run hands out has no graph, if that is known."""
    codes = [frame.f_code for frame in run.frames()]
    if run.called is None or any(code.co_name == "generate" for code in codes):
        return _PIPELINE if run.counter is not None and run.counter.has_outside else _GENERATION
    if any(code.co_name == "forward" and code.co_filename == CHECKPOINT for code in codes):
        return Reason(
            "the model runs this module in a reentrant checkpoint, where torch records no graph",
            "checkpoint with use_reentrant=False; transformers has gradient_checkpointing_kwargs for it",
        )
    if not run.records:
        return Reason(
            "the trace was opened under torch.no_grad()",
            "open it outside of that, or with torch.enable_grad(), model.trace(...):",
        )
    if not any(parameter.requires_grad for parameter in run.module.parameters()):
        return Reason(
            "all parameters are frozen (requires_grad is False), and no input requires grad",
            "layer.output.requires_grad_() at the first value that is meant: from there on there is a graph",
        )
    return None


_GENERATION = Reason(
    "`generate` runs the model under torch.no_grad()",
    "generate first, then `with model.trace(...)` on the tokens that came out, and take the gradient there",
)
_PIPELINE = Reason(
    "a pipeline runs its parts under torch.no_grad()",
    "a trace of one part, on inputs that were read in the pipeline's: with model.unet.trace(...)",
)
_INFERENCE = Reason("it was made under torch.inference_mode()", "trace outside of inference_mode")


def reason_without_graph(tensor: torch.Tensor, handed: list[Handed]) -> Reason:
    """Why a tensor that does not require grad has no graph. `handed`: of the open runs, the last one first."""
    if tensor.is_inference():
        return _INFERENCE
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return Reason(
            f"it holds {str(tensor.dtype).removeprefix('torch.')} values, which have no gradient",
            "a loss of floating-point values, such as a logit; for ids, the output of the embedding",
        )
    if isinstance(tensor, nn.Parameter):
        return Reason("this parameter is frozen: its requires_grad is False", "parameter.requires_grad_() before it")
    for one in handed:
        if one.reason is not None:
            return one.reason
    return Reason(
        "it was made under torch.no_grad(), or by .detach(), or of nothing that requires grad",
        "for an input: x.requires_grad_() before the trace",
    )
