"""A cache in generation hears every step, and says which."""

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
