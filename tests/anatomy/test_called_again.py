"""Layers that are calls of one module, as in ALBERT: `layers[i]` is its call `i`."""

import operator

import pytest
import torch
from transformers import AlbertConfig, AlbertForMaskedLM, GPT2Config, GPT2LMHeadModel

import nnsight
from nnsight.errors import (
    AlreadyPastError,
    CalledFewerTimesError,
    NeverCalledError,
    NotCachedError,
    OutOfOrderError,
)

SIZES = {"vocab_size": 67, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 32}
COUNTS = {"num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 32}
IDS = torch.arange(1, 8)[None]
LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0"


def albert(**more):
    torch.manual_seed(0)
    return AlbertForMaskedLM(AlbertConfig(**{**SIZES, **COUNTS, **more})).eval()


class Looped(GPT2LMHeadModel):
    """A GPT-2 in which one block is all layers."""

    def __init__(self, config):
        super().__init__(config)
        self.transformer.h = torch.nn.ModuleList([self.transformer.h[0]] * config.n_layer)


@pytest.fixture(scope="module")
def module():
    return albert()


@pytest.fixture(scope="module")
def model(module):
    return nnsight.LanguageModel(module)


def calls_of(module, path, ids=IDS):
    """What each call of a module returned, by a plain hook, and the model's output."""
    found = []
    hook = module.get_submodule(path).register_forward_hook(lambda _, __, output: found.append(output))
    try:
        with torch.no_grad():
            logits = module(ids).logits
    finally:
        hook.remove()
    return found, logits


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"num_hidden_groups": 2}, {"inner_group_num": 2}], ids=str)
def test_all_is_verified(more):
    report = nnsight.verify(nnsight.LanguageModel(albert(**more)))
    assert report, report
    assert sum(check.passed is not None for check in report.checks) >= 13


@pytest.mark.parametrize(
    ("more", "paths"),
    [
        ({}, [LAYER] * 4),
        ({"num_hidden_groups": 2}, [LAYER] * 2 + [LAYER.replace("groups.0", "groups.1")] * 2),
        ({"inner_group_num": 2}, [LAYER, LAYER.replace("layers.0", "layers.1")] * 4),
    ],
    ids=str,
)
def test_a_layer_is_a_call_in_the_order_of_the_forward(more, paths):
    module = albert(**more)
    model = nnsight.LanguageModel(module)
    with model.trace(IDS), torch.no_grad():
        outputs = [layer.output for layer in model.layers]
    each = {path: calls_of(module, path)[0] for path in paths}
    assert model.n_layers == len(paths) == len(outputs)
    assert all(torch.equal(output, each[path].pop(0)) for output, path in zip(outputs, paths, strict=True))


@pytest.mark.parametrize(("name", "inner"), [("attn", "attention.dense"), ("mlp", "ffn_output")])
def test_parts_are_of_the_same_call(model, module, name, inner):
    with model.trace(IDS), torch.no_grad():
        third = getattr(model.layers[2], name).output
    assert torch.equal(third, calls_of(module, f"{LAYER}.{inner}")[0][2])


def test_what_is_inside_attention_is_of_the_same_call(model, module):
    with model.trace(IDS), torch.no_grad():
        q, z, pattern = (getattr(model.layers[i].attn, name) for i, name in ((1, "q"), (2, "z"), (3, "pattern")))
    queries = calls_of(module, f"{LAYER}.attention.query")[0]
    given = []
    hook = module.get_submodule(f"{LAYER}.attention.dense").register_forward_pre_hook(
        lambda _, args: given.append(*args)
    )
    with torch.no_grad():
        module(IDS)
    hook.remove()
    assert torch.equal(q.flatten(2), queries[1])
    assert torch.equal(z.flatten(2), given[2])
    assert pattern.shape == (1, 4, 7, 7)


def only_in_call(number, change):
    """A hook that changes what one call of its module returns."""
    count = 0

    def hook(_, __, output):
        nonlocal count
        count += 1
        return change(output) if count == number + 1 else None

    return hook


@pytest.mark.parametrize(
    ("name", "path"),
    [("output", LAYER), ("attn.output", f"{LAYER}.attention.dense"), ("mlp.output", f"{LAYER}.ffn_output")],
)
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_write_is_of_one_call_alone(model, module, name, path, layer):
    site = model.site(f"layers.{layer}.{name}")
    with model.trace(IDS), torch.no_grad():
        site.value = site.value * 2
        written = model.logits
    hook = module.get_submodule(path).register_forward_hook(only_in_call(layer, lambda output: output * 2))
    with torch.no_grad():
        by_hand = module(IDS).logits
    hook.remove()
    assert torch.equal(written, by_hand)
    assert not torch.equal(written, calls_of(module, LAYER)[1])


