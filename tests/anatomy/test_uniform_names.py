"""Whose a name is: ours, the module's own or the user's; names by one string, completed, and as they are shown."""

import gc
import pickle
import weakref

import pytest
import torch
import transformers
from architectures import ATTENDING, IDS, SMALL, every, first, given, model_of, trace
from torch import nn

import nnsight
from comparing import same
from nnsight import LanguageModel
from nnsight.anatomy.halves import HALVES
from nnsight.anatomy.uniform import NAMES
from nnsight.errors import (
    BlockError,
    NotOnThisLayerError,
    UnknownIndexError,
    UnknownNameError,
    WriteError,
)

# Whose name it is.


class Bare(nn.Module):
    """Has children of two of our names, as a bare LlamaModel has."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.layers, self.norm = inner.model.layers, inner.model.norm

    def forward(self, input_ids, **options):
        return self.inner(input_ids, **options)


def test_a_child_of_the_modules_own_wins_and_uniform_is_ours():
    module = model_of("llama")._module.model
    model = LanguageModel(module)
    assert model.layers is model.get("layers")
    assert model.norm is model.get("norm")
    assert model.layers[0]._module is module.layers[0]


def test_an_alias_of_the_users_wins():
    model = LanguageModel(model_of("gpt2")._module, rename={"transformer.h": "layers", "transformer.wpe": "embed"})
    assert model.layers._module is model._module.transformer.h
    assert model.embed._module is model._module.transformer.wpe
    assert model.norm is model.transformer.ln_f
    with trace(model) as tracer, torch.no_grad():
        assert model.layers[1].output is not None
        assert tracer.layers._module is model._module.transformer.h
        stream = tracer.uniform.layers[2].output
        assert model.uniform.layers[2].output is stream


def test_below_a_layer_ours_win_and_others_are_the_modules():
    model = model_of("gpt2")
    layer = model.layers[1]
    assert layer.ln_1 is model.transformer.h[1].ln_1
    assert layer.raw.attn is model.transformer.h[1].attn
    assert layer.attn is not layer.raw.attn
    with trace(model), torch.no_grad():
        stream = layer.input
        assert layer.ln_1.output.shape == stream.shape


def test_names_lead_to_a_module_that_was_put_in_place_of_another():
    model = LanguageModel(transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL)).eval())
    before = model.layers[1].raw
    model._module.transformer.h[1] = transformers.GPT2LMHeadModel(model.config).transformer.h[1].eval()
    assert model.layers[1].raw._module is model._module.transformer.h[1] is not before._module
    with model.trace([[1, 2, 3]]), torch.no_grad():
        assert model.layers[1].output is first(model.transformer.h[1].output)


def test_names_from_before_the_weights_came_hold_afterwards():
    model = LanguageModel("nnsight/demo")
    layer, embed = model.layers[1], model.embed
    assert layer.raw._module is model._module.transformer.h[1]
    model.dispatch()
    with model.trace("The Eiffel Tower"), torch.no_grad():
        assert embed.output.device.type == "cpu"
        assert layer.output.device.type == "cpu"
    assert layer.raw._module is model._module.transformer.h[1]
    assert not model.W_E.is_meta


def test_a_model_is_freed_without_the_collector_and_pickled():
    module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL)).eval()
    model = LanguageModel(module)
    with model.trace([[1, 2, 3]]), torch.no_grad():
        model.layers[1].attn.z
        model.layers[1].attn.output
    copied = pickle.loads(pickle.dumps(model))
    assert copied.layers[1].raw._module is copied._module.transformer.h[1]
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


# By one string.


@every
def test_every_site_is_read_and_listed_in_the_order_of_a_pass(name):
    model = model_of(name)
    places = model.sites()
    sizes = {"prompt": 2, "token": 7, "query": 7, "key": 7, "model": model.d_model, "vocabulary": model.n_vocab}
    if name in ATTENDING:
        sizes |= {"head": model.n_heads, "kv_head": model.n_kv_heads, "d_head": model.d_head}
    sizes |= {"d_mlp": model.d_mlp, "expert": 4, "k": 2}  # Mixtral's, made small
    for place in places:
        with trace(model), torch.no_grad():
            assert tuple(place.value.shape) == tuple(sizes[axis] for axis in place.axes), place
    assert places[0].name == "embed.output"
    assert places[-1].name == "logits"
    assert len(repr(places).splitlines()) == len(places)


@pytest.mark.parametrize(
    ("lens", "ours"),
    [
        ("blocks.1.hook_resid_pre", "layers.1.input"),
        ("blocks.1.hook_resid_post", "layers.1.output"),
        ("blocks.1.hook_attn_out", "layers.1.attn.output"),
        ("blocks.1.hook_mlp_out", "layers.1.mlp.output"),
        ("blocks.2.attn.hook_z", "layers.2.attn.z"),
        ("blocks.2.attn.hook_q", "layers.2.attn.q"),
        ("blocks.2.attn.hook_pattern", "layers.2.attn.pattern"),
        ("blocks.2.attn.hook_attn_scores", "layers.2.attn.scores"),
        ("ln_final", "norm.output"),
        ("unembed", "logits"),
        ("layers[2].attn.v", "layers.2.attn.v"),
        ("logits", "logits"),
    ],
)
def test_a_site_has_our_name_and_transformer_lens_s(lens, ours):
    model = model_of("gpt2")
    assert model.site(lens).name == model.site(ours).name == ours


def test_a_sites_value_is_read_and_assigned():
    model = model_of("gpt2")
    with trace(model) as tracer, torch.no_grad():
        assert tracer.site("blocks.0.hook_resid_post").value is model.layers[0].output
        model.site("blocks.1.attn.hook_z").value = torch.zeros(2, 7, model.n_heads, model.d_head)
        found = model.logits
    with trace(model), torch.no_grad():
        model.layers[1].attn.z[:] = 0
        same(model.logits, found)


def test_a_site_that_is_not_there_has_the_nearest():
    with pytest.raises(UnknownNameError, match=r"no site `blocks\.1\.attn\.hook_x`[\s\S]*nearest"):
        model_of("gpt2").site("blocks.1.attn.hook_x")
    with pytest.raises(UnknownNameError, match=r"no site `layers\.1\.attn\.z`"):
        model_of("mamba").site("layers.1.attn.z")


# As it is shown.


def test_completion_knows_the_names():
    model = model_of("gpt2")
    assert set(dir(model)) >= NAMES - HALVES
    assert not HALVES & set(dir(model))
    assert {"transformer", "lm_head", "trace", "uniform"} <= set(dir(model))
    assert {"input", "output", "attn", "mlp", "raw", "ln_1"} <= set(dir(model.layers[0]))
    assert {"q", "k", "v", "z", "scores", "pattern", "output"} <= set(dir(model.layers[0].attn))


def test_a_model_is_shown_by_where_its_names_lead():
    assert repr(model_of("gemma2").uniform) == (
        "embed   `model.embed_tokens`\n"
        "layers  3, the first is `model.layers.0`\n"
        "        Gemma2DecoderLayer: input + post_attention_layernorm.output + post_feedforward_layernorm.output\n"
        "logits  `model.norm` -> `lm_head` -> cap 30"
    )
    model = model_of("granite")
    assert repr(model.layers[1]) == (
        "layer 1, `model.layers.1`: input + 0.22 * self_attn.output[0] + 0.22 * mlp.output"
    )
    assert repr(model.layers[1].mlp) == "layer 1.mlp: 0.22 * model.layers.1.mlp.output"
    assert len(repr(model.layers).splitlines()) == 3


def test_layers_that_were_cut_off_are_none():
    whole, model = LanguageModel(tiny()), LanguageModel(tiny())
    module = model._module
    module.model.layers = module.model.layers[:2]
    assert [len(model.layers), model.n_layers, len(whole.layers)] == [2, 2, 3]
    assert [layer.attn.W_Q.shape for layer in model.layers] == [(4, 32, 8)] * 2
    assert whole.layers[2].attn.W_Q.shape == (4, 32, 8)
    assert "layers.1.output" in map(str, (one.name for one in model.sites()))
    assert "layers  2" in repr(model.uniform)
    with torch.no_grad(), model.trace(IDS):
        outputs, logits = [layer.output for layer in model.layers], model.logits
    with torch.no_grad():
        assert torch.equal(logits, module(IDS).logits)
    assert len(outputs) == 2
    with pytest.raises(UnknownIndexError, match="no layer 2"):
        model.layers[2]
    cut = whole.layers[2]
    whole._module.model.layers = whole._module.model.layers[:2]
    with pytest.raises(UnknownNameError, match="has no `2`"), whole.trace(IDS):
        cut.output


def test_a_layer_whose_mlp_or_attention_was_replaced_says_so():
    class Nothing(torch.nn.Module):
        def forward(self, hidden_states, **_):
            return hidden_states * 0, None

    model = LanguageModel(tiny())
    model._module.model.layers[1].mlp = torch.nn.Identity()
    model._module.model.layers[2].self_attn = Nothing()
    with torch.no_grad(), model.trace(IDS):
        assert torch.equal(model.layers[1].mlp.input, model.layers[1].mlp.output)
        assert not model.layers[2].attn.output.any()
    assert [layer.index for layer in model.layers.having("mlp.act")] == [0, 2]
    assert [layer.index for layer in model.layers.having("attn.W_Q")] == [0, 1]
    assert model.layers[1].attn.W_O.shape == (4, 8, 32)
    with pytest.raises(NotOnThisLayerError, match="another module stands in its place"), model.trace(IDS):
        model.layers[1].mlp.act[:] = 0
    for ask in (lambda: model.layers[1].mlp.W_in, lambda: model.layers[2].attn.W_Q):
        with pytest.raises(NotOnThisLayerError, match="without `model"):
            ask()


def test_what_a_layer_adds_is_no_value_itself():
    model = LanguageModel(tiny())
    with pytest.raises(WriteError, match=r"instead +model.layers\[1\].attn.output = "), model.trace(IDS):
        model.layers[1].attn = torch.zeros(1, 5, 32)


def tiny():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=2)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("name", ATTENDING)
@pytest.mark.parametrize("what", ["q", "k", "v", "z"])
def test_what_is_inside_attention_is_changed_in_place_where_there_is_a_graph(name, what):
    model = model_of(name)
    ids, others = given(model)
    place = f"layers.{model.layers.having('attn.q')[-1].index}.attn.{what}"
    with model.trace(ids, **others):
        new = model.site(place).value.clone()
        new[-1, :, 0] *= 2
        model.site(place).value = new
        expected, of_new = model.logits, nnsight.grad(model.logits[-1].sum(), new)
    with model.trace(ids, **others):
        value = model.site(place).value
        value[-1, :, 0] *= 2
        assert torch.equal(model.site(place).value, new)
        assert torch.equal(model.logits, expected)
    if name in ("gpt2", "gpt_neox"):  # whose own are views of one fused tensor
        assert of_new.any()


# Names that are asked for on a module, and modules that are called under uniform names.


def tiny_llama(kind):
    sizes = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return kind(transformers.LlamaConfig(**sizes, num_attention_heads=4))


@pytest.mark.parametrize(
    ("wrap", "instead"),
    [
        (LanguageModel, "instead     model.uniform.layers[1].attn"),
        (nnsight.NNsight, "instead     model = TransformersModel(module), and model.uniform.layers[1].attn"),
    ],
)
def test_a_uniform_name_on_a_bare_models_own_layer_is_told_where_it_is(wrap, instead):
    model = wrap(tiny_llama(transformers.LlamaModel))
    with pytest.raises(UnknownNameError) as caught:
        model.layers[1].attn
    assert instead in str(caught.value)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("transformer", "model.layers[0], which all models have; `model.model.layers[0]` here"),
        ("gpt_neox", "model.layers[0], which all models have; `model.model.layers[0]` here"),
        ("model.h", "model.layers[0], which all models have; `model.model.layers[0]` here"),
        ("model.blocks", "model.layers[0], which all models have; `model.model.layers[0]` here"),
        ("lm_head.h", None),
        ("model.norm.h", None),
    ],
)
def test_the_way_to_the_layers_of_another_architecture_is_told_with_the_one_of_all(name, instead):
    model = LanguageModel(tiny_llama(transformers.LlamaForCausalLM))
    with pytest.raises(UnknownNameError) as caught:
        model.get(name)
    assert (f"instead     {instead}" in str(caught.value)) if instead else ("instead" not in str(caught.value))
    with pytest.raises(UnknownNameError, match=r"instead +model.d_model, or what it is called in model.config"):
        model.hidden_size
    bare = LanguageModel(tiny_llama(transformers.LlamaModel))
    with pytest.raises(
        UnknownNameError, match=r"instead +model.uniform.layers\[0\], which all.*; `model.layers\[0\]` h"
    ):
        bare.gpt_neox


def test_an_mlp_is_called_as_its_module_is():
    model = LanguageModel(tiny_llama(transformers.LlamaForCausalLM))
    hidden = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same(model.layers[1].mlp(hidden), model.model.layers[1].mlp._module(hidden))
        with model.trace(IDS):
            again = model.layers[1].mlp(model.layers[1].mlp.input)
            same(again, model.layers[1].mlp.output)


def test_what_no_single_module_makes_cant_be_called():
    model = model_of("gemma2")
    with pytest.raises(NotOnThisLayerError, match="can't be called: no single module makes it"):
        model.layers[0].mlp(torch.zeros(1, 3, 32))


FORGOTTEN = {
    "m.layers[1] + 1": r"`layers\[1\]` is no value itself: nothing can be.*instead +model.layers\[1\].output$",
    "torch.norm(m.layers[1])": r"`norm` can't compute with it.*instead +model.layers\[1\].output$",
    "m.layers[1][:] = 0": r"`layers\[1\]` is no value itself: it has no items.*instead +model.layers\[1\].output$",
    "-m.layers[1].attn": r"`layers\[1\].attn` is no value.*instead +model.layers\[1\].attn.output$",
    "m.layers[1].output = m.layers[0]": r"`layers\[0\]` is no value.*instead +model.layers\[0\].output$",
    "m.layers[1].mlp.output = m.layers[0].mlp": r"`layers\[0\].mlp` is no.*instead +model.layers\[0\].mlp.output$",
    "m.layers[1].raw.output = m.layers[0]": r"`layers\[0\]` is no value.*instead +model.layers\[0\].output$",
    "m.lm_head(m.layers[1])": r"`layers\[1\]` is no value.*instead +model.layers\[1\].output$",
    "m.project(m.layers[1])": r"`layers\[1\]` is no value.*instead +model.layers\[1\].output$",
    "m.project(m.transformer.h[1])": r"`transformer.h.1` is a module.*instead +model.transformer.h\[1\].output$",
    "-m.layers[1].attn.output[0] < m.layers[1].mlp": r"`layers\[1\].mlp` is no.*instead +model.layers\[1\].mlp.output$",
    "abs(m.site('layers.1.attn.z'))": r"is a place, not a value.*instead +model.site\('layers.1.attn.z'\).value$",
    "m.layers[1].output = m.site('layers.0.output')": r"is a place.*instead +model.site\('layers.0.output'\).value$",
    "del m.layers[1].output": r"`layers\[1\].output` is a value of .*instead +model.layers\[1\].output\[:\] = 0$",
    "del m.layers[1].attn.z": r"`layers\[1\].attn.z` is a value of .*instead +model.layers\[1\].attn.z\[:\] = 0$",
    "del m.layers[1].attn": r"`layers\[1\].attn` is a part of the model's, which can't be deleted\.",
    "del m.site('layers.1.output').value": r"is a value of the model's, which can't be deleted",
    "del m.layers[1]": r"taken out of its place.*instead +model.layers\[1\].output = model.layers\[1\].input,",
    "del m.logits": r"`model.logits` is a part of the model's",
    "m.layers['1'].output": r"by its number.*instead +model.layers\[1\]$",
    "m.layers['attn'].output": r"by its number.*instead +model.layers\[3\]$",
    "m.layers[4 / 4].output": r"by its number.*instead +model.layers\[1\]$",
    "m.layers[1].attn[3]": r"is no value itself.*instead +model.layers\[1\].attn.z\[:, :, 3\] for what",
    "m.layers[0, 1].output": r"by its number.*instead +\[model.layers\[i\] for i in \(0, 1\)\]$",
}


@pytest.mark.parametrize("line", FORGOTTEN)
def test_a_layer_that_is_taken_for_its_value_is_told_apart(line):
    with pytest.raises(BlockError, match="(?s)" + FORGOTTEN[line]) as raised:
        exec(f"with m.trace(ids):\n    {line}", {"m": model_of("gpt2"), "ids": IDS, "torch": torch})
    assert "modeling" not in str(raised.value)


def test_a_layer_equals_itself_in_lists_and_dicts_however_often_it_is_asked_for():
    model = model_of("gpt2")
    chosen = [model.layers[1], model.layers[2].attn]
    assert [layer in chosen for layer in model.layers] == [False, True, False]
    assert model.layers[2].attn in chosen
    assert model.layers[2].mlp not in chosen
    assert {model.layers[-1]: "last"}[model.layers[2]] == "last"
    assert model.layers[1] in model.layers
    with model.trace(IDS) as tracer:
        assert tracer.layers[1] == tracer.layers[1] != model.layers[1]
