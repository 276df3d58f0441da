"""Quantised models: loaded as transformers loads them, read and written as plain hooks do, refused in a line."""

import importlib
import importlib.util

import pytest
import torch
import transformers
from tiny import make_tokenizer

import nnsight
from nnsight import LanguageModel, errors

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),  # bitsandbytes
    pytest.mark.filterwarnings("ignore:.*torchao.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
IDS = torch.tensor([[3, 1, 4, 1, 5]])
PATH = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def bitsandbytes(**options):
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(**options)


def torchao(name):
    pytest.importorskip("torchao")
    return transformers.TorchAoConfig(getattr(importlib.import_module("torchao.quantization"), name)())


CONFIGS = {
    "nf4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "8 bits": lambda: bitsandbytes(load_in_8bit=True),
    "torchao": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao, activations too": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
}


@pytest.fixture(params=CONFIGS)
def both(request, folder):
    """The model as ours loads it, and as transformers does."""
    config = CONFIGS[request.param]()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()
    return LanguageModel(folder, quantization_config=config), plain


def paths(module):
    return [name for name, _ in module.named_modules()]


def by_hook(plain, change=None):
    seen = []

    def hook(_, __, output):
        seen.append(output)
        return None if change is None else change(output)

    handle = plain.get_submodule(PATH).register_forward_hook(hook)
    try:
        return seen, plain(IDS).logits
    finally:
        handle.remove()


def test_reads_writes_and_gradients_are_those_of_hooks(both, folder):
    model, plain = both
    before = paths(model._module)
    (seen,), logits = by_hook(plain)
    with model.trace(IDS) as tracer:
        read = model.get(PATH).output
        result = tracer.result.logits
    assert before == paths(transformers.AutoModelForCausalLM.from_pretrained(folder)) == paths(model._module)
    assert torch.equal(read, seen)
    assert torch.equal(result, logits)

    (seen,), logits = by_hook(plain, lambda output: output * 2 + 1)
    with model.trace(IDS) as tracer:
        value = model.get(PATH).output
        model.get(PATH).output = value * 2 + 1
        result = tracer.result.logits
    assert torch.equal(result, logits)
    if not seen.requires_grad:  # activations that are rounded have no gradient
        with pytest.raises(errors.GradientError):
            nnsight.grad(result[0, -1, 7], [value])
        return
    (wanted,) = torch.autograd.grad(logits[0, -1, 7], [seen])
    (grad,) = nnsight.grad(result[0, -1, 7], [value])
    assert torch.equal(grad, wanted)
    assert grad.isfinite().all()


def test_rows_scans_steps_and_uniform_names(both):
    model, plain = both
    with model.scan(IDS):
        shape = model.layers[1].attn.z.shape
    model.dispatch()
    with model.scan(IDS):
        assert model.layers[1].attn.z.shape == shape == (1, 5, 4, 16)
    with model.trace([[3, 1, 4], [2, 5, 6]]) as (_, row):
        z, own = row.layers[1].attn.z, row.result.logits
    assert z.shape == (1, 3, 4, 16)
    torch.testing.assert_close(own, plain(torch.tensor([[2, 5, 6]])).logits, rtol=0.05, atol=0.05)
    ids = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(ids, plain.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0))
    assert nnsight.verify(model)


def alone(module, given, heads):
    """What a module makes of each head's channels alone."""
    parts = []
    for channels in torch.arange(given.shape[-1]).chunk(heads):
        one = torch.zeros_like(given)
        one[..., channels] = given[..., channels]
        parts.append(module(one))
    return torch.stack(parts, -2)


