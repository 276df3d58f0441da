"""A tiny model has the architecture of the large one, and is the same one each time."""

import re

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nnsight.anatomy.tiny import tiny_config, tiny_ids, tiny_model
from nnsight.anatomy.tiny.meaning import Meaning, meaning

# One of each way to be different: where norms stand, how positions are known, what mixes tokens, what is inside what.
FAMILIES = (
    "llama gpt2 gptj gpt_neox bloom mpt opt phi falcon gemma2 gemma3 gpt_oss mixtral qwen2_moe deepseek_v3 mamba "
    "mamba2 jamba bamba zamba2 falcon_h1 rwkv recurrent_gemma xlnet bert bart musicgen xmod blt"
).split()
NO_DEFAULT_IN_5_2 = {
    "musicgen": "its config has no default arguments",
    "zamba2": "its default config makes no rotary embedding, which its forward calls",
}
MIXED_LAYERS = ["gemma2", "jamba", "deepseek_v3", "qwen3_next", "lfm2", "recurrent_gemma"]


@pytest.fixture(autouse=True)
def quiet():
    """The defaults of some configs deserve a remark of transformers', which isn't about us."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def parts(model):
    """Every module's path and class, the experts of a list as one."""
    return {(re.sub(r"experts\.\d+", "experts.*", path), type(module)) for path, module in model.named_modules()}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_tiny_model_of_each_family_runs_on_its_ids(kind):
    if transformers.__version__.startswith("5.2.") and kind in NO_DEFAULT_IN_5_2:
        pytest.skip(NO_DEFAULT_IN_5_2[kind])
    model = tiny_model(CONFIG_MAPPING[kind]())
    ids, inputs = tiny_ids(model)
    with torch.no_grad():
        logits = model(ids, **inputs).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.01
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


@pytest.mark.parametrize("kind", MIXED_LAYERS)
def test_layer_by_layer_the_tiny_model_has_the_parts_of_the_large_one(kind):
    config = CONFIG_MAPPING[kind]()
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(config)
    assert parts(tiny_model(config)) == parts(large)


def test_a_seed_makes_one_model_and_another_seed_another():
    config = LlamaConfig(num_hidden_layers=2)
    assert same(tiny_model(config), tiny_model(config))
    assert not same(tiny_model(config), tiny_model(config, seed=1))


def test_global_state_and_the_config_stay_as_they_were():
    config = CONFIG_MAPPING["gemma3"]()
    before, state, dtype = config.to_json_string(), torch.get_rng_state(), torch.get_default_dtype()
    tiny_ids(tiny_model(config))
    assert config.to_json_string() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype


def test_norms_keep_what_goes_through_them_and_no_parameter_is_alike():
    model = tiny_model(LlamaConfig(num_hidden_layers=20))
    matrices = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])
    vectors = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() == 1])
    assert float(matrices.mean()) == pytest.approx(0, abs=0.01)
    assert float(vectors.mean()) == pytest.approx(1, abs=0.02)
    assert float(matrices.std()) == pytest.approx(0.2, abs=0.01)
    assert float(vectors.std()) == pytest.approx(0.2, abs=0.02)


def test_floats_flags_and_kinds_of_layers_are_kept():
    large = CONFIG_MAPPING["gemma2"](final_logit_softcapping=20.0, query_pre_attn_scalar=144, num_hidden_layers=42)
    small = tiny_config(large)
    kept = "final_logit_softcapping attn_logit_softcapping query_pre_attn_scalar layer_types num_hidden_layers".split()
    assert [getattr(small, name) for name in kept] == [getattr(large, name) for name in kept]


def test_a_checkpoint_of_70_billion_keeps_its_layers_and_its_groups_of_heads():
    large = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, bos_token_id=128000, eos_token_id=[128001, 128008, 128009], dtype="bfloat16",
    )  # fmt: skip
    small = tiny_config(large)
    assert small.num_hidden_layers == 80
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (4, 2, 8)
    assert small.hidden_size == small.num_attention_heads * small.head_dim
    assert small.bos_token_id < min(small.eos_token_id)
    assert max(small.eos_token_id) < small.vocab_size < 200
    assert small.dtype == torch.float32


@pytest.mark.parametrize(("width", "is_product"), [(4096, True), (3072, False)])
def test_a_width_is_heads_times_a_dim_only_where_it_was(width, is_product):
    large = CONFIG_MAPPING["gemma"](hidden_size=width, num_attention_heads=16, num_key_value_heads=16, head_dim=256)
    small = tiny_config(large)
    assert (small.hidden_size == small.num_attention_heads * small.head_dim) is is_product


