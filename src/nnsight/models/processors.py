"""What lies beside a model to make inputs of images and sound, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor

from nnsight.errors import InputError
from nnsight.models.accepts import Accepts
from nnsight.models.hub import Source
from nnsight.models.prompts import short

KINDS = {
    "processor": "AutoProcessor",
    "image_processor": "AutoImageProcessor",
    "feature_extractor": "AutoFeatureExtractor",
}
_FOR = {"image_processor": {"pixel_values"}, "feature_extractor": {"input_features", "input_values"}}


def read_processors(source: Source, takes: Accepts, given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The model's processors by the names of `KINDS`, None where there is none, and why one could not be loaded.

    Only those are looked for that a model with these inputs has a use for; what is given is used as it is.
    """
    wanted = {kind for kind, names in _FOR.items() if names & takes.names}
    if wanted and "input_ids" in takes.names:
        wanted.add("processor")
    found: dict[str, Any] = dict.fromkeys(KINDS)
    why = ""
    for kind, auto in KINDS.items():
        if given.get(kind) is not None:
            found[kind] = given[kind]
        elif kind in wanted and source.where:
            try:
                found[kind] = getattr(transformers, auto).from_pretrained(source.where, **source.lookup)
            except (OSError, ValueError, ImportError, AttributeError) as error:
                why = " ".join(str(error).split()).partition(". ")[0][:200]
    return found, why


def with_processed(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], takes: Accepts, has: Mapping[str, Any], why: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same inputs, with what the processors make of images in their place.

    Args:
        args: Text beside `images=`, an image or a list of them, or the main input as a tensor.
        kwargs: `images=`, and what is passed on.
        has: The processors, by name.
        why: Why one of them is missing.
    """
    rest = dict(kwargs)
    images = rest.pop("images", None) if "images" not in takes.names else None
    if images is None and len(args) == 1 and takes.main != "input_ids":
        if isinstance(args[0], Tensor):
            return (), {takes.main: args[0], **rest}
        if are_images(args[0]):
            images, args = args[0], ()
    if images is None:
        return args, rest
    reads = has["processor"] if args else has["image_processor"] or has["processor"]
    if reads is None:
        check_takes_images(images, takes)
        raise InputError(
            f"There is no {'processor' if args else 'image processor'} to turn an image into numbers.",
            you_gave=short(images),
            because=why,
            write="pixel_values=...",
        )
    text = {"text": args[0]} if args else {}
    return (dict(reads(images=images, **text, return_tensors="pt")),), rest


def check_takes_images(images: Any, takes: Accepts) -> None:
    """Raises InputError where a model has no use for images."""
    if not takes.anything and not any(name.startswith(("pixel_values", "image")) for name in takes.names):
        raise InputError(
            f"`images` is no input of {takes.model}: it reads text alone.",
            you_gave=f"images={short(images)}",
            write="VisionLanguageModel(...), with a model that reads images",
        )


def are_images(value: Any) -> bool:
    """A picture of PIL's, or several."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(are_images, value))
    return callable(getattr(value, "convert", None)) and hasattr(value, "mode")
