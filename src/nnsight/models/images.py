"""Text and images -> the fields of a model's forward, each prompt with its own images read by itself.

A processor pads a batch in its own way, and few take prompts with and without images together. So each prompt goes
through it alone, and the rows are put together here, as those of invokes are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from nnsight.errors import InputError
from nnsight.models.accepts import CHAT_OPTIONS, TEXT_OPTIONS, Accepts
from nnsight.models.inputs import FILL
from nnsight.models.prompts import PADDING, is_conversation, short

_OF_IMAGES = ("pixel_", "image_", "video_", "aspect_ratio_", "spatial_shapes", "cross_attention_mask", "patch_")
# Of these, which images each token sees, [prompt, token, ...]: a row for each prompt, padded as ids are.
_OF_TOKENS = ("cross_attention_mask", "image_attention_mask", "image_embeds_position_mask")
_FOR_TEXT = TEXT_OPTIONS - PADDING  # which is carried out where rows are put together


def is_of_images(name: str) -> bool:
    """Whether an input is of images, which are no rows: a prompt has none, one or several."""
    return name.startswith(_OF_IMAGES)


def prompts_in(prompt: Any) -> list[Any] | None:
    """The texts or chats of a prompt; None where it has another form."""
    if isinstance(prompt, str) or is_conversation(prompt):
        return [prompt]
    if isinstance(prompt, (list, tuple)) and prompt and (isinstance(prompt[0], str) or is_conversation(prompt[0])):
        return list(prompt)
    return None


class Reader:
    """Reads prompts and images with a model's own processor.

    Args:
        processor: None where there is none; then only text is read.
        tokenizer: Reads prompts without images.
        takes: What the model can be given.
        image_id: What an image's tokens are in the model, if that is known.
        why: Why there is no processor.
    """

    def __init__(self, processor: Any, tokenizer: Any, takes: Accepts, image_id: int | None, why: str) -> None:
        self._processor, self._tokenizer, self._takes = processor, tokenizer, takes
        self._image_id, self._why = image_id, why

    @property
    def placeholder(self) -> str:
        """What stands in a text where an image is."""
        for name in ("boi_token", "image_token"):  # of Gemma 3, one token begins an image, and another one fills it
            known = getattr(self._processor, name, None)
            if known is not None:
                return str(getattr(known, "content", known))
        return "<image>"

    @property
    def place(self) -> str:
        """What is written where an image stands: Qwen-VL wants its placeholder between two others."""
        known = self.placeholder
        return f"<|vision_start|>{known}<|vision_end|>" if known == "<|image_pad|>" else known

    def read(self, prompts: list[Any], images: Any, options: Mapping[str, Any], side: str) -> dict[str, Any]:
        """The fields of the prompts, token fields as rows of any length.

        Args:
            prompts: Texts or chats.
            images: As the user gave them.
            options: Of the tokenizer, and of chat templates.
            side: Where the rows will be padded.

        Raises:
            InputError: Images and places for them don't match, or can't be read.
        """
        texts, own = zip(*(self._as_text(prompt, options) for prompt in prompts), strict=True)
        if images is not None and any(own):
            raise InputError(
                "There are images in the chat, and as `images=`.",
                you_gave=f"images={short(images)}",
                write="one of both",
            )
        shared = _as_list(images)
        for image in [*shared, *(image for some in own for image in some)]:
            self._check_image(image)
        given = self._shared_out(texts, shared) if shared else list(own)
        asked = {name: value for name, value in options.items() if name in _FOR_TEXT}
        read = [
            self._read_one(text, some, {**asked, **({} if isinstance(prompt, str) else {"add_special_tokens": False})})
            for prompt, text, some in zip(prompts, texts, given, strict=True)
        ]
        return _rows(read) | joined([{n: v for n, v in one.items() if is_of_images(n)} for one in read], side)

    def _as_text(self, prompt: Any, options: Mapping[str, Any]) -> tuple[str, list[Any]]:
        """A prompt as text with placeholders, and the images in it."""
        if isinstance(prompt, str):
            return prompt, []
        reads = self._processor if getattr(self._processor, "chat_template", None) else self._tokenizer
        if not (options.get("chat_template") or getattr(reads, "chat_template", None)):
            raise InputError(
                f"These are chat messages, and the processor of {self._takes.model} has no chat template for them.",
                you_gave=short(prompt),
                write=f'the text itself, "{self.place}What is this?", or chat_template="..." beside the messages',
            )
        parts = [part for message in prompt if isinstance(message["content"], list) for part in message["content"]]
        images = [part["image"] for part in parts if part.get("type") == "image" and part.get("image") is not None]
        asked = {name: value for name, value in options.items() if name in CHAT_OPTIONS}
        asked.setdefault("add_generation_prompt", not options.get("continue_final_message"))
        bare = [
            {**message, "content": [_without_image(part) for part in message["content"]]}
            if isinstance(message["content"], list)
            else message
            for message in prompt
        ]
        text: str = reads.apply_chat_template(bare, tokenize=False, **asked)
        return text, images

    def _check_image(self, image: Any) -> None:
        """Refuses what would be fetched, and numbers of 0 to 1, which a processor would divide by 255 once more."""
        if isinstance(image, (str, bytes, os.PathLike)):
            raise InputError(
                "An image is one of PIL's, an array or a tensor, not the name of a file.",
                you_gave=short(image),
                write=f"PIL.Image.open({short(image)})",
            )
        reads = getattr(self._processor, "image_processor", None)
        if not isinstance(image, (np.ndarray, Tensor)) or not getattr(reads, "do_rescale", False):
            return
        array = torch.as_tensor(image)
        if array.is_floating_point() and array.numel() and float(array.max()) <= 1:
            raise InputError(
                "The numbers of this image are 0 to 1, and the processor divides by 255.",
                you_gave=short(image),
                write="image * 255",
            )

    def _shared_out(self, texts: Sequence[str], images: list[Any]) -> list[list[Any]]:
        """The images of each prompt: as they were listed by prompt, else in the order of the placeholders."""
        if all(isinstance(one, (list, tuple)) or one is None for one in images):
            if len(images) != len(texts):
                raise InputError(
                    f"There are images for {_number(len(images), 'prompt')}, and there are {len(texts)}.",
                    write="images=[[first, second], [], [third]], a list for each prompt",
                )
            return [list(some or ()) for some in images]
        places = [text.count(self.placeholder) for text in texts]
        if len(texts) == 1:
            places = [len(images)]
        elif not sum(places) and len(images) == len(texts):
            places = [1] * len(texts)  # PaliGemma puts an image in front by itself
        if sum(places) != len(images):
            raise InputError(
                f"There are {_number(len(images), 'image')}, and {_number(sum(places), 'place')} for them.",
                placeholders=", ".join(f"{count} in {short(text)}" for count, text in zip(places, texts, strict=True)),
                write=f"`{self.placeholder}` for each image, or images=[[...], [...]], a list for each prompt",
            )
        rest = iter(images)
        return [[next(rest) for _ in range(count)] for count in places]

    def _read_one(self, text: str, images: list[Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of one prompt."""
        places = text.count(self.placeholder)
        if images and places and places != len(images):
            raise self._mismatch(text, images)
        try:
            if images:
                read = self._processor(text=[text], images=[images], return_tensors="pt", **options)
            else:
                read = self._tokenizer([text], return_tensors="pt", verbose=False, **options)
        except Exception as error:
            if not images:
                raise
            if not places:
                raise self._mismatch(text, images) from error
            raise InputError(  # processors fail in any way
                "The processor can't read this prompt with its images.",
                you_gave=f"{short(text)}, images={short(images)}",
                because=f"{type(error).__name__}: {error}"[:200],
            ) from error
        fields = {name: value for name, value in read.items() if name in self._takes.names and name != "labels"}
        self._check_places(text, images, fields["input_ids"])
        return fields

    def _mismatch(self, text: str, images: list[Any]) -> InputError:
        has_places = self.placeholder in text
        return InputError(
            f"There {'is' if len(images) == 1 else 'are'} {_number(len(images), 'image')} for a prompt that has "
            f"{_number(text.count(self.placeholder), 'place')} for images.",
            you_gave=short(text),
            write=f"`{self.placeholder}` for each image" if has_places else f'"{self.place * len(images)}{text[:40]}"',
        )

    def _check_places(self, text: str, images: list[Any], ids: Tensor) -> None:
        if self._image_id is None:
            return
        has_places = bool((ids == self._image_id).any())
        if images and not has_places:
            raise self._mismatch(text, images)
        if has_places and not images:
            raise InputError(
                f"There is a place for an image, `{self.placeholder}`, and no image for it.",
                you_gave=short(text),
                write="images=[...], or the text without it",
            )


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _without_image(part: Any) -> Any:
    """A part of a message that says where an image is, and not which."""
    return {"type": "image"} if isinstance(part, Mapping) and part.get("type") == "image" else part


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4:
        return list(images)
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _rows(read: list[dict[str, Any]]) -> dict[str, Any]:
    """The token fields of all prompts, as rows of their own lengths. None is padded, so that a mask says nothing."""
    names = dict.fromkeys(name for one in read for name in one if not is_of_images(name) and name != "attention_mask")
    fields: dict[str, Any] = {}
    for name in names:
        rows = [one[name][0] if name in one else torch.full_like(one["input_ids"][0], FILL[name]) for one in read]
        fields[name] = rows
    return fields


