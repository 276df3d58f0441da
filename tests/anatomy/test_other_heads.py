"""Models that say no tokens have the uniform names too: classifiers, models without a head, those that see or hear."""

import re
from functools import cache

import pytest
import torch
import transformers
from architectures import close, first, with_first
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
    ViTConfig,
)

import nnsight
from comparing import same
from nnsight import LanguageModel, TransformersModel
from nnsight.anatomy.tiny import tiny_ids, tiny_model
from nnsight.errors import AnatomyError, InputError, NotOnThisLayerError

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
        same(stream, kept[0])
        model.uniform.layers[1].output = stream.flip(-1) * 2
        same(tracer.result[0], wanted)


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
        same(a, b)


def test_a_model_of_two_towers_says_what_to_wrap():
    text = {**TOKENS, "max_position_embeddings": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 8, "patch_size": 4})
    clip = transformers.CLIPModel(config).eval()
    with pytest.raises(AnatomyError, match="CLIPModel has no single embedding") as caught:
        TransformersModel(clip).uniform
    for part in re.findall(r"TransformersModel\(module\.(\w+)\)", str(caught.value)):  # fewer in older transformers
        assert TransformersModel(getattr(clip, part)).uniform.n_layers == 2
    tower = TransformersModel(transformers.CLIPTextModel(config.text_config).eval())
    with tower.trace(input_ids=torch.tensor([[3, 4, 5]])), torch.no_grad():
        assert tower.uniform.layers[1].attn.pattern.shape == (1, 4, 3, 3)


def answered(module, path, **inputs):
    """What a module of the model returned, by a plain hook, and the model's output."""
    found = []
    hook = module.get_submodule(path).register_forward_hook(lambda _, __, output: found.append(first(output)))
    with torch.no_grad():
        output = module(**inputs)
    hook.remove()
    return found[0], output


def seq2seq(kind):
    sizes = {"vocab_size": 64, "decoder_start_token_id": 0}
    if kind == "Bart":
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        return transformers.BartConfig(**sizes, **heads, **layers, d_model=32, pad_token_id=1, eos_token_id=2)
    return T5Config(**sizes, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layer"), [("Bart", "model.decoder.layers.1"), ("T5", "transformer.decoder.block.1")])
def test_a_decoder_that_classifies_at_the_end_of_text_reads_the_prompt_by_itself(kind, layer):
    torch.manual_seed(0)
    config = seq2seq(kind)
    module = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    model = TransformersModel(module)
    ids = torch.tensor([[5, 6, 7, 8, config.eos_token_id]])
    with torch.no_grad(), model.trace(input_ids=ids):
        stream, logits = model.uniform.layers[1].output, model.uniform.logits
    by_hand, output = answered(module, layer, input_ids=ids, attention_mask=torch.ones_like(ids))
    same(stream, by_hand)
    same(logits, output.logits)
    assert nnsight.verify(model), nnsight.verify(model)


def test_several_choices_for_a_prompt_are_rows_of_the_stream():
    torch.manual_seed(0)
    module = transformers.BertForMultipleChoice(BertConfig(**TOKENS)).eval()
    model = TransformersModel(module)
    ids = torch.randint(3, 60, (2, 3, 5))
    with model.trace(input_ids=ids), torch.no_grad():
        stream, logits = model.layers[1].output, model.logits
    with model.trace(input_ids=ids) as (_, second), torch.no_grad():
        own = second.layers[1].output
    by_hand, output = answered(module, "bert.encoder.layer.1", input_ids=ids)
    same(stream, by_hand)
    same(logits, output.logits)
    same(own, by_hand[3:])
    assert nnsight.verify(model)
    with pytest.raises(InputError, match="this has 3 dimensions"), TransformersModel(bert()).trace(input_ids=ids):
        pass


def bert():
    return transformers.BertForSequenceClassification(BertConfig(**TOKENS)).eval()


@pytest.mark.parametrize("kind", ["AST", "VideoMAE"])
def test_spectrograms_and_videos_have_patches_for_tokens(kind):
    torch.manual_seed(0)
    if kind == "AST":
        sizes = {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8}
    else:
        sizes = {"image_size": 8, "patch_size": 4, "num_frames": 2, "tubelet_size": 2}
    module = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**SIZES, **sizes)).eval()
    model = TransformersModel(module)
    assert nnsight.verify(model), nnsight.verify(model)
    assert model.uniform.n_layers == 2


