"""Where a model comes from: the folder in the package, a folder of the user's, the hub's cache, or the hub.

A name is looked for once, with one request and a short wait. Where the hub doesn't answer, everything else is read
from the cache; without the question, each file would be asked for six times, with half a minute of waiting and a line
of log a time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors

from nnsight.errors import HubError

BUNDLED = {"nnsight/demo": Path(__file__).resolve().parent.parent / "demo"}

# Options that say where and as whom to look; they hold for config, tokenizer and weights alike.
LOOKUP = frozenset({"revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder"}) | frozenset(
    {"trust_remote_code", "code_revision"}
)
_CONFIG = "config.json"
_WAIT = 5.0  # seconds for the hub's answer

# What the hub can answer, the particular before the general.
_REFUSALS: list[tuple[type[Exception], str]] = [
    (errors.HFValidationError, "it is no folder, and can't be a name on the hub"),
    (errors.GatedRepoError, "the hub wants an account that has access to it (`token=...`)"),
    (errors.RevisionNotFoundError, "the hub has it, but not this revision"),
    (errors.EntryNotFoundError, "the hub has it, but without a {file}"),
    (errors.RepositoryNotFoundError, "there is no such folder, and the hub has no (public) model of this name"),
]


@dataclass(frozen=True)
class Source:
    """A place that was found to hold a model.

    Args:
        name: What the user typed, for messages.
        where: A folder, or a name on the hub.
        lookup: The options that hold for each file of it.
    """

    name: str
    where: str
    lookup: dict[str, Any] = field(default_factory=dict)


def out_of_reach(name: str, why: str, cause: BaseException | None = None, file: str = _CONFIG) -> HubError:
    """The error for what can't be had, in one line; of a model, with the one that always can.

    It is raised `from None`, with what the library below said in a row: its tracebacks are three screens long.
    """
    bundled = ' `LanguageModel("nnsight/demo")` is bundled and needs no network.' if file == _CONFIG else ""
    return HubError(f"`{name}` can't be loaded: {why}.{bundled}", because=None if cause is None else _brief(cause))


def _brief(error: BaseException) -> str:
    """The first line of an error that says something."""
    line = next(filter(None, map(str.strip, str(error).splitlines())), "")
    return f"{type(error).__name__}: {line}"[:300]


def find(name: str | os.PathLike[str], options: Mapping[str, Any]) -> tuple[Source, dict[str, Any]]:
    """Finds out where a model lies, before anything of it is read.

    Args:
        name: The bundled model, a folder, or a name on the hub.
        options: All that was given for loading.

    Returns:
        The source, and those options that aren't about looking things up.

    Raises:
        HubError: No such folder, no such name, no permission, or neither network nor cache.
    """
    lookup = {option: value for option, value in options.items() if option in LOOKUP and value is not None}
    rest = {option: value for option, value in options.items() if option not in LOOKUP}
    typed = os.fspath(name)
    folder = BUNDLED.get(typed, Path(typed).expanduser())
    if folder.is_dir():
        within = folder / lookup.get("subfolder", "")
        is_model = (within / "config.json").is_file()
        if (within / "adapter_config.json").is_file():
            raise HubError(
                f"`{typed}` is an adapter, not a model."
                if not is_model
                else f"`{typed}` has a model and an adapter, for which transformers would load another model.",
                instead="LanguageModel(the model's own folder or name, peft=the adapter's)",
            )
        if not is_model:
            raise out_of_reach(typed, f"the folder {folder} has no config.json")
        return Source(typed, str(folder), lookup), rest
    if isinstance(name, os.PathLike) or _looks_like_a_path(typed):
        raise out_of_reach(typed, "there is no such folder")
    return Source(typed, typed, asked(typed, lookup)), rest


def _looks_like_a_path(typed: str) -> bool:
    """A name on the hub is `name` or `owner/name`."""
    return typed.startswith((".", "~", "/")) or typed.endswith("/") or typed.count("/") > 1 or "\\" in typed


def asked(name: str, lookup: dict[str, Any], file: str = _CONFIG) -> dict[str, Any]:
    """Asks the hub for the header of a file. Where it doesn't answer, the cache alone is read from here on.

    Raises:
        HubError: No such name, no permission, or neither network nor cache.
    """
    offline = lookup.get("local_files_only") or constants.HF_HUB_OFFLINE
    try:
        url = huggingface_hub.hf_hub_url(  # which also looks at the name
            name, file, revision=lookup.get("revision"), subfolder=lookup.get("subfolder")
        )
        if not offline:
            huggingface_hub.get_hf_file_metadata(url, token=lookup.get("token"), timeout=_WAIT)
    except tuple(kind for kind, _ in _REFUSALS) as refusal:
        why = next(why for kind, why in _REFUSALS if isinstance(refusal, kind))
        raise out_of_reach(name, why.format(file=file), refusal, file) from None
    except Exception as silence:  # noqa: BLE001 - each release of the hub's client raises its own network layer's
        return _cached(name, lookup, silence, file)
    return _cached(name, lookup, None, file) if offline else lookup


def _cached(name: str, lookup: dict[str, Any], silence: Exception | None, file: str) -> dict[str, Any]:
    """The options that read the cache alone, if it has this model.

    Raises:
        HubError: It hasn't; from `silence`, the reason why the hub itself can't be asked.
    """
    place = "/".join(filter(None, [lookup.get("subfolder"), file]))
    where = {"cache_dir": lookup.get("cache_dir"), "revision": lookup.get("revision")}
    if isinstance(huggingface_hub.try_to_load_from_cache(name, place, **where), str):
        return {**lookup, "local_files_only": True}
    why = "the hub isn't in reach" if silence is not None else "the hub isn't to be asked (offline mode)"
    raise out_of_reach(name, f"there is no such folder, {why}, and its cache has no copy", silence, file) from None
