"""Models that say no tokens have the uniform names too: classifiers, models without a head, those that see or hear."""

from functools import cache

import pytest
import torch
import transformers
from architectures import close, equal, first, with_first
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
    ViTConfig,
)

import nnsight
from nnsight import LanguageModel, TransformersModel
from nnsight.anatomy.tiny import tiny_ids
from nnsight.errors import AnatomyError, NotOnThisLayerError

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": 64, **SIZES}
CASES = {  # class, config, its layer 1, and the matrix that is given z
    "LlamaModel": (LlamaConfig(**TOKENS), "layers.1", "self_attn.o_proj"),
    "LlamaForSequenceClassification": (LlamaConfig(**TOKENS, pad_token_id=0), "model.layers.1", "self_attn.o_proj"),
    "LlamaForTokenClassification": (LlamaConfig(**TOKENS), "model.layers.1", "self_attn.o_proj"),
    "LlamaForQuestionAnswering": (LlamaConfig(**TOKENS), "transformer.layers.1", "self_attn.o_proj"),
    "GPT2Model": (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4), "h.1", "attn.c_proj"),
    "BertForSequenceClassification": (BertConfig(**TOKENS), "bert.encoder.layer.1", "attention.output.dense"),
    "T5Model": (
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0),
        "decoder.block.1",
        "layer.0.SelfAttention.o",
    ),
    "ViTForImageClassification": (ViTConfig(**SIZES, image_size=8, patch_size=4), None, None),
}
every = pytest.mark.parametrize("name", CASES)
of_text = pytest.mark.parametrize("name", [name for name in CASES if name != "ViTForImageClassification"])


@cache
def model_of(name):
    torch.manual_seed(0)
    module = getattr(transformers, name)(CASES[name][0]).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return TransformersModel(module)


def given(model):
    ids, others = tiny_ids(model._module)
    return {model._module.main_input_name: ids, **others}


def hooked(model, path, change, kind="output"):
    """What the model returns first, where a plain hook changes what a module is given, or returns."""
    module = model._module.get_submodule(path)

    def after(_, __, output):
        new = change(first(output))
        return None if new is None else with_first(output, new)

    def before(_, args):
        return (change(args[0]), *args[1:])

    hook = module.register_forward_hook(after) if kind == "output" else module.register_forward_pre_hook(before)
    with hook, torch.no_grad():
        return model._module(**given(model))[0]


@of_text
def test_the_stream_behind_a_layer_is_what_its_module_returns_and_what_is_written_reaches_the_answer(name):
    model, (_, path, _) = model_of(name), CASES[name]
    kept = []
    hooked(model, path, lambda value: kept.append(value.clone()))
    wanted = hooked(model, path, lambda value: value.flip(-1) * 2)
    with torch.no_grad(), model.trace(**given(model)) as tracer:
        stream = model.uniform.layers[1].output
        equal(stream, kept[0])
        model.uniform.layers[1].output = stream.flip(-1) * 2
        equal(tracer.result[0], wanted)


@of_text
def test_a_head_that_is_left_out_is_as_one_that_a_hook_leaves_out(name):
    model, (_, path, projection) = model_of(name), CASES[name]
    width = model.uniform.d_head

    def without(value):
        value = value.clone()
        value[..., width : 2 * width] = 0
        return value

    wanted = hooked(model, f"{path}.{projection}", without, "input")
    with torch.no_grad(), model.trace(**given(model)) as tracer:
        model.uniform.layers[1].attn.z[:, :, 1] = 0
        close(tracer.result[0], wanted)


@every
@pytest.mark.slow
def test_its_names_are_proven_by_numbers(name):
    report = nnsight.verify(model_of(name))
    assert report, report
    assert "hand" not in [check.name for check in report.checks if check.passed is None]
    assert sum(check.passed is True for check in report.checks) >= 12


def test_an_image_has_patches_for_tokens():
    model = model_of("ViTForImageClassification")
    images = given(model)["pixel_values"]
    with model.trace(pixel_values=images) as (one, _), torch.no_grad():
        assert one.layers[1].attn.pattern.shape == (1, 4, 5, 5)
        one.layers[1].mlp.output[:, 0] += 1
        logits = one.result.logits
    module = model._module
    mlp = model.layers[1].mlp.parts[0].path  # by another name in older transformers

    def more(_, __, output):
        return torch.cat([output[:1] + torch.eye(5)[0][None, :, None], output[1:]])

    with module.get_submodule(mlp).register_forward_hook(more), torch.no_grad():
        close(logits, module(pixel_values=images).logits[:1])


