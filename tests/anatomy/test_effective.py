"""Matrices that a module keeps in a form of its own: what each head adds, and copies of what is multiplied with."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune
from transformers import CONFIG_MAPPING

import nnsight
from nnsight import LanguageModel
from nnsight.anatomy.tiny import tiny_model
from nnsight.errors import NotOnThisLayerError, UnknownNameError

IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 2, 1]])
HEADS = 4


class Packed(nn.Linear):
    """A Linear whose weight is not what it multiplies by: whole numbers, and a scale for each output."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        whole = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.register_buffer("scale", scale)

    def matrix(self):
        return self.weight * self.scale

    def forward(self, value):
        return functional.linear(value, self.matrix(), self.bias)


class Rounding(Packed):
    """The same, which rounds each token by its largest channel."""

    def forward(self, value):
        step = value.abs().amax(-1, keepdim=True) / 127
        return super().forward((value / step.clamp_min(1e-6)).round() * step)


def model_with(kind, kv_heads=HEADS):
    torch.manual_seed(0)
    config = CONFIG_MAPPING["llama"](
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, hidden_size=32, intermediate_size=48, vocab_size=64
    )
    model = LanguageModel(tiny_model(config, n_layers=2))
    if kind is not None:
        layer = model._module.model.layers[1]
        for owner, name in ((layer.self_attn, "q_proj"), (layer.self_attn, "o_proj"), (layer.mlp, "up_proj")):
            setattr(owner, name, kind(getattr(owner, name)))
    return model


def projection(model):
    return model._module.model.layers[1].self_attn.o_proj


def by_hand(module, given):
    """What a module makes of each head's channels alone, without its bias."""
    parts = []
    for channels in torch.arange(given.shape[-1]).chunk(HEADS):
        alone = torch.zeros_like(given)
        alone[..., channels] = given[..., channels]
        parts.append(module(alone) - module.bias)
    return torch.stack(parts, -2)


def test_a_result_is_what_the_module_makes_of_each_head_and_adds_up():
    model = model_with(Packed)
    with torch.no_grad(), model.trace(IDS):
        layer = model.layers[1]
        given = projection(model)  # the module itself
        z, result = layer.attn.z.flatten(-2), layer.attn.result
        returned = layer.attn.output
    torch.testing.assert_close(result, by_hand(given, z), rtol=0, atol=1e-6)
    torch.testing.assert_close(result.sum(-2) + given.bias, returned, rtol=0, atol=1e-6)


def test_what_is_changed_in_a_result_is_what_the_model_goes_on_with():
    model = model_with(Packed)
    with torch.no_grad():
        with model.trace(IDS):
            model.layers[1].attn.z[:, :, 2] = 0
            wanted = model.logits
        with model.trace(IDS):
            model.layers[1].attn.result[:, :, 2] = 0
            changed = model.logits
        with model.trace(IDS):
            result = model.layers[1].attn.result.clone()
            result[:, :, 2] = 0
            model.layers[1].attn.result = result
            assigned = model.logits
        with model.trace(IDS):
            untouched = model.logits
        with model.trace(IDS):
            model.layers[1].attn.result = model.layers[1].attn.result
            same = model.logits
    torch.testing.assert_close(changed, wanted, rtol=0, atol=1e-5)
    assert torch.equal(assigned, changed)
    assert torch.equal(same, untouched)
    assert not torch.allclose(wanted, untouched, atol=1e-3)


def test_a_result_of_a_row_is_that_of_the_prompt_alone_and_a_scan_has_its_shape():
    model = model_with(Packed)
    with torch.no_grad(), model.trace(IDS) as (_, second):
        own = second.layers[1].attn.result
    with torch.no_grad(), model.trace(IDS[1:]):
        alone = model.layers[1].attn.result
    torch.testing.assert_close(own, alone, rtol=0, atol=1e-6)
    with model.scan(IDS):
        assert model.layers[1].attn.result.shape == (2, 4, HEADS, 32)


def test_a_result_has_the_gradient_of_what_is_added():
    model = model_with(Packed)
    with model.trace(IDS):
        result, added = model.layers[1].attn.result, model.layers[1].attn.output
        loss = model.logits[0, -1, 7]
    of_result, of_added = nnsight.grad(loss, [result, added])
    torch.testing.assert_close(of_result, of_added.unsqueeze(-2).expand_as(of_result))


def test_where_tokens_are_rounded_as_a_whole_heads_do_not_add_up_and_there_is_no_result():
    model = model_with(Rounding)
    assert not model.layers[1].has("attn.result")
    assert [layer.index for layer in model.layers.having("attn.result")] == [0]
    text = r"(?s)no `attn.result`.*a Rounding.*makes of single heads adds up to what it makes of all but for \de-0\d"
    with pytest.raises(NotOnThisLayerError, match=text.replace(r"\de", r"\d\.\de") + r".*effective\(\"W_O\"\)"):
        with model.trace(IDS):
            model.layers[1].attn.result
    with pytest.raises(NotOnThisLayerError, match=r"no `attn.result`"), model.trace(IDS):
        model.layers[1].attn.result = torch.zeros(2, 4, HEADS, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Packed, Rounding])