def test_a_head_that_is_given_more_than_the_stream_is_gone_into():
    torch.manual_seed(0)
    model = TransformersModel(transformers.BertForPreTraining(BertConfig(**TOKENS)).eval())
    with model.trace(input_ids=torch.tensor([[3, 4, 5]])), torch.no_grad():
        last, logits = model.layers[-1].output, model.logits
    close(model.project(last), logits)


def test_a_bound_of_the_logits_behind_a_scale_is_found_by_the_configs_numbers():
    torch.manual_seed(0)
    module = Bounded(LlamaConfig(**TOKENS, bound=20.0)).eval()
    model = LanguageModel(module)
    with model.trace(torch.tensor([[3, 4, 5]])), torch.no_grad():
        last, logits = model.layers[-1].output, model.logits
    close(model.project(last), logits)
    assert "cap 20" in repr(model.uniform)


class Bounded(transformers.LlamaForCausalLM):
    """A Llama whose logits are scaled, and then bounded."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.config.bound * torch.tanh(output.logits * 0.2 / self.config.bound)
        return output


@pytest.mark.parametrize("at", [slice(None, -2), slice(2, None)], ids=["behind", "before"])
def test_tokens_that_the_model_puts_beside_its_own_have_no_logits(at):
    torch.manual_seed(0)
    module = Longer(LlamaConfig(**TOKENS, at=[at.start, at.stop])).eval()
    model = LanguageModel(module)
    with model.trace(torch.tensor([[3, 4, 5]])), torch.no_grad():
        last, logits = model.layers[-1].output, model.logits
    assert last.shape[1] == logits.shape[1] + 2
    close(model.project(last)[:, at], logits)


class Longer(transformers.LlamaForCausalLM):
    """A Llama that reads two tokens more than it is given, and says nothing of these."""

    def forward(self, input_ids, **_):
        more = input_ids[:, :2]
        start, stop = self.config.at
        ids = torch.cat([input_ids, more] if start is None else [more, input_ids], 1)
        hidden = self.model(ids, use_cache=False)[0]
        logits = self.lm_head(hidden[:, slice(start, stop)])
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def test_a_model_without_layers_that_hand_on_a_stream_says_so():
    sizes = {"hidden_sizes": [8, 16, 32, 64], "num_channels": 3, "depths": [1, 1, 1, 1], "embedding_size": 8}
    model = TransformersModel(transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).eval())
    with pytest.raises(AnatomyError):
        model.uniform


@pytest.mark.parametrize("name", ["Siglip2VisionModel", "Siglip2ForImageClassification", "SiglipVisionModel"])
def test_models_that_are_given_the_patches_of_images_have_the_names(name):
    kind = getattr(transformers, name)
    report = nnsight.verify(TransformersModel(tiny_model(kind.config_class(), kind, n_layers=2)))
    assert report, str(report)


def test_a_layer_that_attends_to_tokens_in_another_order_is_refused_with_their_shapes():
    config = transformers.TimesformerConfig(**SIZES, image_size=8, patch_size=4, num_frames=2)
    module = transformers.TimesformerForVideoClassification(config).eval()
    told = r"temporal_attention.*` returns \[8, 2, 32\] and .* returns \[4, 5, 32\], where the stream is \[2, 9, 32\]"
    with pytest.raises(AnatomyError, match=told):
        TransformersModel(module).uniform
    config.attention_type = "joint_space_time"
    model = TransformersModel(transformers.TimesformerForVideoClassification(config).eval())
    assert model.uniform.n_layers == 2
