"""Pipelines of diffusers as one module: built without weights, loaded with them, called as a whole."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from nnsight.core.spelling import nearest
from nnsight.errors import HubError, InputError, ModelError
from nnsight.models.hub import asked
from nnsight.models.options import takes
from nnsight.models.packages import imported

_DENOISER = re.compile(r"UNet|Transformer|DiT|Prior")
_NO_DENOISER = re.compile(r"ControlNet|Autoencoder|Adapter|VQ")


def diffusers() -> Any:
    """The package.

    Raises:
        MissingPackageError: It isn't there.
    """
    return imported("diffusers", "A pipeline", "diffusion")


def settings(pipeline: Any) -> dict[str, Any]:
    """What a pipeline has that isn't a module: its scheduler, the options of its progress bar."""
    public = (name for name in vars(pipeline) if not name.startswith("_") or name == "_progress_bar_config")
    return {name: value for name in public if not isinstance(value := vars(pipeline)[name], nn.Module)}


def go_on(before: Mapping[str, Any], pipeline: Any, loaded: Any) -> None:
    """Gives a loaded pipeline the settings that are others by now in the one without weights."""
    for name, value in settings(pipeline).items():
        if name not in before or before[name] is not value:
            setattr(loaded, name, value)


class Pipeline(nn.Module):
    """A pipeline, whose components that are modules are its children.

    A pipeline and its scheduler keep what they have done so far in a run. Of several that go on at once, the first is
    the pipeline's own, and the others are a copy's, with the same modules.
    """

    pipeline: Any
    _n_running: int

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.__dict__["pipeline"] = pipeline
        self.__dict__["_n_running"] = 0
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module):
                self._modules[name] = component
        self.train(any(child.training for child in self.children()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        pipeline = self.pipeline
        if self._n_running:
            pipeline = copy.copy(pipeline)
            pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
        self._n_running += 1
        try:
            return pipeline(*args, **kwargs)
        finally:
            self._n_running -= 1

    def __setattr__(self, name: str, value: Any) -> None:
        is_own = name.startswith("__") or name in vars(self)
        if is_own or isinstance(value, nn.Module) or name in self._modules:
            super().__setattr__(name, value)
        elif not hasattr(self.pipeline, name):
            super().__setattr__(name, value)
            return
        if not is_own and (name in self.pipeline.components or not isinstance(value, nn.Module)):
            setattr(self.pipeline, name, value)

    def follow(self) -> bool:
        """Takes the parts that the pipeline has now, where somebody gave it others. Returns whether there were any."""
        parts = {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}
        others = {name: part for name, part in parts.items() if self._modules.get(name) is not part}
        self._modules.update(others)
        gone = [name for name in self._modules if name in self.pipeline.components and name not in parts]
        for name in gone:
            del self._modules[name]
        return bool(others or gone)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "pipeline" or not hasattr(pipeline := self.__dict__["pipeline"], name):
                raise
            return getattr(pipeline, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pipeline:
        """A copy whose pipeline has the copies; what has no tensors, such as a tokenizer, is shared."""
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        nn.Module.__init__(new)
        new.__dict__["pipeline"] = copy.copy(self.pipeline)
        new.__dict__["_n_running"] = 0
        new.training = self.training
        for name, child in self._modules.items():
            new._modules[name] = copy.deepcopy(child, memo)
            setattr(new.pipeline, name, new._modules[name])
        new.pipeline.scheduler = copy.deepcopy(self.pipeline.scheduler, memo)
        return new

    def denoisers(self) -> list[nn.Module]:
        """The modules that are called once a step.

        Raises:
            ModelError: No component looks like one.
        """
        found = [child for child in self.children() if _denoises(child)]
        if not found:
            names = ", ".join(f"`{name}` ({type(child).__name__})" for name, child in self.named_children())
            raise ModelError(
                f"Which part of this {type(self.pipeline).__name__} denoises isn't known.",
                it_has=names,
                instead="NNsight(pipeline.part), for a part of it",
            )
        return found

    def signature(self) -> inspect.Signature:
        return inspect.signature(self.pipeline.__call__)


def _denoises(module: nn.Module) -> bool:
    kind = type(getattr(module, "_orig_mod", module))  # of a compiled one
    ours = kind.__module__.startswith("diffusers.") or not kind.__module__.startswith("transformers.")
    return ours and bool(_DENOISER.search(kind.__name__)) and not _NO_DENOISER.search(kind.__name__)


def pipeline_class(
    name: str, automodel: Any, lookup: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], Mapping[str, Any]]:
    """The class of a pipeline, what its `model_index.json` says of its components, and how to look for these.

    Args:
        automodel: A class of diffusers', or its name, in place of the one in that file.

    Raises:
        HubError: The file can't be read.
        ModelError: There is no such class.
    """
    package = diffusers()
    if isinstance(automodel, str):
        if not hasattr(package, automodel):
            raise ModelError(
                f"diffusers has no `{automodel}`.",
                nearest=nearest(automodel, [name for name in dir(package) if "Pipeline" in name]),
            )
        automodel = getattr(package, automodel)
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise HubError(f"`{name}` is no pipeline: the folder has no model_index.json.")
    if not folder.is_dir() and name.startswith((".", "~", "/")):
        raise HubError(f"`{name}` is no pipeline: there is no such folder.")
    if not folder.is_dir():
        lookup = asked(name, dict(lookup), "model_index.json")
    try:
        index = package.DiffusionPipeline.load_config(str(folder) if folder.is_dir() else name, **lookup)
    except (OSError, ValueError) as error:
        raise HubError(f"`{name}` can't be loaded.", because=f"{type(error).__name__}: {error}"[:300]) from None
    kind = automodel or getattr(package, index["_class_name"], None)
    if kind is None:
        raise ModelError(
            f"This diffusers has no `{index['_class_name']}`, of which `{name}` is one.",
            instead="a newer diffusers, or automodel=diffusers.DiffusionPipeline",
        )
    return kind, dict(index), lookup


def skeleton(
    name: str, kind: Any, index: Mapping[str, Any], lookup: Mapping[str, Any], given: Mapping[str, Any]
) -> Any:
    """The pipeline with modules on `meta`; None where one can't be built without its weights.

    Args:
        given: What is not taken from the folder: components, and the dtype.
    """
    if not issubclass(kind, diffusers().DiffusionPipeline):
        return None  # one of the Auto classes, which choose for themselves
    parts: dict[str, Any] = {key: value for key, value in given.items() if key in index and key != "torch_dtype"}
    dtype = given.get("torch_dtype")
    for part, entry in index.items():
        if part.startswith("_") or part in parts:
            continue
        if not isinstance(entry, (list, tuple)):
            parts[part] = entry
        elif entry[0] is None:
            parts[part] = None
        else:
            component = _component(name, part, entry[0], entry[1], lookup, dtype)
            if component is None:
                return None
            parts[part] = component
    takes_part = inspect.signature(kind.__init__).parameters
    return kind(**{part: value for part, value in parts.items() if part in takes_part})


def _component(name: str, part: str, library: str, kind_name: str, lookup: Mapping[str, Any], dtype: Any) -> Any:
    package: Any
    try:
        package = importlib.import_module(library)
    except ImportError:
        package = getattr(diffusers().pipelines, library, None)
    kind: Any = getattr(package, kind_name, None)
    if kind is None:
        return None
    if not issubclass(kind, nn.Module):
        return kind.from_pretrained(name, subfolder=part, **lookup)
    module: Any
    with torch.device("meta"):
        if issubclass(kind, transformers.PreTrainedModel):
            config = kind.config_class.from_pretrained(name, subfolder=part, **lookup)
            module = kind._from_config(config)
        elif hasattr(kind, "load_config"):
            module = kind.from_config(kind.load_config(name, subfolder=part, **lookup))
        else:
            return None
    return module.to(dtype).eval() if isinstance(dtype, torch.dtype) else module.eval()


def check_loading(kind: Any, options: Mapping[str, Any], index: Mapping[str, Any]) -> None:
    """Raises InputError for the first option that diffusers would pass over."""
    known = {*takes(kind.from_pretrained), *takes(diffusers().DiffusionPipeline.from_pretrained)}
    known |= {part for part in index if not part.startswith("_")}
    for option in options:
        if option not in known:
            raise InputError(
                f"`{option}` is no option of loading a {kind.__name__}, and none of its parts.",
                you_gave=f"{option}={options[option]!r}"[:200],
                nearest=nearest(option, sorted(known)),
            )


def shapes_only(scheduler: Any) -> Any:
    """A scheduler for scans: its steps are real, and what it makes of a sample has the sample's shape."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    kind: Any = type(scheduler)

    @wraps(kind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return kind.set_timesteps(self, *args, **kwargs)

    def scale_model_input(self: Any, sample: Any, *_: Any, **__: Any) -> Any:
        return sample

    @wraps(kind.step)
    def step(self: Any, _: Any, __: Any, sample: Any, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        new = torch.empty_like(sample)
        return diffusers().schedulers.scheduling_utils.SchedulerOutput(new) if return_dict else (new,)

    own: dict[str, Any] = {"set_timesteps": set_timesteps, "step": step}
    if hasattr(kind, "scale_model_input"):
        own["scale_model_input"] = scale_model_input
    new = copy.copy(scheduler)
    new.__class__ = type(kind.__name__, (kind,), own)
    return new
