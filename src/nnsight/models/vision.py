"""Models that read text and images together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nnsight.block.cuts import Batch
from nnsight.errors import InputError
from nnsight.models import tasks
from nnsight.models.accepts import OPTIONS, Accepts, check_names
from nnsight.models.images import Reader, is_of_images, joined, prompts_in
from nnsight.models.inputs import prepare
from nnsight.models.joined import together
from nnsight.models.language import LanguageModel
from nnsight.models.packages import check_installed
from nnsight.models.processors import are_images, check_takes_images
from nnsight.models.prompts import PADDING, short

_SEEN = frozenset({"mm_encoder_outputs"})  # what `generate` made of images before the first step


class VisionLanguageModel(LanguageModel):
    """A model that reads text and images, and predicts tokens: LLaVA, Qwen-VL, PaliGemma, Idefics, Gemma 3.

        with model.trace("<image>What is this?", images=picture):
            hidden = model.layers[3].output

    Args and attributes are those of `TransformersModel`. A prompt has the model's placeholder where an image stands,
    or is a chat, whose parts say it. Images are PIL's, arrays [height, width, channel] or tensors [channel, height,
    width] with numbers of 0 to 255; one, a list in the order of the placeholders, or a list for each prompt. The
    uniform names are those of the language model inside, and an image's tokens are tokens of the prompt.

    Raises:
        HubError: The model isn't in reach.
        ModelError: It isn't a model that reads images and text.
        InputError: An option that nobody has a use for.
    """

    _TASKS = (tasks.READ_IMAGES,)

    def _says_prompt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return super()._says_prompt(args, kwargs) or kwargs.get("text") is not None or kwargs.get("images") is not None

    def _processed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rest = dict(kwargs)
        images, text = rest.pop("images", None), rest.pop("text", None)
        if len(args) == 2 and are_images(args[1]):
            raise InputError(
                "A run takes one prompt by position, and images by name.",
                you_gave=f"{short(args[0])}, {short(args[1])}",
                write=f"{short(args[0])}, images=...",
            )
        if text is not None:
            if args:
                raise InputError(
                    "There are two prompts: one by position, and one as `text=`.",
                    you_gave=f"{short(args[0])}, text={short(text)}",
                    write="one of the two",
                )
            args = (text,)
        prompts = prompts_in(args[0]) if len(args) == 1 else None
        reader = self._reader()
        if prompts is None and images is not None:
            raise InputError(
                "There are images, and no text that says where they stand.",
                you_gave=f"images={short(images)}",
                write=f'"{reader.place}What is this?", images=...',
            )
        if prompts is None or self.tokenizer is None:
            return args, rest
        if images is not None:
            self._check_can_read(images)
        later = PADDING if rest.get("truncation") else PADDING | {"max_length"}  # carried out where rows are padded
        options = {name: rest.pop(name) for name in OPTIONS & rest.keys() - later}
        side = rest.get("padding_side", self._takes().side)
        return (reader.read(prompts, images, options, side),), rest

    def _reader(self) -> Reader:
        config: Any = self._module.config
        ids = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
        image_id = next((one for one in ids if one is not None), None)
        return Reader(self._processors["processor"], self.tokenizer, self._takes(), image_id, self._no_processor)

    def _check_can_read(self, images: Any) -> None:
        check_takes_images(images, self._takes())
        check_installed("PIL", "Reading images (with Pillow)", "vision")
        if self._processors["processor"] is None:
            raise InputError(
                "There is no processor to turn an image into numbers.",
                you_gave=f"images={short(images)}",
                because=self._no_processor,
                write="VisionLanguageModel(..., processor=transformers.AutoProcessor.from_pretrained(...))",
            )

    def _prepare_scan(
        self, fn: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if fn == "generate":
            return super()._prepare_scan(fn, args, kwargs)
        check_names([name for name in kwargs if name not in OPTIONS | {"images", "text"}], self._takes())
        args, kwargs = self._processed(args, kwargs)
        fields = {**(args[0] if args and isinstance(args[0], Mapping) else {}), **kwargs}
        return (), self._completed(prepare(args, kwargs, self._takes_with(fields), self.tokenizer))

    def _completed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Text alone, with what the model would otherwise take from elsewhere."""
        config: Any = self._module.config
        base: Any = getattr(self._module, "base_model", self._module)
        ids, mask = inputs.get("input_ids", inputs.get("inputs_embeds")), inputs.get("attention_mask")
        if ids is None or any(map(is_of_images, inputs)):
            return inputs
        if getattr(base, "rope_deltas", None) is not None:  # positions, from those of Qwen-VL's last images
            return {"position_ids": torch.arange(ids.shape[1], device=ids.device).expand(ids.shape[:2]), **inputs}
        if config.model_type == "paligemma" and isinstance(mask, Tensor) and not bool(mask.all()):
            return {"token_type_ids": torch.zeros_like(mask), **inputs}  # else causal with padding, and without it not
        return inputs

    def _takes_with(self, fields: Mapping[str, Any]) -> Accepts:
        """What the model can be given beside these: positions on two axes of an image, it counts itself."""
        takes = self._takes()
        counts = self._places_images and any(is_of_images(name) for name in fields)
        return replace(takes, wants_positions=False) if counts else takes

    @property
    def _places_images(self) -> bool:
        """Whether a token's position has several axes, as in Qwen-VL."""
        return hasattr(getattr(self._module, "base_model", self._module), "get_rope_index")

    def _together(self, fn: str | None, given: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any], list[int]]:
        own_positions, generating = any(own for own, _ in given), fn == "generate"
        images = [{name: value for name, value in fields.items() if is_of_images(name)} for _, fields in given]
        texts = [{name: value for name, value in fields.items() if not is_of_images(name)} for _, fields in given]
        takes = self._takes_with({name: None for one in images for name in one})
        inputs, counts = together(texts, takes, own_positions, generating=generating)
        inputs = {**inputs, **joined(images, takes.side)}
        return (), self._placed(inputs if generating else self._completed(inputs)), counts

    def _rows_of(self, fn: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        batch = super()._rows_of(fn, args, kwargs)
        # Images are no rows: a prompt may have none or several. Where tokens stand is measured on text alone.
        batch.own_state |= {name for name, value in kwargs.items() if isinstance(value, Tensor) and is_of_images(name)}
        batch.own_state |= _SEEN | ({"position_ids"} if self._places_images else set())
        return batch
