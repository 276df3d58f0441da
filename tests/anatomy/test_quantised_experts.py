"""Experts, and matrices, whose numbers are not what is multiplied with: nothing is taken for what it isn't."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import CONFIG_MAPPING, MixtralForCausalLM

import nnsight
from nnsight import LanguageModel
from nnsight.anatomy.tiny import tiny_model
from nnsight.errors import NotOnThisLayerError, UnknownNameError

IDS = torch.tensor([[5, 6, 7, 8, 9, 3, 2, 1]])


class Expert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, value):
        return self.down(functional.silu(self.gate(value)) * self.up(value))


class Listed(nn.ModuleList):
    """Experts as a list of modules, as the older transformers have them."""

    def __init__(self, config):
        super().__init__(Expert(config) for _ in range(config.num_local_experts))

    def forward(self, hidden, chosen, weights):
        total = torch.zeros_like(hidden)
        for number in chosen.unique().tolist():
            tokens, rank = torch.where(chosen == number)
            total[tokens] += self[number](hidden[tokens]) * weights[tokens, rank, None]
        return total


class OfLists(MixtralForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.experts = Listed(config)
        self.post_init()


class Whole(nn.Linear):
    """A matrix as whole numbers, with a scale for each output, that is multiplied with beneath torch's functions."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax(1) / 7
        self.weight = nn.Parameter(
            (linear.weight.detach() / scale[:, None]).round().to(torch.int8), requires_grad=False
        )
        self.register_buffer("scale", scale)

    def forward(self, value):
        return torch.ops.aten.linear(value, self.weight.to(value.dtype)) * self.scale

    def matrix(self):
        return self.weight * self.scale[:, None]


def listed(kind=None):
    torch.manual_seed(0)
    config = CONFIG_MAPPING["mixtral"](
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, vocab_size=64,
    )  # fmt: skip
    model = LanguageModel(OfLists(config).eval())
    assert model.layers[1].has("mlp.experts.0.W_in")
    if kind is not None:
        for expert in model._module.model.layers[1].mlp.experts:
            for name in ("gate", "up", "down"):
                setattr(expert, name, kind(getattr(expert, name)))
    return model


def test_an_expert_of_quantised_matrices_has_what_it_adds_and_copies_and_neither_neurons_nor_views():
    model = listed(Whole)
    layer, experts = model.layers[1], model._module.model.layers[1].mlp.experts
    for name in ("act", "pre", "W_in", "W_gate", "W_out"):
        assert not layer.has(f"mlp.experts.2.{name}")
        assert model.layers[0].has(f"mlp.experts.2.{name}")
    assert [one.index for one in model.layers.having("mlp.experts.2.act")] == [0]
    assert len(model.layers.having("mlp.experts.2.output")) == 2
    with pytest.raises(NotOnThisLayerError, match=r"(?s)no `W_out`: .*2.down`, a Whole.*effective\(\"W_out\"\)"):
        _ = layer.mlp.experts[2].W_out
    with pytest.raises(NotOnThisLayerError, match=r"no `act`: .*2.down`, a Whole, multiplies in a way of its own"):
        with model.trace(IDS):
            layer.mlp.experts[2].act
    for name, own in (("W_in", "up"), ("W_gate", "gate"), ("W_out", "down")):
        copy = layer.mlp.experts[2].effective(name)
        torch.testing.assert_close(copy, getattr(experts[2], own).matrix().T, rtol=0, atol=1e-7)
        assert torch.equal(
            model.layers[0].mlp.experts[2].effective(name), getattr(model.layers[0].mlp.experts[2], name)
        )
    with pytest.raises(UnknownNameError, match="W_in, W_gate, W_out"):
        layer.mlp.experts[2].effective("W_up")
    report = nnsight.verify(model)
    assert report, report


def test_what_an_expert_of_quantised_matrices_adds_is_what_its_module_makes():
    model = listed(Whole)
    module, seen = model._module.model.layers[1].mlp.experts, {}
    hook = module.register_forward_pre_hook(lambda _, args: seen.update(zip("hcw", args, strict=True)))
    with hook, torch.no_grad():
        model._module(IDS)
    with torch.no_grad(), model.trace(IDS):
        output = model.layers[1].mlp.experts[2].output
    times = (seen["w"] * (seen["c"] == 2)).sum(-1, keepdim=True)
    torch.testing.assert_close(output[0], module[2](seen["h"]) * times, rtol=1e-5, atol=1e-7)


