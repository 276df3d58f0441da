"""Heads have their parts of the model's own weights, and what each adds is read and assigned."""

import copy

import pytest
import torch
import transformers
from architectures import ATTENDING, FAMILIES, WITHOUT_ROWS, close, fresh, given, hooked, model_of, trace
from torch import nn
from torch.nn.utils import prune
from transformers import CONFIG_MAPPING

import nnsight
from comparing import same
from nnsight import LanguageModel
from nnsight.anatomy.heads import known
from nnsight.anatomy.tiny import tiny_model
from nnsight.errors import AlreadyPastError, NotOnThisLayerError, OutsideTraceError, UnknownNameError, WriteError

attending = pytest.mark.parametrize("name", ATTENDING)
NAMES = ["W_Q", "W_K", "W_V", "W_O"]


def noise_like(value):
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(5))


def projection(name):
    return f"{FAMILIES[name].layers}.1.{FAMILIES[name].projection}"


# Weights.


def split(weight, *order):
    """The parts of a weight, [out, in], that stand one after the other: each [head, in, d_head]."""
    sizes = [heads * width for heads, width in order]
    return [
        part.unflatten(0, (heads, width)).mT for part, (heads, width) in zip(weight.split(sizes), order, strict=True)
    ]


def beside(weight, heads, count):
    """Those that stand beside one another in each head, [head, count, d_head]."""
    return [part.mT for part in weight.unflatten(0, (heads, count, -1)).unbind(1)]


def by_hand(name, attn, heads, kv_heads, width):
    """Q, K, V as each family's own code cuts them."""
    three = (heads, width), (kv_heads, width), (kv_heads, width)
    if name == "gpt2":
        return split(attn.c_attn.weight.T, *three)
    if name == "falcon":
        return split(attn.query_key_value.weight, *three)
    if name in ("bloom", "gpt_neox"):
        return beside(attn.query_key_value.weight, heads, 3)
    if name == "bert":
        attn = attn.self
        return [split(one.weight, size)[0] for one, size in zip((attn.query, attn.key, attn.value), three, strict=True)]
    each = zip((attn.q_proj, attn.k_proj, attn.v_proj), three, strict=True)
    return [split(one.weight, size)[0] for one, size in each]


@attending
def test_weights_of_heads_are_what_each_family_cuts_out_of_its_own(name):
    model = model_of(name)
    layer, heads, kv_heads, width = model.layers[1], model.n_heads, model.n_kv_heads, model.d_head
    attn = model._module.get_submodule(projection(name).rpartition(".")[0])
    attn = layer.raw._module.attention if name == "bert" else attn
    cut = by_hand(name, attn, heads, kv_heads, width)
    last = model._module.get_submodule(projection(name))
    cut.append((last.weight if name == "gpt2" else last.weight.T).unflatten(0, (heads, width)))
    for ours, theirs in zip(NAMES, cut, strict=True):
        value = getattr(layer.attn, ours)
        same(value, theirs)
        assert value.data_ptr() == theirs.data_ptr(), ours
        assert value.stride() == theirs.stride(), ours
    assert layer.attn.W_Q.shape == (heads, model.d_model, width)
    assert layer.attn.W_V.shape == (kv_heads, model.d_model, width)
    assert layer.attn.W_O.shape == (heads, width, model.d_model)


@attending
def test_writing_into_a_weight_writes_the_models_parameter(name):
    module = tiny_model(CONFIG_MAPPING[name](**FAMILIES[name].config), n_layers=3)
    model = LanguageModel(module)
    before = {path: one.detach().clone() for path, one in module.named_parameters()}
    ids, others = given(model)
    with torch.no_grad():
        untouched = module(ids, **others).logits
        for ours in NAMES:
            getattr(model.layers[1].attn, ours)[0] = 0
        assert not torch.equal(module(ids, **others).logits, untouched)
    changed = {path for path, one in module.named_parameters() if not torch.equal(one, before[path])}
    counts = {path: int((dict(module.named_parameters())[path] != before[path]).sum()) for path in changed}
    size = model.d_model * model.d_head
    assert sum(counts.values()) == 4 * size
    assert all(path.startswith(f"{FAMILIES[name].layers}.1.") for path in changed)


