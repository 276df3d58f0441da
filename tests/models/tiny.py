"""Tiny models of several architectures with random weights, and a tokenizer trained on three lines."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

PROMPT = "The Eiffel Tower is in the city of"
TEXT = [f"{PROMPT} Paris", "The Colosseum is in the city of Rome", "Madison Square Garden is in the city of New York"]
END = "<|end|>"
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

_TOKENS = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0}
_TINY = {**_TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(**_TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "llama": lambda: transformers.LlamaConfig(**_TINY, intermediate_size=32),
    "opt": lambda: transformers.OPTConfig(**_TINY, ffn_dim=32, word_embed_proj_dim=16, pad_token_id=1),
    "bloom": lambda: transformers.BloomConfig(**_TOKENS, hidden_size=16, n_layer=2, n_head=2, pad_token_id=1),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_TINY, intermediate_size=32),
    "mamba": lambda: transformers.MambaConfig(**_TOKENS, hidden_size=16, num_hidden_layers=2, state_size=4),
    "mixtral": lambda: transformers.MixtralConfig(**_TINY, intermediate_size=32, num_key_value_heads=2),
    "rwkv": lambda: transformers.RwkvConfig(**_TOKENS, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16),
    "bart": lambda: transformers.BartConfig(
        **_TOKENS,
        d_model=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
    ),
    "roberta": lambda: transformers.RobertaConfig(**_TINY, intermediate_size=32, pad_token_id=1, is_decoder=True),
}


def build(name: str) -> PreTrainedModel:
    """A model whose random weights are large enough for every token and position to matter."""
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def make_tokenizer(**options: object) -> PreTrainedTokenizerFast:
    """Byte-level BPE like GPT-2's: no pad token, and nothing is put in front."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, **options)


_HALVES = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
_HALVES |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
_SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
_BERT = {**_TINY, "intermediate_size": 32, "pad_token_id": 1}
OTHERS = {
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **_SPECIAL)
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            **_HALVES, **_SPECIAL, vocab_size=320, max_position_embeddings=32, forced_eos_token_id=None
        )
    ),
    "classifier": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**_BERT, num_labels=3)),
    "masked": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**_BERT)),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**_BERT)),
    "two heads": lambda: transformers.GPT2DoubleHeadsModel(CONFIGS["gpt2"]()),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    ),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **_HALVES, **_SPECIAL, vocab_size=320, num_mel_bins=8, max_source_positions=10, max_target_positions=16
        )
    ),
}


def build_other(name: str) -> PreTrainedModel:
    """A model of another kind, as `build` makes the causal ones."""
    torch.manual_seed(0)
    module = OTHERS[name]().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module
