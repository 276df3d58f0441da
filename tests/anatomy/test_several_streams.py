"""Layers that mix several residual streams have what is inside their attention, and no stream of one array."""

import pathlib
from functools import cache

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

import nnsight
from nnsight import LanguageModel
from nnsight.errors import NotOnThisLayerError

SUPPORT = pathlib.Path(__file__).parents[2] / "tools" / "support"
KINDS = {"gemma3n_text": "self_attn.o_proj", "hy_v4": "self_attn.o_proj", "deepseek_v4": None}
IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 2, 1]])


@cache
def built(kind):
    from build import build

    return LanguageModel(build(kind, n_layers=2)[0])


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    monkeypatch.syspath_prepend(str(SUPPORT))
    if request.param not in CONFIG_MAPPING:
        pytest.skip("this transformers doesn't have it")
    return request.param


def test_the_streams_and_what_is_added_to_each_are_refused_and_the_modules_named(kind):
    model = built(kind)
    layer = model.layers[1]
    assert model.n_layers == len(model.layers) == 2
    for name in ("input", "output", "attn", "mlp", "attn.output", "mlp.output", "attn.input", "mlp.act"):
        assert not layer.has(name), name
    with torch.no_grad(), model.trace(IDS):
        with pytest.raises(
            NotOnThisLayerError, match=r"(?s)no single `input`: it hands \d residual streams on.*\.raw\.input"
        ):
            layer.input
        with pytest.raises(NotOnThisLayerError, match=r"no single `output`"):
            layer.output = torch.zeros(2, 4, 8)
        with pytest.raises(NotOnThisLayerError, match=r"(?s)mixes \d residual streams: what `attn` adds.*attn.q, .k"):
            layer.attn.output
        with pytest.raises(NotOnThisLayerError, match=r"mixes \d residual streams: what `mlp` adds"):
            layer.mlp.act
        with pytest.raises(NotOnThisLayerError, match="no single one of them becomes the logits"):
            model.project(torch.zeros(2, 4, 8))
        output = layer.raw.output
        assert (output[0] if isinstance(output, tuple) else output).ndim == 4  # all of them
        assert model.logits.shape[:2] == IDS.shape
    assert "streams, mixed" in str(model.uniform)
    sites = [site.name for site in model.sites()]
    assert {"layers.1.attn.z", "layers.1.attn.pattern", "logits"} <= {*sites}
    assert not {"layers.1.input", "layers.1.output", "layers.1.attn.output", "layers.1.mlp.output"} & {*sites}


def test_patterns_of_each_row_sum_to_one_at_most_and_what_is_written_in_them_reaches_the_logits(kind):
    model = built(kind)
    with torch.no_grad():
        untouched = model._module(IDS).logits
        with model.trace(IDS) as (_, row):
            pattern = row.layers[1].attn.pattern.clone()
            row.layers[1].attn.pattern[:, 0] = 0
            changed = row.logits
        with model.trace(IDS):
            model.layers[1].attn.z = model.layers[1].attn.z
            same = model.logits
    assert pattern.shape[:3:2] == (1, IDS.shape[1])
    assert (pattern.sum(-1) <= 1 + 1e-5).all()
    assert torch.equal(same, untouched)
    assert not torch.allclose(changed, untouched[1:], atol=1e-6)


def test_a_head_that_is_left_out_is_as_one_that_a_hook_leaves_out(kind):
    model, projection = built(kind), KINDS[kind]
    if projection is None:
        assert not model.layers[1].has("attn.result")  # its heads go through no single matrix
        return
    layer = model._module.get_submodule(f"model.layers.1.{projection.rpartition('.')[0]}")
    matrix, seen = model._module.get_submodule(f"model.layers.1.{projection}"), []
    width = matrix.in_features // model.layers[1].attn.n_heads

    def without(_, args):
        value = args[0].clone()
        value[..., width : 2 * width] = 0
        return (value, *args[1:])

    with torch.no_grad():
        with matrix.register_forward_pre_hook(without):
            wanted = model._module(IDS).logits
        with matrix.register_forward_hook(lambda _, __, output: seen.append(output)), model.trace(IDS):
            result = model.layers[1].attn.result
        with model.trace(IDS):
            model.layers[1].attn.result[:, :, 1] = 0
            of_result = model.logits
        with model.trace(IDS):
            model.layers[1].attn.z[:, :, 1] = 0
            of_z = model.logits
    torch.testing.assert_close(of_z, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(of_result, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.sum(-2), seen[0], rtol=0, atol=1e-5)
    if model.layers[1].has("attn.W_Q"):
        heads = layer.q_proj.weight.unflatten(0, (model.layers[1].attn.n_heads, -1)).mT
        assert torch.equal(model.layers[1].attn.W_Q, heads)


@pytest.mark.slow
def test_verify_proves_what_there_is_and_leaves_out_the_rest(kind):
    report = nnsight.verify(built(kind))
    assert report, report
    found = {check.name: check.passed for check in report.checks}
    assert found["A layer's output is the next one's input"] is None
    assert found["Input and what is added make the output"] is None
    assert found["Patterns sum to one, and look back"] is True
    assert found["Pattern times v is z"] is True


@pytest.mark.slow
def test_what_mixes_streams_is_not_taken_for_attention(monkeypatch):
    """Its softmax is over streams. The first layers of this kind mix tokens without attention."""
    monkeypatch.syspath_prepend(str(SUPPORT))
    from others import made

    if "glm5_next" not in CONFIG_MAPPING:
        pytest.skip("this transformers doesn't have it")
    kind = transformers.Glm5NextForConditionalGeneration
    model = LanguageModel(made(CONFIG_MAPPING["glm5_next"](), kind, n_layers=3))
    layer = model.layers[0]
    assert type(layer.raw.attn_hc._module).__name__.endswith("HyperConnection")
    assert not layer.has("attn.pattern")
    with pytest.raises(NotOnThisLayerError, match="no attention is computed in it"):
        layer.attn.pattern
