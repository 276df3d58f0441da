"""What a layer adds is multiplied on its way, a number for each channel, as in BEiT: against plain hooks."""

from functools import cache

import pytest
import torch
import transformers

import nnsight
from nnsight import TransformersModel
from nnsight.errors import WriteError

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@cache
def model_of(kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, image_size=8, patch_size=4)
    module = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return TransformersModel(module)


def layer_of(model):
    return model._module.get_submodule(model.layers[1].raw.path.removeprefix("model."))


def hooked(model, name, change=None):
    """The logits, and what the layer's attention or MLP returns, by a hook that may change it."""
    seen = []

    def hook(_, __, output):
        first = output[0] if isinstance(output, tuple) else output
        seen.append(first)
        if change is None:
            return None
        return (change(first), *output[1:]) if isinstance(output, tuple) else change(first)

    (part,) = getattr(model.layers[1], name).parts
    with model._module.get_submodule(part.path).register_forward_hook(hook):
        return model._module(IMAGES).logits, seen[0]


def vector(model, name):
    return getattr(layer_of(model), "lambda_1" if name == "attn" else "lambda_2")


names = pytest.mark.parametrize("name", ["attn", "mlp"])
kinds = pytest.mark.parametrize("kind", ["Beit", "Data2VecVision"])


@kinds
@names
def test_what_is_added_is_what_the_module_returns_times_the_models_own_vector(kind, name):
    model = model_of(kind)
    with torch.no_grad():
        untouched, returned = hooked(model, name)
        with model.trace(IMAGES):
            added = getattr(model.layers[1], name).output
            getattr(model.layers[1], name).output = added
            assert torch.equal(model.logits, untouched)
        with model.trace(IMAGES):
            layer = model.layers[1]
            before, attn, mlp, after = layer.input, layer.attn.output, layer.mlp.output, layer.output
    assert torch.equal(added, returned * vector(model, name))
    torch.testing.assert_close(before + attn + mlp, after, rtol=0, atol=1e-5)
    assert "lambda_1 * attention" in str(model.uniform)


@kinds
@names
def test_what_is_written_reaches_the_stream_divided_by_it(kind, name):
    model = model_of(kind)
    with torch.no_grad():
        wanted, _ = hooked(model, name, lambda value: value * 2 + 1 / vector(model, name))
        with model.trace(IMAGES):
            here = getattr(model.layers[1], name)
            here.output = here.output * 2 + 1
            assigned = model.logits
        with model.trace(IMAGES):
            value = getattr(model.layers[1], name).output
            value *= 2
            value += 1
            in_place = model.logits
        with model.trace(IMAGES) as (_, row):
            getattr(row.layers[1], name).output = getattr(row.layers[1], name).output * 2 + 1
            own = row.logits
    torch.testing.assert_close(assigned, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(in_place, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(own, wanted[1:], rtol=0, atol=1e-4)


def test_it_has_the_gradient_of_what_is_added_and_the_vector_keeps_its_own():
    model = model_of("Beit")
    logits, returned = hooked(model, "attn")
    of_returned, of_vector = torch.autograd.grad(logits[0, 1], [returned, vector(model, "attn")])
    with model.trace(IMAGES):
        added = model.layers[1].attn.output
        loss = model.logits[0, 1]
    (found,) = nnsight.grad(loss, [added], retain_graph=True)
    torch.testing.assert_close(found * vector(model, "attn"), of_returned)
    (of_ours,) = torch.autograd.grad(loss, [vector(model, "attn")])
    torch.testing.assert_close(of_ours, of_vector)


def test_what_would_be_multiplied_by_0_is_refused():
    model = TransformersModel(model_of("Beit")._module)
    with torch.no_grad():
        kept = vector(model, "mlp").clone()
        try:
            vector(model, "mlp")[:3] = 0
            with model.trace(IMAGES):
                model.layers[1].mlp.output[..., 3:] *= 2
                assert model.logits.isfinite().all()
            with pytest.raises(WriteError, match=r"(?s)multiplies 3 channels of this by 0, in `.*lambda_2`"):
                with model.trace(IMAGES):
                    model.layers[1].mlp.output = model.layers[1].mlp.output + 1
        finally:
            vector(model, "mlp").copy_(kept)


def test_the_weights_have_their_gradients_where_it_is_0():
    model = TransformersModel(model_of("Beit")._module)
    kept = vector(model, "mlp").detach().clone()
    try:
        with torch.no_grad():
            vector(model, "mlp")[:3] = 0
        weights = [*layer_of(model).parameters()]
        expected = torch.autograd.grad(model._module(IMAGES).logits[0, 1], weights)
        with model.trace(IMAGES):
            added = model.layers[1].mlp.output
            loss = model.logits[0, 1]
        *found, of_added = torch.autograd.grad(loss, [*weights, added])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        assert not of_added[..., :3].any()
    finally:
        with torch.no_grad():
            vector(model, "mlp").copy_(kept)


@pytest.mark.slow
@kinds
def test_all_names_are_proven_by_numbers(kind):
    report = nnsight.verify(model_of(kind))
    assert report, report
    assert sum(check.passed is True for check in report.checks) >= 12
    with model_of(kind).scan(IMAGES):
        assert model_of(kind).layers[1].attn.output.shape == (2, 5, 32)
