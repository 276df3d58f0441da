"""The neurons of single experts under uniform names, against experts computed by hand and plain torch hooks."""

import pytest
import torch
from test_experts import FAMILIES, NORMED, WHERE, by_hand, expert_by_hand, mlp_of, model_of, trace
from torch import nn
from torch.nn import functional
from transformers import CONFIG_MAPPING

from nnsight import LanguageModel
from nnsight.anatomy.tiny import tiny_ids, tiny_model
from nnsight.errors import NotOnThisLayerError, UnknownNameError, WriteError

NUMBER = 1


def inside_by_hand(name, number=NUMBER):
    """pre and act of one expert for all tokens, [prompt * token, d_mlp], which go to it, and with what weight."""
    model, (block, _) = model_of(name), WHERE[name]
    _, seen = by_hand(name)
    experts, hidden = model._module.get_submodule(f"{block}.experts"), seen["hidden"].flatten(0, -2)
    own = (seen["weights"] * (seen["chosen"] == number)).flatten(0, -2).sum(-1)
    goes = (seen["chosen"] == number).flatten(0, -2).any(-1)
    with torch.no_grad():
        if isinstance(experts, nn.ModuleList):
            one = experts[number]
            pre, up = one.gate_proj(hidden), one.up_proj(hidden)
        elif name == "gpt_oss":
            both = hidden @ experts.gate_up_proj[number] + experts.gate_up_proj_bias[number]
            pre, up = both[..., ::2], both[..., 1::2]
            gate = pre.clamp(max=7.0)
            return pre, (up.clamp(-7.0, 7.0) + 1) * gate * torch.sigmoid(1.702 * gate), goes, own
        else:
            pre, up = functional.linear(hidden, experts.gate_up_proj[number]).chunk(2, -1)
            one = experts
        return pre, one.act_fn(pre) * up, goes, own


@pytest.mark.parametrize("name", FAMILIES)
def test_pre_and_act_are_those_of_the_experts_own_weights(name):
    model = model_of(name)
    with torch.no_grad(), trace(model):
        expert = mlp_of(model).experts[NUMBER]
        act, pre, output = expert.act, expert.pre, expert.output
    pre_by_hand, act_by_hand, goes, own = inside_by_hand(name)
    assert act.shape == pre.shape == (2, 7, act_by_hand.shape[-1])
    for found, expected in ((act, act_by_hand), (pre, pre_by_hand)):
        torch.testing.assert_close(found.flatten(0, 1), expected * goes[:, None], rtol=1e-5, atol=1e-5)
    if name == "gpt_oss":
        return
    made = (act @ mlp_of(model).experts[NUMBER].W_out).flatten(0, 1) * own[:, None]
    factor = output.flatten(0, 1)[goes].norm() / expert_by_hand(name, NUMBER)[goes].norm()
    torch.testing.assert_close(made * factor, output.flatten(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NORMED])
