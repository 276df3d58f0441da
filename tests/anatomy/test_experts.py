"""Routers and experts under uniform names, against plain torch hooks and experts computed by hand."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from architectures import NEWEST, quietly
from torch import nn
from torch.nn import functional
from transformers import CONFIG_MAPPING

import nnsight
from nnsight import LanguageModel
from nnsight.anatomy.tiny import tiny_ids, tiny_model
from nnsight.errors import (
    AlreadyPastError,
    BlockError,
    NotOnThisLayerError,
    UnknownIndexError,
    UnknownNameError,
    WriteError,
)

# The block of the layer that is a mixture, its experts below it, and the router's matrix.
WHERE = {
    "mixtral": ("model.layers.1.mlp", "gate"),
    "olmoe": ("model.layers.1.mlp", "gate"),
    "qwen2_moe": ("model.layers.1.mlp", "gate"),
    "qwen3_moe": ("model.layers.1.mlp", "gate"),
    "deepseek_v3": ("model.layers.1.mlp", "gate"),
    "gpt_oss": ("model.layers.1.mlp", "router"),
    "afmoe": ("model.layers.1.mlp", "router.gate"),
    "jamba": ("model.layers.1.feed_forward", "router"),
    "minimax": ("model.layers.1.mlp", "gate"),
    "phimoe": ("model.layers.1.mlp", "router"),
}
SHARED = {"qwen2_moe": "shared_expert", "deepseek_v3": "shared_experts", "afmoe": "shared_experts"}
OPTIONS = {"deepseek_v3": {"first_k_dense_replace": 1}, "afmoe": {"num_dense_layers": 1}}
NORMED = ["afmoe"]  # a norm stands between the sum and the stream
FAMILIES = list(WHERE)


@cache
def model_of(name: str) -> LanguageModel:
    return quietly(name, **OPTIONS.get(name, {}))


def trace(model, *prompts):
    ids, others = tiny_ids(model._module)
    return model.trace(list(prompts) or ids, **others)


def mlp_of(model):
    return model.uniform.layers[1].mlp


def by_hand(name, change=None, pre=None):
    """What passes the experts' module, by plain hooks: its inputs, its output, and the logits.

    `pre` may change the inputs, and `change` the output.
    """
    model, (block, _) = model_of(name), WHERE[name]
    ids, others = tiny_ids(model._module)
    experts, seen = model._module.get_submodule(f"{block}.experts"), {}

    def before(_, args):
        seen["hidden"], seen["chosen"], seen["weights"] = args
        return None if pre is None else pre(*args)

    def after(_, args, output):
        seen["sum"] = output.clone()
        return None if change is None else change(output)

    handles = [experts.register_forward_pre_hook(before), experts.register_forward_hook(after)]
    try:
        with torch.no_grad():
            logits = model._module(ids, **others).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, seen


def expert_by_hand(name, number):
    """What one expert adds, [prompt * token, model], of its own weights."""
    model, (block, _) = model_of(name), WHERE[name]
    _, seen = by_hand(name)
    experts = model._module.get_submodule(f"{block}.experts")
    hidden = seen["hidden"].flatten(0, -2)
    chosen, weights = seen["chosen"].flatten(0, -2), seen["weights"].flatten(0, -2)
    own = (weights * (chosen == number)).sum(-1, keepdim=True)
    with torch.no_grad():
        if isinstance(experts, nn.ModuleList):
            return experts[number](hidden) * own
        gate_up, down = experts.gate_up_proj[number], experts.down_proj[number]
        if name == "gpt_oss":
            both = hidden @ gate_up + experts.gate_up_proj_bias[number]
            gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
            made = ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ down + experts.down_proj_bias[number]
            return made * own
        gate, up = functional.linear(hidden, gate_up).chunk(2, -1)
        return functional.linear(experts.act_fn(gate) * up, down) * own


@pytest.mark.parametrize("name", FAMILIES)
def test_chosen_and_their_weights_are_what_the_experts_are_given(name):
    model = model_of(name)
    _, seen = by_hand(name)
    with torch.no_grad(), trace(model):
        chosen, weights = mlp_of(model).chosen, mlp_of(model).routing_weights
    assert chosen.shape == weights.shape
    assert chosen.shape[:2] == (2, 7)
    assert torch.equal(chosen, seen["chosen"].reshape(chosen.shape))
    assert torch.equal(weights, seen["weights"].reshape(weights.shape))


@pytest.mark.parametrize("name", FAMILIES)
def test_router_logits_are_the_routers_product(name):
    model, (block, router) = model_of(name), WHERE[name]
    router = model._module.get_submodule(f"{block}.{router}")
    with torch.no_grad(), trace(model):
        given = model.get(block).input.clone() if name != "minimax" else mlp_of(model).input.clone()
        logits = mlp_of(model).router_logits
    expected = functional.linear(given.flatten(0, 1), router.weight, getattr(router, "bias", None))
    assert logits.shape == (2, 7, 4)
    assert torch.equal(logits.flatten(0, 1), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_router_logits_that_are_assigned_choose(name):
    model = model_of(name)
    untouched, _ = by_hand(name)
    with torch.no_grad(), trace(model):
        logits = mlp_of(model).router_logits
        new = logits.clone()
        new[..., 2] = logits.abs().max() * 2
        mlp_of(model).router_logits = new
        assigned, after = mlp_of(model).chosen.clone(), model.logits
    with torch.no_grad(), trace(model):
        logits = mlp_of(model).router_logits
        logits[..., 2] = logits.abs().max() * 2
        in_place, same = mlp_of(model).chosen.clone(), model.logits
    if name != "deepseek_v3":  # which chooses among groups first
        assert bool((assigned == 2).any(-1).all())
    assert torch.equal(in_place, assigned)
    assert torch.equal(same, after)
    assert not torch.equal(after, untouched)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_assigned_to_chosen_and_weights_reaches_the_experts(name):
    model = model_of(name)

    def turned(hidden, chosen, weights):
        return hidden, (chosen + 1) % 4, weights.flip(-1) * 2

    expected, _ = by_hand(name, pre=turned)
    with torch.no_grad(), trace(model):
        mlp = mlp_of(model)
        mlp.chosen = (mlp.chosen + 1) % 4
        mlp.routing_weights = mlp.routing_weights.flip(-1) * 2
        logits = model.logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_expert_adds_what_its_own_weights_make_times_its_weight(name):
    model = model_of(name)
    assert len(mlp_of(model).experts) == 4
    with torch.no_grad(), trace(model):
        chosen = mlp_of(model).chosen
        outputs = [expert.output for expert in mlp_of(model).experts]
    for number, output in enumerate(outputs):
        expected = expert_by_hand(name, number).reshape(output.shape)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        assert bool((output[~(chosen == number).any(-1)] == 0).all())


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_and_what_is_shared_add_up_to_what_the_mlp_adds(name):
    model = model_of(name)
    block = WHERE[name][0]
    with torch.no_grad(), trace(model):
        total = sum(expert.output for expert in mlp_of(model).experts)
        whole = model.get(block).output.clone() if name in NORMED else mlp_of(model).output.clone()
    if name in SHARED:
        with torch.no_grad(), trace(model):
            total = total + mlp_of(model).shared.output
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_without_one_expert_the_model_goes_on_with_the_others(name):
    model = model_of(name)
    alone = expert_by_hand(name, 1)
    expected, _ = by_hand(name, lambda output: output - alone.reshape(output.shape))
    untouched, _ = by_hand(name)
    results = []
    for way in ("assigned", "in place", "times"):
        with torch.no_grad(), trace(model):
            expert = mlp_of(model).experts[1]
            if way == "assigned":
                expert.output = torch.zeros_like(expert.output)
            elif way == "in place":
                expert.output[:] = 0
            else:
                expert.output *= 0
            results.append(model.logits)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.allclose(results[0], untouched)
    torch.testing.assert_close(results[0], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_writing_back_what_is_inside_a_mixture_changes_nothing(name):
    model = model_of(name)
    untouched, _ = by_hand(name)
    with torch.no_grad(), trace(model):
        mlp = mlp_of(model)
        mlp.router_logits = mlp.router_logits
        mlp.chosen = mlp.chosen
        mlp.routing_weights = mlp.routing_weights
        for expert in mlp.experts:
            expert.output = expert.output
        for expert in mlp.experts:
            expert.output += 0
        logits = model.logits
    assert torch.equal(logits, untouched)
    if name in SHARED:
        with torch.no_grad(), trace(model):
            mlp_of(model).shared.output = mlp_of(model).shared.output
            assert torch.equal(model.logits, untouched)


def test_several_experts_are_changed_in_one_place():
    model = model_of("mixtral")
    first, second = (expert_by_hand("mixtral", number).reshape(2, 7, -1) for number in (0, 3))
    with torch.no_grad(), trace(model):
        untouched = mlp_of(model).output.clone()
    with torch.no_grad(), trace(model):
        mlp = mlp_of(model)
        one, other = mlp.experts[0].output, mlp.experts[3].output
        one *= 2
        other[:, 2] = 1
        mlp.experts[0].output += 1
        changed = mlp.output
    other = second.clone()
    other[:, 2] = 1
    torch.testing.assert_close(changed, untouched + first + 1 + other - second)


def test_what_was_assigned_to_an_expert_is_what_is_read():
    model = model_of("mixtral")
    new = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), trace(model):
        expert = mlp_of(model).experts[0]
        expert.output = new
        assert torch.equal(expert.output, new)
        expert.output[:] = 3
        assert bool((expert.output == 3).all())


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", *["afmoe"] * NEWEST])  # older ones can't be measured
def test_a_row_has_the_routing_and_the_experts_of_its_own_prompt(name):
    model = model_of(name)
    ids, _ = tiny_ids(model._module)
    prompts = [ids[0].tolist(), ids[1, :4].tolist()]

    def values(mlp):
        yield mlp.router_logits
        yield mlp.chosen
        yield mlp.routing_weights
        yield mlp.experts[0].output
        yield mlp.experts[1].output

    alone = []
    for prompt in prompts:
        with torch.no_grad(), trace(model, prompt) as tracer:
            alone.append([value.clone() for value in values(mlp_of(tracer))])
    with torch.no_grad(), trace(model, *prompts) as (one, other):
        found = [list(pair) for pair in zip(values(mlp_of(one)), values(mlp_of(other)), strict=True)]
    for expected, *pair in zip(zip(*alone, strict=True), found, strict=True):
        for ours, theirs in zip(pair[0], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_rows_expert_is_changed_in_that_row_alone():
    model = model_of("mixtral")
    ids, _ = tiny_ids(model._module)
    prompts = [ids[0].tolist(), ids[1, :4].tolist()]

    def change(mlp):
        mlp.router_logits = mlp.router_logits.flip(-1)
        mlp.experts[1].output[:, -1] = 0
        mlp.experts[2].output = mlp.experts[2].output * 2

    with torch.no_grad(), trace(model, prompts[0]):
        untouched = model.logits
    with torch.no_grad(), trace(model, prompts[1]):
        change(mlp_of(model))
        changed = model.logits
    with torch.no_grad(), trace(model, *prompts) as (one, other):
        change(mlp_of(other))
        logits = one.uniform.logits, other.uniform.logits
    torch.testing.assert_close(logits[0], untouched, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], changed, rtol=1e-4, atol=1e-4)


def test_invokes_have_their_own():
    model = model_of("mixtral")
    ids, others = tiny_ids(model._module)
    with torch.no_grad(), model.trace(**others) as tracer:
        with tracer.invoke([ids[0].tolist()]):
            first = mlp_of(model).router_logits.save()
        with tracer.invoke([ids[1, :4].tolist()]):
            second = mlp_of(model).router_logits.save()
            mlp_of(model).experts[0].output[:] = 0
            after = mlp_of(model).experts[0].output.save()
    assert first.shape == (1, 7, 4)
    assert second.shape == (1, 4, 4)
    assert not after.any()


def test_in_a_generation_each_step_has_its_own():
    model = model_of("mixtral")
    ids, _ = tiny_ids(model._module)
    shapes = []
    with model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0) as tracer:
        for _ in tracer.iter[:]:
            mlp = mlp_of(model)
            shapes.append([mlp.router_logits.shape[:2], mlp.chosen.shape[:2], mlp.experts[0].output.shape[:2]])
    assert shapes == [[(2, 7)] * 3, [(2, 1)] * 3, [(2, 1)] * 3]


def test_an_edit_leaves_an_expert_out_for_good():
    model = model_of("mixtral")
    with model.edit() as edited:
        model.layers[1].mlp.experts[0].output[:] = 0
    with torch.no_grad(), trace(model):
        mlp_of(model).experts[0].output[:] = 0
        expected = model.logits
    with torch.no_grad(), trace(edited):
        assert torch.equal(edited.logits, expected)
    with torch.no_grad(), trace(model):
        assert not torch.equal(model.logits, expected)


def test_a_scan_has_the_shapes():
    model = model_of("mixtral")
    ids, others = tiny_ids(model._module)
    with model.scan(ids, **others):
        mlp = mlp_of(model)
        shapes = [mlp.router_logits.shape, mlp.chosen.shape, mlp.experts[0].output.shape]
    assert shapes == [(2, 7, 4), (2, 7, 2), (2, 7, 32)]


def test_an_experts_output_has_the_gradient_of_what_is_added():
    model = model_of("mixtral")
    with trace(model):
        untouched = model.logits
    with trace(model):
        logits = mlp_of(model).router_logits
        expert, output = mlp_of(model).experts[0].output, mlp_of(model).output
        passed = model.logits
        with passed.sum().backward():
            of_output, of_expert, of_logits = output.grad, expert.grad, logits.grad
    assert torch.equal(passed, untouched)
    assert torch.equal(of_expert, of_output)
    assert bool(of_expert.any())
    with trace(model):
        logits = mlp_of(model).router_logits
        with model.logits.sum().backward():
            alone = logits.grad
    torch.testing.assert_close(of_logits, alone, rtol=1e-4, atol=1e-4)


def test_what_is_shared_has_a_gradient_where_it_is_the_rest_of_a_sum():
    model = model_of("qwen2_moe")
    with trace(model):
        shared, output = mlp_of(model).shared.output, mlp_of(model).output
        with model.logits.sum().backward():
            of_output, of_shared = output.grad, shared.grad
    torch.testing.assert_close(of_shared, of_output)


@pytest.mark.parametrize("name", SHARED)
def test_without_what_is_shared_the_chosen_experts_are_left(name):
    model, block = model_of(name), WHERE[name][0]
    with torch.no_grad(), trace(model):
        mlp_of(model).shared.output = torch.zeros(2, 7, 32 if name != "deepseek_v3" else 40)
        left = model.get(block).output.clone()
        logits = model.logits
    expected, seen = by_hand(name)
    torch.testing.assert_close(left.flatten(0, 1), seen["sum"].flatten(0, -2), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, expected)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_all_implementations_have_the_same_experts(implementation):
    model = model_of("mixtral")
    with torch.no_grad(), trace(model):
        expected = [expert.output.clone() for expert in mlp_of(model).experts]
    other = LanguageModel(tiny_model(CONFIG_MAPPING["mixtral"](), n_layers=3))
    other._module.set_experts_implementation(implementation)
    with torch.no_grad(), trace(other):
        outputs = [expert.output.clone() for expert in mlp_of(other).experts]
        mlp_of(other).experts[1].output[:] = 0
        without = mlp_of(other).output
    for output, known in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, known)
    torch.testing.assert_close(without, sum(expected) - expected[1])


def test_a_model_of_both_kinds_of_layers_says_which_has_what():
    model = model_of("deepseek_v3")
    assert [layer.index for layer in model.layers.having("mlp.experts")] == [1, 2]
    assert [layer.index for layer in model.layers.having("mlp.pre")] == [0]
    assert [layer.index for layer in model.layers.having("mlp.shared.output")] == [1, 2]
    with pytest.raises(NotOnThisLayerError, match=r"Layer 0, `model.layers.0`, has no `mlp.experts`: it is no mixture"):
        _ = model.layers[0].mlp.experts
    with pytest.raises(NotOnThisLayerError, match=r"has no `mlp.act`: it is a mixture of experts"):
        _ = model.layers[1].mlp.act
    with pytest.raises(NotOnThisLayerError, match=r"has no `mlp.shared`: its experts are all that it adds"):
        _ = model_of("mixtral").layers[0].mlp.shared


def test_sites_have_routers_and_a_single_expert_is_found_by_its_number():
    model = model_of("mixtral")
    names = [site.name for site in model.sites() if site.name.startswith("layers.1.mlp")]
    assert names == [f"layers.1.mlp.{one}" for one in ("input", "router_logits", "chosen", "routing_weights", "output")]
    with torch.no_grad(), trace(model):
        output = model.site("layers[1].mlp.experts.2.output").value
        assert output is mlp_of(model).experts[2].output
    assert model.site("blocks.1.mlp.hook_expert_indices").name == "layers.1.mlp.chosen"
    assert not model.layers[1].has("mlp.experts.4.output")
    assert model.layers[1].has("mlp.experts.3.output")


def test_mistakes_with_experts_say_what_to_write():
    model = model_of("mixtral")
    experts = model.layers[1].mlp.experts
    with pytest.raises(UnknownIndexError, match=r"Layer 1 has no expert 4(.|\n)*4 experts: 0 to 3"):
        _ = experts[4]
    with pytest.raises(BlockError, match=r"by its number, not by 'a'(.|\n)*model.layers\[1\].mlp.experts\[3\]$"):
        _ = experts["a"]
    with pytest.raises(BlockError, match=r"`layers\[1\].mlp.experts\[0\]` is no value itself(.|\n)*\[0\].output$"):
        _ = experts[0] * 2
    with pytest.raises(BlockError, match=r"`layers\[1\].mlp.experts\[0\].act` is a value of the model's, which can't"):
        del experts[0].act
    with pytest.raises(UnknownNameError, match=r"`mlp.experts` has no `output`(.|\n)*mlp.experts\[3\].output"):
        _ = experts.output
    with pytest.raises(UnknownNameError, match=r"`mlp.experts\[...\]` has no `weight`"):
        _ = experts[0].weight
    with pytest.raises(UnknownNameError, match=r"`mlp.shared` has no `input`"):
        _ = model_of("qwen2_moe").layers[1].mlp.shared.input
    assert experts[torch.tensor(2)].number == 2
    with pytest.raises(WriteError, match=r"can be assigned(.|\n)*mlp.experts\[1\].output = ..."):
        experts[1] = torch.zeros(2, 7, 32)
    with pytest.raises(WriteError, match=r"`mlp.experts` is not a value that can be assigned"):
        model.layers[1].mlp.experts = 1
    with pytest.raises(WriteError, match=r"`layers\[1\].mlp.experts\[0\].output` has another shape"), trace(model):
        experts[0].output = torch.zeros(2, 7, 3)
    with pytest.raises(WriteError, match=r"`model.layers.1.mlp.gate.router_logits` has another shape"), trace(model):
        mlp_of(model).router_logits = torch.zeros(2, 7, 3)
    with pytest.raises(AlreadyPastError), trace(model):
        _ = mlp_of(model).output
        _ = mlp_of(model).router_logits
    assert repr(experts[-1]) == "layers[1].mlp.experts[3]"
    assert repr(experts) == "layer 1.mlp.experts: 4, computed together in `model.layers.1.mlp.experts`"


def test_a_model_that_is_not_asked_about_its_experts_is_left_alone():
    model = model_of("mixtral")
    untouched, _ = by_hand("mixtral")
    router = model._module.model.layers[1].mlp.gate
    with torch.no_grad(), trace(model):
        _ = mlp_of(model).router_logits
        assert router._forward_hooks
    assert not router._forward_hooks
    assert not router._forward_pre_hooks
    with torch.no_grad(), trace(model):
        assert torch.equal(model.logits, untouched)


def test_experts_that_are_given_every_token_are_parts_of_what_their_module_returns():
    model = LanguageModel(tiny_model(CONFIG_MAPPING["llama4_text"](), n_layers=2))
    block = model._module.model.layers[1].feed_forward
    ids, others = tiny_ids(model._module)
    seen = []
    handle = block.experts.register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    with torch.no_grad():
        untouched = model._module(ids, **others).logits
    handle.remove()
    expected = seen[0].reshape(4, 2, 7, -1)
    with torch.no_grad(), trace(model):
        logits = mlp_of(model).router_logits.clone()
        outputs = [expert.output.clone() for expert in mlp_of(model).experts]
        for expert in mlp_of(model).experts:
            expert.output = expert.output
        assert torch.equal(model.logits, untouched)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True))
    assert all(bool((output[logits.argmax(-1) != at] == 0).all()) for at, output in enumerate(outputs))

    handle = block.experts.register_forward_hook(
        lambda _, __, output: output.reshape(4, -1, 32).index_fill(0, torch.tensor([1, 3]), 0.0).reshape(output.shape)
    )
    with torch.no_grad():
        without = model._module(ids, **others).logits
    handle.remove()
    with torch.no_grad(), trace(model):
        one, other = mlp_of(model).experts[1], mlp_of(model).experts[3]
        one.output = torch.zeros_like(one.output)
        other.output[:] = 0
        assert torch.equal(model.logits, without)
    with torch.no_grad(), trace(model):
        shared = mlp_of(model).shared.output
        total = mlp_of(model).output
    torch.testing.assert_close(sum(outputs) + shared, total)
    assert not model.layers[1].has("mlp.chosen")
    with pytest.raises(NotOnThisLayerError, match="a score for each expert, and no numbers of experts"):
        _ = model.layers[1].mlp.chosen


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("where", ["router_logits", "routing_weights"])
def test_a_rows_routing_is_changed_in_place_where_there_is_a_graph(name, where):
    model = model_of(name)
    ids, _ = tiny_ids(model._module)
    prompts = [ids[0].tolist(), ids[1].tolist()]

    def change(values):
        values[..., 1:3] = 0.25
        values[:, -1] *= 2

    with trace(model, *prompts) as rows:
        new = getattr(mlp_of(rows), where).clone()
        change(new[1:2])
        setattr(mlp_of(rows), where, new)
        expected, of_whole = model.logits, nnsight.grad(model.logits[1, -1].sum(), new)
    with trace(model, *prompts) as (one, other):
        ours, untouched = getattr(mlp_of(other), where), getattr(mlp_of(one), where).clone()
        change(ours)
        assert torch.equal(getattr(mlp_of(one), where), untouched)
        assert torch.equal(getattr(mlp_of(other), where), ours)
        logits, of_row = other.logits, nnsight.grad(other.logits[0, -1].sum(), ours)
    assert torch.equal(logits[0], expected[1])
    assert torch.equal(of_row[0], of_whole[1])
    assert of_row.any()


@pytest.mark.parametrize(("wrong", "given"), [(-1, "int64, -1 to"), (99, "to 99"), (0.5, "float32")])
def test_chosen_are_numbers_of_experts(wrong, given):
    model = model_of("mixtral")
    with pytest.raises(WriteError, match=rf"the numbers of experts, 0 to \d+(.|\n)*{given}"), trace(model):
        chosen = model.layers[1].mlp.chosen.clone()
        chosen = chosen.float() if isinstance(wrong, float) else chosen
        chosen[0, 0, 0] = wrong
        model.layers[1].mlp.chosen = chosen


@pytest.mark.parametrize("wrong", [4, -1])
def test_a_number_of_no_expert_that_is_written_in_place_is_told_before_the_model_goes_on(wrong):
    model = model_of("mixtral")
    with pytest.raises(WriteError, match=r"`mlp\.chosen` has the numbers of experts, 0 to 3") as told, trace(model):
        chosen = mlp_of(model).chosen
        chosen[0, 0, 0] = wrong
        model.logits
    assert "chosen = mlp_of(model).chosen" in "".join(told.value.__notes__)
    with pytest.raises(WriteError, match=r"0 to 3"), trace(model) as (_, row):
        row.uniform.layers[1].mlp.chosen[0, 0, 0] = wrong


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_numbers_of_experts_that_are_written_in_place_are_as_assigned_ones(name):
    model = model_of(name)
    with trace(model), torch.no_grad():
        mlp_of(model).chosen = (mlp_of(model).chosen + 1) % 4
        wanted = model.logits
    with trace(model), torch.no_grad():
        chosen = mlp_of(model).chosen
        chosen[:] = (chosen + 1) % 4
        assert torch.equal(model.logits, wanted)
    with trace(model) as (_, row), torch.no_grad():
        chosen = row.uniform.layers[1].mlp.chosen
        chosen[:] = (chosen + 1) % 4
        torch.testing.assert_close(row.logits, wanted[1:])
