"""A cache in generation hears every step, and says which."""

import pickle

import pytest
import torch

from nnsight import errors

PROMPT = "a b c d"


def test_every_step_is_kept_with_its_number(model, gpt2, switch):
    seen = []
    handle = gpt2.transformer.h[0].mlp.register_forward_hook(lambda *args: seen.append(args[2]))
    model.generate(PROMPT, max_new_tokens=4, do_sample=False)
    handle.remove()
    with model.generate(PROMPT, max_new_tokens=4, do_sample=False) as tracer:
        cache = tracer.cache([model.transformer.h[0].mlp, "model"], include_inputs=True)
    layer = cache.transformer.h[0].mlp
    assert [visit.step for visit in layer.visits] == [0, 1, 2, 3]
    assert all(map(torch.equal, layer.outputs, seen))
    assert torch.equal(layer.output, seen[0])
    assert len(cache["model"]) == len(layer) == 4
    logits = [visit.output.logits for visit in cache["model"].visits]
    assert tracer.result[0, -4:].tolist() == [step[0, -1].argmax().item() for step in logits]


def test_a_write_in_the_first_step_is_in_the_cache(model):
    with model.generate(PROMPT, max_new_tokens=3, do_sample=False) as tracer:
        cache = tracer.cache("h.*.mlp")
        model.transformer.h[0].mlp.output[:] = 0
    first, *later = cache.transformer.h[0].mlp.outputs
    assert not first.any()
    assert all(output.any() for output in later)
    assert isinstance(errors.NotCachedError("x"), KeyError)


def test_an_invokes_cache_has_its_prompts_own_tokens_in_each_step_as_alone(model):
    def alone(prompt, factor):
        with model.generate(prompt, **options) as tracer:
            cache = tracer.cache(["h.*", "lm_head"])
            model.transformer.h[0].mlp.output[:] *= factor
        return cache

    def steer(edited):
        edited.transformer.h[1].mlp.output[:] *= 2

    options, prompts = {"max_new_tokens": 3, "do_sample": False}, ("a b c d e f", "c d")
    plain = model
    for model in (plain, plain.edit(steer)):
        with model.generate(**options) as tracer:
            with tracer.invoke(prompts[0]):
                first = tracer.cache(["h.*", "lm_head"])
                model.transformer.h[0].mlp.output[:] *= 2
            with tracer.invoke(prompts[1]):
                second = tracer.cache(["h.*", "lm_head"])
        for cache, prompt, factor in zip((first, second), prompts, (2, 1), strict=True):
            expected, cache = alone(prompt, factor), pickle.loads(pickle.dumps(cache))
            assert list(cache) == list(expected)
            for path in expected:
                assert [visit.step for visit in cache[path].visits] == [0, 1, 2]
                for one, other in zip(cache[path].outputs, expected[path].outputs, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_key_value_cache_is_not_in_a_cache(model):
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache(include_inputs=True)
    copied = pickle.loads(pickle.dumps(cache))
    assert copied.output.logits.shape == cache.output.logits.shape
    assert not any(value.requires_grad for value in cache.output.values() if isinstance(value, torch.Tensor))
    with pytest.raises(errors.NotCachedError, match="this is a DynamicCache"):
        copied.output.past_key_values.layers
