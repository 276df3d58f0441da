"""Tiny attention models of many architectures, and plain code that says what is inside their attention."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_TOKENS = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
_TINY = {**_TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
_WIDE = {**_TINY, "intermediate_size": 32}
_GROUPED = {**_WIDE, "num_key_value_heads": 2, "head_dim": 8}
_OWN = {**_TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(**_OWN),
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_WIDE),
    "gemma2": lambda: transformers.Gemma2Config(
        **_GROUPED, sliding_window=4, query_pre_attn_scalar=8, attn_logit_softcapping=0.5
    ),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=4),
    "mixtral": lambda: transformers.MixtralConfig(**_GROUPED, num_local_experts=2),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_GROUPED, num_local_experts=2, num_experts_per_tok=1, sliding_window=4
    ),
    "phi": lambda: transformers.PhiConfig(**_WIDE),
    "opt": lambda: transformers.OPTConfig(**_TINY, ffn_dim=32, word_embed_proj_dim=16),
    "bert": lambda: transformers.BertConfig(**_WIDE),
    "falcon": lambda: transformers.FalconConfig(**_TOKENS, hidden_size=16, num_hidden_layers=2, num_attention_heads=4),
    "bloom": lambda: transformers.BloomConfig(**_TOKENS, hidden_size=16, n_layer=2, n_head=2),
    "gptj": lambda: transformers.GPTJConfig(**_OWN, rotary_dim=4),
    "xglm": lambda: transformers.XGLMConfig(
        **_TOKENS, d_model=16, ffn_dim=32, num_layers=2, attention_heads=2, max_position_embeddings=64
    ),
    "mamba": lambda: transformers.MambaConfig(**_TOKENS, hidden_size=16, num_hidden_layers=2, state_size=4),
}
PATHS = {
    "gpt2": "transformer.h.{}.attn",
    "gpt_neox": "gpt_neox.layers.{}.attention",
    "opt": "model.decoder.layers.{}.self_attn",
    "bert": "bert.encoder.layer.{}.attention.self",
    "falcon": "transformer.h.{}.self_attention",
    "bloom": "transformer.h.{}.self_attention",
    "gptj": "transformer.h.{}.attn",
    "mamba": "backbone.layers.{}.mixer",
}
INTERFACED = ["gpt2", "llama", "qwen3", "gpt_neox", "gemma2", "mistral", "mixtral", "gpt_oss", "phi", "opt", "bert"]
WITH_SDPA = [name for name in INTERFACED if name not in ("gemma2", "gpt_oss")]


def path(name: str, layer: int) -> str:
    return PATHS.get(name, "model.layers.{}.self_attn").format(layer)


def build(name: str, implementation: str | None = None) -> nn.Module:
    """A model whose random weights are large enough for every token and position to matter."""
    torch.manual_seed(0)
    auto = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    options = {} if implementation is None else {"attn_implementation": implementation}
    module = auto.from_config(CONFIGS[name](), **options).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


class Spy:
    """A hand-written attention function that notes what one module's attention is given and returns, or changes it."""

    def __init__(self, module: nn.Module, implementation: str, change=None) -> None:
        self.module, self.implementation, self.change = module, implementation, change
        self.seen: dict[str, torch.Tensor] = {}

    def __enter__(self) -> Spy:
        self.before = ALL_ATTENTION_FUNCTIONS[self.implementation]
        ALL_ATTENTION_FUNCTIONS[self.implementation] = self
        return self

    def __exit__(self, *_: object) -> None:
        del ALL_ATTENTION_FUNCTIONS[self.implementation]

    def __call__(self, module, query, key, value, *args, **kwargs):
        if module is not self.module:
            return self.before(module, query, key, value, *args, **kwargs)
        arrays = {"q": query.transpose(1, 2), "k": key.transpose(1, 2), "v": value.transpose(1, 2)}
        if self.change is not None:
            arrays = {name: self.change(name, array) for name, array in arrays.items()}
        z, *rest = self.before(module, *(array.transpose(1, 2) for array in arrays.values()), *args, **kwargs)
        z = z if self.change is None else self.change("z", z)
        self.seen = {**arrays, "z": z}
        return (z, *rest)
