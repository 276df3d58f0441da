"""Tiny models that read text and images, and their processors, of several families; none needs torchvision."""

from __future__ import annotations

import numpy as np
import tiny
import torch
import transformers
from transformers import PreTrainedModel

_SPECIAL = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
_QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_TEXT = {
    "vocab_size": 330,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 320,
}
_EYES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_EYES |= {"image_size": 8, "patch_size": 4}
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}PLACE{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
PLACES = {
    "llava": "<image>",
    "idefics3": "<image>",
    "paligemma": "<image>",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}


def tokenizer_of(name: str):
    tokenizer = tiny.make_tokenizer(pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(_QWEN if name == "qwen2_vl" else _SPECIAL)})
    return tokenizer


def _image_processor(name: str, **options):
    """The one that works on PIL's images and arrays; from transformers 5.3 on, it has a name of its own."""
    kind = getattr(transformers, f"{name}Pil", None) if f"{name}Pil" in dir(transformers) else None
    return (kind or getattr(transformers, name))(**options)


def processor_of(name: str):
    """The family's own processor, but for Qwen2-VL's, which needs torchvision for videos."""
    tokenizer = tokenizer_of(name)
    template = CHAT.replace("PLACE", PLACES[name])
    if name == "llava":
        reads = _image_processor("CLIPImageProcessor", size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
        return transformers.LlavaProcessor(
            image_processor=reads,
            tokenizer=tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    if name == "idefics3":
        edge = {"longest_edge": 8}
        reads = _image_processor("Idefics3ImageProcessor", size=edge, max_image_size=edge, do_image_splitting=False)
        return transformers.Idefics3Processor(
            image_processor=reads, tokenizer=tokenizer, image_seq_len=4, chat_template=template
        )
    if name == "paligemma":
        reads = _image_processor("SiglipImageProcessor", size={"height": 8, "width": 8})
        reads.image_seq_length = 4
        return transformers.PaliGemmaProcessor(image_processor=reads, tokenizer=tokenizer, chat_template=template)
    reads = _image_processor(
        "Qwen2VLImageProcessor", patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=256
    )
    return QwenProcessor(reads, tokenizer, template)


class QwenProcessor:
    """What Qwen2-VL's processor does with images: as many tokens as merged patches."""

    image_token = "<|image_pad|>"

    def __init__(self, image_processor, tokenizer, chat_template) -> None:
        self.image_processor, self.tokenizer, self.chat_template = image_processor, tokenizer, chat_template

    def __call__(self, text, images, return_tensors, **options):
        read = self.image_processor(images=images, return_tensors="pt")
        counts = iter((read["image_grid_thw"].prod(-1) // 4).tolist())
        texts = []
        for one in text:
            first, *rest = one.split(self.image_token)
            texts.append(first + "".join(self.image_token * next(counts) + part for part in rest))
        ids = self.tokenizer(texts, return_tensors="pt", **options)
        kinds = (ids["input_ids"] == self.tokenizer.convert_tokens_to_ids(self.image_token)).long()
        return {**ids, "mm_token_type_ids": kinds, **read}

    def apply_chat_template(self, conversation, **options):
        return self.tokenizer.apply_chat_template(conversation, chat_template=self.chat_template, **options)


def build(name: str) -> PreTrainedModel:
    """A model whose random weights are large enough for every token, position and pixel to matter."""
    special = dict(zip(_QWEN if name == "qwen2_vl" else _SPECIAL, range(321, 325)))
    if name == "llava":
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**_EYES | {"num_hidden_layers": 2}),
            text_config=transformers.LlamaConfig(**_TEXT),
            image_token_id=special["<image>"],
            vision_feature_layer=-1,
        )
    elif name == "idefics3":
        config = transformers.Idefics3Config(
            vision_config=_EYES, text_config=transformers.LlamaConfig(**_TEXT), image_token_id=321, scale_factor=1
        )
    elif name == "paligemma":
        config = transformers.PaliGemmaConfig(
            vision_config={
                **_EYES,
                "model_type": "siglip_vision_model",
                "projection_dim": 16,
                "vision_use_head": False,
            },
            text_config={**_TEXT, "model_type": "gemma", "head_dim": 8},
            image_token_id=321,
            projection_dim=16,
            hidden_size=16,
        )
    else:
        config = transformers.Qwen2VLConfig(
            text_config={
                **_TEXT,
                "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2]},
            },
            vision_config={
                "depth": 1,
                "embed_dim": 16,
                "num_heads": 2,
                "hidden_size": 16,
                "patch_size": 4,
                "mlp_ratio": 2,
            },
            image_token_id=special["<|image_pad|>"],
            video_token_id=special["<|video_pad|>"],
            vision_start_token_id=special["<|vision_start|>"],
            vision_end_token_id=special["<|vision_end|>"],
        )
    torch.manual_seed(0)
    module = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def picture(seed: int = 0, size: tuple[int, int] = (20, 24)):
    """An image of PIL's, of noise."""
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def build_crossing() -> PreTrainedModel:
    """A Llama 3.2 that sees: some of its layers take from the images what a mask lets each token see."""
    eyes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 32,
        "vision_output_dim": 32,
        "image_size": 16,
        "patch_size": 4,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [1],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    text = {**_TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    config = transformers.MllamaConfig(vision_config=eyes, text_config=text, image_token_index=321)
    torch.manual_seed(0)
    module = transformers.MllamaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def crossing_processor():
    """The processor of that."""
    tokenizer = tiny.make_tokenizer(pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>", "<|python_tag|>"]})
    reads = _image_processor("MllamaImageProcessor", size={"height": 16, "width": 16}, max_image_tiles=2)
    return transformers.MllamaProcessor(image_processor=reads, tokenizer=tokenizer)
