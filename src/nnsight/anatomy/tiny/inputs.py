"""Token ids for a tiny model, and what else its forward needs to run as a language model."""

from __future__ import annotations

import inspect
import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from nnsight.anatomy.tiny.leaves import configs, leaves
from nnsight.anatomy.tiny.meaning import Meaning, meaning
from nnsight.errors import AnatomyError

__all__ = ["tiny_ids"]

BATCH, LENGTH = 2, 7
_WAVE = 4000  # samples: what convolutions make a few steps of
ANSWER = 5  # tokens of a decoder that an encoder reads for


def tiny_ids(model: nn.Module, *, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
    """Ordinary token ids for a model, and what else its forward needs as a language model: `model(ids, **inputs)`.

    A model that hears has sound in the place of ids, and one that sees, an image. Where an encoder reads, there are
    also ids for its decoder.

    Args:
        model: A model of transformers, of any size.
        seed: Of the ids. The global generator is not touched.

    Returns:
        The ids, [prompt, token] of 2 by 7, int64, none of them special (a model of several codebooks reads one row a
        codebook for each prompt), and keyword inputs: no cache is kept, and what the forward can't do without is
        there.

    Raises:
        AnatomyError: It reads neither ids nor sound nor images, or several of these.
    """
    draw = torch.Generator().manual_seed(seed)
    inputs = _needed(cast(Any, model))
    main = getattr(model, "main_input_name", "input_ids")
    makes = _SENSES.get(main)
    if makes is not None and not has_encoder(model):
        return makes(cast(Any, model), draw), inputs
    table: Any = embedding_of(model)
    if table is None:
        raise AnatomyError(
            f"A {type(model).__name__} has no single embedding of tokens, for which inputs could be made.",
            instead="    or ".join(parts_of(model)) or "a part that reads tokens, or one that sees, wrapped by itself",
        )
    # A model of several codebooks has one table for each, and a row of ids for each beside the other.
    tables: list[Any] = list(table) if isinstance(table, nn.ModuleList) else [table]
    numbers = [leaf for leaf in leaves(cast(Any, model).config) if meaning(leaf.name, leaf.value) is Meaning.TOKEN]
    special = {leaf.value for leaf in numbers if not leaf.name.startswith("vocab_size")}
    # Gemma 3n has a second, smaller vocabulary for the embeddings of each layer.
    sizes = [leaf.value for leaf in numbers if leaf.name == "vocab_size_per_layer_input" and leaf.value]
    plain = [token for token in range(min([tables[0].weight.shape[0], *sizes])) if token not in special]
    drawn = torch.tensor(plain)
    ids = drawn[torch.randint(len(plain), (BATCH * len(tables), LENGTH), generator=draw)]
    if reads_end(model):
        ids[:, -1] = cast(Any, model).config.eos_token_id
    elif type(model).__name__.endswith("ForMultipleChoice"):
        ids = ids[:, None]  # of one choice
    elif has_encoder(model):
        inputs["decoder_input_ids"] = drawn[torch.randint(len(plain), (BATCH, ANSWER), generator=draw)]
    return (ids if makes is None else makes(cast(Any, model), draw)), inputs


def embedding_of(model: nn.Module) -> nn.Module | None:
    """What a model looks its tokens up in, or makes of patches of an image; None where transformers knows none."""
    get: Any = getattr(model, "get_input_embeddings", None)
    try:
        return None if get is None else get()
    except NotImplementedError:
        return None


def has_encoder(model: nn.Module) -> bool:
    """Whether a decoder answers for what an encoder has read."""
    asked = inspect.signature(model.forward).parameters
    return bool(getattr(model.config, "is_encoder_decoder", False)) and "decoder_input_ids" in asked


def reads_end(model: nn.Module) -> bool:
    """Whether it classifies a prompt by what its decoder, which is given the prompt too, makes of the end of text."""
    return has_encoder(model) and type(model).__name__.endswith("ForSequenceClassification")


def parts_of(model: nn.Module) -> list[str]:
    """How to wrap each of the models inside a model: CLIP's two."""
    inside = [name for name, one in model.named_children() if embedding_of(one) is not None]
    return [f"TransformersModel(module.{name})" for name in inside]


def _sound(model: Any, draw: torch.Generator) -> Tensor:
    """Sound as Whisper takes it, [prompt, frequency, time], of two steps of time a position; or as others do.

    That is [prompt, time, frequency], or a wave, [prompt, time].
    """
    config = model.config
    if model.main_input_name == "input_values" and hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return torch.randn(BATCH, config.max_length, config.num_mel_bins, generator=draw)
    if model.main_input_name == "input_values":
        return torch.randn(BATCH, _WAVE, generator=draw)
    if hasattr(config, "input_feat_per_channel"):
        return torch.randn(BATCH, 4 * LENGTH, config.input_feat_per_channel, generator=draw)
    if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
        return torch.randn(BATCH, config.num_mel_bins, 2 * config.max_source_positions, generator=draw)
    names = ("num_mel_bins", "feature_projection_input_dim")
    widths = [getattr(one, name) for one in configs(config) for name in names if hasattr(one, name)]
    return torch.randn(BATCH, 8 * LENGTH, widths[0] if widths else config.num_mel_bins, generator=draw)


def _image(model: Any, draw: torch.Generator) -> Tensor:
    """Images of the size that the config has, or one inside, [prompt, channel, height, width].

    Where a model is told how many patches an image has, these, [prompt, patch, channel * height * width].
    """
    config: Any
    if _reads_patches(model):
        config = next(one for one in configs(model.config) if hasattr(one, "patch_size"))
        return torch.randn(BATCH, math.prod(_GRID), config.num_channels * config.patch_size**2, generator=draw)
    config = next((one for one in configs(model.config) if hasattr(one, "image_size")), model.config)
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    frames = [model.config.num_frames] if hasattr(model.config, "num_frames") else []
    return torch.randn(BATCH, *frames, getattr(config, "num_channels", 3), height, width, generator=draw)


_GRID = (2, 4)  # patches of an image, down and across


def _reads_patches(model: Any) -> bool:
    """Whether it reads the patches of images of any size, and is told how many these are: SigLIP 2."""
    return model.main_input_name == "pixel_values" and "spatial_shapes" in inspect.signature(model.forward).parameters


_SENSES = {"input_features": _sound, "input_values": _sound, "pixel_values": _image}


def _needed(model: Any) -> dict[str, Any]:
    asked = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    if "use_cache" in asked or ("kwargs" in asked and hasattr(model.config, "use_cache")):
        inputs["use_cache"] = False
    if _reads_patches(model):
        inputs["pixel_attention_mask"] = torch.ones(BATCH, math.prod(_GRID), dtype=torch.int64)
        inputs["spatial_shapes"] = torch.tensor([_GRID] * BATCH)
    if "lang_ids" in asked:  # X-MOD: an adapter for each language, and no language by default
        inputs["lang_ids"] = torch.zeros(BATCH, dtype=torch.int64)
    return inputs