def test_act_that_is_assigned_is_computed_on_from_there(name):
    model = model_of(name)
    _, act, goes, own = inside_by_hand(name)
    with torch.no_grad(), trace(model):
        w_out = mlp_of(model).experts[NUMBER].W_out.clone()
    less = (act[:, 3:4] @ w_out[3:4]) * (own * goes)[:, None]
    expected, _ = by_hand(name, change=lambda total: total - less.reshape(total.shape))
    with torch.no_grad(), trace(model):
        mlp_of(model).experts[NUMBER].act[:, :, 3] = 0
        in_place = model.logits
    with torch.no_grad(), trace(model):
        new = mlp_of(model).experts[NUMBER].act.clone()
        new[:, :, 3] = 0
        mlp_of(model).experts[NUMBER].act = new
        assert torch.equal(mlp_of(model).experts[NUMBER].act, new)
        assigned = model.logits
    torch.testing.assert_close(in_place, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(assigned, in_place)
    assert not torch.equal(assigned, by_hand(name)[0])


def test_pre_that_is_changed_goes_through_the_non_linearity():
    model = model_of("mixtral")
    pre, act, goes, _ = inside_by_hand("mixtral")
    up = act / functional.silu(pre)
    with torch.no_grad(), trace(model):
        expert = mlp_of(model).experts[NUMBER]
        assert expert.act.any()
        expert.pre[..., 2] *= -1
        after = expert.act.clone()
        output = expert.output.clone()
        total = mlp_of(model).output.clone()
    pre[:, 2] *= -1
    expected = functional.silu(pre) * up * goes[:, None]
    torch.testing.assert_close(after.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), trace(model):
        mlp_of(model).experts[NUMBER].output = output
        torch.testing.assert_close(mlp_of(model).output, total)


@pytest.mark.parametrize(("front", "behind"), [("pre", "act"), ("pre", "output"), ("act", "output")])
def test_a_change_that_another_one_in_front_of_it_would_undo_is_refused(front, behind):
    model = model_of("mixtral")
    told = rf"experts\[1\]\.{behind}` was changed before `{front}`[\s\S]*{front} first, and then {behind}"
    with torch.no_grad(), pytest.raises(WriteError, match=told), trace(model):
        expert = mlp_of(model).experts[NUMBER]
        setattr(expert, behind, getattr(expert, behind) * 2)
        setattr(expert, front, getattr(expert, front) * 2)
    with torch.no_grad(), trace(model):
        expert = mlp_of(model).experts[NUMBER]
        setattr(expert, front, getattr(expert, front) * 2)
        setattr(expert, behind, getattr(expert, behind) * 2)


def test_act_that_was_had_before_pre_was_changed_can_not_be_changed_in_place():
    model = model_of("mixtral")
    with torch.no_grad(), pytest.raises(WriteError, match="is of before another change of this expert"), trace(model):
        expert = mlp_of(model).experts[NUMBER]
        act = expert.act
        expert.pre *= 2
        assert expert.act is not act
        act *= 2


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_all_implementations_have_the_same_neurons(name, implementation):
    model = LanguageModel(tiny_model(CONFIG_MAPPING[name](), n_layers=3))
    with torch.no_grad(), trace(model):
        expected = [(expert.act.clone(), expert.pre.clone()) for expert in mlp_of(model).experts]
    with torch.no_grad(), trace(model):
        mlp_of(model).experts[2].pre += (mlp_of(model).chosen == 2).any(-1)[..., None]
        logits = model.logits
    model._module.set_experts_implementation(implementation)
    with torch.no_grad(), trace(model):
        found = [(expert.act.clone(), expert.pre.clone()) for expert in mlp_of(model).experts]
        mlp_of(model).experts[2].pre += (mlp_of(model).chosen == 2).any(-1)[..., None]
        same = model.logits
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_many_tokens_some_of_them_equal_each_have_their_own(implementation):
    """More than sixteen are sorted in any order, and prompts that begin alike have equal tokens."""
    model = LanguageModel(tiny_model(CONFIG_MAPPING["mixtral"](), n_layers=2))
    model._module.set_experts_implementation(implementation)
    ids = torch.randint(3, 60, (2, 64), generator=torch.Generator().manual_seed(0))
    ids[1, :60] = ids[0, :60]
    experts, seen = model._module.model.layers[0].mlp.experts, {}
    handle = experts.register_forward_hook(lambda _, args, out: seen.update(args=args, out=out))
    with torch.no_grad():
        model._module(ids)
    handle.remove()
    hidden, chosen, weights = (one.flatten(0, -2) for one in seen["args"])
    is_chosen = chosen == NUMBER
    gate, up = functional.linear(hidden, experts.gate_up_proj[NUMBER]).chunk(2, -1)
    expected = experts.act_fn(gate) * up * is_chosen.any(-1)[:, None]
    assert is_chosen.any(-1).sum() > 40
    changed = expected.clone()
    changed[:64] = changed[:64] * torch.arange(64)[:, None]  # of the first prompt alone, each token otherwise
    more = (changed - expected) @ experts.down_proj[NUMBER].T * (weights * is_chosen).sum(-1, keepdim=True)
    with torch.no_grad(), model.trace(ids):
        act = model.layers[0].mlp.experts[NUMBER].act
        assert torch.equal(act[0, :60], act[1, :60])
        torch.testing.assert_close(act.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
        model.layers[0].mlp.experts[NUMBER].act = changed.view_as(act)
        total = model.model.layers[0].mlp.experts.output
    torch.testing.assert_close(total.flatten(0, -2), seen["out"].flatten(0, -2) + more, rtol=1e-3, atol=1e-4)


def test_act_has_the_gradient_of_what_it_makes():
    model = model_of("mixtral")
    with trace(model):
        w_out = mlp_of(model).experts[NUMBER].W_out
        weights = (mlp_of(model).routing_weights * (mlp_of(model).chosen == NUMBER)).sum(-1)
        act, output = mlp_of(model).experts[NUMBER].act, mlp_of(model).output
        passed = model.logits
        with passed.sum().backward():
            of_output, of_act = output.grad, act.grad
    assert torch.equal(passed, by_hand("mixtral")[0])
    torch.testing.assert_close(of_act, of_output @ w_out.T * weights[..., None], rtol=1e-4, atol=1e-5)
    assert bool(of_act.any())
    with trace(model):
        logits = mlp_of(model).router_logits
        mlp_of(model).experts[NUMBER].act
        with model.logits.sum().backward():
            with_it = logits.grad
    with trace(model):
        logits = mlp_of(model).router_logits
        with model.logits.sum().backward():
            torch.testing.assert_close(with_it, logits.grad, rtol=1e-4, atol=1e-4)


def test_a_row_has_the_neurons_of_its_own_tokens_and_changes_them_alone():
    model = model_of("mixtral")
    ids, _ = tiny_ids(model._module)
    prompts = [ids[0].tolist(), ids[1, :4].tolist()]
    alone = []
    for prompt in prompts:
        with torch.no_grad(), trace(model, prompt):
            alone.append((mlp_of(model).experts[NUMBER].act.clone(), model.logits))
    with torch.no_grad(), trace(model, prompts[1]):
        mlp_of(model).experts[NUMBER].act *= 3
        changed = model.logits
    with torch.no_grad(), trace(model, *prompts) as (one, other):
        acts = [mlp_of(row).experts[NUMBER].act.clone() for row in (one, other)]
        mlp_of(other).experts[NUMBER].act *= 3
        logits = one.uniform.logits, other.uniform.logits
    for found, (expected, _) in zip(acts, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[0], alone[0][1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], changed, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(changed, alone[1][1], rtol=1e-4, atol=1e-4)


def test_an_edit_and_a_scan_have_them_too():
    model = model_of("mixtral")
    ids, others = tiny_ids(model._module)
    with model.scan(ids, **others):
        shapes = [mlp_of(model).experts[NUMBER].act.shape, mlp_of(model).experts[NUMBER].pre.shape]
    assert shapes == [(2, 7, mlp_of(model).experts[NUMBER].W_out.shape[0])] * 2
    with torch.no_grad(), trace(model):
        mlp_of(model).experts[NUMBER].act *= 0
        expected = model.logits
    with model.edit() as edited:
        mlp_of(edited).experts[NUMBER].act *= 0
    with torch.no_grad(), trace(edited):
        assert torch.equal(edited.logits, expected)
    site = model.site(f"layers.1.mlp.experts.{NUMBER}.act")
    assert site.axes == ("prompt", "token", "d_mlp")
    with torch.no_grad(), trace(model):
        assert torch.equal(
            site.value.flatten(0, 1)[0] != 0, inside_by_hand("mixtral")[1][0] * inside_by_hand("mixtral")[2][0] != 0
        )


def test_an_expert_that_no_token_goes_to_has_neurons_that_are_zero():
    model = model_of("mixtral")
    with torch.no_grad(), trace(model, [5]):
        mlp = mlp_of(model)
        unused = next(number for number in range(4) if number not in mlp.chosen)
        act = mlp.experts[unused].act
        act *= 2
    assert act.shape == (1, 1, mlp_of(model).experts[unused].W_out.shape[0])
    assert not act.any()


def test_mistakes_with_an_experts_neurons_say_what_to_write():
    model = model_of("mixtral")
    instead = r"goes = \(mlp.chosen == 1\).any\(-1\); mlp.experts\[1\].act\[goes\] = ..."
    with (
        torch.no_grad(),
        pytest.raises(WriteError, match=rf"\d+ of those that you changed don't[\s\S]*{instead}"),
        trace(model),
    ):
        mlp_of(model).experts[1].act += 1
    with torch.no_grad(), pytest.raises(WriteError, match=r"experts\[1\]\.act` has another shape"), trace(model):
        mlp_of(model).experts[1].act = torch.zeros(2, 7, 3)
    with pytest.raises(NotOnThisLayerError, match=r"each has its own: mlp.experts\[3\].act"), trace(model):
        mlp_of(model).act
    with pytest.raises(UnknownNameError, match=r"no `hidden`[\s\S]*\.act and \.pre"), trace(model):
        mlp_of(model).experts[1].hidden
    assert model.uniform.layers[1].has("mlp.experts.3.act")
    assert not model.uniform.layers[1].has("mlp.experts.4.act")
    assert not model.uniform.layers[1].has("mlp.experts.3.q")


def test_an_expert_that_hands_on_what_it_is_given_has_none():
    config = CONFIG_MAPPING["longcat_flash"]()
    model = LanguageModel(tiny_model(config, n_layers=2))
    layer = next(layer for layer in model.uniform.layers if layer.has("mlp.experts.0.act"))
    last = len(layer.mlp.experts) - 1
    assert not layer.has(f"mlp.experts.{last}.act")
    with pytest.raises(NotOnThisLayerError, match="has no matrices, and hands on what it is given"), trace(model):
        model.uniform.layers[layer.index].mlp.experts[last].act


@pytest.mark.parametrize("name", ["act", "output"])
def test_output_that_was_had_before_another_change_can_not_be_changed_in_place(name):
    model = model_of("mixtral")
    with torch.no_grad(), pytest.raises(WriteError, match="is of before another change of this expert"), trace(model):
        expert = mlp_of(model).experts[NUMBER]
        output = expert.output
        setattr(expert, name, getattr(expert, name) * 0)
        output[0] += 1