def test_widths_of_experts_are_rows_of_16_bytes():
    small = tiny_config(CONFIG_MAPPING["qwen2_moe"](hidden_size=2048, moe_intermediate_size=1408))
    assert small.moe_intermediate_size % 4 == 0


def test_ratios_of_heads_up_to_three_are_kept():
    small = tiny_config(LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3))
    assert (small.num_attention_heads, small.num_key_value_heads) == (6, 2)


def test_sums_of_dims_stay_sums():
    small = tiny_config(CONFIG_MAPPING["deepseek_v3"]())
    assert small.qk_head_dim == small.qk_nope_head_dim + small.qk_rope_head_dim
    assert small.num_experts_per_tok <= small.topk_group * small.n_routed_experts // small.n_group


def test_an_expansion_stays_the_product_that_it_was():
    small = tiny_config(CONFIG_MAPPING["bamba"]())
    assert small.mamba_n_heads * small.mamba_d_head == small.mamba_expand * small.hidden_size


def test_rotary_lists_follow_the_head():
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48}
    longrope["long_factor"] = [1.0 + pair for pair in range(48)]
    phi = tiny_config(CONFIG_MAPPING["phi3"](hidden_size=3072, num_attention_heads=32, rope_parameters=longrope))
    assert phi.rope_parameters["long_factor"] == [1.0, 13.0, 25.0, 37.0]
    sections = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}
    assert sum(tiny_config(LlamaConfig(rope_parameters=sections)).rope_parameters["mrope_section"]) == 4


def test_ids_at_the_end_of_a_vocabulary_stay_there():
    small = tiny_config(CONFIG_MAPPING["gpt2"]())
    assert small.eos_token_id == small.vocab_size - 1


def test_fewer_layers_are_the_first_ones():
    large = CONFIG_MAPPING["gemma3n_text"]()
    small = tiny_config(large, n_layers=6)
    assert small.num_hidden_layers == 6
    assert small.layer_types == large.layer_types[:6]
    assert len(small.intermediate_size) == 6
    assert small.num_kv_shared_layers == 0
    assert len(tiny_model(large, n_layers=6).model.layers) == 6


def test_layers_that_differ_by_config_differ_in_the_tiny_one():
    pytest.importorskip("transformers.integrations.heterogeneity")
    large = CONFIG_MAPPING["gemma4_text"]()
    small = tiny_config(large)
    layers = range(large.num_hidden_layers)
    assert len({small.per_layer_config[index].head_dim for index in layers}) == 2
    ratios = {large.per_layer_config[index].head_dim / small.per_layer_config[index].head_dim for index in layers}
    assert len(ratios) == 1


def test_ids_are_never_special():
    model = tiny_model(CONFIG_MAPPING["gemma3"]())
    ids = torch.cat([tiny_ids(model, seed=seed)[0] for seed in range(20)])
    text = model.config.get_text_config()
    special = {model.config.image_token_index, text.pad_token_id, text.bos_token_id, text.eos_token_id}
    assert not special & set(ids.flatten().tolist())
    assert int(ids.max()) < text.vocab_size
    assert ids.shape == (40, 7)


class Roomy(LlamaForCausalLM):
    """A model that needs more room in a head than it is given at first."""

    def forward(self, *args, **kwargs):
        if self.config.head_dim < 16:
            raise RuntimeError("heads of 16 at least")
        return super().forward(*args, **kwargs)


class Refusing(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        raise RuntimeError(f"not with heads of {self.config.head_dim}")


def test_larger_heads_are_tried_where_small_ones_fail():
    assert tiny_model(LlamaConfig(num_hidden_layers=2), Roomy).config.head_dim == 16


def test_a_model_that_never_runs_says_what_it_said_first():
    with pytest.raises(RuntimeError, match="not with heads of 8"):
        tiny_model(LlamaConfig(num_hidden_layers=2), Refusing)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("num_attention_heads_per_layer", 48, Meaning.HEADS),
        ("mamba_d_head", 64, Meaning.DIM),
        ("n_group", 8, Meaning.EXPERT_GROUPS),
        ("n_groups", 8, Meaning.HEADS),
        ("vocab_size_per_layer_input", 262144, Meaning.TOKEN),
        ("max_window_layers", 28, Meaning.LAYERS),
        ("sliding_window", 4096, Meaning.LENGTH),
        ("sliding_window_pattern", 16, Meaning.KEPT),
        ("rope_parameters.original_max_position_embeddings", 4096, Meaning.LENGTH),
        ("compress_rates.heavily_compressed_attention", 128, Meaning.KEPT),
        ("never_heard_of", 4096, Meaning.WIDTH),
        ("never_heard_of", 3, Meaning.KEPT),
    ],
)
def test_words_say_what_a_number_counts(name, value, what):
    assert meaning(name, value) is what
