"""Encoder-decoders under uniform names: each half's layers, what crosses over, rows, generation, and the proof."""

from functools import cache, partial

import architectures
import pytest
import torch
import transformers
from architectures import passing
from transformers import CONFIG_MAPPING

import nnsight
from comparing import near, same
from nnsight import LanguageModel
from nnsight.analysis import logit_lens
from nnsight.anatomy.tiny import tiny_ids, tiny_model
from nnsight.errors import InputError, NotOnThisLayerError, UnknownNameError, WriteError

# The raw names of a family: encoder, decoder, attention, cross-attention, what the MLP adds, and the norms behind both.
RAW = {
    "t5": (
        "encoder.block",
        "decoder.block",
        "layer.0.SelfAttention",
        "layer.1.EncDecAttention",
        "layer.2.DenseReluDense",
    ),
    "bart": ("model.encoder.layers", "model.decoder.layers", "self_attn", "encoder_attn", "fc2"),
    "whisper": ("model.encoder.layers", "model.decoder.layers", "self_attn", "encoder_attn", "fc2"),
}
OPTIONS = {"do_sample": False, "decoder_start_token_id": 3, "forced_eos_token_id": None}
MORE = ["mbart", "marian", "pegasus", "m2m_100", "switch_transformers", "t5gemma"]


@cache
def model_of(name):
    auto = transformers.AutoModelForSpeechSeq2Seq if name == "whisper" else transformers.AutoModelForSeq2SeqLM
    config = CONFIG_MAPPING[name](**({"tie_word_embeddings": True} if name == "t5" else {}))
    module = tiny_model(config, auto, n_layers=2)
    if name == "t5gemma":
        module.set_attn_implementation("eager")  # the sdpa of older transformers leaves out its soft cap
    return LanguageModel(module)


def trace(name):
    return architectures.trace(model_of(name))


def hooked(name, path, change=None):
    return passing(model_of(name), path, change)


def sites(name):
    """Where uniform names lead, below a scope of the model, and the raw module that returns the same."""
    encoder, decoder, attn, cross, mlp = RAW[name]
    return [
        (lambda m: m.uniform.encoder.layers[1], f"{encoder}.1"),
        (lambda m: m.layers[0], f"{decoder}.0"),
        (lambda m: m.uniform.decoder.layers[1], f"{decoder}.1"),
        (lambda m: m.layers[1].attn, f"{decoder}.1.{attn}"),
        (lambda m: m.layers[1].cross_attn, f"{decoder}.1.{cross}"),
        (lambda m: m.layers[0].mlp, f"{decoder}.0.{mlp}"),
        (lambda m: m.uniform.encoder.layers[0].attn, f"{encoder}.0.{attn}"),
    ]


@pytest.mark.parametrize("name", RAW)
def test_what_is_read_is_what_a_plain_hook_sees(name):
    for node, path in sites(name):
        with trace(name):
            got = node(model_of(name)).output
            logits = model_of(name).logits
        (seen,), plain = hooked(name, path)
        same(got, seen)
        same(logits, plain)


@pytest.mark.parametrize("name", RAW)
def test_a_write_and_its_gradient_are_a_plain_hook_s(name):
    def changed(value):
        return (value * 1.5).detach().requires_grad_()

    for node, path in sites(name):
        seen, plain = hooked(name, path, changed)
        (expected,) = torch.autograd.grad(plain[:, -1].sum(), seen[1])
        with trace(name):
            new = changed(node(model_of(name)).output)
            node(model_of(name)).output = new
            logits = model_of(name).logits
        same(logits, plain)
        same(torch.autograd.grad(logits[:, -1].sum(), new)[0], expected)


DOWN = {"t5": "encoder.block.1.layer.1.DenseReluDense.wo", "bart": "model.encoder.layers.1.fc2"}


