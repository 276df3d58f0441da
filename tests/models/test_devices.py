"""Language models on an accelerator, and on the CPU as well: prompts, generation, rows, weights that are elsewhere."""

import importlib.util

import pytest
import tiny
import torch

import nnsight
from nnsight import LanguageModel, errors
from nnsight.analysis import logit_lens

P, Q = tiny.PROMPT, "The Colosseum is"  # of different lengths in tokens
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, check_device=False)


@pytest.fixture(params=["gpt2", "llama"])
def module(request, device):
    return tiny.build(request.param).to(device)


@pytest.fixture
def model(module, tokenizer):
    return LanguageModel(module, tokenizer=tokenizer)


def hooked(module, change, run):
    """What the first MLP gives in each call, with `change(output, number of the call)` put in its place; what runs."""
    seen = []

    def hook(_, __, output):
        seen.append(output)
        return change(output, len(seen) - 1)

    handle = layers_of(module)[0].mlp.register_forward_hook(hook)
    try:
        return seen, run()
    finally:
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_reads_and_writes_equal_those_of_hooks(module, tokenizer, device, attention, dtype):
    module = module.to(dtype)
    module.set_attn_implementation(attention)
    model = LanguageModel(module, tokenizer=tokenizer)
    inputs = tokenizer(P, return_tensors="pt").to(device)
    seen, expected = hooked(module, lambda out, _: out * 2, lambda: module(**inputs).logits)
    with model.trace(P) as tracer:
        out = layers_of(model)[0].mlp.output
        layers_of(model)[0].mlp.output = out * 2
        logits = tracer.result.logits
    assert (out.device, out.dtype) == (device, dtype)
    assert torch.equal(out, seen[0])
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
def test_implementations_of_attention_give_the_same_reads(module, tokenizer, device, attention):
    if attention.startswith("flash") and (device.type == "cpu" or not importlib.util.find_spec("flash_attn")):
        pytest.skip("no flash attention")
    dtype = torch.float32 if attention == "eager" else torch.bfloat16
    model, read = LanguageModel(module.to(dtype), tokenizer=tokenizer), []
    for one in ("sdpa", attention):
        module.set_attn_implementation(one)
        with model.trace(P):
            read.append(layers_of(model)[1].mlp.output)
    if attention == "eager":
        close(*read)
    else:
        torch.testing.assert_close(*read, rtol=0.05, atol=0.05)


# Generation.


def test_a_generation_is_steered_as_by_hooks(model, module, tokenizer, device, switch):
    vectors = torch.linspace(-1, 1, 5).to(device)[:, None] * torch.ones(16, device=device)
    inputs = tokenizer(P, return_tensors="pt").to(device)
    seen, expected = hooked(
        module, lambda out, step: out + vectors[step], lambda: module.generate(**inputs, **GREEDY, pad_token_id=0)
    )
    read = []
    with model.generate(P, **GREEDY) as tracer:
        for step in tracer.iter[:]:
            mlp = layers_of(model)[0].mlp
            read.append(mlp.output)
            mlp.output = mlp.output + vectors[step]
        ids = tracer.result
    assert torch.equal(ids, expected)
    assert len(read) == len(seen) == 5
    assert all(map(torch.equal, read, seen))


def test_a_generation_reads_the_same_without_a_key_value_cache(model):
    read = {True: [], False: []}
    for use_cache, values in read.items():
        with model.generate(P, **GREEDY, use_cache=use_cache) as tracer:
            for _step in tracer.iter[:]:
                values.append(layers_of(model)[1].mlp.output[:, -1:])
            values.append(tracer.result)
    assert len(read[True]) == 6
    for one, other in zip(*read.values()):
        close(one, other)


def test_sampling_draws_the_same_numbers(model, module, tokenizer, device):
    options = {"do_sample": True, "max_new_tokens": 5, "pad_token_id": 0}
    torch.manual_seed(1)
    expected = module.generate(**tokenizer(P, return_tensors="pt").to(device), **options)
    torch.manual_seed(1)
    with model.generate(P, **options) as tracer:
        for _step in tracer.iter[:]:
            layers_of(model)[0].mlp.output
        ids = tracer.result
    assert torch.equal(ids, expected)


# Prompts.


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_bundled_model_knows_its_city(device, dtype):
    model = LanguageModel("nnsight/demo", device_map=device, dtype=dtype)
    with model.scan(P) as tracer:
        planned = model.transformer.h[2].mlp.output, tracer.result.logits
    assert not model.dispatched
    with torch.no_grad(), model.trace(P) as tracer:
        hidden, logits = model.transformer.h[2].mlp.output, tracer.result.logits
    for scanned, real in zip(planned, (hidden, logits)):
        assert (scanned.shape, scanned.dtype, scanned.device) == (real.shape, real.dtype, real.device)
    assert hidden.device == device == model.device
    assert model.tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    ids = model.generate(P, max_new_tokens=1, do_sample=False)
    assert model.tokenizer.decode(ids[0]).endswith(" Paris")


