"""PEFT adapters: read from a folder or the hub, put on a model, and taken off again, so that nothing of them is left.

A targeted module is replaced by the adapter's layer, which has it as `.base_layer`; all other modules stay as they are.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nnsight.core.history import user_place
from nnsight.core.spelling import nearest
from nnsight.errors import AdapterError, HubError, InputError
from nnsight.models.adapter_layers import base_of, check_unmerged, layers_in
from nnsight.models.hub import LOOKUP, asked
from nnsight.models.packages import imported

_NAME = "default"  # what peft calls an adapter that nobody named
_PREFIX = "base_model.model."  # of what a PeftModel saves
_CONFIG = "adapter_config.json"
_NOTHING: Any = object()


@dataclass
class Adapter:
    """An adapter as it was saved.

    Args:
        where: The folder, or the name on the hub, as it was given.
        config: Of peft's.
        weights: Its tensors, by their names in the model.
    """

    where: str
    config: Any
    weights: dict[str, Tensor]


def peft() -> Any:
    """The package.

    Raises:
        MissingPackageError: It isn't there.
    """
    return imported("peft", "An adapter", "peft")


def is_adapter(folder: Path) -> bool:
    """Whether an adapter lies here, and no model."""
    return (folder / _CONFIG).is_file()


def read(where: Any, options: Mapping[str, Any]) -> Adapter:
    """An adapter from a folder, or from the hub.

    Args:
        where: As the user gave it.
        options: Of looking it up: `revision`, `subfolder`, `token`, `cache_dir`.

    Raises:
        MissingPackageError: There is no `peft`.
        AdapterError: It can't be put into a model's modules.
        HubError: It isn't there.
        InputError: An option that nobody has a use for.
    """
    package = peft()
    for option in options:
        if option not in LOOKUP - {"trust_remote_code", "code_revision"}:
            raise InputError(
                f"`{option}` is no option of looking up an adapter.",
                you_wrote=user_place().source,
                nearest=nearest(option, LOOKUP, n=1),
            )
    if not isinstance(where, (str, os.PathLike)):
        raise AdapterError(
            f"An adapter is a folder or a name on the hub, not a {type(where).__name__}.",
            you_wrote=user_place().source,
            instead="load_adapter(path), or None for none",
        )
    name = os.fspath(where)
    folder = Path(name).expanduser() / options.get("subfolder", "")
    if folder.is_dir() and not is_adapter(folder):
        raise HubError(f"`{name}` is no adapter: the folder has no {_CONFIG}.")
    if not folder.is_dir() and (isinstance(where, os.PathLike) or name.startswith((".", "~", "/"))):
        raise HubError(f"`{name}` is no adapter: there is no such folder.")
    place = str(Path(name).expanduser()) if folder.is_dir() else name
    if not folder.is_dir():
        options = asked(name, dict(options), _CONFIG)
    try:
        config = package.PeftConfig.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise HubError(
            f"No adapter can be read from `{name}`.", because=f"{type(error).__name__}: {error}"[:300]
        ) from None
    if config.is_prompt_learning or getattr(config, "is_adaption_prompt", False):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise AdapterError(
            f"`{name}` is an adapter of the type {kind}, which adds tokens in front of the prompt instead of changing "
            "modules, and can't be put on a model here."
        )
    try:
        weights = package.utils.load_peft_weights(place, device="cpu", **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise HubError(
            f"The weights of the adapter `{name}` can't be read.", because=f"{type(error).__name__}: {error}"[:300]
        ) from None
    return Adapter(name, config, {key.removeprefix(_PREFIX): value for key, value in weights.items()})


@dataclass
class Fitted:
    """An adapter on a model, and what it takes to have the model as it was.

    Args:
        root: The model.
        adapter: None for one that came with it.
    """

    root: nn.Module
    adapter: Adapter | None
    _modules: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)  # parent, name, what isn't there now
    _values: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    _attributes: dict[str, Any] = field(default_factory=dict)

    def changes_own(self) -> bool:
        """Whether weights of the model's own have other values with it, as biases that were trained too."""
        return any(not torch.equal(parameter, value) for parameter, value in self._values)

    def exchange(self) -> None:
        """Takes the adapter off, and puts back the very modules, values and attributes; called again, puts it on."""
        self._modules = [_exchanged(*place) for place in self._modules]
        with torch.no_grad():
            for i, (parameter, value) in enumerate(self._values):
                self._values[i] = parameter, parameter.detach().clone()
                parameter.copy_(value)
        own = vars(self.root)
        for name, value in self._attributes.items():
            self._attributes[name] = own.pop(name, _NOTHING)
            if value is not _NOTHING:
                own[name] = value