@pytest.mark.parametrize("name", DOWN)
def test_the_neurons_of_an_encoder_s_layer_are_its_own(name):
    module, seen = model_of(name)._module, []
    ids, others = tiny_ids(module)
    handle = module.get_submodule(DOWN[name]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module(input_ids=ids, **others)
    handle.remove()
    with trace(name) as tracer:
        same(tracer.uniform.encoder.layers[1].mlp.act, seen[0])
    weight = module.get_submodule(DOWN[name]).weight
    assert model_of(name).uniform.encoder.layers[1].mlp.W_out.data_ptr() == weight.data_ptr()
    assert "encoder.layers.1.mlp.act" in [site.name for site in model_of(name).sites()]


@pytest.mark.parametrize("name", RAW)
def test_cross_attention_s_pattern_is_over_the_encoder_s_tokens(name):
    model = model_of(name)
    with trace(name) as tracer:
        states = tracer.uniform.encoder.output
        own = tracer.layers[1].attn.pattern
        q, k = tracer.layers[1].cross_attn.q, tracer.layers[1].cross_attn.k
        pattern = tracer.layers[1].cross_attn.pattern
    n_read, n_said = states.shape[1], own.shape[-1]
    assert pattern.shape == (2, model.n_heads, n_said, n_read)
    assert own.triu(1).abs().max() == 0
    scale = model.d_head**-0.5 if name == "bart" else 1  # Whisper's queries are scaled already
    near(pattern, torch.einsum("pqhd,pkhd->phqk", q * scale, k).softmax(-1))


@pytest.mark.parametrize("name", RAW)
def test_what_the_decoder_reads_can_be_replaced(name):
    with trace(name) as tracer:
        plain = tracer.logits
    with trace(name) as tracer:
        tracer.uniform.encoder.output = tracer.uniform.encoder.output.flip(0)
        flipped = tracer.logits
    module = model_of(name)._module
    ids, others = tiny_ids(module)
    with torch.no_grad():
        expected = module(**{module.main_input_name: ids.flip(0)}, **others).logits
    near(flipped, expected)
    assert not torch.allclose(plain, flipped)


def test_the_module_s_own_child_wins_and_uniform_is_always_ours():
    model = model_of("t5")
    assert model.encoder._module is model._module.encoder
    assert model.uniform.encoder.n_layers == 2
    assert model.uniform.decoder.embed._module is model._module.decoder.embed_tokens
    bart = model_of("bart")
    assert repr(bart.encoder).startswith("encoder: 2 layers, the first is `model.encoder.layers.0`")
    assert len(bart.decoder.layers) == len(bart.layers) == bart.n_layers
    assert {"encoder", "decoder"} <= set(dir(bart))
    with pytest.raises(NotOnThisLayerError, match="The encoder has no `norm`"):
        bart.encoder.norm
    assert model_of("whisper").encoder.norm._module is model_of("whisper")._module.model.encoder.layer_norm
    with pytest.raises(NotOnThisLayerError, match="The encoder has no `embed`"):
        model_of("whisper").encoder.embed


def test_a_model_without_halves_says_so():
    model = LanguageModel("nnsight/demo")
    with pytest.raises(UnknownNameError, match="has no `encoder`"):
        model.encoder
    for half in ("encoder", "decoder"):
        with pytest.raises(NotOnThisLayerError, match="no encoder beside its layers"):
            getattr(model.uniform, half)
    with pytest.raises(NotOnThisLayerError, match="no `cross_attn`: nothing in it reads what an encoder read"):
        model.layers[0].cross_attn.output
    with pytest.raises(NotOnThisLayerError, match=r"no `cross_attn\.pattern`: no attention"):
        model.layers[0].cross_attn.pattern
    assert len(model_of("t5").layers.having("cross_attn.pattern")) == 2
    assert len(model_of("t5").uniform.encoder.layers.having("cross_attn")) == 0


def test_a_name_of_a_half_that_is_no_value_can_not_be_assigned():
    with trace("bart"), pytest.raises(WriteError, match=r"`encoder\.layers` is not a value"):
        model_of("bart").encoder.layers = 1


@pytest.mark.parametrize("name", [*RAW, *[pytest.param(one, marks=pytest.mark.slow) for one in MORE]])
def test_the_names_are_proven_by_numbers(name):
    report = nnsight.verify(model_of(name))
    assert report, str(report)
    names = {check.name: check for check in report.checks}
    for check in (
        "Only cross-attention reads the encoder",
        "Encoder: pattern times v is z",
        "Cross-attention's pattern times v is z",
    ):
        assert names[check].passed
    assert (names["A padded batch is its prompts alone"].passed is None) == (name == "whisper")


GIVEN = {  # the modules that the parts of a decoder's layer are computed in
    "t5": {"attn": "layer.0.SelfAttention", "cross_attn": "layer.1.EncDecAttention", "mlp": "layer.2.DenseReluDense"},
    "bart": {"attn": "self_attn", "cross_attn": "encoder_attn", "mlp": "fc1"},
    "whisper": {"attn": "self_attn", "cross_attn": "encoder_attn", "mlp": "fc1"},
}


@pytest.mark.parametrize("part", ["attn", "cross_attn", "mlp"])
@pytest.mark.parametrize("name", RAW)
def test_a_change_of_what_a_part_is_given_is_that_parts_alone_in_place_too(name, part):
    model = model_of(name)
    below = GIVEN[name]
    encoder, decoder, *_ = RAW[name]
    places = [(f"{decoder}.1.{below[part]}", lambda m: getattr(m.layers[1], part))]
    if part != "cross_attn":
        last = below[part].replace("layer.2", "layer.1")  # an encoder's layer has no part between
        places.append((f"{encoder}.1.{last}", lambda m: getattr(m.uniform.encoder.layers[1], part)))
    for path, node in places:

        def doubled(_, args, kwargs):
            if args:
                return (args[0] * 2, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 2}

        with model._module.get_submodule(path).register_forward_pre_hook(doubled, with_kwargs=True):
            ids, others = tiny_ids(model._module)
            wanted = model._module(ids, **others).logits
        with trace(name):
            node(model).input = node(model).input * 2
            near(model.logits, wanted)
        with trace(name), torch.no_grad():
            node(model).input.mul_(2)
            near(model.logits, wanted)


@pytest.mark.parametrize(("name", "part"), [("t5", "attn"), ("bart", "mlp")])
def test_a_part_that_does_not_read_the_encoder_is_told_where_it_is_said_to(name, part):
    from dataclasses import replace

    model = LanguageModel(model_of(name)._module)
    layout = model.uniform._layout
    wrong = [replace(layer, cross_attn=getattr(layer, part), **{part: layer.cross_attn}) for layer in layout.layers]
    model._known = model._known._replace(layout=replace(layout, layers=tuple(wrong)), layers=tuple(wrong))
    failed = {check.name for check in nnsight.verify(model).checks if check.passed is False}
    assert "Only cross-attention reads the encoder" in failed


def test_a_bias_of_the_logits_is_a_step_to_them():
    module = tiny_model(CONFIG_MAPPING["marian"](), transformers.AutoModelForSeq2SeqLM, n_layers=2)
    module.final_logits_bias.normal_()
    model = LanguageModel(module)
    ids, others = tiny_ids(module)
    with model.trace(ids, **others):
        projected, logits = model.project(model.layers[-1].output), model.logits
    near(projected, logits)
    assert "final_logits_bias" in repr(model.uniform)


def test_the_scale_in_front_of_a_tied_unembedding_is_of_the_model_s_own_width():
    config = transformers.T5Config(
        vocab_size=64, d_model=48, d_kv=8, d_ff=32, num_layers=1, num_heads=2, tie_word_embeddings=True
    )
    model = LanguageModel(transformers.T5ForConditionalGeneration(config).eval())
    with model.trace([[5, 6]], decoder_input_ids=[[0, 3]]):
        projected, logits = model.project(model.layers[-1].output), model.logits
    near(projected, logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_each_row_has_what_its_prompt_has_alone_in_both_halves(name):
    model = model_of(name)
    prompts, begun = [[5, 6, 7, 8, 9], [10, 11]], [[3, 4, 5], [3, 6, 7]]

    def inside(scope):
        return [
            scope.uniform.encoder.layers[0].attn.pattern,
            scope.uniform.encoder.output,
            scope.layers[0].cross_attn.k,
            scope.layers[0].cross_attn.pattern,
            scope.layers[1].output,
            scope.logits,
        ]

    alone = []
    for prompt, own in zip(prompts, begun, strict=True):
        with model.trace([prompt], decoder_input_ids=[own]) as tracer:
            alone.append(inside(tracer))
    with model.trace(prompts, decoder_input_ids=begun) as rows:
        of_rows = list(
            zip(*[[step(row) for row in rows] for step in [partial(_nth, i) for i in range(6)]], strict=True)
        )
    with model.trace() as tracer:
        with tracer.invoke([prompts[0]], decoder_input_ids=[begun[0]]):
            one = inside(model)
        with tracer.invoke([prompts[1]], decoder_input_ids=[begun[1]]):
            other = inside(model)
    for got in (of_rows, [one, other]):
        for mine, expected in zip(got, alone, strict=True):
            for value, wanted in zip(mine, expected, strict=True):
                near(value, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_decoders_rows_of_unequal_length_have_their_own_tokens(name):
    model = model_of(name)
    prompts, begun = [[5, 6, 7, 8, 9], [10, 11]], [[3, 4], [3, 6, 7, 8]]

    def inside(scope):
        return [scope.layers[0].attn.pattern, scope.layers[0].cross_attn.pattern, scope.layers[1].output, scope.logits]

    alone = []
    for prompt, own in zip(prompts, begun, strict=True):
        with model.trace([prompt], decoder_input_ids=[own]) as tracer:
            alone.append(inside(tracer))
    with model.trace(prompts, decoder_input_ids=begun) as (a, b):
        steps = [
            (a.layers[0].attn.pattern, b.layers[0].attn.pattern),
            (a.layers[0].cross_attn.pattern, b.layers[0].cross_attn.pattern),
            (a.layers[1].output, b.layers[1].output),
            (a.logits, b.logits),
        ]
    with model.trace() as tracer:
        with tracer.invoke([prompts[0]], decoder_input_ids=[begun[0]]):
            one = inside(model)
        with tracer.invoke([prompts[1]], decoder_input_ids=[begun[1]]):
            other = inside(model)
    for got in (list(zip(*steps, strict=True)), [one, other]):
        for mine, expected in zip(got, alone, strict=True):
            for value, wanted in zip(mine, expected, strict=True):
                near(value, wanted)
    if name == "bart":  # the other has no token to start with
        with model.trace(prompts, labels=[[4, 2], [6, 7, 8, 2]]) as (a, b):
            assert [a.layers[1].output.shape[1], b.layers[1].output.shape[1]] == [2, 4]


def test_a_write_into_a_shorter_row_of_a_decoder_leaves_the_longer_one():
    model = model_of("bart")
    prompts, begun = [[5, 6, 7], [10, 11]], [[3, 4], [3, 6, 7, 8]]
    with model.trace(prompts, decoder_input_ids=begun) as tracer:
        plain = tracer.model.logits
    with model.trace(prompts, decoder_input_ids=begun) as (a, _):
        a.layers[0].output = a.layers[0].output * 0
        whole = a.tracer.model.logits
    same(whole[1], plain[1])
    assert not torch.allclose(whole[0, :2], plain[0, :2])
    for write in (
        lambda a, b: setattr(a.layers[0], "output", b.layers[0].output),
        lambda a, b: setattr(a.layers[0].attn, "z", b.layers[0].attn.z),
    ):
        with model.trace(prompts, decoder_input_ids=begun) as (a, b):
            with pytest.raises(WriteError, match=r"(?s)shape.*instead +the positions that correspond"):
                write(a, b)


def test_what_a_decoder_begins_with_has_a_row_for_each_prompt_and_no_padding_to_go_on_from():
    model = model_of("t5")
    with pytest.raises(InputError, match=r"(?s)`decoder_input_ids` has one row a prompt.*prompts +2"):
        model.trace([[5, 6], [7, 8]], decoder_input_ids=[[3, 4]])
    with pytest.raises(InputError, match="would go on from the padding"):
        model.generate([[5, 6], [7, 8]], decoder_input_ids=[[3, 4], [3]])
    with pytest.raises(InputError, match=r"are ids, its start token first"):
        model.trace([[5, 6]], decoder_input_ids="Rome")


def test_a_half_s_misspelt_name_has_the_nearest():
    with pytest.raises(UnknownNameError, match=r"(?s)`encoder` has no `layer`.*nearest +`layers`"):
        model_of("bart").encoder.layer
    with pytest.raises(AttributeError):
        model_of("bart").decoder.logits


def _nth(i, scope):
    return [
        lambda: scope.uniform.encoder.layers[0].attn.pattern,
        lambda: scope.uniform.encoder.output,
        lambda: scope.layers[0].cross_attn.k,
        lambda: scope.layers[0].cross_attn.pattern,
        lambda: scope.layers[1].output,
        lambda: scope.logits,
    ][i]()


@pytest.mark.parametrize("name", RAW)
def test_in_a_generation_the_encoder_runs_once_and_the_decoder_has_the_steps(name):
    model = model_of(name)
    ids, _ = tiny_ids(model._module)
    options = {**OPTIONS, "max_new_tokens": 3, "min_new_tokens": 3}
    patterns, said = [], []
    with model.generate(ids, **options) as tracer:
        states = tracer.uniform.encoder.output
        for _ in tracer.iter[:]:
            patterns.append(tracer.layers[0].cross_attn.pattern)
            said.append(tracer.logits[:, -1].argmax(-1))
        result = tracer.result
    assert states.shape[0] == 2
    assert [pattern.shape for pattern in patterns] == [(2, model.n_heads, 1, states.shape[1])] * 3
    assert result[:, -2:].tolist() == torch.stack(said, dim=1)[:, -2:].tolist()
    with torch.no_grad():
        same(result, model._module.generate(ids, **options))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_rows_of_a_generation_have_their_own_encoder_tokens_in_each_step(name):
    model = model_of(name)
    prompts, options = [[5, 6, 7, 8, 9], [10, 11]], {**OPTIONS, "max_new_tokens": 3, "min_new_tokens": 3}
    alone = []
    for prompt in prompts:
        with model.generate([prompt], **options) as tracer:
            alone.append([tracer.layers[1].cross_attn.pattern for _ in tracer.iter[:]])
    with model.generate(prompts, **options) as (a, b):
        steps = [[row.layers[1].cross_attn.pattern for row in (a, b)] for _ in a.tracer.iter[:]]
    for i in range(2):
        for step in range(3):
            near(steps[step][i], alone[i][step])


def test_an_edit_of_the_encoder_holds_in_a_generation():
    model = LanguageModel(model_of("bart")._module)
    with model.edit() as edited:
        model.encoder.layers[0].attn.output = model.encoder.layers[0].attn.output * 0
    with pytest.warns(UserWarning, match=r"edit that module: model\.model\.encoder\.edit"):
        edited.generate([[5, 6, 7]], **OPTIONS, max_new_tokens=2)
    with model.model.encoder.edit(inplace=True):
        model.encoder.layers[0].attn.output = model.encoder.layers[0].attn.output * 0
    with model.generate([[5, 6, 7]], **OPTIONS, max_new_tokens=2) as tracer:
        states = tracer.encoder.output
    model = model_of("bart")
    with model.trace([[5, 6, 7]], decoder_input_ids=[[3]]):
        model.encoder.layers[0].attn.output = model.encoder.layers[0].attn.output * 0
        same(states, model.encoder.output)
    with model.generate([[5, 6, 7]], **OPTIONS, max_new_tokens=2) as tracer:
        assert not torch.allclose(tracer.encoder.output, states)


def test_a_gradient_reaches_the_encoder():
    model = model_of("t5")
    with model.trace([[5, 6, 7]], decoder_input_ids=[[3, 4]]):
        states = model.uniform.encoder.output
        pattern = model.layers[0].cross_attn.pattern
        grads = nnsight.grad(model.logits[0, -1].max(), [states, pattern])
    assert [grad.shape for grad in grads] == [states.shape, pattern.shape]
    assert all(grad.abs().max() > 0 for grad in grads)


def test_an_edit_of_a_decoder_s_layer_holds_in_each_step():
    model = model_of("t5")
    ids, _ = tiny_ids(model._module)
    with model.edit() as edited:
        model.layers[1].cross_attn.output = model.layers[1].cross_attn.output * 0
    seen = []
    with edited.generate(ids, **OPTIONS, max_new_tokens=2, min_new_tokens=2) as tracer:
        seen = [tracer.layers[1].cross_attn.output.abs().max() for _ in tracer.iter[:]]
    assert seen == [0, 0]


def test_the_lens_is_over_the_decoder_s_layers_and_tokens():
    model = model_of("t5")
    with pytest.raises(InputError, match="decoder_input_ids"):
        logit_lens(model, [[5, 6]])
    lens = logit_lens(model, [[5, 6]], decoder_input_ids=[[3, 4, 5]], top_k=2)
    assert lens.values.shape == (2, 3, 2)
    assert lens.tokens == ("3", "4", "5")
    logits = model.trace([[5, 6]], decoder_input_ids=[[3, 4, 5]], trace=False).logits
    same(lens.ids[-1], logits[0].topk(2).indices)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("encoder.1.attn.hook_z", "encoder.layers.1.attn.z"),
        ("decoder.0.cross_attn.hook_pattern", "layers.0.cross_attn.pattern"),
        ("decoder.1.hook_cross_attn_out", "layers.1.cross_attn.output"),
        ("decoder.layers[1].mlp.output", "layers.1.mlp.output"),
        ("encoder.output", "encoder.output"),
        ("encoder.embed.output", "encoder.embed.output"),
    ],
)
def test_a_site_of_a_half_has_our_name_and_transformer_lens_s(name, ours):
    assert model_of("t5").site(name).name == ours


def test_every_site_has_a_value_of_its_axes():
    for site in model_of("t5").sites():
        with trace("t5"):
            assert site.value.ndim == len(site.axes), site


def test_the_way_to_the_layers_of_a_half_is_told():
    model = model_of("t5")
    with pytest.raises(
        UnknownNameError, match=r"model.uniform.encoder.layers\[0\], which all.*`model.encoder.block\[0\]` h"
    ):
        model.encoder.layers
    with pytest.raises(UnknownNameError, match=r"model.layers\[0\], which all.*`model.decoder.block\[0\]` h"):
        model.decoder.layers