def test_changes_in_place_inside_reach_one_call(model, module):
    with model.trace(IDS), torch.no_grad():
        model.layers[2].mlp.act[..., 3] = 5
        changed = model.logits

    def change(output):
        output[..., 3] = 5
        return output

    hook = module.get_submodule(f"{LAYER}.activation").register_forward_hook(only_in_call(2, change))
    with torch.no_grad():
        by_hand = module(IDS).logits
    hook.remove()
    assert torch.equal(changed, by_hand)


def test_what_is_past_is_not_taken_from_a_later_call(model, module):
    outputs = calls_of(module, LAYER)[0]
    with model.trace(IDS), torch.no_grad():
        later = model.layers[1].mlp.output
        with pytest.raises(AlreadyPastError, match=r"of `layers\[1\]` is past"):
            model.layers[1].attn.output
        with pytest.raises(AlreadyPastError, match=r"`layers\[0\]` is past"):
            model.layers[0].output
        after = model.layers[1].output, model.layers[2].output
    assert later.shape == (1, 7, 16)
    assert torch.equal(after[0], outputs[1])
    assert torch.equal(after[1], outputs[2])


@pytest.mark.parametrize("name", ["attn.q", "mlp.output", "raw.ffn.input"])
def test_what_is_inside_a_call_is_past_at_its_output(model, module, name):
    with model.trace(IDS), torch.no_grad():
        first = model.layers[1].output
        with pytest.raises(AlreadyPastError, match=r"of `layers\[1\]` is past"):
            operator.attrgetter(name)(model.layers[1])
        second = model.layers[2].mlp.output
    assert torch.equal(first, calls_of(module, LAYER)[0][1])
    assert torch.equal(second, calls_of(module, f"{LAYER}.ffn_output")[0][2])


def test_what_a_skipped_call_did_not_call_is_no_past(model):
    with model.trace(IDS):
        model.layers[1].skip(model.layers[1].input)
        with pytest.raises(NeverCalledError, match=r"has no value: `layers\[1\]` was skipped"):
            model.layers[1].mlp.output


def test_a_cache_keeps_all_calls_and_is_not_asked_for_one(model, module):
    with model.trace(IDS) as tracer, torch.no_grad():
        cache = tracer.cache()
        with pytest.raises(NotCachedError, match=r"`layers\[2\]` is call 3 of"):
            tracer.cache(model.layers[2])
    with pytest.raises(NotCachedError, match=r"outputs, of all its calls"):
        cache[model.layers[2]]
    assert all(map(torch.equal, cache[LAYER].outputs, calls_of(module, LAYER)[0]))


def test_what_stands_before_the_layers_may_be_read_first(model, module):
    with model.trace(IDS), torch.no_grad():
        model.albert.embeddings.output
        third = model.layers[2].output
    assert torch.equal(third, calls_of(module, LAYER)[0][2])


def test_all_modules_in_a_layer_are_of_its_call(model, module):
    with model.trace(IDS), torch.no_grad():
        found = {scope.path: scope.output for scope in model.layers[2].raw.modules() if scope.path.endswith("ffn")}
    assert torch.equal(found[f"model.{LAYER}.ffn"], calls_of(module, f"{LAYER}.ffn")[0][2])


def test_a_call_that_was_not_counted_is_refused(model):
    with model.trace(IDS):
        model.get(LAYER).output
        with pytest.raises(OutOfOrderError, match="which one the run is in isn't known"):
            model.layers[2].output


def test_a_call_that_never_comes_is_told(module):
    model = nnsight.LanguageModel(module)
    assert model.n_layers == 4
    module.config.num_hidden_layers = 2
    try:
        with model.trace(IDS), pytest.raises(CalledFewerTimesError, match="was called 2 times"):
            model.layers[3].output
    finally:
        module.config.num_hidden_layers = 4


def test_the_layers_own_names_are_of_its_call(model, module):
    with model.trace(IDS), torch.no_grad():
        own = model.layers[1].ffn.output, model.layers[2].raw.attention.output[0]
        with pytest.raises(AlreadyPastError):
            model.layers[2].raw.attention.query.output
        model.layers[3].skip(model.layers[3].input)
        skipped = model.layers[3].output
    assert torch.equal(own[0], calls_of(module, f"{LAYER}.ffn")[0][1])
    assert torch.equal(own[1], calls_of(module, f"{LAYER}.attention")[0][2][0])
    assert torch.equal(skipped, calls_of(module, LAYER)[0][2])