@attending
def test_biases_are_cut_as_the_weights_are(name):
    model = model_of(name)
    attn = model.layers[1].attn
    has_bias = name in ("gpt2", "bloom", "gpt_neox", "bert")
    for letter in "QKVO":
        bias = getattr(attn, f"b_{letter}")
        assert (bias is not None) is has_bias, letter
        if bias is None:
            continue
        assert bias.shape == (getattr(attn, f"W_{letter}").shape[::2] if letter != "O" else (model.d_model,))


@pytest.mark.parametrize("name", [name for name in ATTENDING if name != "falcon_h1"])  # it has another mixer beside
def test_values_are_what_their_weights_make_of_the_attentions_input(name):
    model = model_of(name)
    attn = model.layers[1].attn
    with trace(model), torch.no_grad():
        stream, v = attn.input, attn.v
        bias = 0 if attn.b_V is None else attn.b_V
        close(v, torch.einsum("ptm,hmd->pthd", stream, attn.W_V) + bias)


REAL = {
    "gpt2": (12, 12, 64),
    "falcon": (71, 1, 64),
    "bloom": (8, 8, 8),
    "gpt_neox": (64, 64, 96),
    "mixtral": (32, 8, 128),
    "gemma2": (8, 4, 256),
    "openai-gpt": (12, 12, 64),
    "phi3": (32, 32, 96),
}


@pytest.mark.parametrize("name", REAL)
def test_in_a_large_model_they_have_its_own_sizes_and_its_weights_need_not_be_there(name):
    config = CONFIG_MAPPING[name]()
    for field in ("num_hidden_layers", "n_layer"):
        if field in vars(config):
            setattr(config, field, 2)
    with torch.device("meta"):
        model = LanguageModel(transformers.AutoModelForCausalLM.from_config(config))
    heads, kv_heads, width = REAL[name]
    attn = model.layers[1].attn
    assert attn.W_Q.shape == (heads, model.d_model, width)
    assert attn.W_K.shape == attn.W_V.shape == (kv_heads, model.d_model, width)
    assert attn.W_O.shape == (heads, width, model.d_model)
    assert attn.W_O.is_meta