@pytest.mark.slow
def test_an_encoder_of_images_and_a_decoder_of_text_have_the_names_of_both_halves():
    images = ViTConfig(**SIZES, image_size=8, patch_size=4)
    layers = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    text = transformers.TrOCRConfig(vocab_size=64, d_model=32, cross_attention_hidden_size=32, **layers)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(images, text)
    torch.manual_seed(0)
    model = TransformersModel(transformers.VisionEncoderDecoderModel(config=config).eval())
    with model.trace(**given(model)), torch.no_grad():
        assert model.uniform.encoder.layers[1].attn.pattern.shape == (2, 4, 5, 5)
        assert model.layers[1].cross_attn.pattern.shape[-1] == 5
    report = nnsight.verify(model)
    assert report, report
    assert any(check.name.startswith("Encoder: ") and check.passed for check in report.checks)


def test_logits_are_those_of_the_classes_and_without_any_an_error_says_what_there_is():
    classifier, bare = model_of("LlamaForSequenceClassification"), model_of("LlamaModel")
    with classifier.trace(**given(classifier)), torch.no_grad():
        with pytest.raises(NotOnThisLayerError, match="makes no logits of each token"):
            classifier.project(classifier.layers[-1].output)
        assert classifier.logits.shape == (2, 2)
    with pytest.raises(NotOnThisLayerError, match=r"(?s)LlamaModel returns no logits.*model\.layers\[-1\]\.output"):
        bare.logits
    assert "logits" not in [site.name for site in bare.sites()]
    assert classifier.site("logits").axes == ("prompt", "class")
    labels = model_of("LlamaForTokenClassification")
    with labels.trace(**given(labels)), torch.no_grad():
        last = labels.layers[-1].output
        close(labels.project(last), labels.logits)


def test_the_models_own_names_win_here_too():
    bare = model_of("LlamaModel")
    assert bare.layers[1] is bare.get("layers.1")
    assert bare.uniform.layers[1].raw is bare.layers[1]
    assert bare.uniform.norm is bare.norm
    assert (bare.n_layers, bare.n_heads, bare.d_model, bare.n_vocab) == (2, 4, 32, 64)


def test_a_classifier_without_a_padding_token_has_them_for_single_prompts():
    module = transformers.LlamaForSequenceClassification(LlamaConfig(**TOKENS)).eval()
    model = TransformersModel(module)
    with model.trace(torch.tensor([[3, 4, 5]])), torch.no_grad():
        assert model.layers[1].attn.q.shape == (1, 3, 4, 8)
        assert model.layers[0].attn.W_Q.shape == (4, 32, 8)
    assert module.config.pad_token_id is None


def test_layers_of_one_kind_are_the_same_under_a_head_that_says_tokens():
    torch.manual_seed(0)
    module = transformers.LlamaForCausalLM(LlamaConfig(**TOKENS)).eval()
    one, other = TransformersModel(module), LanguageModel(module)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        with one.trace(ids):
            found = one.layers[1].mlp.act, one.project(one.layers[-1].output), one.logits
        with other.trace(ids):
            wanted = other.layers[1].mlp.act, other.project(other.layers[-1].output), other.logits
    for a, b in zip(found, wanted, strict=True):
        equal(a, b)


def test_a_model_of_two_towers_says_what_to_wrap():
    text = {**TOKENS, "max_position_embeddings": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 8, "patch_size": 4})
    clip = transformers.CLIPModel(config).eval()
    with pytest.raises(AnatomyError, match=r"(?s)CLIPModel has no single embedding.*wrapped by itself"):
        TransformersModel(clip).uniform
    tower = TransformersModel(transformers.CLIPTextModel(config.text_config).eval())
    with tower.trace(input_ids=torch.tensor([[3, 4, 5]])), torch.no_grad():
        assert tower.uniform.layers[1].attn.pattern.shape == (1, 4, 3, 3)


def test_a_model_without_layers_that_hand_on_a_stream_says_so():
    sizes = {"hidden_sizes": [8, 16, 32, 64], "num_channels": 3, "depths": [1, 1, 1, 1], "embedding_size": 8}
    model = TransformersModel(transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).eval())
    with pytest.raises(AnatomyError):
        model.uniform
