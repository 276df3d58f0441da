"""State spaces and hybrids: generation steps, what is carried from step to step, edits, and rows."""

from functools import cache

import pytest
import tiny
import torch
import transformers

from comparing import same
from nnsight import LanguageModel
from nnsight.errors import NotOnThisLayerError

NEWEST = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 10)
_HYBRID = {
    "vocab_size": 320,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 2,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
CONFIGS = {
    "mamba": tiny.CONFIGS["mamba"],
    "jamba": lambda: transformers.JambaConfig(**_HYBRID),
}
PROMPT = "Rome is in"
OPTIONS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
every = pytest.mark.parametrize("name", CONFIGS)


@cache
def model_of(name):
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return LanguageModel(module, tokenizer=tiny.make_tokenizer())


def generated(name, path=None):
    """By plain transformers, with what one module returns doubled."""
    model = model_of(name)

    def double(_, __, output):
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    handle = None if path is None else model._module.get_submodule(path).register_forward_hook(double)
    try:
        ids = model.tokenizer(PROMPT, return_tensors="pt")
        return model._module.generate(**ids, **OPTIONS, pad_token_id=1)
    finally:
        if handle is not None:
            handle.remove()


@every
def test_each_step_has_its_own_token_and_the_result_is_the_plain_one(name):
    model = model_of(name)
    with model.generate(PROMPT, **OPTIONS) as tracer:
        steps = [(model.layers[0].attn.output, model.layers[-1].output, model.logits) for _ in tracer.iter[:]]
        result = tracer.result
    same(result, generated(name))
    assert [mixed.shape[1] for mixed, _, _ in steps] == [4, 1, 1]
    for step, (_, last, logits) in enumerate(steps):
        torch.testing.assert_close(model.project(last)[:, -1], logits[:, -1], rtol=1e-4, atol=1e-5)
        assert logits[0, -1].argmax() == result[0, 4 + step]


@every
def test_a_write_in_each_step_and_an_edit_are_what_a_plain_hook_does(name):
    model = model_of(name)
    expected = generated(name, model.uniform._layout.layers[0].path)
    with model.generate(PROMPT, **OPTIONS) as tracer:
        for _ in tracer.iter[:]:
            model.layers[0].output = model.layers[0].output * 2
        written = tracer.result
    with model.edit() as edited:
        model.layers[0].output = model.layers[0].output * 2
    same(written, expected)
    same(edited.generate(PROMPT, **OPTIONS), expected)
    same(model.generate(PROMPT, **OPTIONS), generated(name))


@every
def test_a_cache_of_the_tracer_has_the_layers_of_each_step(name):
    model = model_of(name)
    path = model.uniform._layout.layers[1].path
    with model.generate(PROMPT, **OPTIONS) as tracer:
        cache = tracer.cache(modules=[model.get(path)])
        outputs = [model.layers[1].output for _ in tracer.iter[:]]
    for whole, output in zip(cache[path].outputs, outputs, strict=True):
        same(whole[0] if isinstance(whole, tuple) else whole, output)


@pytest.mark.skipif(not NEWEST, reason="these states want a `cache_position` in older transformers")
@every
def test_a_state_from_one_run_is_gone_on_from_in_the_next(name):
    model = model_of(name)
    before, after = model.tokenizer("Rome is")["input_ids"], model.tokenizer(" in")["input_ids"]
    output = model.trace([before], use_cache=True, trace=False)
    kind = "cache_params" if name == "mamba" else "past_key_values"
    with model.trace([after], **{kind: output[kind]}, use_cache=True):
        went_on = model.layers[-1].output
    with model.trace([before + after]):
        whole = model.layers[-1].output
    torch.testing.assert_close(went_on[:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not NEWEST, reason="a hybrid's own cache can't be measured in older transformers")
@every
def test_each_row_of_a_generation_is_its_prompt_alone(name):
    model = model_of(name)
    prompts = [PROMPT, "The city"]
    alone = []
    for prompt in prompts:
        with model.generate(prompt, **OPTIONS) as tracer:
            alone.append([model.layers[0].attn.output for _ in tracer.iter[:]])
    with model.generate(prompts, **OPTIONS) as (a, b):
        steps = [[row.layers[0].attn.output for row in (a, b)] for _ in a.tracer.iter[:]]
    for i in range(2):
        for step in range(3):
            torch.testing.assert_close(steps[step][i], alone[i][step], rtol=1e-4, atol=1e-5)


def test_which_layers_attend_and_which_have_a_state():
    hybrid = model_of("jamba")
    assert [layer.index for layer in hybrid.layers.having("attn.pattern")] == [1, 3]
    assert len(hybrid.layers.having("attn")) == 4
    with hybrid.trace(PROMPT), pytest.raises(NotOnThisLayerError, match=r"Layer 0.*no `attn\.pattern`"):
        hybrid.layers[0].attn.pattern
    assert len(model_of("mamba").layers.having("mlp")) == 0