def _differing(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What a module had under the names under which it has something else now."""
    names = [name for name in before | now if before.get(name, _NOTHING) is not now.get(name, _NOTHING)]
    return {name: before.get(name, _NOTHING) for name in names}


def _exchanged(parent: nn.Module, name: str, module: nn.Module) -> tuple[nn.Module, str, nn.Module]:
    there = parent._modules[name]
    assert there is not None
    parent._modules[name] = module
    return parent, name, there


def put_on(root: nn.Module, adapter: Adapter, base: str | None, *, is_known: bool = False) -> Fitted:
    """Puts an adapter on a model; where that fails, the model is as before.

    Args:
        root: The model. On `meta`, the adapter's layers have no weights either.
        adapter: What `read` returned.
        base: What the model was loaded from, if that is known.
        is_known: Whether it was put on a model of the same config before.

    Raises:
        AdapterError: No module is what it targets, or its weights are of other modules, or of another shape.
    """
    package = peft()
    before = [(parent, name, child) for parent in root.modules() for name, child in parent._modules.items()]
    learned = {parameter: parameter.requires_grad for parameter in root.parameters()}
    fitted, own = Fitted(root, adapter), dict(vars(root))
    try:
        try:
            _inject(package, root, adapter)
        finally:
            fitted._attributes = _differing(own, vars(root))
            fitted._modules = [(p, name, child) for p, name, child in before if child and p._modules[name] is not child]
            for parameter, requires_grad in learned.items():
                parameter.requires_grad_(requires_grad)
        _check_fits(package, fitted, adapter, base)
        trained = [one for name, one in root.named_parameters() if name in adapter.weights and one in learned]
        fitted._values = [
            (one, one.detach().clone()) for one in trained
        ]  # a bias, or the embedding, that was trained too
        if not any(weight.is_meta for weight in learned):
            package.utils.set_peft_model_state_dict(root, dict(adapter.weights), adapter_name=_NAME)
    except BaseException:
        fitted.exchange()
        raise
    _settle(fitted, learned)
    fitted._attributes = _differing(own, vars(root))
    if not is_known:
        _warn_of_another_base(adapter, base)
    return fitted


def _inject(package: Any, root: nn.Module, adapter: Adapter) -> None:
    on_meta = any(parameter.is_meta for parameter in root.parameters())
    try:
        with torch.device("meta") if on_meta else nullcontext(), torch.random.fork_rng(devices=()):
            package.inject_adapter_in_model(adapter.config, root, adapter_name=_NAME)
    except (ValueError, NotImplementedError, AttributeError, KeyError) as error:
        raise AdapterError(
            f"The adapter `{adapter.where}` can't be put on this {type(root).__name__}.",
            because=" ".join(f"{type(error).__name__}: {error}".split())[:400],
            made_for=_made_for(adapter),
        ) from None


def _check_fits(package: Any, fitted: Fitted, adapter: Adapter, base: str | None) -> None:
    """Refuses what peft passes over: weights that no module takes, and modules that get none."""
    given, root = adapter.weights, fitted.root
    if not fitted._modules:
        raise AdapterError(
            f"The adapter `{adapter.where}` changes no module of this {type(root).__name__}.",
            it_targets=_shown(adapter.config.target_modules),
            made_for=_made_for(adapter),
        )
    wanted = package.utils.get_peft_model_state_dict(root, adapter_name=_NAME, save_embedding_layers=False)
    wanted = {key.removeprefix(_PREFIX): value for key, value in wanted.items()}
    wanted |= {key: value for key, value in root.state_dict().items() if key in given and key not in wanted}
    facts = {
        "without_a_place": _shown(key for key in given if key not in wanted),
        "without_weights": _shown(key for key in wanted if key not in given),
        "of_other_shapes": _shown(
            f"{key} {list(value.shape)} for {list(wanted[key].shape)}"
            for key, value in given.items()
            if key in wanted and value.shape != wanted[key].shape
        ),
    }
    if any(facts.values()):
        raise AdapterError(
            f"The weights of the adapter `{adapter.where}` are not those that it would have on this "
            f"{type(root).__name__}: it belongs to another model.",
            **facts,
            made_for=_made_for(adapter),
            this_is=f"`{base}`" if base else None,
        )


def _warn_of_another_base(adapter: Adapter, base: str | None) -> None:
    trained = getattr(adapter.config, "base_model_name_or_path", None)
    if trained and base and Path(trained).name != Path(base).name:
        warnings.warn(
            f"The adapter `{adapter.where}` was made for `{trained}`, and this is `{base}`. Its weights fit; whether "
            "they mean anything there is another matter.",
            UserWarning,
            stacklevel=2,
        )


def _made_for(adapter: Adapter) -> str | None:
    base = getattr(adapter.config, "base_model_name_or_path", None)
    mapping = getattr(adapter.config, "auto_mapping", None) or {}
    kind = mapping.get("base_model_class")
    return ", ".join(filter(None, [f"`{base}`" if base else None, f"a {kind}" if kind else None])) or None


def _shown(names: Iterable[str] | str | None) -> str | None:
    if names is None or isinstance(names, str):
        return names
    all_ = sorted(names)
    return None if not all_ else ", ".join(all_[:3]) + (f", and {len(all_) - 3} more" if len(all_) > 3 else "")


def _settle(fitted: Fitted, learned: dict[nn.Parameter, bool]) -> None:
    """Has the adapter's layers be as the model's are: evaluating or training, with gradients or without."""
    for parent, name, _ in fitted._modules:
        for part in parent._modules[name].modules():  # type: ignore[union-attr]
            part.training = parent.training
    for parameter in fitted.root.parameters():
        if parameter not in learned and parameter.is_floating_point():
            parameter.requires_grad_(any(learned.values()))
    if hasattr(type(fitted.root), "_hf_peft_config_loaded"):
        fitted.root._hf_peft_config_loaded = True  # type: ignore[assignment]  # for transformers' `disable_adapters`


def that_came_with(root: nn.Module) -> Fitted | None:
    """The adapter that a model has, whoever put it there.

    Raises:
        AdapterError: It is merged into the weights.
    """
    found = layers_in(root)
    if not found:
        return None
    check_unmerged(root)
    marks: dict[str, Any] = {name: _NOTHING for name in ("peft_config", "_hf_peft_config_loaded") if name in vars(root)}
    return Fitted(root, None, [(parent, name, base_of(layer)) for parent, name, layer in found], _attributes=marks)
