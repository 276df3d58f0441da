"""Models of transformers for any task: prompts in, weights when they are needed."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import nn
from transformers import PreTrainedConfig

from nnsight.core.history import deprecated, user_place
from nnsight.envoy import Envoy
from nnsight.errors import ModelError
from nnsight.generator import Generator
from nnsight.models import adapter_layers, adapters, hub, loading, processors, quantised, tasks
from nnsight.models.before import Before
from nnsight.models.loaded import check_loaded
from nnsight.models.options import check_dtype, check_options
from nnsight.models.positions import LanguageTracer
from nnsight.models.prompted import Prompted

_Load = Callable[[], nn.Module]
_NOT_IN_CONFIG = frozenset({"dtype", "attn_implementation", "device_map", "quantization_config"})


class TransformersModel(Prompted):
    """Any model of transformers, with what lies beside it to make its inputs: a tokenizer, an image processor.

    Only the config and the tokenizer are read at first; the module tree is there, on `meta`. The weights come with the
    first run, with `dispatch()` or with `dispatch=True`, and everything taken from the tree before stays valid.

    It has the uniform names, as a `LanguageModel` has, where its layers hand one stream on: `model.layers[3].output`.

    A run takes prompts in every form where there is a tokenizer, tensors by keyword (`pixel_values=`), a tensor of the
    model's main input, or images, as PIL has them.

    Args:
        model: "nnsight/demo" (bundled), a folder, a name on the hub, or a module that is loaded already.
        task: What the model is loaded for: "text-classification", "fill-mask", "image-classification" ...; else the
            task of the class that its config names.
        tokenizer: Used as it is, and never changed. If it isn't given, it is looked for where the model lies.
        processor: The same, for text and images together.
        image_processor: The same, for images.
        feature_extractor: The same, for sound.
        peft: An adapter of peft's that is put on the model: a folder, or a name on the hub.
        dispatch: Load the weights now.
        device_map: Where the weights go, as in `from_pretrained`; "auto" needs accelerate.
        dtype: The type of the weights, else the config's; `torch_dtype` is the same. "nf4", "fp4" and "int8" are
            quantised ones, with `compute_dtype=` for what is computed with them.
        attn_implementation: As in `from_pretrained`.
        trust_remote_code: Whether code that lies beside the weights may run.
        revision: Branch, tag or commit on the hub.
        tokenizer_kwargs: For the tokenizer's `from_pretrained`.
        rename: Further names for modules, as in `NNsight`.
        envoys: Classes for modules, as in `NNsight`.
        load_kwargs: For the config (`n_layer=2` changes it) and the model's `from_pretrained`.

    Attributes:
        tokenizer: What reads text; None where there is none.
        processor, image_processor, feature_extractor: What reads the rest; each None where there is none.
        task: What it is for; None where that isn't known.
        repo_id: The name or folder that it came from; None for a module that came from nowhere.
        peft: The adapter that is on it, as it was given; None without one.
        revision: As it was given.
        dispatched: Whether the weights are there.

    Raises:
        HubError: The model isn't in reach.
        ModelError: There is no such model for this task, or options for loading came with a loaded module.
        InputError: An option that nobody has a use for.
        AdapterError: The adapter doesn't fit.
    """

    task: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    _TASKS: tuple[str, ...] = ()  # that it can be for; none: any
    _load: _Load | None = None
    _before: Before | None = None
    _given: Any = None
    _device_map: Any = None

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        task: str | None = None,
        *,
        tokenizer: Any = None,
        processor: Any = None,
        image_processor: Any = None,
        feature_extractor: Any = None,
        peft: str | os.PathLike[str] | None = None,
        dispatch: bool = False,
        device_map: Any = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        rename: Mapping[Any, str | Iterable[str]] | None = None,
        envoys: Any = None,
        **load_kwargs: Any,
    ) -> None:
        named = {
            "device_map": device_map,
            "dtype": dtype if dtype is not None else torch_dtype,
            "attn_implementation": attn_implementation,
            "trust_remote_code": trust_remote_code or None,
            "revision": revision,
        }
        options = {name: value for name, value in (named | load_kwargs).items() if value is not None}
        self._given = model
        if isinstance(model, (str, os.PathLike)) and "automodel" in options:
            task = self._task_of_class(options.pop("automodel"), task)
        else:
            self._check_task(task)
        given = {"processor": processor, "image_processor": image_processor, "feature_extractor": feature_extractor}
        if isinstance(model, nn.Module):
            model = adapter_layers.unwrapped(model)
            check_loaded(model, options)
            super().__init__(model, rename=rename, envoys=envoys)
            source = loading.source_of(model)
            self._fitted = adapters.that_came_with(model)
            self.dispatched, self.repo_id = True, source.where or None
            known = tasks.task_of(type(model).__name__, getattr(model, "config", None), self._TASKS)
            self.task = task or known or next(iter(self._TASKS), None)
        else:
            source, config, loader, options, self.task = self._found(model, task, options)
            skeleton = loading.skeleton(config, {**source.lookup, **options}, loader)
            super().__init__(skeleton, rename=rename, envoys=envoys)
            self._load, self._before = partial(loading.weights, source, config, options, loader), Before(skeleton)
            self._has_weights = False
            self._device_map, self.repo_id, self.revision = device_map, source.name, revision
        self._begin_adapters(peft, source.lookup)
        self.tokenizer, self._no_tokenizer = loading.tokenizer_for(tokenizer, tokenizer_kwargs, source)
        self._processors, self._no_processor = processors.read_processors(source, self._takes(), given)
        for name, value in self._processors.items():
            if name not in self._module._modules:  # a Wav2Vec2 has a module called `feature_extractor`
                self.__dict__[name] = value
        if self.tokenizer is None:
            self.tokenizer = getattr(self._processors["processor"], "tokenizer", None)
        if dispatch:
            self.dispatch()

    def _task_of_class(self, automodel: Any, task: str | None) -> str:
        """For programs written for the existing package: what the class is for, with a warning that names it."""
        found = tasks.task_of_class(automodel)
        if task is not None and task != found:
            raise ModelError(f"The task {task!r} is not one of `automodel`, which is for {found!r}.")
        name = type(self).__name__ if self._is_for(found) else TransformersModel.__name__
        deprecated(f"`automodel=` is deprecated: write {name}(..., task={found!r}).")
        return found

    def _is_for(self, task: str | None) -> bool:
        return task is None or not self._TASKS or task in self._TASKS

    def _check_task(self, task: str | None) -> None:
        if self._is_for(task):
            return
        raise ModelError(
            f"A {type(self).__name__} is for the task {' or '.join(map(repr, self._TASKS))}, not for {task!r}.",
            instead=f"nnsight.TransformersModel(..., task={task!r})",
        )

    def _found(self, model: Any, task: str | None, options: dict[str, Any]) -> Any:
        """Where the model lies, its config, the class that loads it, options for that, and its task."""
        if isinstance(model, Envoy):
            raise ModelError(
                f"This {type(model).__name__} is a model that is wrapped already.",
                you_wrote=user_place().source,
                instead="the model itself; model.edit() makes another of it",
            )
        if not isinstance(model, (str, os.PathLike)):
            raise ModelError(
                f"A model is a name on the hub, a folder, or a torch.nn.Module; this is {model!r}."[:300],
                instead=f'{type(self).__name__}("nnsight/demo")',
            )
        options = quantised.resolved(options)
        check_dtype(options.get("dtype"))
        source, options = hub.find(model, options)
        config, options = _config(source, options)
        quantised.check_configured(config, options)
        if not (options.get("trust_remote_code") or source.lookup.get("trust_remote_code")):
            check_options(options, inspect.signature(TransformersModel.__init__).parameters, config)
        loader, task = tasks.loader(task, config, self._TASKS)
        return source, config, loader, options, task

    def dispatch(self) -> None:
        """Loads the weights, if they aren't there yet.

        Raises:
            HubError: They can't be read.
            ModelError: Modules or weights were changed by hand before.
        """
        with loading.loading:
            if self._load is None:
                return
            assert self._before is not None
            self._before.check(self._module, is_adapted=self._fitted is not None)
            loaded = self._load()
            self._before.go_on(self._module, loaded)
            fitted = self._fitted_on(loaded)
            self._replace_module(loaded)
            for model in self._family():  # an edited view, too, is loaded now
                model.__dict__.update(dispatched=True, _has_weights=True, _load=None, _before=None, _fitted=fitted)

    @overload
    def generate(self, *args: Any, trace: Literal[True], **kwargs: Any) -> LanguageTracer: ...
    @overload
    def generate(self, *args: Any, trace: bool | None = None, **kwargs: Any) -> Any: ...

    def generate(self, *args: Any, trace: bool | None = None, **kwargs: Any) -> Any:
        """Generates tokens after a prompt: in a `with`, a trace of the generation; else the ids, [prompt, token].

        Args:
            args: One prompt, in any form that `trace` takes.
            trace: Whether this is a trace, where it can't be seen from the call (a helper, an `ExitStack`).
            kwargs: Options of transformers' `generate` (`max_new_tokens=5`), of the tokenizer, inputs of the forward.

        Returns:
            A tracer, or the prompt's ids with the generated ones behind, padded on the left as the prompts were.

        Raises:
            InputError: No prompt was given, or something that can't be one.
            ModelError: The model has no head that predicts tokens.
        """
        if not self._can_generate():
            raise ModelError(f"{type(self._module).__name__} can't generate: it has no head that predicts tokens.")
        return self._trace_or_call("generate", args, kwargs, trace, sys._getframe(1))

    def _missing(self, name: str) -> Any:
        if name == "generator" and self._can_generate():
            return Generator(self)
        if name == "args":  # of the existing package: what the model was made from
            return (self._given,)
        return super()._missing(name)

    def _can_generate(self) -> bool:
        return callable(getattr(self._module, "generate", None))

    def _make_scannable(self, copied: nn.Module) -> None:
        choose: Any = getattr(copied, "set_experts_implementation", None)
        if choose is not None:
            choose("batched_mm")  # the usual one has no fake kernel in float32

    def _planned_device(self) -> torch.device | None:
        if self._load is None:
            return None
        asked = self._device_map
        if isinstance(asked, Mapping):
            asked = next(iter(asked.values()), None)
        if asked in ("auto", "balanced", "balanced_low_0", "sequential"):
            asked = torch.accelerator.current_accelerator()
        cpu = torch.device("cpu")
        try:
            device = cpu if asked is None or asked == "disk" else torch.device(asked)
        except RuntimeError:  # an index, where there is nothing to count
            return cpu
        is_here = device.type in ("cpu", "meta") or torch.get_device_module(device).is_available()
        return device if is_here else cpu  # autograd ends the process on a device that isn't

    def _ready(self) -> None:
        if self._load is not None:
            self.dispatch()


def _config(source: hub.Source, options: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The config, and the options for the weights. What `from_config` takes is not looked for in the config."""
    kept: dict[str, Any] = {name: options.pop(name) for name in _NOT_IN_CONFIG & options.keys()}
    config, rest = loading.read_config(source, options)
    return config, rest | kept