SIZES = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 12, "vocab_size": 64}
ORDERS = {
    "stacked": lambda: transformers.GPTBigCodeConfig(n_embd=96, n_head=12, n_layer=2, vocab_size=64),
    "in each head": lambda: transformers.GPTBigCodeConfig(
        n_embd=96, n_head=12, n_layer=2, vocab_size=64, multi_query=False
    ),
    "one tensor": lambda: transformers.MptConfig(d_model=96, n_heads=12, n_layers=2, vocab_size=64),
    "a gate": lambda: transformers.Qwen3NextConfig(
        **SIZES,
        num_key_value_heads=4,
        head_dim=16,
        layer_types=["full_attention"] * 2,
        intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "normed": lambda: transformers.Olmo2Config(**SIZES, num_key_value_heads=4, intermediate_size=32, pad_token_id=1),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # older transformers
@pytest.mark.parametrize("order", ORDERS)
def test_a_head_is_found_in_every_order_of_a_fused_matrix(order):
    torch.manual_seed(0)
    model = LanguageModel(transformers.AutoModelForCausalLM.from_config(ORDERS[order]()).eval())
    attn = model.layers[1].attn
    for name, letter in (("W_Q", "q"), ("W_K", "k"), ("W_V", "v")):
        weight = getattr(attn, name)
        for head in (0, weight.shape[0] - 1):
            with trace(model), torch.no_grad():
                before = getattr(attn, letter).clone()
            with torch.no_grad():
                weight[head].neg_()
                with trace(model):
                    after = getattr(attn, letter).clone()
                weight[head].neg_()
            moved = (after - before).abs().amax((0, 1, 3))
            assert moved[head] > 0.1 * float(before[:, :, head].abs().max()), (name, head)
            assert moved.argmax() == head
            assert (moved > 1e-3 * moved[head]).sum() == 1


REASONS = {
    "codegen": (
        lambda: transformers.CodeGenConfig(n_embd=256, n_head=16, n_layer=1, rotary_dim=8),
        "W_Q",
        "don't stand",
    ),
    "falcon": (
        lambda: transformers.FalconConfig(
            **SIZES | {"num_attention_heads": 16}, new_decoder_architecture=True, num_kv_heads=4
        ),
        "W_Q",
        "those of k are in between",
    ),
    "deepseek_v3": (
        lambda: transformers.DeepseekV3Config(num_hidden_layers=1),
        "W_Q",
        "is not given the stream itself",
    ),
    "jetmoe": (lambda: transformers.JetMoeConfig(num_hidden_layers=1), "W_Q", "no single matrix"),
}


@pytest.mark.parametrize("kind", REASONS)
def test_where_there_is_no_such_view_the_reason_is_told(kind):
    make, name, reason = REASONS[kind]
    with torch.device("meta"):
        model = LanguageModel(transformers.AutoModelForCausalLM.from_config(make()))
    layer = model.layers[0]
    assert not layer.has(f"attn.{name}")
    assert not model.layers.having(f"attn.{name}")
    with pytest.raises(NotOnThisLayerError, match=f"no `attn.{name}` on this layer") as raised:
        getattr(layer.attn, name)
    assert reason in str(raised.value)
    assert layer.has("attn.W_O") is (kind != "jetmoe")


class Halved(nn.Linear):
    """A Linear whose weight is not what it multiplies by, as in a quantized model."""

    def forward(self, value):
        return super().forward(value) * 0.5


def test_an_adapted_quantized_or_parametrized_matrix_has_no_view():
    model = LanguageModel(tiny_model(CONFIG_MAPPING["llama"](num_attention_heads=4), n_layers=2))
    attn = model.layers[1].attn.module._module
    adapted = Halved(attn.o_proj.in_features, attn.o_proj.out_features, bias=False)
    attn.o_proj = adapted
    nn.utils.parametrizations.weight_norm(attn.q_proj)
    prune.random_unstructured(attn.v_proj, "weight", amount=0.5)  # the same class, and a weight made in each call
    for name in ("W_Q", "W_V", "W_O"):
        with pytest.raises(NotOnThisLayerError, match="quantized, adapted or parametrized"):
            getattr(model.layers[1].attn, name)
        assert not model.layers[1].has(f"attn.{name}")
        assert model.layers[0].has(f"attn.{name}")
    assert model.layers[1].attn.W_K.shape == (4, model.d_model, model.d_head)


def test_layers_without_attention_have_none_and_nothing_is_looked_for(monkeypatch):
    monkeypatch.setattr(known, "tiny_model", None)
    model = model_of("mamba")
    assert not model.layers.having("attn.W_Q")
    assert not model.layers.having("attn.result")
    with pytest.raises(NotOnThisLayerError, match="no attention is computed"):
        model.layers[0].attn.W_O


def test_they_are_looked_for_once_for_each_config_in_a_model_of_few_layers(monkeypatch):
    counts = []

    def counted(*args, **options):
        counts.append(options["n_layers"])
        return tiny_model(*args, **options)

    monkeypatch.setattr(known, "tiny_model", counted)
    config = CONFIG_MAPPING["llama"](num_attention_heads=4, num_hidden_layers=5, rope_theta=123.0)
    for _ in range(2):
        with torch.device("meta"):
            model = LanguageModel(transformers.AutoModelForCausalLM.from_config(config))
        assert len(model.layers.having("attn.W_O")) == 5
    assert counts == [2]


def test_they_are_there_before_the_weights_and_stay_the_models_afterwards():
    model = LanguageModel("nnsight/demo")
    attn = model.layers[3].attn
    assert attn.W_Q.is_meta
    model.dispatch()
    assert attn.W_Q.data_ptr() == model._module.transformer.h[3].attn.c_attn.weight.data_ptr()
    assert attn.W_K.shape == (4, 128, 32)


# What each head adds.


@attending
def test_results_are_z_through_w_o_and_make_what_the_projection_returns(name):
    model = model_of(name)
    found = {}
    hooked(model, outputs={projection(name): lambda value: found.update(returned=value.clone())})
    hooked(model, inputs={projection(name): lambda value: found.update(given=value.clone())})
    attn = model.layers[1].attn
    weight = attn.W_O.detach()
    with trace(model), torch.no_grad():
        result = attn.result
        assert result is attn.result
        untouched = model.logits
    by_head = found["given"].unflatten(-1, weight.shape[:2])
    same(result, torch.einsum("pthd,hdm->pthm", by_head, weight))
    close(result.sum(-2) + (0 if attn.b_O is None else attn.b_O.detach()), found["returned"])
    same(untouched, hooked(model))


@attending
def test_writing_back_what_was_read_changes_nothing(name):
    model = model_of(name)
    with trace(model), torch.no_grad():
        for layer in model.layers:
            layer.attn.result = layer.attn.result
        same(model.logits, hooked(model))
    with trace(model):  # with gradients, too
        for layer in model.layers:
            layer.attn.result = layer.attn.result
        same(model.logits.detach(), hooked(model))


@attending
def test_what_is_assigned_is_summed_over_heads_with_the_bias(name):
    model = model_of(name)
    attn = model.layers[1].attn
    with trace(model), torch.no_grad():
        new = noise_like(attn.result)
    bias = 0 if attn.b_O is None else attn.b_O.detach()
    wanted = hooked(model, outputs={projection(name): lambda _: new.sum(-2) + bias})
    with trace(model), torch.no_grad():
        attn.result = new
        assert attn.result is new
        same(model.logits, wanted)
    assert not torch.equal(wanted, hooked(model))


@attending
def test_a_head_left_out_in_place_is_one_whose_z_is_zero(name):
    model = model_of(name)
    attn = model.layers[1].attn
    with trace(model), torch.no_grad():
        attn.z[:, :, 2] = 0
        wanted = model.logits
    with trace(model), torch.no_grad():
        attn.result[:, :, 2] = 0
        close(model.logits, wanted)
    with trace(model), torch.no_grad():
        attn.result[:, :, 2] = 0
        assert float(attn.result[:, :, 2].abs().max()) == 0
        attn.result *= 2
        twice = model.logits
    assert not torch.allclose(twice, wanted)


def test_sdpa_stays_sdpa(monkeypatch):
    from transformers.models.llama import modeling_llama

    def eager(*_args, **_kwargs):
        raise AssertionError

    model = model_of("llama")
    assert model._module.config._attn_implementation == "sdpa"
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager)
    with trace(model), torch.no_grad():
        for layer in model.layers:
            layer.attn.result[:, :, 0] = 0


WITH_ROWS = [name for name in ATTENDING if name not in WITHOUT_ROWS]
SLOW = {"falcon_h1": [pytest.mark.slow]}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, [])) for name in WITH_ROWS])
def test_rows_and_invokes_have_their_own(name):
    model = model_of(name)
    ids, others = given(model)
    one, two = ids.tolist()
    others = {key: value for key, value in others.items() if not isinstance(value, torch.Tensor)}
    with model.trace([one], **others), torch.no_grad():
        first = model.layers[1].attn.result
    with model.trace([two], **others), torch.no_grad():
        model.layers[1].attn.result = first
        wanted = model.logits
    with model.trace([one, two], **others) as (a, b), torch.no_grad():
        close(a.layers[1].attn.result, first)
        b.layers[1].attn.result = a.layers[1].attn.result
        close(b.layers[1].attn.result, first)
        close(b.logits, wanted)
        close(a.logits, hooked(model)[:1])
    with model.trace(**others) as tracer, torch.no_grad():
        with tracer.invoke([one]):
            kept = model.layers[1].attn.result
        with tracer.invoke([two]):
            model.layers[1].attn.result[:] = kept
            logits = model.logits
    close(logits, wanted)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_an_edit_stays_and_what_it_assigned_is_read_behind_it(name):
    model = fresh(name)
    with model.edit() as edited:
        edited.layers[1].attn.result[:, :, 1] = 0
    ids, others = given(model)
    with trace(model), torch.no_grad():
        model.layers[1].attn.result[:, :, 1] = 0
        wanted = model.logits
    with edited.trace(ids, **others), torch.no_grad():
        assert float(edited.layers[1].attn.result[:, :, 1].abs().max()) == 0
        same(edited.logits, wanted)
    plain = {key: value for key, value in others.items() if not isinstance(value, torch.Tensor)}
    with edited.trace(ids.tolist(), **plain) as (a, b), torch.no_grad():
        for row in (a, b):
            assert float(row.layers[1].attn.result[:, :, 1].abs().max()) == 0
            assert row.layers[1].attn.result.shape[0] == 1