def test_that_is_told_in_16_bits_too(kind, dtype):
    model = model_with(kind)
    model._module.to(dtype)
    assert model.layers[1].has("attn.result") is (kind is Packed)


@pytest.mark.parametrize("kind", [Packed, Rounding])
def test_an_effective_weight_is_the_matrix_that_is_multiplied_with_and_a_copy(kind):
    model = model_with(kind, kv_heads=2)
    attn, mlp = model._module.model.layers[1].self_attn, model._module.model.layers[1].mlp
    ours = model.layers[1]
    close = {"rtol": 0, "atol": 1e-6 if kind is Packed else 1e-3}
    wanted = attn.o_proj.matrix().T.unflatten(0, (HEADS, -1))
    torch.testing.assert_close(ours.attn.effective("W_O"), wanted, **close)
    wanted = attn.q_proj.matrix().unflatten(0, (HEADS, -1)).mT
    torch.testing.assert_close(ours.attn.effective("W_Q"), wanted, **close)
    torch.testing.assert_close(ours.attn.effective("b_O"), attn.o_proj.bias.detach(), **close)
    torch.testing.assert_close(ours.attn.effective("b_Q"), attn.q_proj.bias.detach().unflatten(0, (HEADS, -1)), **close)
    torch.testing.assert_close(ours.mlp.effective("W_in"), mlp.up_proj.matrix().T, **close)
    for name, owner in (("W_K", ours.attn), ("W_gate", ours.mlp), ("W_out", ours.mlp)):  # plain ones
        assert torch.equal(owner.effective(name), getattr(owner, name))
        assert owner.effective(name).data_ptr() != getattr(owner, name).data_ptr()
        assert not owner.effective(name).requires_grad
    assert ours.attn.effective("b_V") is None


def test_parametrized_and_pruned_matrices_are_what_they_multiply_with():
    model = model_with(None)
    attn = model._module.model.layers[0].self_attn
    nn.utils.parametrizations.weight_norm(attn.o_proj)
    prune.random_unstructured(attn.v_proj, "weight", amount=0.5)
    with torch.no_grad():
        attn.o_proj.parametrizations.weight.original0 *= 3
    ours = model.layers[0].attn
    torch.testing.assert_close(ours.effective("W_O").flatten(0, 1), attn.o_proj.weight.T.detach())
    torch.testing.assert_close(ours.effective("W_V").mT.flatten(0, 1), attn.v_proj.weight.detach())
    assert (ours.effective("W_V") == 0).float().mean() > 0.4
    with torch.no_grad(), model.trace(IDS):
        result, returned = ours.result, ours.output
        inside = ours.effective("W_O")
    torch.testing.assert_close(result.sum(-2), returned, rtol=0, atol=1e-6)
    assert torch.equal(inside, ours.effective("W_O"))


def test_what_is_no_weight_or_has_none_is_told():
    model = model_with(Packed)
    with pytest.raises(UnknownNameError, match=r"(?s)'W_X' is none.*W_Q, W_K, W_V, W_O, b_Q"):
        model.layers[1].attn.effective("W_X")
    with pytest.raises(UnknownNameError, match=r"(?s)`mlp.effective` is for weights.*nearest +`W_out`"):
        model.layers[1].mlp.effective("W_ou")
    with pytest.raises(
        NotOnThisLayerError, match=r"(?s)no `attn.W_O`.*Packed.*a copy +layer.attn.effective\(\"W_O\"\)"
    ):
        _ = model.layers[1].attn.W_O
    with pytest.raises(NotOnThisLayerError, match=r"(?s)not kept as a matrix.*a copy +layer.mlp.effective\(\"W_in\"\)"):
        _ = model.layers[1].mlp.W_in
    model._module.model.layers[1].self_attn.o_proj = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(NotOnThisLayerError, match="a Sequential, does not say how many inputs it has"):
        model.layers[1].attn.effective("W_O")


def test_verify_proves_results_of_such_a_module_and_leaves_out_those_that_do_not_add_up():
    name = "z through W_O is the attention's output"
    for kind in (Packed, Rounding):
        model = model_with(kind)
        model._module.model.layers[0].self_attn.o_proj = kind(model._module.model.layers[0].self_attn.o_proj)
        report = nnsight.verify(model)
        assert report, report
        (check,) = (one for one in report.checks if one.name == name)
        assert check.passed is (True if kind is Packed else None)