def test_neurons_of_an_expert_are_met_where_its_class_has_packed_numbers_and_none_goes_there():
    """As torchao has them: the class of a Linear, and a weight that is no plain parameter."""
    model = listed()

    class Packed(nn.Parameter):
        pass

    experts = model._module.model.layers[1].mlp.experts
    for expert in experts:
        for one in (expert.gate, expert.up, expert.down):
            one.weight = torch.Tensor._make_subclass(Packed, one.weight.detach(), False)
    layer = model.layers[1]
    assert layer.has("mlp.experts.1.act")
    assert not layer.has("mlp.experts.1.W_in")
    with torch.no_grad(), model.trace(IDS):
        chosen = layer.mlp.chosen
        chosen[:] = torch.tensor([0, 3])
        acts = [layer.mlp.experts[number].act for number in range(4)]
    assert [one.shape for one in acts] == [(1, 8, 48)] * 4
    assert [bool(one.any()) for one in acts] == [True, False, False, True]


def test_stacked_experts_of_another_class_have_no_weights_and_no_neurons():
    model = LanguageModel(tiny_model(CONFIG_MAPPING["mixtral"](), n_layers=2))
    assert model.layers[0].has("mlp.experts.0.W_in")
    experts = model._module.model.layers[1].mlp.experts

    class Scaled(type(experts)):
        """Weights of 8-bit floats, with scales beside them."""

    experts.__class__ = Scaled
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name).detach().to(torch.float8_e4m3fn)
        setattr(experts, name, nn.Parameter(weight, requires_grad=False))
    for name in ("act", "pre", "W_in", "W_gate", "W_out"):
        assert not model.layers[1].has(f"mlp.experts.0.{name}")
    with pytest.raises(NotOnThisLayerError, match=r"(?s)mlp.experts`, a Scaled, has no plain matrix: it is quantized"):
        _ = model.layers[1].mlp.experts[0].W_in
    with pytest.raises(NotOnThisLayerError, match="a Scaled, has the matrices of all experts in a form of its own"):
        model.layers[1].mlp.experts[0].effective("W_in")


def test_a_packed_router_does_not_change_how_many_experts_there_are():
    model = LanguageModel(tiny_model(CONFIG_MAPPING["afmoe"](num_dense_layers=0), n_layers=2))
    (layer, *_) = model.layers.having("mlp.experts")
    router = layer.mlp.inside.mixture.counted.removesuffix(".weight")
    count, module = len(layer.mlp.experts), model._module.get_submodule(router)
    assert type(module) is nn.Linear
    module.weight = nn.Parameter(torch.zeros(999, 1, dtype=torch.uint8), requires_grad=False)
    assert len(layer.mlp.experts) == count == module.out_features


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_matrix_of_8_bits_is_no_weight_of_an_mlp(dtype):
    model = LanguageModel(tiny_model(CONFIG_MAPPING["llama"](), n_layers=1))
    up = model._module.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(up.weight.detach().to(dtype), requires_grad=False)
    assert model.layers[0].has("mlp.W_out")
    assert not model.layers[0].has("mlp.W_in")
    with pytest.raises(NotOnThisLayerError, match=r"(?s)not kept as a matrix of numbers.*effective\(\"W_in\"\)"):
        _ = model.layers[0].mlp.W_in


def test_an_unembedding_of_whole_numbers_is_no_weight_of_the_model_and_projects_all_the_same():
    model = LanguageModel(tiny_model(CONFIG_MAPPING["llama"](tie_word_embeddings=False), n_layers=1))
    model._module.lm_head = Whole(model._module.lm_head)
    with pytest.raises(NotOnThisLayerError, match=r"(?s)`W_U` is not kept.*`lm_head`, a Whole.*int8.*model.project"):
        _ = model.W_U
    assert model.W_E.shape[1] == model.d_model
    with torch.no_grad(), model.trace(IDS):
        torch.testing.assert_close(model.project(model.layers[0].output), model.logits)