def test_each_step_of_a_generation_has_them():
    model = model_of("llama")
    ids, _ = given(model)
    shapes = []
    with model.generate(ids[:1], max_new_tokens=3, do_sample=False, eos_token_id=None) as tracer, torch.no_grad():
        for _ in tracer.iter[:]:
            shapes.append(tuple(model.layers[1].attn.result.shape[1:]))
            model.layers[1].attn.result[:, -1, 0] = 0
    assert shapes == [(length, model.n_heads, model.d_model) for length in (7, 1, 1)]


@pytest.mark.parametrize("name", ["gpt2", "bloom", "mixtral"])
def test_a_scan_knows_their_shape(name):
    model = model_of(name)
    ids, others = given(model)
    with model.scan(ids, **others):
        shape = tuple(model.layers[1].attn.result.shape)
    assert shape == (*ids.shape, model.n_heads, model.d_model)


@attending
def test_gradients_are_those_of_the_projection_and_weights_keep_theirs(name):
    model = model_of(name)
    module, path = model._module, projection(name)
    ids, others = given(model)
    kept = []
    handle = module.get_submodule(path).register_forward_hook(lambda _, __, output: kept.append(output))
    loss = module(ids, **others).logits[:, -1].square().sum()
    handle.remove()
    parameters = [one for one in module.get_submodule(path).parameters() if one.requires_grad]
    of_output, *of_parameters = torch.autograd.grad(loss, [*kept, *parameters])
    with trace(model):
        result = model.layers[1].attn.result
        found, *ours = nnsight.grad(model.logits[:, -1].square().sum(), [result, *parameters])
    size = float(of_output.abs().max())
    close(found / size, (of_output.unsqueeze(-2) / size).expand_as(found))
    for one, other in zip(ours, of_parameters, strict=True):
        close(one / other.abs().max(), other / other.abs().max())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_rows_gradient_is_its_part(name):
    model = model_of(name)
    with trace(model):
        result = model.layers[1].attn.result
        whole = nnsight.grad(model.logits.square().sum(), [result])[0]
    with trace(model) as scopes:
        row = scopes.rows[1]
        result = row.layers[1].attn.result
        found = nnsight.grad(row.logits.square().sum(), [result])[0]
    close(found / whole.abs().max(), whole[1:] / whole.abs().max())


