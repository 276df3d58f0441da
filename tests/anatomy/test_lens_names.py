"""Who comes with TransformerLens's names is told ours."""

import pytest

import nnsight
from nnsight import LanguageModel, errors


@pytest.fixture(scope="module")
def model():
    return LanguageModel("nnsight/demo")


def told(get):
    with pytest.raises(errors.UnknownNameError) as raised:
        get()
    return "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    {
        "resid_pre": "layers[3].input",
        "hook_resid_post": "layers[3].output",
        "attn_out": "layers[3].attn.output",
        "hook_resid_mid": "model.layers[3].input + model.layers[3].attn.output",
        "attn.hook_z": "layers[3].attn.z",
        "attn.attn_scores": "layers[3].attn.scores",
        "mlp.hook_post": "layers[3].mlp.act",
    }.items(),
)
def test_a_name_of_theirs_on_a_layer_is_answered_with_ours(model, theirs, ours):
    part, _, name = theirs.rpartition(".")
    layer = model.layers[3]
    assert ours in told(lambda: getattr(getattr(layer, part) if part else layer, name))
    owner, _, last = ours.rpartition(".")
    assert hasattr(type(layer.attn if "attn" in owner else layer.mlp if "mlp" in owner else layer), last)


def test_what_they_have_no_like_of_is_a_misspelt_name(model):
    assert "raw, for the module's own names" in told(lambda: model.layers[3].attn.hook_rotary)
    assert "\nHere it is" not in told(lambda: model.layers[3].hook_scale)


def test_a_middle_of_a_layer_is_no_site_and_is_a_sum(model):
    with model.trace("Rome is in"):
        layer = model.layers[3]
        middle = layer.input + layer.attn.output
        assert (middle == layer.raw.ln_2.input).all()
    said = told(lambda: model.site("blocks.3.hook_resid_mid"))
    assert "model.layers[3].input + model.layers[3].attn.output" in said
    assert "print(model.sites())" in told(lambda: model.site("blocks.3.hook_mid"))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    {
        "W_Q": "model.layers[0].attn.W_Q",
        "W_out": "model.layers[0].mlp.W_out",
        "cfg": "model.n_layers",
        "ln_final": "model.norm",
        "tokens": "tracer.rows[0].tokens",
        "to_single_token": "model.tokenizer",
        "hook_dict": "model.sites()",
        "reset_hooks": "model.clear_edits()",
    }.items(),
)
def test_a_name_of_theirs_on_a_model_is_answered_with_ours(model, theirs, ours):
    assert ours in told(lambda: getattr(model, theirs))


@pytest.mark.parametrize("name", ["layers.*.attn.z", "blocks.3.hook_resid_post", "blocks.*.attn.hook_pattern"])
def test_a_cache_of_values_that_no_module_returns_is_a_list(model, name):
    with model.trace("Rome") as tracer:
        assert "[layer.output for layer in model.layers]" in told(lambda: tracer.cache(name))
        with pytest.raises(TypeError, match=r"kept by a list: \[layer.output for layer in model.layers\]"):
            tracer.cache(model.layers[0].attn)
        layer = tracer.cache(model.layers[1])
    assert len(layer[model.layers[1]]) == 1


def test_a_misspelt_uniform_name_is_answered_with_the_uniform_ones(model):
    for written, meant in {"n_head": "n_heads", "layer": "layers", "logit": "logits", "d_modl": "d_model"}.items():
        assert f"`{meant}`" in told(lambda: getattr(model, written))  # noqa: B023


def test_a_path_through_uniform_layers_is_answered_with_a_site(model):
    assert 'model.layers[2]    or model.site("layers.2.output").value' in told(lambda: model.get("layers.2.output"))


def test_what_the_attention_module_itself_has_is_there(model):
    assert "layers[3].attn.module.source" in told(lambda: model.layers[3].attn.source)
    assert "layers[3].attn.module.c_attn" in told(lambda: model.layers[3].attn.c_attn)
    assert model.layers[3].attn.module.c_attn is model.transformer.h[3].attn.c_attn
    assert "layers[3].raw" in told(lambda: model.layers[3].attn.nothing_of_the_kind)


def test_gradients_of_what_a_layer_adds_are_of_values_and_not_at_a_module(model):
    with model.trace("Rome is in"):
        added = [layer.attn.output for layer in model.layers]
        loss = model.logits.sum()
        with pytest.raises(errors.BlockError, match=r"nnsight\.grad\(metric, values\)"):
            nnsight.grad(loss, at=model.layers[2].attn)
        assert nnsight.grad(loss, added[2]).shape == added[2].shape
