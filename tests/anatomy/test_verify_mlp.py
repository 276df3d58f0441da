"""Each check of the inside of MLPs fails where that is wrong."""

from dataclasses import replace

import pytest
import torch
from architectures import quietly
from transformers import CONFIG_MAPPING

from nnsight import LanguageModel
from nnsight.anatomy import find
from nnsight.anatomy.layout import Part
from nnsight.anatomy.mlps import names, router
from nnsight.anatomy.tiny import tiny_model
from nnsight.anatomy.verify import verify

DOWN = "Act through down projection is mlp.output"
BENDS = "Act is pre through the non-linearity"
EXPERTS = "Experts and shared add up to mlp.output"
CHOSEN = "Chosen experts have the largest logits"
REACH = "Each write reaches the logits"
WRITE_BACK = "Writing back what was read changes nothing"
OPTIONS = {"deepseek_v3": {"first_k_dense_replace": 1}, "afmoe": {"num_dense_layers": 1}}


def model_of(kind, change=lambda inside: inside):
    """A model of two layers, of which the inside of the last was changed after it was found."""
    model = quietly(kind, n_layers=2, **OPTIONS.get(kind, {}))
    found = find.insides_of(model._module)
    last = [*found][-1]
    find._insides[model._module] = {**found, last: change(found[last])}
    return model


def with_neurons(**changes):
    return lambda inside: replace(inside, neurons=replace(inside.neurons, **changes))


def with_mixture(**changes):
    return lambda inside: replace(inside, mixture=replace(inside.mixture, **changes))


def failed(report):
    return {check.name for check in report.checks if check.passed is False}


def lacking(report):
    return {check.name for check in report.checks if check.passed is None}


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "olmo2", "mixtral", "qwen2_moe", "deepseek_v3", "afmoe"])
def test_what_was_found_is_verified(kind):
    report = verify(model_of(kind))
    assert report, report
    assert ({DOWN, BENDS} <= lacking(report)) == (kind in ("mixtral", "qwen2_moe"))
    assert (EXPERTS in lacking(report)) == (kind in ("gpt2", "phi3", "olmo2"))
    assert (CHOSEN in lacking(report)) == (kind in ("gpt2", "phi3", "olmo2"))


def test_activations_that_do_not_make_the_output_are_told():
    assert failed(verify(model_of("llama", with_neurons(factor=2.0)))) == {DOWN}


def test_a_weight_that_is_another_is_told():
    def of_first(inside):
        out = replace(inside.neurons.w_out, path="model.layers.0.mlp.down_proj")
        return replace(inside, neurons=replace(inside.neurons, w_out=out))

    assert failed(verify(model_of("llama", of_first))) == {DOWN}


@pytest.mark.parametrize("path", ["mlp.up_proj", "self_attn.q_proj"])
def test_what_no_activation_is_given_is_told_where_it_is_called_pre(path):
    part = Part(f"model.layers.1.{path}", "output")
    assert BENDS in failed(verify(model_of("llama", with_neurons(pre=part))))


@pytest.mark.parametrize(("kind", "change"), [("mixtral", {"factor": 2.0}), ("qwen2_moe", {"shared": ()})])
def test_experts_that_do_not_add_up_are_told(kind, change):
    assert EXPERTS in failed(verify(model_of(kind, with_mixture(**change))))


def test_logits_of_others_than_the_chosen_are_told(monkeypatch):
    read, write = router.read, router.write
    monkeypatch.setattr(router, "read", lambda root, where: -read(root, where))
    monkeypatch.setattr(router, "write", lambda root, where, value: write(root, where, -value))
    assert failed(verify(model_of("mixtral"))) == {CHOSEN}


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_a_router_that_is_another_module_is_told(kind):
    part = Part("model.layers.1.self_attn.o_proj", "output")
    assert {CHOSEN, REACH} & failed(verify(model_of(kind, with_mixture(router=part))))


def test_experts_that_are_chosen_in_groups_are_said_to_be():
    report = verify(model_of("deepseek_v3"))
    check = next(check for check in report.checks if check.name == CHOSEN)
    assert check.passed
    assert check.detail.startswith("layer 1: not alone: a bias, or groups; ")


def test_a_write_inside_an_mlp_that_does_not_reach_the_model_is_told(monkeypatch):
    model = model_of("llama")
    monkeypatch.setattr(names, "write", lambda *_: None)
    assert failed(verify(model)) == {BENDS, REACH}


def test_a_write_to_the_router_that_does_not_reach_the_model_is_told(monkeypatch):
    model = model_of("mixtral")
    monkeypatch.setattr(router, "write", lambda *_: None)
    assert failed(verify(model)) == {REACH}


@pytest.mark.parametrize(("kind", "where"), [("llama", names), ("mixtral", router)])
def test_a_write_inside_an_mlp_that_rounds_is_told(monkeypatch, kind, where):
    model, write = model_of(kind), where.write
    monkeypatch.setattr(where, "write", lambda root, at, value: write(root, at, torch.atan(value).tan()))
    assert WRITE_BACK in failed(verify(model))


def test_experts_whose_sum_is_given_to_a_norm_of_their_own_are_verified():
    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers doesn't have Gemma 4")
    mixed = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
    model = LanguageModel(tiny_model(CONFIG_MAPPING["gemma4_text"](**mixed), n_layers=2))
    report = verify(model)
    assert report, report
    told = next(check.detail for check in report.checks if check.name == EXPERTS)
    assert "given to `model.layers.1.post_feedforward_layernorm_2`" in told