def test_rows_and_invokes_have_their_parts_of_a_call(model, module):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    with model.trace(prompts) as (a, b), torch.no_grad():
        rows = [(a.layers[i].attn.output, b.layers[i].attn.output) for i in range(4)]
        b.layers[3].output = b.layers[3].output * 0
        logits = a.logits
    with model.trace() as tracer, torch.no_grad():
        with tracer.invoke(prompts[0]):
            first = model.layers[2].attn.output
        with tracer.invoke(prompts[1]):
            model.layers[1].output = model.layers[1].output * 0
            second = model.layers[2].input
    alone, own_logits = calls_of(module, f"{LAYER}.attention.dense", torch.tensor(prompts[:1]))
    torch.testing.assert_close(rows[2][0], alone[2])
    torch.testing.assert_close(logits, own_logits)
    torch.testing.assert_close(first, alone[2])
    assert rows[2][1].shape == (1, 5, 16)
    assert not second.any()


def test_an_invoke_that_comes_too_late_is_told(model):
    with pytest.raises(AlreadyPastError, match=r"of `layers\[2\]` is past"), model.trace() as tracer:
        with tracer.invoke([1, 2, 3]):
            model.layers[2].mlp.output
            model.layers[2].attn.output
        with tracer.invoke([4, 5, 6]):
            model.layers[3].output


def test_edits_of_one_call_stay(model):
    with model.edit() as edited:
        edited.layers[1].output = edited.layers[1].output * 0
        edited.layers[2].mlp.output = edited.layers[2].mlp.output * 2
    with model.trace(IDS), torch.no_grad():
        model.layers[1].output = model.layers[1].output * 0
        model.layers[2].mlp.output = model.layers[2].mlp.output * 2
        once = model.logits
    for _ in range(2):
        with edited.trace(IDS), torch.no_grad():
            seen, again = edited.layers[1].output, edited.logits
        assert not seen.any()
        assert torch.equal(again, once)


def test_scans_and_lockstep_runs_count_for_themselves(model, module):
    with model.scan(IDS):
        shapes = [layer.attn.z.shape for layer in model.layers]
    with model.trace(IDS) as one, model.trace(IDS + 1) as other, torch.no_grad():
        for i in range(4):
            other.uniform.layers[i].output = one.uniform.layers[i].output
        logits = other.logits
    assert shapes == [(1, 7, 4, 4)] * 4
    assert torch.equal(logits, calls_of(module, LAYER)[1])


def test_a_gradient_is_of_one_call(model, module):
    with model.trace(IDS):
        stream = model.layers[1].output
        with model.logits.sum().backward():
            gradient = stream.grad
    kept = []

    def keep(_, __, output):
        output.retain_grad()
        kept.append(output)

    hook = module.get_submodule(LAYER).register_forward_hook(keep)
    module(IDS).logits.sum().backward()
    hook.remove()
    assert torch.equal(gradient, kept[1].grad)


def test_nothing_is_left_on_the_model(model, module):
    with model.trace(IDS):
        model.layers[2].mlp.output
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in module.modules())


def test_each_step_of_a_generation_counts_anew():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=67, n_embd=16, n_layer=3, n_head=4, n_positions=32, use_cache=False)
    module = Looped(config).eval()
    model = nnsight.LanguageModel(module)
    assert model.n_layers == 3
    found = []
    with model.generate(IDS, max_new_tokens=3, use_cache=False, do_sample=False) as tracer, torch.no_grad():
        for step in tracer.iter[:]:
            attn = model.layers[1].attn.output
            if step == 1:
                model.layers[2].output = model.layers[2].output * 1
                with pytest.raises(AlreadyPastError):
                    model.layers[0].output
            found.append((attn, model.layers[2].output))
        result = tracer.result
    assert len(found) == 3
    for i, (attn, last) in enumerate(found):
        ids = result[:, : 7 + i]
        assert torch.equal(attn, calls_of(module, "transformer.h.0.attn", ids)[0][1][0])
        outputs = calls_of(module, "transformer.h.0", ids)[0]
        assert torch.equal(last, outputs[2] if isinstance(outputs[2], torch.Tensor) else outputs[2][0])


def test_layers_that_are_calls_of_one_module_equal_themselves_and_not_each_other(model):
    layers = model.layers
    assert layers[0] == layers[0] != layers[1]
    assert layers[1].attn == layers[1].attn != layers[0].attn
    assert layers[1].raw == layers[1].raw != layers[0].raw
    assert {layers[1]: 1}[layers[1]] == 1