# Encoders, and what crosses over.


@pytest.fixture(scope="module")
def halves():
    config = CONFIG_MAPPING["t5"]()
    return LanguageModel(tiny_model(config, transformers.AutoModelForSeq2SeqLM, n_layers=2))


def test_an_encoder_and_what_crosses_over_have_weights_of_their_own(halves):
    stack = halves._module.encoder.block[1].layer[0].SelfAttention
    layer = halves.uniform.decoder.layers[1]
    own, crossing = (halves._module.decoder.block[1].layer[at] for at in (0, 1))
    pairs = [
        (halves.uniform.encoder.layers[1].attn, stack),
        (layer.attn, own.SelfAttention),
        (layer.cross_attn, crossing.EncDecAttention),
    ]
    for attn, raw in pairs:
        for name in "qkv":
            weight = getattr(raw, name).weight
            cut = weight.unflatten(0, (attn.W_Q.shape[0], -1)).mT
            same(getattr(attn, f"W_{name.upper()}"), cut)
            assert getattr(attn, f"W_{name.upper()}").data_ptr() == weight.data_ptr()
        same(attn.W_O.flatten(0, 1), raw.o.weight.T)
    assert not halves.uniform.encoder.layers[1].has("cross_attn.W_Q")


def test_results_of_cross_attention_are_read_and_assigned(halves):
    ids, others = given(halves)
    layer = halves.uniform.layers[1]
    with halves.trace(ids, **others), torch.no_grad():
        layer.cross_attn.z[:, :, 2] = 0
        wanted = halves.logits
    with halves.trace(ids, **others), torch.no_grad():
        result = layer.cross_attn.result
        close(result.sum(-2), layer.cross_attn.output)
    with halves.trace(ids, **others), torch.no_grad():
        layer.cross_attn.result[:, :, 2] = 0
        close(halves.logits, wanted)
    assert halves.site("layers.1.cross_attn.result").axes == ("prompt", "token", "head", "model")
    with pytest.raises(NotOnThisLayerError, match=r"no `cross_attn\.W_Q` on this layer"):
        halves.uniform.encoder.layers[1].cross_attn.W_Q


