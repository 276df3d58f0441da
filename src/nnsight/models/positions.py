"""Which token of its prompt, or after it, each column of a step's values is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnsight.block.launch import Launch
from nnsight.block.rows import RowRun
from nnsight.block.steps import ONE_STEP, Plan
from nnsight.block.tracer import Tracer
from nnsight.core.axes import Axes
from nnsight.core.history import user_place
from nnsight.core.several import Call, Window
from nnsight.errors import BlockError


class LanguageTracer(Tracer):
    """The trace of a language model: it knows where in its prompts a step stands."""

    @property
    def positions(self) -> Tensor:
        """The position of each token of this step in its own prompt and what follows, [prompt, token], int64.

        The first token of a prompt is 0; padding is -1. With a cache, a step after the first has one column; without,
        all of them come again. So `hidden[tracer.positions == 3] += v` is the same edit either way, in every step.

        Asked for in step 0 of a generation, it has the model run to where that step begins.
        """
        return self._own(self._seen.positions, ("row", "token"))

    @property
    def lengths(self) -> Tensor:
        """How many tokens each prompt has, without padding: [prompt, 1], int64, to be compared with `positions`.

        Tokens that were in a key-value cache before the run are a part of the prompt.
        """
        return self._own(self._seen.lengths, ("row", ""))

    @property
    def _seen(self) -> Seen:
        run, launch = self._entered(), self._in_charge()._launch
        if not isinstance(launch, LanguageLaunch):
            raise BlockError("Positions were asked for after the block of the trace.", you_wrote=user_place().source)
        run.begin()
        return launch.seen

    def _own(self, whole: Tensor, axes: Axes) -> Tensor:
        """The part of a row's, or of an invoke's own prompts."""
        asked = self._asked()
        return asked.cut(whole, axes) if isinstance(asked, RowRun) else whole


class Seen:
    """What is kept of the inputs of the first step and of this one.

    Args:
        plan: The run's.
        given: What a generation is given. The prompts' mask in it, [prompt, token], is kept: its steps may have another
            form of it, with a static cache, or only a part.
    """

    def __init__(self, plan: Plan = ONE_STEP, given: Mapping[str, Any] | None = None) -> None:
        self.plan = plan
        given = given or {}
        mask = given.get("attention_mask")
        rows = next((given[name] for name in ("input_ids", "inputs_embeds") if name in given), None)
        self._width: int = rows.shape[1] if isinstance(rows, Tensor) else 0
        self._mask: Tensor | None = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._steps: list[_Inputs] = []
        self._latest: tuple[Tensor, Tensor] | None = None  # ids and mask of this step, where they say all
        self._beside: Seen | None = None  # of the calls that are given something else than the prompts
        self._stands_beside = False

    def saw(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: Any = kwargs.get("input_ids")
        mask: Any = kwargs.get("attention_mask")
        is_plain = type(ids) is type(mask) is Tensor and ids.ndim == mask.ndim == 2
        if self._steps and is_plain and mask.shape[1] > ids.shape[1] and "decoder_input_ids" not in kwargs:
            self._latest = ids, mask  # on the way of each step: looked into when somebody asks
            return
        self._look()
        ids = next((kwargs[name] for name in _TOKENS if kwargs.get(name) is not None), args[0] if args else None)
        if isinstance(ids, Tensor) and ids.ndim >= 2:
            self._steps[1:] = [self._inputs(ids, kwargs)]

    def saw_call(self, kind: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Window | None:
        """As `saw`, where a step may be several calls; returns which columns of the rows this one has."""
        self._stands_beside = kind is Call.ASIDE
        if self._stands_beside:
            self._beside = self._beside or Seen()
            self._beside.saw(args, kwargs)
            return Window(None, None)
        self.saw(args, kwargs)
        self._look()
        last = self._steps[-1] if self._steps else None
        return None if last is None or last.decodes else Window(last.start, last.end)

    def _look(self) -> None:
        if self._latest is not None:
            (ids, mask), self._latest = self._latest, None
            self._steps[1:] = [self._inputs(ids, {"attention_mask": mask})]

    def _inputs(self, ids: Tensor, kwargs: dict[str, Any]) -> _Inputs:
        count = ids.shape[1]
        mask = kwargs.get("decoder_attention_mask" if "decoder_input_ids" in kwargs else "attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < count:
            mask = None
        start = self._n_before(count, mask, kwargs.get("past_key_values"))
        if mask is None and "decoder_input_ids" not in kwargs:
            mask = self._whole_mask(ids.shape[0], start + count)
        if mask is not None and mask.shape[1] != start + count:
            mask = None
        return _Inputs(mask, ids.shape[0], start, start + count, ids.device, "decoder_input_ids" in kwargs)

    def _whole_mask(self, n_rows: int, width: int) -> Tensor | None:
        """The prompts' mask with what follows them, for each of their rows; None where there is none that fits."""
        mask = self._mask
        if mask is None or n_rows % mask.shape[0] or mask.shape[1] > width:
            return None
        rows = mask.repeat_interleave(n_rows // mask.shape[0], dim=0)
        return torch.nn.functional.pad(rows, (0, width - mask.shape[1]), value=1)

    def _n_before(self, count: int, mask: Tensor | None, cache: Any) -> int:
        """How many tokens came before those that are given now, and are not given again."""
        if mask is not None and mask.shape[1] > count:
            return mask.shape[1] - count
        if hasattr(cache, "get_seq_length"):
            return int(cache.get_seq_length())
        before = self._steps[-1].end if self._steps else 0
        return 0 if count > before else before  # without a cache, all tokens come again

    @property
    def positions(self) -> Tensor:
        if self._stands_beside and self._beside is not None:
            return self._beside.positions
        return self._step(-1).positions()

    @property
    def lengths(self) -> Tensor:
        if self._stands_beside and self._beside is not None:
            return self._beside.lengths
        if self.plan.kind is not None and not self._step(0).decodes:
            return self._own_lengths()
        if self.plan.guesses:
            raise BlockError(
                "How long the decoder's beginning is can't be told: in its first call, guesses stand behind it.",
                you_wrote=user_place().source,
            )
        return self._step(0).positions().amax(dim=-1, keepdim=True) + 1

    def _own_lengths(self) -> Tensor:
        """By the prompts' own mask, where the first call has less than the prompts, or guesses behind them."""
        first, mask = self._step(0), self._mask
        if mask is None:
            return torch.full((first.n_prompts, 1), self._width, device=first.device)
        lengths = mask.sum(dim=-1, keepdim=True)
        return lengths.repeat_interleave(first.n_prompts // mask.shape[0], dim=0)

    def _step(self, at: int) -> _Inputs:
        self._look()
        if not self._steps:
            raise BlockError(
                "The model was given no tokens, [prompt, token], so that none has a position.",
                you_wrote=user_place().source,
            )
        return self._steps[at]


@dataclass
class LanguageLaunch(Launch):
    """A run of a language model; `seen` is shown its inputs."""

    seen: Seen = field(default_factory=Seen)


_TOKENS = ("decoder_input_ids", "input_ids", "inputs_embeds")


class _Inputs(NamedTuple):
    """What a step was given: its mask [prompt, token], and how many tokens of which of them are new.

    `decodes`: whether they are those of a decoder behind an encoder, rather than the prompts'.
    """

    mask: Tensor | None
    n_prompts: int
    start: int
    end: int
    device: torch.device
    decodes: bool

    def positions(self) -> Tensor:
        if self.mask is None:
            return torch.arange(self.start, self.end, device=self.device).expand(self.n_prompts, -1)
        counted = (self.mask.cumsum(dim=-1) - 1).masked_fill(self.mask == 0, -1)
        return counted[:, self.start - self.end :]