def test_the_lens_shows_what_it_shows_on_the_cpu(device):
    lenses = [logit_lens(LanguageModel("nnsight/demo", device_map=place), P, top_k=3) for place in (device, "cpu")]
    assert torch.equal(lenses[0].ids[-1, :, 0], lenses[1].ids[-1, :, 0])
    close(lenses[0].values, lenses[1].values)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_a_batch_have_what_they_have_alone(model, side, device):
    def alone(prompt):
        with model.trace(prompt) as tracer:
            hidden = layers_of(model)[1].mlp.output
            layers_of(model)[1].mlp.output = hidden * 2
            return hidden, tracer.result.logits

    with torch.no_grad():
        expected, got, invoked = [alone(P), alone(Q)], [], []
        with model.trace([P, Q], padding_side=side) as rows:
            hidden = [layers_of(row)[1].mlp.output for row in rows]
            for row, value in zip(rows, hidden):
                layers_of(row)[1].mlp.output = value * 2
            got = [(value, row.result.logits) for row, value in zip(rows, hidden)]
        with model.trace(padding_side=side) as tracer:
            for prompt in (P, Q):
                with tracer.invoke(prompt):
                    value = layers_of(model)[1].mlp.output
                    layers_of(model)[1].mlp.output = value * 2
                    invoked.append((value, tracer.result.logits))
    for one, other, third in zip(expected, got, invoked):
        for values in zip(one, other, third):
            close(values[1], values[0])
            close(values[2], values[0])
            assert {value.device for value in values} == {device}


def test_ids_come_from_any_device(model, tokenizer, device):
    ids = tokenizer(P, return_tensors="pt").input_ids
    with torch.no_grad():
        for given in (ids, ids.to(device)):
            with model.trace(given) as tracer:
                assert tracer.positions.device == device
                logits = tracer.result.logits
            assert torch.equal(logits, model._module(ids.to(device)).logits)


def test_past_and_never_called_are_told_apart(model):
    model._module.extra = torch.nn.Linear(4, 4)
    with pytest.raises(errors.AlreadyPastError), model.trace(P):
        layers_of(model)[1].mlp.output
        layers_of(model)[0].mlp.output
    with pytest.raises(errors.NeverCalledError), model.trace(P):
        model.extra.output


# Weights that are kept elsewhere.


@pytest.mark.parametrize("kept", ["offloaded", "split"])
def test_a_model_whose_weights_are_partly_on_the_cpu(accelerator, folder, tokenizer, kept):
    accelerate = pytest.importorskip("accelerate")
    plain = LanguageModel(folder)
    if kept == "offloaded":
        module = tiny.build("gpt2")
        accelerate.cpu_offload(module, execution_device=accelerator)
        model = LanguageModel(module, tokenizer=tokenizer)
    else:
        places = dict.fromkeys(("transformer.wte", "transformer.wpe", "transformer.h.0", "lm_head"), accelerator.index)
        model = LanguageModel(folder, device_map={**places, "transformer.h.1": "cpu", "transformer.ln_f": "cpu"})
        model.dispatch()
    before = [parameter.device for parameter in model._module.parameters()]
    read = []
    with torch.no_grad():
        for one in (plain, model):
            with one.trace([P, Q]) as (a, b):
                b.transformer.h[1].mlp.output = (
                    a.transformer.h[1].mlp.output[:, -3:].mean(1) + b.transformer.h[1].mlp.output
                )
                read.append((a.result.logits, b.result.logits))
        with model.trace(P) as tracer:
            hidden = model.transformer.h[1].mlp.output
            weight = model.transformer.h[1].mlp.c_fc.weight
            tracer.stop()
    for values in zip(*read, strict=True):
        close(*values)
    assert hidden.device == weight.device == accelerator
    assert [parameter.device for parameter in model._module.parameters()] == before


def test_gradients_flow_through_a_language_model(model, module, tokenizer, device):
    inputs, kept = tokenizer(P, return_tensors="pt").to(device), []
    handle = layers_of(module)[0].mlp.register_forward_hook(lambda _, __, out: kept.append(out))
    (expected,) = torch.autograd.grad(module(**inputs).logits[0, -1].max(), kept)
    handle.remove()
    with model.trace(P) as tracer:
        hidden = layers_of(model)[0].mlp.output
        best = tracer.result.logits[0, -1].max()
        (asked,) = nnsight.grad(best, [hidden], retain_graph=True)
        with best.backward():
            in_block = hidden.grad
    close(asked, expected)
    close(in_block, expected)
