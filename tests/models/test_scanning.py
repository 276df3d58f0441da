"""A language model is scanned without its weights."""

import pytest
import tiny
import torch

from nnsight import LanguageModel, errors

PROMPT = "a b c d"


def test_a_scan_loads_no_weights(folder, gpt2):
    model = LanguageModel(folder)
    with model.scan(PROMPT) as tracer:
        hidden = model.transformer.h[1].mlp.output
        logits = model.lm_head(model.transformer.ln_f(hidden))
        by_hand = hidden @ model.lm_head.weight.T
        result = tracer.result
    assert not model.dispatched
    assert model.device == torch.device("meta")
    assert hidden.device == logits.device == torch.device("cpu")
    assert logits.shape == by_hand.shape == result.logits.shape
    with model.trace(PROMPT) as tracer:
        real = model.transformer.h[1].mlp.output
        out = tracer.result.logits
    assert (hidden.shape, hidden.dtype, hidden.requires_grad) == (real.shape, real.dtype, real.requires_grad)
    assert (result.logits.shape, result.logits.dtype) == (out.shape, out.dtype)


def test_calls_are_those_of_a_trace(folder):
    model = LanguageModel(folder)
    calls = model.calls(PROMPT)
    assert not model.dispatched
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache()
    assert sorted(calls) == sorted(cache)
    assert calls[:3] == ["model", "model.transformer", "model.transformer.wte"]


def test_dtype_and_place_are_those_that_were_asked_for(folder):
    here = "cuda:0" if torch.cuda.is_available() else "cpu"
    for device_map in ("cuda:0", "auto", {"": "cuda:0"}, 0):
        model = LanguageModel(folder, dtype=torch.bfloat16, device_map=device_map)
        with model.scan(PROMPT):
            hidden = model.transformer.h[0].mlp.output
        assert hidden.dtype == torch.bfloat16
        assert hidden.device == torch.device(here)


def test_weights_that_are_loaded_meanwhile_disturb_no_scan(folder):
    model = LanguageModel(folder)
    with model.scan(PROMPT):
        first = model.transformer.h[0].mlp.output
        with model.trace(PROMPT):
            assert model.transformer.h[0].mlp.output.sum().item()
        second = model.transformer.h[1].mlp.output
    assert first.shape == second.shape


def test_prompts_of_every_form_and_mistakes_are_as_in_a_trace(folder):
    model = LanguageModel(folder)
    for prompt in (PROMPT, [PROMPT, "a b"], torch.tensor([[1, 2, 3]])):
        with model.scan(prompt) as tracer:
            assert tracer.result.logits.ndim == 3
    with pytest.raises(errors.InputError), model.scan(""):
        pass
    assert not model.dispatched
    with pytest.raises(errors.InputError), model.scan(PROMPT, fn="generate"):
        pass


@pytest.mark.parametrize("name", ["llama", "mixtral", "rwkv", "roberta"])
def test_other_architectures_call_in_a_scan_what_they_call_in_a_trace(name, tokenizer):
    module = tiny.build(name)
    experts = getattr(module.config, "_experts_implementation", None)
    model = LanguageModel(module, tokenizer=tokenizer)
    prompts = [tiny.PROMPT, "a"]
    with model.trace(prompts) as tracer:
        real = tracer.cache(clone=True)
    with model.scan(prompts) as tracer:
        fake = tracer.cache(clone=True)
    assert repr(fake) == repr(real)
    assert list(fake) == list(real)
    assert sorted(set(model.calls(prompts))) == sorted(real)
    assert getattr(module.config, "_experts_implementation", None) == experts


def test_a_generation_is_refused_at_the_call(model):
    with pytest.raises(errors.InputError, match="generation can't be scanned"):
        model.scan("a b c d", fn="generate")


def test_rows_of_a_model_that_is_not_loaded_have_their_own_tokens(folder):
    model = LanguageModel(folder)
    with model.scan(["a b c d", "c d"]) as (a, b):
        shapes = [row.transformer.h[1].mlp.output.shape[1] for row in (a, b)]
        assert [len(row.tokens) for row in (a, b)] == shapes
        assert b.result.logits.shape[1] == shapes[1]
    assert not model.dispatched
    with model.trace(["a b c d", "c d"]) as (a, b):
        assert [row.transformer.h[1].mlp.output.shape[1] for row in (a, b)] == shapes


def test_positions_and_hidden_states_are_there(model):
    with model.scan("a b c d", output_hidden_states=True) as tracer:
        width = model.transformer.h[0].mlp.output.shape[1]
        assert tracer.positions.shape[-1] == width
        assert len(tracer.result.hidden_states) == 3