def joined(read: Sequence[Mapping[str, Tensor]], side: str) -> dict[str, Any]:
    """The image fields of several prompts: one after the other, and other axes filled up with zeros.

    That is at their ends; an axis of tokens on the side on which the tokens are padded.

    Raises:
        InputError: One has no images, and the model wants a row of images for each.
    """
    fields: dict[str, Any] = {}
    for name in dict.fromkeys(name for one in read for name in one):
        tensors = [torch.as_tensor(one[name]) for one in read if name in one]
        if name in _OF_TOKENS and len(tensors) < len(read):
            raise InputError(
                "Some of these prompts have images and others none, and this model takes both in a batch only as a row "
                "of images for each.",
                because=f"it is given `{name}`",
                write="a trace for the prompts without images, and one for the others",
            )
        sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
        in_front = name in _OF_TOKENS and side == "left"
        fields[name] = torch.cat([_filled(tensor, sizes, in_front) for tensor in tensors])
    return fields


def _filled(tensor: Tensor, sizes: list[int], in_front: bool) -> Tensor:
    """Filled up behind, and on axis 1 perhaps in front."""
    missing = [size - own for own, size in zip(tensor.shape[1:], sizes, strict=True)]
    gaps = [side for gap in reversed(missing) for side in (0, gap)]
    if in_front:
        gaps[-2:] = [missing[0], 0]
    return pad(tensor, gaps) if any(gaps) else tensor
