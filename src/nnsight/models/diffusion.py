"""DiffusionModel: a pipeline of diffusers, traced as a whole. Its steps are denoising steps."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from nnsight.block.cuts import Batch
from nnsight.block.launch import Launch
from nnsight.block.rows import Rows
from nnsight.block.steps import Plan
from nnsight.core.history import user_place
from nnsight.core.run import Run
from nnsight.core.spelling import nearest
from nnsight.core.stages import Stages
from nnsight.errors import BlockError, InputError, ModelError
from nnsight.models import loading, pipelines
from nnsight.models.before import Before
from nnsight.models.pipeline_rows import PROMPTS, PipelineRows, n_prompts, together
from nnsight.root import NNsight

_LOOKUP = frozenset({"revision", "token", "cache_dir", "local_files_only", "force_download"})
_OURS = frozenset({"seed"})


class DiffusionModel(NNsight):
    """A pipeline of diffusers: every part of it that is a module is an Envoy, as `model.unet`, `model.vae`.

    A trace runs the whole pipeline. Its steps are the calls of what denoises: `for step in tracer.iter[:]`. Text
    encoders are asked before them, the decoder behind them, and neither belongs to a step.

    Under guidance the denoiser has each prompt twice: all rows without a prompt, then all rows with theirs. A row or an
    invoke has its own of both, in that order.

    Args:
        pipeline: A folder, a name on the hub, or a pipeline that is loaded already.
        automodel: The class that loads it, or its name, in place of the one that its `model_index.json` names.
        dispatch: Load the weights now; else the tree is there first, on `meta`, and they come with the first run.
        rename: Further names for modules, as in `NNsight`.
        envoys: Classes for modules, as in `NNsight`.
        load_kwargs: For the pipeline's `from_pretrained`.

    Attributes:
        pipeline: The pipeline itself.
        dispatched: Whether the weights are there.

    Raises:
        HubError: The pipeline isn't in reach.
        InputError: An option that nobody has a use for.
        MissingPackageError: There is no `diffusers`.
        ModelError: There is no such class, or nothing in the pipeline denoises.
    """

    dispatched: bool = False
    repo_id: str | None = None
    _load: Callable[[], pipelines.Pipeline] | None = None
    _before: Before | None = None
    _settings: Mapping[str, Any] = MappingProxyType({})  # of the pipeline without weights, as it was made

    def __init__(
        self,
        pipeline: Any,
        *,
        automodel: Any = None,
        dispatch: bool = False,
        rename: Mapping[Any, str | Iterable[str]] | None = None,
        envoys: Any = None,
        **load_kwargs: Any,
    ) -> None:
        package = pipelines.diffusers()
        self._between: set[nn.Module] = set()
        if isinstance(pipeline, package.DiffusionPipeline):
            if given := [*load_kwargs, *(["automodel"] if automodel is not None else [])]:
                raise ModelError(
                    "Options for loading have no effect on a pipeline that is loaded already.",
                    you_gave=", ".join(f"{name}=..." for name in given),
                )
            module, self.dispatched = pipelines.Pipeline(pipeline), True
        elif isinstance(pipeline, (str, os.PathLike)):
            name = os.fspath(pipeline)
            module = self._found(os.path.expanduser(name), automodel, load_kwargs)
            self.repo_id = name
        else:
            raise ModelError(
                f"A DiffusionModel is a pipeline: a folder, a name on the hub, or one that is loaded; this is a "
                f"{type(pipeline).__name__}.",
                instead="nnsight.NNsight(module)" if isinstance(pipeline, nn.Module) else None,
            )
        module.denoisers()
        super().__init__(module, rename=rename, envoys=envoys)
        if dispatch:
            self.dispatch()

    def _found(self, name: str, automodel: Any, options: dict[str, Any]) -> pipelines.Pipeline:
        lookup = {key: value for key, value in options.items() if key in _LOOKUP}
        kind, index, looked = pipelines.pipeline_class(name, automodel, lookup)
        pipelines.check_loading(kind, options, index)
        options = {**options, **looked}
        load = partial(_loaded, kind, name, options)
        with loading.loading:
            bare = pipelines.skeleton(name, kind, index, looked, options)
        if bare is None:
            self.dispatched = True
            return load()
        whole = pipelines.Pipeline(bare)
        self._load, self._before, self._has_weights = load, Before(whole), False
        self._settings = pipelines.settings(bare)
        return whole

    def dispatch(self) -> None:
        """Loads the weights, if they aren't there yet. A scheduler that was set before goes on.

        Raises:
            ModelError: Modules or weights were changed by hand before.
        """
        with loading.loading:
            if self._load is None:
                return
            assert self._before is not None
            self._whole.follow()
            self._before.check(self._whole, is_adapted=False)
            loaded = self._load()
            pipelines.go_on(self._settings, self._whole.pipeline, loaded.pipeline)
            self._replace_module(loaded)
            for model in self._family():
                model.__dict__.update(dispatched=True, _has_weights=True, _load=None, _before=None, _settings={})

    def generate(self, *args: Any, trace: bool | None = None, **kwargs: Any) -> Any:
        """The same as `trace` in a `with`; else the output of the pipeline.

        Args:
            args: What the pipeline is called with: a prompt, or a list of them.
            trace: Whether this is a trace, where it can't be seen from the call (a helper, an `ExitStack`).
            kwargs: Of the pipeline's call. `seed=3` is a generator for each image, with the seeds 3, 4 ...

        Raises:
            InputError: Something that the pipeline doesn't take.
        """
        return self._trace_or_call(None, args, kwargs, trace, sys._getframe(1))

    @property
    def _whole(self) -> pipelines.Pipeline:
        assert isinstance(self._module, pipelines.Pipeline)
        return self._module

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        self._check_edits()
        return super().__call__(*args, hook=hook, **kwargs)

    def _check_edits(self) -> None:
        """Refuses an edit of the whole pipeline in which the denoiser is named: it would be that of its first step."""
        denoisers = self._whole.denoisers()
        names = {name for name, child in self._whole.named_children() if child in denoisers}
        for edit in self._tree.edits:
            if not edit.path and (named := sorted(names & edit.names)):
                raise BlockError(
                    f"An edit of a whole pipeline runs once, and this one asks for `{named[0]}`, called in each step.",
                    edited_at=edit.place.quoted,
                    instead=f"model.{named[0]}.edit(edit, inplace=True), and tracer.step in def edit(tracer, part)",
                )

    def _ready(self) -> None:
        if self._load is not None:
            self.dispatch()
        if self._whole.follow():
            self._follow_modules()

    def _says_prompt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if args or "prompt" not in self._whole.signature().parameters:
            return True
        return any(kwargs.get(name) is not None for name in PROMPTS)

    def _prepare(
        self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._ready()
        self._check_edits()
        if fn is not None:
            raise InputError("A pipeline has one call, and takes no `fn`.", you_wrote=user_place().source)
        given = self._named(args, kwargs)
        if not self._says_prompt((), given):
            raise InputError(
                f"A {type(self._whole.pipeline).__name__} needs a prompt.",
                you_wrote=user_place().source,
                instead="with model.trace(prompt, ...):    or prompt_embeds=...",
            )
        return (), self._with_generators(given)

    def _prepare_scan(
        self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = self._named(args, kwargs)
        given = {name: value for name, value in given.items() if name not in ("seed", "generator")}
        if "output_type" in self._whole.signature().parameters and given.get("output_type") != "latent":
            given["output_type"] = "pt"  # an image is made of values
        return (), {"num_inference_steps": 1, **given}

    def _make_scannable(self, copied: nn.Module) -> None:
        pipeline: Any = copied.pipeline
        pipeline.scheduler = pipelines.shapes_only(pipeline.scheduler)
        pipeline.set_progress_bar_config(disable=True)

    def _planned_device(self) -> torch.device | None:
        return None if self._load is None else torch.device("cpu")

    def _prepare_invoke(self, fn: Any, shared: dict[str, Any], args: Any, kwargs: dict[str, Any]) -> Any:
        return self._prepare(fn, args, {**kwargs, **shared})[1]

    def _together(self, fn: Any, given: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any], list[int]]:
        inputs, counts = together(given)
        return (), inputs, counts

    def _launched(self, make_run: Callable[..., Run], fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
        denoisers = self._whole.denoisers()
        others = [part for child in self._whole.children() if child not in denoisers for part in _outer(child)]
        counter = partial(_stages, denoisers, others, self._between)
        return Launch(partial(make_run, steps=counter), partial(self._rows, fn, args, kwargs), Plan(instead=""))

    def _rows(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Run) -> Rows:
        return PipelineRows(run, Batch(n_prompts(kwargs)), int(kwargs.get("num_images_per_prompt") or 1))

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All that the pipeline is called with, by name; what it has no use for is refused."""
        parameters = self._whole.signature().parameters
        names = [name for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD]
        kind = type(self._whole.pipeline).__name__
        if len(args) > len(names):
            raise InputError(f"A {kind} takes {len(names)} inputs.", you_wrote=user_place().source)
        for name in kwargs:
            if name not in names and name not in _OURS:
                raise InputError(
                    f"`{name}` is no input of a {kind}.",
                    you_wrote=user_place().source,
                    nearest=nearest(name, [*names, *_OURS]),
                )
        if twice := [name for name in names[: len(args)] if name in kwargs]:
            raise InputError(f"`{twice[0]}` was given twice.", you_wrote=user_place().source)
        return dict(zip(names, args, strict=False)) | kwargs

    def _with_generators(self, given: dict[str, Any]) -> dict[str, Any]:
        """A generator for each image, where a seed was given."""
        if (seed := given.pop("seed", None)) is None:
            return given
        if given.get("generator") is not None:
            raise InputError("`seed` and `generator` are two ways to say one thing.", you_wrote=user_place().source)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise InputError(f"`seed` is a whole number, not {seed!r}.", you_wrote=user_place().source)
        count = n_prompts(given) * int(given.get("num_images_per_prompt") or 1)
        each = [torch.Generator().manual_seed(seed + image) for image in range(count)]
        return {**given, "generator": each[0] if count == 1 else each}


def _outer(component: nn.Module) -> list[nn.Module]:
    """A part, and what in it a pipeline may call by itself, as it does a decoder."""
    return [component, *component.children()]


def _stages(
    denoisers: list[nn.Module], others: list[nn.Module], between: set[nn.Module], _: nn.Module, state: Any, saw: Any
) -> Stages:
    return Stages(denoisers, others, between, state, saw)


def _loaded(kind: Any, name: str, options: dict[str, Any]) -> pipelines.Pipeline:
    return pipelines.Pipeline(kind.from_pretrained(name, **options))
