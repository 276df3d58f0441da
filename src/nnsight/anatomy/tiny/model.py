"""A tiny random model of the architecture of a large one, for finding out by arithmetic how the large one is built."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nnsight.anatomy.tiny.inputs import tiny_ids
from nnsight.anatomy.tiny.layers import keep_layers
from nnsight.anatomy.tiny.leaves import configs, rewrite
from nnsight.anatomy.tiny.rotary import fit_rotary
from nnsight.anatomy.tiny.shrink import Shrink

__all__ = ["tiny_config", "tiny_ids", "tiny_model"]

# A layer of a tiny model has some ten thousand parameters, so that all layers of the deepest models can stay.
MOST_LAYERS = 100
# What the smallest dim of a head may become, one after the other, until the model runs.
LEASTS = (8, 16, 32)
STD = 0.2
_READS_LAST = "ForSequenceClassification"  # at a prompt's last token


def tiny_config(
    config: PreTrainedConfig, *, n_layers: int = MOST_LAYERS, least: int = 8, heads: int = 4
) -> PreTrainedConfig:
    """A copy of a config, of the same architecture, with every width, head count and vocabulary small.

    Layers stay as many as they are, each of its kind, and so do flags, kernels, scales, soft caps. What was equal
    stays equal, what was heads times a dim stays it, and ids keep their order and their places at the end of the
    vocabulary.

    Args:
        config: Any config of transformers, also with configs inside. It stays as it is.
        n_layers: At most so many layers, the first ones, of this config and of each inside.
        least: The smallest dim of a head.
        heads: How many heads there are, about.
    """
    small = copy.deepcopy(config)
    keep_layers(small, n_layers)
    shrink = Shrink(small, least, heads)
    rewrite(small, shrink)
    for one in configs(small):
        part = shrink.parts[id(one)]
        fit_rotary(one, part.small_dims, part.shares)
        vars(one).pop("quantization_config", None)
        if "dtype" in vars(one):
            vars(one)["dtype"] = torch.float32
        _compute_anywhere(one)
    return small


def _compute_anywhere(config: PreTrainedConfig) -> None:
    """Exchanges implementations that need a kernel, and a device for it, for one that computes the same."""
    if config._attn_implementation not in (None, "sdpa"):
        config._attn_implementation = "eager"
    if getattr(config, "_experts_implementation", None) not in (None, "batched_mm", "grouped_mm"):
        config._experts_implementation = "eager"


def tiny_model(
    config: PreTrainedConfig,
    auto: Any = AutoModelForCausalLM,
    *,
    n_layers: int = MOST_LAYERS,
    seed: int = 0,
    least: int = LEASTS[0],
    heads: int = 4,
) -> nn.Module:
    """A small random model of a config's architecture, that has run once: evaluating, in float32, on the CPU.

    Its parameters are drawn at random, so that no sum and no ratio fits by accident: the weights of norms around 1, all
    others around 0, with a standard deviation of 0.2. Buffers, and parameters that aren't trained, are the model's own.

    Args:
        config: The config, large or small. It stays as it is.
        auto: What makes a model of it: a class like `AutoModelForCausalLM`, or a model class.
        n_layers: At most so many layers, the first ones.
        seed: Of the parameters. Neither the global generators nor the default dtype are touched.
        least: The smallest dim of a head that is tried.
        heads: How many heads there are, about.

    Raises:
        Exception: What the model raised where it was built or run, if it did so with each size of heads that was tried.
    """
    failures: list[Exception] = []
    for one in [least, *(one for one in LEASTS if one > least)]:
        try:
            return _run_once(_drawn(tiny_config(config, n_layers=n_layers, least=one, heads=heads), auto, seed))
        except Exception as failure:  # noqa: BLE001 - a model refuses a size in any way; the first is raised below
            failures.append(failure)
    raise failures[0]


def _drawn(config: PreTrainedConfig, auto: Any, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]), _quiet():
        model = _built(config, auto).eval().float()
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # RoFormer's rotary embedding: a buffer in all but name
            continue
        # A norm that made its input smaller in each of many layers would leave nothing to be seen at the end.
        mean = 1.0 if parameter.dim() < 2 and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, mean, STD, generator=draw)
    return model


def _built(config: PreTrainedConfig, auto: Any) -> nn.Module:
    """A model of a config, or of the one inside that its class is made for: MusicGen's is made for its `decoder`."""
    made = auto if issubclass(auto, PreTrainedModel) else _made(auto, config)
    if made is None:  # code that comes with a checkpoint: only the auto class knows
        return auto.from_config(config, dtype=torch.float32)
    inner = next((one for one in configs(config) if isinstance(one, made.config_class)), config)
    if made.__name__.endswith(_READS_LAST) and getattr(inner, "pad_token_id", 0) is None:
        inner.pad_token_id = 0  # else several prompts are refused: where they end is told by it
    return made._from_config(inner, dtype=torch.float32)


def _made(auto: Any, config: PreTrainedConfig) -> Any:
    made = auto._model_mapping.get(type(config), None)
    return made[0] if isinstance(made, (list, tuple)) else made


def _run_once(model: nn.Module) -> nn.Module:
    ids, inputs = tiny_ids(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _quiet():
        model(ids, **inputs)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' advice on kernels and generation, which is about the large model if about any."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
