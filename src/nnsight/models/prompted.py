"""What is given to a model of transformers: from prompts to its inputs, the rows in them, and a run on these."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from nnsight.block.cuts import Batch
from nnsight.block.steps import ONE_STEP
from nnsight.core.history import user_place
from nnsight.core.inputs import check_no_text
from nnsight.core.run import Run
from nnsight.core.several import SeveralCalls
from nnsight.envoy import Envoy
from nnsight.errors import InputError, RowError
from nnsight.models import generation, processors
from nnsight.models.accepts import OPTIONS, Accepts, accepts, check_generation_names, check_names
from nnsight.models.inputs import PROMPTS, on_meta, prepare
from nnsight.models.joined import together
from nnsight.models.named import Named
from nnsight.models.positions import LanguageLaunch, LanguageTracer, Seen
from nnsight.models.rows import batch_of


class Prompted(Named):
    """A model that is given prompts, and what lies beside it to make its inputs of them."""

    tokenizer: Any = None
    dispatched: bool = False
    _processors: dict[str, Any]
    _accepts: tuple[nn.Module, Any, Accepts] | None = None
    _no_tokenizer: str = ""
    _no_processor: str = ""

    # From what is given to the inputs of the forward, or of `generate`.

    def _takes(self) -> Accepts:
        """What the module can be given; read anew where the module or the tokenizer is another one by now."""
        known = self._accepts
        if known is None or known[0] is not self._module or known[1] is not self.tokenizer:
            takes = accepts(self._module, self.tokenizer, self._no_tokenizer)
            known = self._accepts = (self._module, self.tokenizer, takes)
        return known[2]

    def _prepare(
        self, fn: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._check_numbers(args, kwargs)
        return (), self._placed(self._prepare_scan(fn, args, kwargs)[1])

    def _check_numbers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Programs move their inputs to `model.device`, also before there are weights."""
        what = on_meta(args, kwargs)
        if what is not None and not (self.dispatched and self.device == torch.device("meta")):
            raise InputError(
                f"{what} has no numbers: it is on `meta`, as `model.device` is until the weights are loaded.",
                instead="no `.to(model.device)`, since inputs are moved to the model; or model.dispatch() before it",
            )

    def _prepare_scan(
        self, fn: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if fn == "generate":
            return (), self._generation_inputs(*args, **kwargs)
        return (), prepare(*self._processed(args, kwargs), self._takes(), self.tokenizer)

    def _processed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        takes = self._takes()
        if takes.main == "input_ids" and "images" not in kwargs:
            return args, kwargs
        return processors.with_processed(args, kwargs, takes, self._processors, self._no_processor)

    def _placed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs on the device where the model takes them in; with weights, since there is no such place before."""
        self._ready()
        device = _input_device(self._module, self._takes().embedding)
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}

    def _generation_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prompt and options for `generate`, and what it would ask for: a pad token, a tokenizer for stop strings."""
        if "inputs" in kwargs:
            args = (*args, kwargs.pop("inputs"))
        check_generation_names(kwargs, self._module, self._takes())
        inputs = prepare(*self._processed(args, kwargs), self._takes(), self.tokenizer, generating=True)
        config = inputs.get("generation_config") or getattr(self._module, "generation_config", None)
        if getattr(config, "pad_token_id", None) is None:
            inputs.setdefault("pad_token_id", self._takes().pad)
        if isinstance(assistant := inputs.get("assistant_model"), (str, Envoy)):
            inputs["assistant_model"] = _unwrapped(assistant)
        if inputs.get("stop_strings") is not None:
            inputs.setdefault("tokenizer", self.tokenizer)
        return inputs

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        if args and not isinstance(args[0], Tensor):
            check_no_text(self._module, args, lambda: "model")
        return super().__call__(*args, hook=hook, **kwargs)

    # A run on these inputs.

    _new_tracer = LanguageTracer

    if TYPE_CHECKING:  # the same, with this tracer

        @overload
        def trace(
            self, *args: Any, fn: str | Callable[..., Any] | None = None, trace: Literal[True] = True, **kwargs: Any
        ) -> LanguageTracer: ...
        @overload
        def trace(self, *args: Any, fn: str | Callable[..., Any] | None = None, trace: bool, **kwargs: Any) -> Any: ...
        def trace(self, *args: Any, **kwargs: Any) -> Any: ...

        def scan(self, *args: Any, fn: str | None = None, **kwargs: Any) -> LanguageTracer: ...

    def _launched(
        self, make_run: Callable[..., Run], fn: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> LanguageLaunch:
        generates = fn == "generate"
        plan = generation.plan(self._module, kwargs) if generates else ONE_STEP
        seen = Seen(plan, kwargs if generates else None)
        if generates:
            steps = partial(SeveralCalls, plan.kind, seen.saw_call) if plan.kind else True
            make_run = partial(make_run, steps=steps, saw=seen.saw, seen=seen)
        else:
            make_run = partial(make_run, seen=seen)
            seen.saw(args, kwargs)
        samples = generates and generation.samples(self._module, kwargs)
        return LanguageLaunch(make_run, partial(self._rows, fn, args, kwargs), plan, samples, seen)

    def _new_seen(self, fn: str | None, kwargs: Mapping[str, Any]) -> Seen:
        if fn != "generate":
            return Seen()
        return Seen(generation.plan(self._module, kwargs), kwargs)

    def _says_prompt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return bool(args) or any(kwargs.get(name) is not None for name in (*PROMPTS, self._takes().main))

    def _check_shared(self, fn: str | None, shared: dict[str, Any]) -> None:
        if fn != "generate":
            check_names([name for name in shared if name not in OPTIONS and name != "images"], self._takes())

    def _prepare_invoke(self, fn: str | None, shared: dict[str, Any], args: Any, kwargs: dict[str, Any]) -> Any:
        self._check_numbers(args, kwargs)
        own_positions = "position_ids" in kwargs or (
            args and isinstance(args[0], Mapping) and "position_ids" in args[0]
        )
        return own_positions, self._prepare_scan(fn, args, {**kwargs, **shared})[1]

    def _together(self, fn: str | None, given: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any], list[int]]:
        own_positions = any(own for own, _ in given)
        takes, generating = self._takes(), fn == "generate"
        inputs, counts = together([fields for _, fields in given], takes, own_positions, generating=generating)
        return (), self._placed(inputs), counts

    def _rows_of(self, fn: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        if fn == "generate" and generation.guides_itself(self._module, kwargs):
            raise RowError(
                f"A {type(self._module).__name__} has guidance of its own: which rows are a prompt's isn't known.",
                you_wrote=user_place().source,
                instead="guidance_scale=1, or the values of the whole batch: tracer.model...",
            )
        return batch_of(kwargs, self.tokenizer, self._no_tokenizer, self._module, generating=fn == "generate")


def _unwrapped(assistant: Envoy | str) -> nn.Module:
    """An assistant that came wrapped, with its weights."""
    if isinstance(assistant, str):
        raise InputError(
            "`assistant_model` takes a model, not a name.",
            you_gave=repr(assistant),
            instead=f"assistant_model=LanguageModel({assistant!r})",
        )
    assistant.root._ready()
    if assistant._tree.edits:
        raise InputError(
            "The edits of an `assistant_model` take no part where another model generates.",
            you_wrote=user_place().source,
            instead="an assistant without edits",
        )
    return assistant._module


def _input_device(module: nn.Module, embedding: nn.Module | None) -> torch.device:
    """Where ids belong: where accelerate runs the embedding, else where its weights are, else the first weights."""
    first = module if embedding is None else embedding
    for owner in (first, module):
        place = getattr(vars(owner).get("_hf_hook"), "execution_device", None)
        if place is not None:
            return torch.device(place)
    weight = next(itertools.chain(first.parameters(), module.parameters()), None)
    return torch.device("cpu") if weight is None else weight.device
