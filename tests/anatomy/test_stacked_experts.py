"""The neurons of experts of which each is given every token, as Llama 4's: against hooks, and experts made by hand."""

import pytest
import torch
from torch.nn import functional
from transformers import CONFIG_MAPPING

import nnsight
from nnsight import LanguageModel
from nnsight.anatomy.tiny import tiny_ids, tiny_model
from nnsight.errors import NotOnThisLayerError, RowError, WriteError

NUMBER, COUNT = 1, 4


@pytest.fixture(scope="module")
def model():
    return LanguageModel(tiny_model(CONFIG_MAPPING["llama4_text"](), n_layers=2))


@pytest.fixture(scope="module")
def ids(model):
    return tiny_ids(model._module)[0]


def experts_of(model):
    return model._module.model.layers[1].feed_forward.experts


def by_hand(model, ids, change=None):
    """The logits, and what one expert is given, makes and has inside, by a hook that may change its neurons."""
    experts, seen = experts_of(model), {}

    def hook(module, args, output):
        hidden = args[0].view(COUNT, -1, args[0].shape[-1])[NUMBER]
        gate, up = (hidden @ module.gate_up_proj[NUMBER]).chunk(2, -1)
        act = up * functional.silu(gate)
        seen.update(hidden=hidden, pre=gate, act=act, up=up, output=act @ module.down_proj[NUMBER])
        if change is None:
            return None
        new = output.clone().view(COUNT, -1, output.shape[-1])
        new[NUMBER] = change(**seen) @ module.down_proj[NUMBER]
        return new.view(output.shape)

    with experts.register_forward_hook(hook):
        logits = model._module(ids).logits
    return logits, seen


def test_neurons_are_those_of_the_experts_own_weights(model, ids):
    with torch.no_grad():
        _, seen = by_hand(model, ids)
        with model.trace(ids):
            expert = model.layers[1].mlp.experts[NUMBER]
            act, pre, output = expert.act, expert.pre, expert.output
    for found, name in ((act, "act"), (pre, "pre"), (output, "output")):
        torch.testing.assert_close(found.flatten(0, 1), seen[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(act @ expert.W_out, output, rtol=0, atol=1e-6)
    experts = experts_of(model)
    assert torch.equal(expert.W_out, experts.down_proj[NUMBER])
    gate, up = experts.gate_up_proj[NUMBER].chunk(2, -1)
    assert torch.equal(expert.W_gate, gate)
    assert torch.equal(expert.W_in, up)
    assert expert.W_in.untyped_storage().data_ptr() == experts.gate_up_proj.untyped_storage().data_ptr()
    goes = model.layers[1].mlp
    with torch.no_grad(), model.trace(ids):
        others = goes.router_logits.argmax(-1) != NUMBER
    assert others.any()
    assert not act[others].any()  # the score of another expert's token is 0


def without(number):
    return lambda act, **_: act.index_fill(-1, torch.tensor([number]), 0.0)


def raised(pre, up, **_):
    gate = pre.clone()
    gate[:, 5] += 1
    return up * functional.silu(gate)


def test_what_is_changed_in_them_is_computed_on_from_there(model, ids):
    expert = model.layers[1].mlp.experts[NUMBER]
    with torch.no_grad():
        untouched, _ = by_hand(model, ids)
        wanted, _ = by_hand(model, ids, without(3))
        turned, _ = by_hand(model, ids, raised)
        with model.trace(ids):
            expert.act[:, :, 3] = 0
            in_place = model.logits
        with model.trace(ids):
            new = expert.act.clone()
            new[:, :, 3] = 0
            expert.act = new
            assert torch.equal(expert.act, new)
            made = expert.output
            assigned = model.logits
        with model.trace(ids):
            expert.pre[:, :, 5] += 1
            of_pre = model.logits
        with model.trace(ids):
            expert.act = expert.act
            same = model.logits
    torch.testing.assert_close(assigned, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(made, new @ expert.W_out, rtol=0, atol=1e-6)
    torch.testing.assert_close(of_pre, turned, rtol=0, atol=1e-5)
    assert torch.equal(in_place, assigned)
    assert torch.equal(same, untouched)
    assert not torch.allclose(wanted, untouched, atol=1e-4)


def test_a_rows_part_is_refused_and_the_whole_batchs_is_there(model, ids):
    with torch.no_grad(), model.trace(ids) as (first, _):
        with pytest.raises(RowError, match=r"(?s)its axis 0 follows neither rows nor tokens.*tracer.model"):
            first.layers[1].mlp.experts[NUMBER].act
        whole = first.tracer.model.layers[1].mlp.experts[NUMBER].act
    assert whole.shape[:2] == ids.shape


def test_they_have_the_gradient_that_torch_gives_them(model, ids):
    kept = []
    logits, _ = by_hand(model, ids, lambda act, **_: kept.append(act) or act)
    (wanted,) = torch.autograd.grad(logits[0, -1, 3], kept)
    with model.trace(ids):
        act = model.layers[1].mlp.experts[NUMBER].act
        loss = model.logits[0, -1, 3]
    (found,) = nnsight.grad(loss, [act])
    assert wanted.any()
    torch.testing.assert_close(found.flatten(0, 1), wanted, rtol=1e-4, atol=1e-7)


def test_a_scan_has_their_shapes(model, ids):
    with model.scan(ids):
        expert = model.layers[1].mlp.experts[NUMBER]
        assert expert.act.shape == (*ids.shape, len(expert.W_out))


def test_a_change_that_would_be_lost_is_told(model, ids):
    expert = model.layers[1].mlp.experts[NUMBER]
    with torch.no_grad(), model.trace(ids):
        expert.output[:] = 1
        with pytest.raises(WriteError, match=r"experts\[1\].output` was changed before `act`"):
            expert.act = torch.zeros(*ids.shape, len(expert.W_out))
    with torch.no_grad(), model.trace(ids):
        expert.act[:] = 1
        with pytest.raises(WriteError, match=r"experts\[1\].act` was changed before `pre`"):
            expert.pre = torch.zeros(*ids.shape, len(expert.W_out))
    with pytest.raises(NotOnThisLayerError, match="a score for each expert, and no numbers"):
        _ = model.layers[1].mlp.chosen


@pytest.mark.slow
def test_they_are_proven_by_numbers(model):
    report = nnsight.verify(model)
    assert report
    assert [one.passed for one in report.checks if one.name == "An expert's act makes its output"] == [True]
