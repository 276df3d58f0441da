"""Reading a model's parts from where `hub` found them: config, tokenizer, the architecture on `meta`, the weights."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars  # type: ignore[attr-defined]
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging

from nnsight.errors import ModelError
from nnsight.models.hub import Source, out_of_reach
from nnsight.models.options import check_tokenizer_options

# transformers builds a model under settings of the whole process (default dtype, progress bars): one thread at a time.
loading = threading.RLock()
_QUICK = 2**30  # bytes that load in a second or two: no progress bar for them


def read_config(source: Source, options: Mapping[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The config, with what `options` change in it, and the options that are for the weights.

    Raises:
        HubError: The file can't be read.
    """
    rest = dict(options)
    given = rest.pop("config", None)
    if given is not None:
        return given, rest
    try:
        return AutoConfig.from_pretrained(source.where, return_unused_kwargs=True, **source.lookup, **rest)
    except OSError as error:
        raise out_of_reach(source.name, "its config can't be read", error) from None


def read_tokenizer(source: Source, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The tokenizer, with its end of text as pad token where it has none; or None, and the reason.

    Without its files, some of transformers' classes give a tokenizer that knows its special tokens only, and turns any
    text into nothing; others complain. A model can be run on ids all the same.
    """
    if not source.where:
        return None, f"{source.name} was loaded without one"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.where, **source.lookup, **options)
    except (OSError, ValueError, ImportError, TypeError) as error:  # the last, where a file of its class isn't there
        return None, f"none could be loaded from {source.name}: {' '.join(str(error).split())[:200]}"
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
        return None, f"{source.name} has none"
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, ""


def source_of(module: nn.Module) -> Source:
    """Where a loaded module's config says that it came from; nobody on the hub is asked."""
    where = getattr(getattr(module, "config", None), "_name_or_path", "")
    return Source(where or f"this {type(module).__name__}", where, {"local_files_only": True})


def skeleton(config: PreTrainedConfig, options: Mapping[str, Any], loader: Any) -> nn.Module:
    """The architecture without weights, on `meta`, in evaluation mode.

    Args:
        config: Not changed.
        options: Of `from_config`: `dtype`, `attn_implementation`, `trust_remote_code`.
        loader: The class of transformers' that builds it (tasks.py).
    """
    known = {name: options[name] for name in ("attn_implementation", "trust_remote_code") if name in options}
    if isinstance(options.get("dtype"), (torch.dtype, str)) and options["dtype"] != "auto":
        known["dtype"] = options["dtype"]
    with loading, torch.device("meta"):
        return _made(loader.from_config(copy.deepcopy(config), **known))


def tokenizer_for(given: Any, options: Mapping[str, Any] | None, source: Source) -> tuple[Any, str]:
    """The tokenizer that was given, or else the one that lies where the model does; and why there is none.

    Raises:
        ModelError: Options for loading came with one that is loaded, or the name of one was given.
    """
    if given is None:
        found, why = read_tokenizer(source, options or {})
        if options and found is not None:
            check_tokenizer_options(options, found)
        return found, why
    if options:
        raise ModelError(
            "Options for loading have no effect on a tokenizer that is loaded already.",
            you_gave=", ".join(f"{name}=..." for name in options),
        )
    if isinstance(given, (str, os.PathLike)):
        raise ModelError(
            "`tokenizer=` takes a tokenizer, not a name.",
            you_gave=f"tokenizer={str(given)!r}",
            instead=f"transformers.AutoTokenizer.from_pretrained({str(given)!r})",
        )
    return given, ""


def weights(source: Source, config: PreTrainedConfig, options: Mapping[str, Any], loader: Any) -> nn.Module:
    """The model with its weights, in evaluation mode.

    Raises:
        HubError: The files aren't in reach, or broken.
    """
    asked = {**source.lookup, **options, "config": copy.deepcopy(config)}
    if asked.get("local_files_only"):  # else transformers asks the hub for an adapter, where there is peft
        asked["adapter_kwargs"] = {"local_files_only": True, **asked.get("adapter_kwargs", {})}
    try:
        with loading, _bars_where_it_takes_long(source):
            return _made(loader.from_pretrained(source.where, **asked))
    except (OSError, SafetensorError) as error:  # the latter of a file that was cut off
        raise out_of_reach(source.name, "its weights can't be read", error) from None


def _made(module: nn.Module) -> nn.Module:
    if vars(module).get("loss_type", "") is None:
        vars(module)["loss_type"] = "ForCausalLM"  # transformers' own choice, which it prints a line about
    return module.eval()


@contextmanager
def _bars_where_it_takes_long(source: Source) -> Iterator[None]:
    """No progress bar for a folder of less than a gigabyte; the settings are put back."""
    folder = Path(source.where)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else _QUICK
    if size >= _QUICK or not logging.is_progress_bar_enabled():
        yield
        return
    hub_shows_none = are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()  # and the hub's with it
        if hub_shows_none:
            disable_progress_bars()
