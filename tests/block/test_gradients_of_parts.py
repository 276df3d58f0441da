"""Gradients of rows and in invokes equal autograd's by hand; and where there is none, the true reason is given."""

import pytest
import torch

import nnsight
import toys
from comparing import same
from nnsight.errors import AlreadyPastError, BlockError, GradientError, WriteError

PROMPTS = ["The Eiffel Tower is in the city of", "The Colosseum is in the city of"]


@pytest.fixture
def x():
    return torch.randn(2, toys.WIDTH, generator=torch.Generator().manual_seed(0))


def by_hand(mlp, x, at=1, weights=(1.0, 3.0)):
    """The gradients of a weighted sum of the output's squares at one layer's output, and the parameters'."""
    kept = []
    handle = mlp._module.layers[at].register_forward_hook(lambda _, __, output: kept.append(output))
    loss = (mlp._module(x).square().sum(-1) * torch.tensor(weights)).sum()
    handle.remove()
    parameters = list(mlp._module.parameters())
    return torch.autograd.grad(loss, kept[0], retain_graph=True)[0], torch.autograd.grad(loss, parameters)


# Rows.


@pytest.mark.parametrize("first", [0, 1])
def test_the_gradients_of_two_rows_come_in_either_order(switch, mlp, x, first):
    wanted, of_parameters = by_hand(mlp, x)
    got = {}
    with mlp.trace(x) as rows:
        values = [row.layers[1].output for row in rows]
        loss = sum(row.output.square().sum() * weight for row, weight in zip(rows, (1, 3)))
        with loss.backward():
            for at in (first, 1 - first):
                got[at] = values[at].grad
            same(values[1 - first].grad, got[1 - first])
    same(torch.cat([got[0], got[1]]), wanted)
    for parameter, gradient in zip(mlp._module.parameters(), of_parameters):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(not value._backward_hooks for value in values)


def test_rows_at_several_layers_come_layer_by_layer(switch, mlp, x):
    with mlp.trace(x) as (a, b):
        early = [a.layers[0].output, b.layers[0].output]
        late = [a.layers[2].output, b.layers[2].output]
        loss = a.output.square().sum() + b.output.square().sum() * 3
        with loss.backward():
            got = [value.grad for value in (late[0], late[1], early[0], early[1])]
    same(torch.cat(got[:2]), by_hand(mlp, x, at=2)[0])
    same(torch.cat(got[2:]), by_hand(mlp, x, at=0)[0])


@pytest.mark.parametrize("in_place", [True, False])
def test_the_gradient_of_a_row_that_is_past_is_not_changed_in_silence(switch, mlp, x, in_place):
    with mlp.trace(x) as (a, b):
        first, second = a.layers[1].output, b.layers[1].output
        loss = a.output.sum() + b.output.sum()
        with pytest.raises(WriteError, match="from the last row to the first") as raised, loss.backward():
            first.grad
            if in_place:
                second.grad[:] = 0
            else:
                second.grad = torch.zeros_like(second)
    assert "`layers.1.output` of row 1" in str(raised.value)


def test_the_gradients_of_rows_are_changed_from_the_last_to_the_first(switch, mlp, x):
    with mlp.trace(x) as (a, b):
        below = mlp.layers[0].output
        first, second = a.layers[1].output, b.layers[1].output
        loss = a.output.sum() + b.output.sum()
        with loss.backward():
            second.grad = torch.zeros_like(second)
            first.grad[:] = 0
            blocked = below.grad
    assert not blocked.any()


def test_an_error_about_a_row_names_the_module_the_row_and_the_line(mlp, x):
    with mlp.trace(x) as (a, b):
        early, late = a.layers[0].output, b.layers[2].output
        loss = a.output.sum() + b.output.sum()
        with pytest.raises(AlreadyPastError) as raised, loss.backward():
            early.grad
            late.grad
    assert "The gradient of `layers.2.output` of row 1 is past" in str(raised.value)
    assert "early, late = a.layers[0].output" in str(raised.value)
    assert "at the gradient of `layers.0.output` of row 0" in str(raised.value)


# Invokes.


def test_a_backward_block_in_an_invoke_equals_autograd(switch, demo):
    model = demo
    with model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            hidden = model.transformer.h[2].mlp.output
            loss = model.lm_head.output[0, -1].logsumexp(-1)
            with loss.backward(retain_graph=True):
                got = hidden.grad
        with tracer.invoke(PROMPTS[1]):
            other = model.transformer.h[2].mlp.output
            metric = model.lm_head.output[0, -1].logsumexp(-1)
            grads = nnsight.grad(metric, [other], retain_graph=True)
    model._module.zero_grad()
    for prompt, gradient in zip(PROMPTS, (got, grads[0])):
        with model.trace(prompt):
            alone = model.transformer.h[2].mlp.output
            wanted = torch.autograd.grad(model.lm_head.output[0, -1].logsumexp(-1), alone)[0]
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)


def test_two_invokes_have_a_loss_each(switch, mlp, x):
    with mlp.trace() as tracer:
        with tracer.invoke(x[:1]):
            first = mlp.layers[1].output
            loss_of_first = mlp.output.square().sum()
            with loss_of_first.backward(retain_graph=True):
                of_first = first.grad
        with tracer.invoke(x[1:]):
            second = mlp.layers[1].output
            loss_of_second = mlp.output.square().sum() * 3
            with loss_of_second.backward():
                of_second = second.grad
    wanted, of_parameters = by_hand(mlp, x)
    same(torch.cat([of_first, of_second]), wanted)
    for parameter, gradient in zip(mlp._module.parameters(), of_parameters):
        torch.testing.assert_close(parameter.grad, gradient)