# By name, and mistakes.


def test_it_is_a_site_with_transformer_lens_s_name():
    model = model_of("gpt2")
    site = model.site("blocks.2.attn.hook_result")
    assert site.name == "layers.2.attn.result"
    assert site.axes == ("prompt", "token", "head", "model")
    names = [one.name for one in model.sites()]
    assert names.index("layers.1.attn.z") + 1 == names.index("layers.1.attn.result")
    with trace(model), torch.no_grad():
        assert site.value is model.layers[2].attn.result


def test_completion_knows_the_names():
    assert {*NAMES, "b_Q", "b_K", "b_V", "b_O", "result"} <= set(dir(model_of("gpt2").layers[0].attn))


@pytest.mark.parametrize("name", ["W_Q", "b_O"])
def test_a_weight_is_written_into_and_not_assigned(name):
    model = model_of("gpt2")
    with pytest.raises(WriteError, match="written into, and not assigned") as raised:
        setattr(model.layers[1].attn, name, torch.zeros(3))
    assert f"layer.attn.{name}[:] = ..." in str(raised.value)


def test_only_a_tensor_of_the_results_shape_can_be_assigned():
    model = model_of("gpt2")
    with pytest.raises(WriteError, match=r"`layers\[1\].attn.result` has another shape") as raised, trace(model):
        model.layers[1].attn.result = model.layers[1].attn.result.sum(2)
    assert "[2, 7, 4, 32]" in str(raised.value)
    with pytest.raises(WriteError, match="is a tensor, not an int"), trace(model):
        model.layers[1].attn.result = 0


def test_results_are_had_in_a_trace_and_in_their_turn():
    model = model_of("gpt2")
    with pytest.raises(OutsideTraceError, match=r"layers\[1\].attn.result"):
        model.layers[1].attn.result
    with pytest.raises(AlreadyPastError), trace(model):
        model.layers[1].output
        model.layers[1].attn.result
    with pytest.raises(AlreadyPastError, match=r"read `transformer\.h\.1\.attn\.z` before"), trace(model):
        model.layers[1].attn.result
        model.layers[1].attn.z


def test_a_bias_that_the_config_does_not_tell_of_is_one():
    model = LanguageModel(copy.deepcopy(model_of("llama")._module))
    attention = model._module.model.layers[1].self_attn
    assert model.layers[1].attn.b_O is None
    for name in ("q_proj", "o_proj"):
        had = getattr(attention, name)
        setattr(attention, name, nn.Linear(had.in_features, had.out_features))
    attn = model.layers[1].attn
    assert torch.equal(attn.b_O, attention.o_proj.bias)
    assert torch.equal(attn.b_Q.flatten(), attention.q_proj.bias)
    with torch.no_grad(), trace(model):
        attn.z[:, :, 1] = 0
        expected = model.logits
    with torch.no_grad(), trace(model):
        attn.result[:, :, 1] = 0
        close(model.logits, expected)


def test_a_misspelt_name_has_the_nearest():
    with pytest.raises(UnknownNameError) as raised:
        model_of("gpt2").layers[1].attn.W_q
    assert "`W_Q`" in str(raised.value)


def test_what_was_asked_is_told_under_its_name():
    model = model_of("gpt2")
    with trace(model) as tracer, torch.no_grad():
        model.layers[1].attn.result = model.layers[1].attn.result * 2
    asked = [line.split()[:2] for line in str(tracer).splitlines() if "c_proj.result" in line]
    assert asked == [[verb, "transformer.h.1.attn.c_proj.result"] for verb in ("read", "wrote")]
