"""A generation that transformers compiles by itself, for a key-value cache of a fixed size, is read eagerly.

It does so on an accelerator, and with a private option on the CPU. Where a generation is compiled, a hook that comes
later is silent, and the lines of a block would be compiled too.
"""

import pytest
import snapshots
import tiny
import torch
import transformers

from nnsight import LanguageModel, NNsight

P = tiny.PROMPT
OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # dynamo's own


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()
    yield
    assert snapshots.stance() == "default"
    torch._dynamo.reset()


@pytest.fixture(params=["gpt2", "llama"])
def module(request, device):
    return tiny.build(request.param).to(device)


def mlp_of(model):
    return (model.transformer.h if hasattr(model, "transformer") else model.model.layers)[0].mlp


def hooked(module, **options):
    """What its first MLP gives in each step, and the ids, with nothing compiled."""
    seen = []
    handle = mlp_of(module).register_forward_hook(lambda *args: seen.append(args[2]))
    ids = module.generate(**options, disable_compile=True)
    handle.remove()
    return seen, ids


class Counting:
    """A backend that counts the calls of what it compiled; transformers copies it with its options."""

    calls = 0

    def __call__(self, graph, _inputs):
        def run(*args):
            Counting.calls += 1
            return graph.forward(*args)

        return run

    def __deepcopy__(self, _):
        return self


def on_every_device():
    """The options with which transformers compiles the model's call by itself on a CPU, too."""
    config = transformers.CompileConfig(backend=Counting(), mode=None)
    config._compile_all_devices = True
    return config


WAYS = {
    "an option": lambda module: {"cache_implementation": "static", "compile_config": on_every_device()},
    "a config": lambda module: {
        "generation_config": transformers.GenerationConfig(
            **OPTIONS, cache_implementation="static", compile_config=on_every_device()
        )
    },
    "the model's config": lambda module: (
        module.generation_config.update(cache_implementation="static") or {"compile_config": on_every_device()}
    ),
    "a cache": lambda module: {
        "past_key_values": transformers.StaticCache(config=module.config, max_cache_len=32),
        "compile_config": on_every_device(),
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("warm", [False, True])
def test_what_generate_compiles_by_itself_is_read_eagerly(module, tokenizer, device, way, warm):
    inputs = tokenizer(P, return_tensors="pt").to(device)
    seen, expected = hooked(module, **inputs, **OPTIONS)

    def options():
        found = WAYS[way](module)
        return found if way == "a config" else {**OPTIONS, **found}

    if warm:
        assert torch.equal(module.generate(**inputs, **options()), expected)
    calls = Counting.calls
    model = LanguageModel(module, tokenizer=tokenizer)
    with model.generate(P, **options()) as tracer:
        read = [mlp_of(model).output for _step in tracer.iter[:]]
        assert torch.equal(tracer.result, expected)
    assert len(read) == len(seen) == 5
    for one, other in zip(read, seen):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert Counting.calls == calls
    assert torch.equal(module.generate(**inputs, **options()), expected)
    assert Counting.calls >= calls + 4


def test_so_is_one_of_an_edited_model_and_one_of_a_module_that_is_merely_wrapped(module, tokenizer, device):
    inputs = tokenizer(P, return_tensors="pt").to(device)
    options = {**OPTIONS, "cache_implementation": "static", "compile_config": on_every_device()}
    handle = mlp_of(module).register_forward_hook(lambda *args: args[2] * -3)
    seen, expected = hooked(module, **inputs, **OPTIONS)
    handle.remove()
    assert not torch.equal(module.generate(**inputs, **OPTIONS), expected)

    def edit(edited):
        mlp_of(edited).output = mlp_of(edited).output * -3

    calls, edited = Counting.calls, LanguageModel(module, tokenizer=tokenizer).edit(edit)
    assert torch.equal(edited.generate(P, **options), expected)
    with NNsight(module).edit(edit).trace(**inputs, **options, fn="generate") as tracer:
        read = [mlp_of(tracer.model).output for _step in tracer.iter[:]]
        assert torch.equal(tracer.result, expected)
    for one, other in zip(read, seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert Counting.calls == calls


def test_what_is_compiled_on_an_accelerator_is_as_compiled_afterwards(accelerator, tokenizer):
    module = tiny.build("llama").to(accelerator)
    inputs, options = tokenizer(P, return_tensors="pt").to(accelerator), {**OPTIONS, "cache_implementation": "static"}
    seen, eager = hooked(module, **inputs, **options)

    def compiled():
        with torch.compiler.set_stance("fail_on_recompile"):
            return module.generate(**inputs, **options)

    for _ in range(2):
        module.generate(**inputs, **options)
    before = compiled()
    model = LanguageModel(module, tokenizer=tokenizer)
    with model.generate(P, **options) as tracer:
        read = [mlp_of(model).output for _step in tracer.iter[:]]
        assert torch.equal(tracer.result, eager)
    assert all(map(torch.equal, read, seen))
    assert len(read) == len(seen) == 5
    assert torch.equal(compiled(), before)