def test_an_invoke_without_a_prompt_has_the_gradients_of_the_whole(switch, mlp, x):
    with mlp.trace() as tracer:
        with tracer.invoke(x[:1]):
            mlp.layers[1].output
        with tracer.invoke(x[1:]):
            mlp.layers[1].output
        with tracer.invoke():
            whole = mlp.layers[1].output
            loss = (mlp.output.square().sum(-1) * torch.tensor([1.0, 3.0])).sum()
            with loss.backward():
                got = whole.grad
    same(got, by_hand(mlp, x)[0])


def test_a_loss_in_an_invoke_of_what_another_one_bound(switch, mlp, x):
    with mlp.trace() as tracer:
        with tracer.invoke(x[:1]):
            first = mlp.layers[1].output
            out = mlp.output
        with tracer.invoke(x[1:]):
            second = mlp.layers[1].output
            loss = out.square().sum() + mlp.output.square().sum() * 3
            with loss.backward():
                of_first = first.grad
                of_second = second.grad
    same(torch.cat([of_first, of_second]), by_hand(mlp, x)[0])


def test_an_error_about_an_invoke_names_it(mlp, x):
    with pytest.raises(AlreadyPastError, match=r"`layers\.2\.output` of invoke 1 is past"), mlp.trace() as tracer:
        with tracer.invoke(x[:1]):
            mlp.output
        with tracer.invoke(x[1:]):
            early, late = mlp.layers[0].output, mlp.layers[2].output
            with mlp.output.sum().backward():
                early.grad
                late.grad


# Why there is none.


def test_a_plain_backward_in_a_generation_gives_the_reason(demo):
    model = demo
    with pytest.raises(GradientError, match=r"`generate` runs the model under torch\.no_grad"):
        with model.generate(PROMPTS[0], max_new_tokens=1):
            loss = model.lm_head.output.sum()
            loss.backward()


@pytest.mark.parametrize("as_block", [True, False])
def test_an_edit_in_a_generation_gives_the_reason(demo, as_block):
    def edit(model):
        loss = model.lm_head.output.sum()
        if as_block:
            with loss.backward():
                pass
        else:
            loss.backward()

    with pytest.raises(GradientError, match=r"`generate` runs the model under torch\.no_grad"):
        demo.edit(edit).generate(PROMPTS[0], max_new_tokens=1)


def test_a_trace_under_no_grad_says_so_and_its_way_out_works(mlp, x):
    with torch.no_grad(), mlp.trace(x):
        with pytest.raises(GradientError, match=r"opened under torch\.no_grad") as raised:
            with mlp.output.sum().backward():
                pass
    assert "torch.enable_grad(), model.trace(...)" in str(raised.value)
    with torch.no_grad(), torch.enable_grad(), mlp.trace(x):
        with mlp.output.sum().backward():
            pass


def test_frozen_weights_are_named_and_the_way_out_works(mlp, x):
    mlp._module.requires_grad_(False)
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        with pytest.raises(GradientError, match="all parameters are frozen") as raised:
            with hidden.sum().backward():
                pass
    assert "layer.output.requires_grad_()" in str(raised.value)
    with mlp.trace(x):
        hidden = mlp.layers[1].output.requires_grad_()
        with (mlp.output.square() * torch.tensor([[1.0], [3.0]])).sum().backward():
            got = hidden.grad
    mlp._module.requires_grad_(True)
    same(got, by_hand(mlp, x)[0])


def test_a_module_that_was_only_written_is_to_be_read(mlp, x):
    with mlp.trace(x):
        mlp.layers[1].output = torch.zeros(2, toys.WIDTH, requires_grad=True)
        loss = mlp.output.sum()
        with pytest.raises(BlockError, match="was written, and not read") as raised:
            nnsight.grad(loss, at=mlp.layers[1])
    assert "read `layers.1.output` behind the write" in str(raised.value)
    with mlp.trace(x):
        mlp.layers[1].output = torch.zeros(2, toys.WIDTH, requires_grad=True)
        mlp.layers[1].output
        assert nnsight.grad(mlp.output.sum(), at=mlp.layers[1]).shape == (2, toys.WIDTH)


@pytest.mark.parametrize(
    ("at", "instead"),
    [
        (lambda mlp, value: value, r"nnsight\.grad\(metric, \[a, b\]\)"),
        (lambda mlp, value: [value], r"nnsight\.grad\(metric, \[a, b\]\)"),
        (lambda mlp, value: "layers.0", r"at=model\.get\('layers\.0'\)"),
        (lambda mlp, value: ["layers.0"], r"at=model\.get\('layers\.0'\)"),
        (lambda mlp, value: mlp._module.layers[0], "and this is Layer"),
        (lambda mlp, value: 3, "and this is int"),
    ],
)
def test_what_is_no_module_of_the_model_is_refused(mlp, x, at, instead):
    with mlp.trace(x):
        value = mlp.layers[0].output
        with pytest.raises(BlockError, match=instead):
            nnsight.grad(mlp.output.sum(), at=at(mlp, value))