def test_what_each_head_adds_is_what_the_quantised_matrix_makes_of_it_where_that_adds_up(both):
    model, plain = both
    projection = plain.model.layers[1].self_attn.o_proj
    model.dispatch()
    layer = model.layers[1]
    if type(projection).__name__ == "Linear8bitLt" or "Activation" in str(plain.config.quantization_config):
        assert not layer.has("attn.result")  # tokens are rounded by their largest channel
        with pytest.raises(
            errors.NotOnThisLayerError, match=r"single heads adds up to what it makes of all but for \d"
        ):
            layer.attn.result
        return
    with model.trace(IDS):
        z, result, returned = layer.attn.z.flatten(-2), layer.attn.result, layer.attn.output
    torch.testing.assert_close(result, alone(projection, z, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(result.sum(-2), returned, rtol=0, atol=1e-6)
    with model.trace(IDS):
        layer.attn.z[:, :, 2] = 0
        wanted = model.logits
    with model.trace(IDS):
        layer.attn.result[:, :, 2] = 0
        torch.testing.assert_close(model.logits, wanted, rtol=0, atol=1e-5)


def test_an_effective_weight_is_the_dequantised_matrix(both):
    model, plain = both
    model.dispatch()
    projection = plain.model.layers[1].self_attn.o_proj
    weight = projection.weight
    logits = plain(IDS).logits  # bitsandbytes packs its weights in the first call
    if type(projection).__name__ == "Linear4bit":
        matrix = importlib.import_module("bitsandbytes").functional.dequantize_4bit(weight.data, weight.quant_state)
    elif type(projection).__name__ == "Linear8bitLt":
        state = projection.state
        matrix = state.CB.float() * state.SCB[:, None] / 127
    else:
        matrix = weight.dequantize()
    ours = model.layers[1].attn.effective("W_O")
    assert ours.shape == (4, 16, 64)
    most = float(matrix.abs().max())
    most *= 5e-3 if "Activation" in str(plain.config.quantization_config) else 1e-3  # float16, of 8 bits
    torch.testing.assert_close(ours.flatten(0, 1), matrix.T.float(), rtol=0, atol=most)
    with pytest.raises(errors.NotOnThisLayerError, match=r'a copy +layer.attn.effective\("W_O"\)'):
        model.layers[1].attn.W_O
    assert model.layers[1].mlp.effective("W_out").shape == (128, 64)
    model.layers[0].has("attn.result")
    assert torch.equal(model.trace(IDS, trace=False).logits, logits)  # asking has not changed what it computes


def test_experts_that_are_quantised_together_have_neurons_and_no_views(tmp_path):
    quantization = importlib.import_module("torchao.quantization") if importlib.util.find_spec("torchao") else None
    if not hasattr(quantization, "FqnToConfig"):
        pytest.skip("this version of torchao quantises no experts")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path)
    weights = quantization.Int8WeightOnlyConfig()
    names = {r"re:.*experts\.gate_up_proj": weights, r"re:.*experts\.down_proj": weights}
    config = transformers.TorchAoConfig(quantization.FqnToConfig(names))
    model = LanguageModel(tmp_path, quantization_config=config, experts_implementation="eager")
    model.dispatch()
    experts, expert = model._module.model.layers[1].mlp.experts, model.layers[1].mlp.experts[2]
    assert type(experts.down_proj) is not torch.nn.Parameter
    with torch.no_grad(), model.trace(IDS):
        goes = (model.layers[1].mlp.chosen == 2).any(-1)
        act, output = expert.act, expert.output
        times = (model.layers[1].mlp.routing_weights * (model.layers[1].mlp.chosen == 2)).sum(-1, keepdim=True)
    assert goes.any()
    torch.testing.assert_close(act @ experts.down_proj.dequantize()[2].T * times, output, rtol=0, atol=1e-6)
    with pytest.raises(errors.NotOnThisLayerError, match=r"a MixtralExperts, has no plain matrix"):
        expert.W_out
    assert nnsight.verify(model)


def test_a_gradient_that_is_not_finite_is_told(both):
    model, _ = both
    with model.trace(IDS):
        hidden, loss = model.layers[0].output, model.logits.sum() * float("inf")
        with pytest.warns(RuntimeWarning, match=r"The gradient of `model.layers.0.output` is not finite"):
            nnsight.grad(loss, [hidden])


def test_an_adapter_goes_on_quantised_weights_and_off_again(folder, tmp_path):
    peft = pytest.importorskip("peft")
    config = CONFIGS["nf4"]()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()
    bare = plain(IDS).logits
    tuned = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora" in name:
                parameter.add_(0.3)
    tuned.save_pretrained(tmp_path)
    model = LanguageModel(folder, quantization_config=config, peft=tmp_path)
    with torch.no_grad():  # bitsandbytes computes otherwise where gradients are recorded, and peft freezes the model
        assert torch.equal(model.trace(IDS, trace=False).logits, tuned(IDS).logits)
    with model.scan(IDS):
        assert model.layers[0].output.shape == (1, 5, 64)
    with model.trace(IDS):
        assert model.layers[0].attn.effective("W_Q").shape == (4, 64, 16)
    layer = model.get("model.layers.0.self_attn.q_proj")
    base = layer.base_layer._module
    model.load_adapter(None)
    assert layer._module is base
    torch.testing.assert_close(model.trace(IDS, trace=False).logits, bare, rtol=0.05, atol=0.05)


# By name.


@pytest.mark.parametrize(
    ("name", "type_", "compute"),
    [
        ("nf4", "nf4", torch.bfloat16),
        ("4bit", "nf4", torch.bfloat16),
        ("int4", "nf4", torch.bfloat16),
        ("fp4", "fp4", torch.bfloat16),
        ("int8", None, torch.float16),
        ("8bit", None, torch.float16),
    ],
)
@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
def test_a_short_name_is_the_config_that_it_means(folder, name, type_, compute, option):
    pytest.importorskip("bitsandbytes")
    model = LanguageModel(folder, **{option: name})
    assert model.model.embed_tokens.weight.dtype == compute
    model.dispatch()
    config = model._module.config.quantization_config
    assert (config.load_in_4bit, config.load_in_8bit) == (type_ is not None, type_ is None)
    if type_ is not None:
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == (type_, compute)
    assert model.model.norm.weight.dtype == compute


@pytest.mark.parametrize("option", ["compute_dtype", "bnb_4bit_compute_dtype"])
@pytest.mark.parametrize("given", [torch.float32, "float32"])
def test_what_is_computed_with_is_asked_for(folder, option, given):
    pytest.importorskip("bitsandbytes")
    model = LanguageModel(folder, dtype="nf4", **{option: given})
    with model.trace(IDS):
        assert model.layers[0].output.dtype == torch.float32
    assert model._module.config.quantization_config.bnb_4bit_compute_dtype == torch.float32


def test_what_means_nothing_is_refused(folder, monkeypatch):
    with pytest.raises(errors.InputError, match=r"`compute_dtype` is for weights that are quantised by name"):
        LanguageModel(folder, compute_dtype=torch.float32)
    with pytest.raises(errors.InputError, match=r"is a quantisation, and so is the `quantization_config`"):
        LanguageModel(folder, dtype="nf4", quantization_config={"load_in_8bit": True})
    with pytest.raises(errors.InputError, match=r"(?s)'nf5' is no dtype.*quantised: '4bit', '8bit', 'fp4'"):
        LanguageModel(folder, dtype="nf5")
    with pytest.raises(errors.InputError, match=r"'nonsense' is no type to compute with"):
        LanguageModel(folder, dtype="nf4", compute_dtype="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(errors.InputError, match=r"need a GPU of compute capability 8\.9"):
            LanguageModel(folder, dtype="fp8")


@pytest.mark.parametrize(
    ("package", "options"),
    [
        ("bitsandbytes", {"dtype": "nf4"}),
        ("bitsandbytes", {"dtype": "int8"}),
        ("bitsandbytes", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}),
        ("torchao", {"quantization_config": {"quant_method": "torchao", "quant_type": "int8_weight_only"}}),
    ],
)
def test_a_missing_package_is_told_when_the_model_is_made(folder, monkeypatch, package, options):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    text = rf'(?s)needs the package `{package}`.*pip install "nnsight\[quantization\]"'
    with pytest.raises(errors.MissingPackageError, match=text):
        LanguageModel(folder, **options)
