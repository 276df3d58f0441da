"""Numbers of a model are those of its arrays, and where layers differ, each layer has its own."""

import pytest
import torch
import transformers
from architectures import FAMILIES, IDS, model_of, quietly, trace

from comparing import same
from nnsight import LanguageModel, verify
from nnsight.errors import NotOnThisLayerError, WriteError

newest = pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="a newer transformers has it")
KINDS = ["sliding_attention", "full_attention"] * 3


@pytest.fixture(scope="module")
def gemma4():
    """Six layers, of which the last two attend with the keys and values of the two before; every second is wider."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16}
    layers = {"num_hidden_layers": 6, "layer_types": KINDS, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
    config = transformers.Gemma4TextConfig(**sizes, **heads, **layers)
    module = transformers.Gemma4ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return LanguageModel(module)


@pytest.mark.parametrize("name", [*(name for name in FAMILIES if name != "mamba"), "deepseek_v3"])
def test_each_layers_heads_are_those_of_its_arrays(name):
    model = model_of(name) if name in FAMILIES else quietly(name)
    for i in (layer.index for layer in model.layers.having("attn.n_heads")):
        with trace(model), torch.no_grad():
            q = model.layers[i].attn.q
        with trace(model), torch.no_grad():
            k = model.layers[i].attn.k
        attn = model.layers[i].attn
        assert (attn.n_heads, attn.d_head) == tuple(q.shape[2:])
        assert attn.n_kv_heads == k.shape[2]
        assert (model.n_heads, model.n_kv_heads, model.d_head) == (attn.n_heads, attn.n_kv_heads, attn.d_head)
    assert model.layers[1].has("attn.d_head")


def test_a_layer_without_attention_has_no_heads():
    model = model_of("mamba")
    assert not model.layers[0].has("attn.n_heads")
    with pytest.raises(NotOnThisLayerError, match=r"no `attn\.n_heads` on this layer"):
        model.layers[0].attn.n_heads
    with pytest.raises(NotOnThisLayerError, match="no attention heads"):
        model.n_heads


def test_numbers_are_not_assigned():
    with pytest.raises(WriteError, match=r"`attn\.n_heads` is a number"):
        model_of("llama").layers[0].attn.n_heads = 3


@newest
def test_where_layers_differ_the_error_says_which_has_what(gemma4):
    assert [layer.attn.d_head for layer in gemma4.layers] == [8, 16] * 3
    with pytest.raises(NotOnThisLayerError) as told:
        gemma4.d_head
    assert "8 in layers 0, 2, 4; 16 in layers 1, 3, 5" in str(told.value)
    assert "model.layers[i].attn.d_head" in str(told.value)
    assert (gemma4.n_heads, gemma4.n_kv_heads, gemma4.d_model, gemma4.n_vocab) == (4, 2, 32, 64)


@newest
@pytest.mark.slow
def test_layers_that_share_keys_and_values_are_verified(gemma4):
    report = verify(gemma4)
    assert report, report
    assert not gemma4.layers[4].has("attn.W_K")
    assert gemma4.layers[4].has("attn.W_Q")
    with torch.no_grad():
        with gemma4.trace(IDS):
            shared = gemma4.layers[2].attn.k.clone()
        with gemma4.trace(IDS):
            same(gemma4.layers[4].attn.k, shared)


@newest
def test_shared_keys_that_are_changed_in_place_are_changed_for_all_and_assigned_ones_for_one_layer(gemma4):
    with torch.no_grad(), gemma4.trace(IDS):
        gemma4.layers[2].attn.k = gemma4.layers[2].attn.k + 1
        untouched = gemma4.layers[4].attn.k
    with torch.no_grad(), gemma4.trace(IDS):
        keys = gemma4.layers[2].attn.k
        before = keys.clone()
        keys += 1
        same(gemma4.layers[4].attn.k, before + 1)
    same(untouched, before)


def test_heads_of_an_exchanged_matrix_are_counted_anew():
    sizes = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4))
    model = LanguageModel(module)
    assert (model.n_heads, model.d_head) == (4, 8)
    attention = module.model.layers[0].self_attn
    attention.q_proj = torch.nn.Linear(32, 16, bias=False)
    with pytest.raises(NotOnThisLayerError, match="that of layer 0 can't be told any more"):
        model.n_heads
    attention.q_proj = torch.nn.Linear(32, 32, bias=False)
    assert model.n_heads == 4
