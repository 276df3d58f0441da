"""Gradients in a block equal what torch gives by hand, bit for bit; and a mistake says what to write instead."""

import contextlib
import warnings
from pathlib import Path

import pytest
import torch
from snapshots import differences, of_model, of_modes

import nnsight
import toys
from comparing import same
from gradients_by_hooks import by_hand
from nnsight.errors import (
    BlockError,
)

NAMES = ["embed", "layers.0.up", "layers.0", "layers.1.act", "layers.1", "layers.2"]


# Reading.


def test_gradients_equal_those_of_hooks(mlp, x, switch):
    expected, parameters = by_hand(mlp._module, x, NAMES)
    with mlp.trace(x):
        values = {name: mlp.get(name).output for name in NAMES}
        loss = mlp.output.square().sum()
        with loss.backward():
            got = {name: values[name].grad for name in reversed(NAMES)}
    for name in NAMES:
        same(got[name], expected[name])
    for name, parameter in mlp._module.named_parameters():
        same(parameter.grad, parameters[name])


def test_code_of_a_package_whose_name_begins_with_torch_is_the_users_own(mlp, x):
    expected, _ = by_hand(mlp._module, x, NAMES)
    source = (
        "def read(mlp, x):\n"
        "    with mlp.trace(x):\n"
        "        hidden = mlp.embed.output\n"
        "        with mlp.output.square().sum().backward():\n"
        "            return hidden.grad\n"
    )
    found = {}
    exec(compile(source, f"{Path(torch.__file__).parent}tune/recipe.py", "exec"), found)
    same(found["read"](mlp, x), expected["embed"])


def test_gradients_of_inputs_parameters_and_the_loss_itself(mlp, x, switch):
    x.requires_grad_()
    with mlp.trace(x):
        loss = mlp.output.square().sum()
        weight = mlp.layers[1].up.weight
        expected = torch.autograd.grad(loss, [loss, weight, x], retain_graph=True)
        with loss.backward():
            got = [loss.grad, weight.grad, x.grad]
    for one, other in zip(got, expected):
        same(one, other)
    same(weight.grad, expected[1])  # after the block, torch's own
    same(x.grad, expected[2])


def test_a_parameter_gradient_is_this_pass_alone(mlp, x):
    weight = mlp.embed.weight
    mlp._module(x).sum().backward()
    before = weight.grad.clone()
    with mlp.trace(x):
        loss = mlp.output.square().sum()
        with loss.backward():
            one = weight.grad
    same(weight.grad, before + one)


def test_a_value_that_the_block_computed_has_a_gradient(mlp, x):
    with mlp.trace(x):
        mixed = mlp.layers[0].output * 2
        mlp.layers[0].output = mixed
        loss = mlp.output.sum()
        with loss.backward(retain_graph=True):
            got = mixed.grad
        same(got, torch.autograd.grad(loss, mixed)[0])


def test_a_part_of_a_tuple_has_a_gradient(switch):
    model = nnsight.NNsight(toys.Structured())
    with model.trace(torch.ones(2, 4)):
        hidden, (twice, _) = model.tuple.output
        inner = model.dict.output
        loss = model.output.square().sum()
        wanted = [inner["extra"][0], inner["hidden"], twice, hidden]
        expected = torch.autograd.grad(loss, wanted, retain_graph=True)
        with loss.backward():
            got = [value.grad for value in wanted]
    for one, other in zip(got, expected):
        same(one, other)


def test_the_same_gradient_read_twice_in_a_row_is_one_tensor(mlp, x):
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        loss = mlp.output.sum()
        with loss.backward():
            assert hidden.grad is hidden.grad


def test_the_model_goes_on_inside_a_backward_block(mlp, x, switch):
    whole = mlp._module(x)
    with mlp.trace(x):
        first = mlp.layers[0].output
        loss = first.square().sum()
        expected = torch.autograd.grad(loss, first, retain_graph=True)[0]
        with loss.backward(retain_graph=True):
            got = first.grad
            later = mlp.layers[1].output
            mlp.layers[2].output = later * 0
            out = mlp.output
    same(got, expected)
    same(out, mlp._module.head(torch.zeros_like(later)))
    assert not torch.equal(out, whole)


# Assigning.


@pytest.mark.parametrize("reads", [True, False])
def test_an_assigned_gradient_flows_on_as_a_hook_returns_it(mlp, x, switch, reads):
    change = {"layers.1": lambda gradient: gradient * 3, "embed": torch.zeros_like}
    expected, parameters = by_hand(mlp._module, x, NAMES, change)
    with mlp.trace(x):
        values = {name: mlp.get(name).output for name in NAMES}
        loss = mlp.output.square().sum()
        got = {}
        with loss.backward():
            for name in reversed(NAMES):
                value = values[name]
                if name in change:
                    value.grad = change[name](value.grad) if reads else change[name](expected[name])
                else:
                    got[name] = value.grad
    for name, gradient in got.items():
        same(gradient, expected[name])
    for name, parameter in mlp._module.named_parameters():
        same(parameter.grad, parameters[name])


def test_an_assigned_parameter_gradient_is_what_accumulates(mlp, x, switch):
    with mlp.trace(x):
        loss = mlp.output.sum()
        with loss.backward():
            mlp.layers[1].up.weight.grad = torch.ones(4, 4)
    same(mlp.layers[1].up.weight.grad, torch.ones(4, 4))
    assert mlp.layers[1].up.weight._backward_hooks is None


@pytest.mark.parametrize("write", ["h.grad *= 3", "h.grad.mul_(3)", "g = h.grad; g[:] = g * 3"])
def test_a_gradient_changed_in_place_flows_on(mlp, x, write):
    _, parameters = by_hand(mlp._module, x, ["layers.1"], {"layers.1": lambda gradient: gradient * 3})
    with mlp.trace(x):
        names = {"h": mlp.layers[1].output}
        loss = mlp.output.square().sum()
        with loss.backward():
            exec(write, names)
    for name, parameter in mlp._module.named_parameters():
        same(parameter.grad, parameters[name])


def test_a_change_in_place_reaches_no_other_tensor():
    one, other = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    left, right = one * 1, other * 1
    loss = (left + right).sum()  # torch hands one buffer to both
    with nnsight.backward(loss):
        right.grad[:] = 0
        got = left.grad
    same(got, torch.ones(3))
    same(one.grad, torch.ones(3))
    same(other.grad, torch.zeros(3))


def test_what_was_read_stays_what_it_was(mlp, x):
    with mlp.trace(x):
        loss = mlp.output.sum()
        with loss.backward():
            kept = mlp.layers[1].up.weight.grad
        before = kept.clone()
        mlp.layers[1].up.weight.grad.zero_()
    same(kept, before)


def test_reading_and_writing_back_changes_nothing(mlp, x):
    _, parameters = by_hand(mlp._module, x, [])
    with mlp.trace(x):
        values = [mlp.get(name).output for name in NAMES]
        loss = mlp.output.square().sum()
        with loss.backward():
            for value in reversed(values):
                value.grad = value.grad
    for name, parameter in mlp._module.named_parameters():
        same(parameter.grad, parameters[name])


# Forms.


def test_two_passes_one_after_the_other(mlp, x, switch):
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        out = mlp.output
        expected = [torch.autograd.grad(out[:, i].sum(), hidden, retain_graph=True)[0] for i in (0, 1)]
        one, two = out[:, 0].sum(), out[:, 1].sum()
        with one.backward(retain_graph=True):
            first = hidden.grad
        with two.backward():
            second = hidden.grad
    same(first, expected[0])
    same(second, expected[1])


def test_nested_passes(mlp, x, switch):
    with mlp.trace(x):
        early, late = mlp.layers[0].output, mlp.layers[1].output
        out = mlp.output
        one, two = out.sum(), out.square().sum()
        expected = [torch.autograd.grad(loss, [late, early], retain_graph=True) for loss in (one, two)]
        with one.backward(retain_graph=True):
            first_late = late.grad
            with two.backward(retain_graph=True):
                second = late.grad, early.grad
            first_early = early.grad
    same((first_late, first_early), expected[0])
    same(second, expected[1])


def test_gradients_of_gradients(mlp, x, switch):
    with mlp.trace(x):
        hidden = mlp.layers[0].output
        loss = mlp.output.square().sum()
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        (expected,) = torch.autograd.grad(gradient.square().sum(), hidden, retain_graph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, on backward with create_graph
            with loss.backward(create_graph=True):
                size = hidden.grad.square().sum()
                with size.backward(retain_graph=True):
                    got = hidden.grad
    same(got, expected)


def test_a_plain_backward_in_the_block_is_torchs(mlp, x):
    _, parameters = by_hand(mlp._module, x, [])
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        hidden.retain_grad()
        loss = mlp.output.square().sum()
        assert loss.backward() is None
        assert hidden.grad is not None
    for name, parameter in mlp._module.named_parameters():
        same(parameter.grad, parameters[name])


def test_outside_of_any_trace(mlp, x, switch):
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        loss = mlp.output.square().sum()
    (expected,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    with nnsight.backward(loss, retain_graph=True):
        got = hidden.grad
    same(got, expected)
    with contextlib.ExitStack() as stack:
        stack.enter_context(nnsight.backward(loss))
        again = hidden.grad
    same(again, expected)


def test_in_a_function_that_the_block_calls(mlp, x):
    def importance(loss, value):
        with nnsight.backward(loss, retain_graph=True):
            return (value.grad * value).sum()

    with mlp.trace(x):
        hidden = mlp.layers[1].output
        loss = mlp.output.sum()
        got = importance(loss, hidden)
        same(got, (torch.autograd.grad(loss, hidden)[0] * hidden).sum())


def test_under_a_mode_of_torchs_own(mlp, x):
    with torch.device("cpu"), mlp.trace(x), torch.device("cpu"):
        hidden = mlp.layers[1].output
        loss = mlp.output.sum()
        with loss.backward():
            got = hidden.grad
    assert got.shape == (3, 4)


def test_torchs_own_code_means_the_stored_gradients(mlp, x):
    optimizer = torch.optim.SGD(mlp._module.parameters(), lr=0.1)
    (mlp._module(x) * 5).sum().backward()
    _, parameters = by_hand(mlp._module, x, [])
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        loss = mlp.output.square().sum()
        with loss.backward():
            with torch.device("cpu"):
                optimizer.zero_grad()
                hidden.grad
    for name, parameter in mlp._module.named_parameters():
        same(parameter.grad, parameters[name])


def test_a_gradient_for_the_loss(mlp, x):
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        out = mlp.output
        (expected,) = torch.autograd.grad(out, hidden, torch.ones_like(out), retain_graph=True)
        with out.backward(torch.ones_like(out), retain_graph=True):
            one = hidden.grad
        with out.backward(gradient=torch.ones_like(out)):
            other = hidden.grad
    same(one, expected)
    same(other, expected)


def test_hooks_of_the_users_come_first(mlp, x):
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        loss = mlp.output.sum()
        (plain,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        hidden.register_hook(lambda gradient: gradient * 2)
        with loss.backward():
            got = hidden.grad
    same(got, plain * 2)


@pytest.mark.parametrize("leave", ["return", "break", "continue"])
def test_leaving_the_block_early_lets_the_pass_end(mlp, x, leave):
    _, parameters = by_hand(mlp._module, x, [])

    def program():
        for _ in range(1):
            with mlp.trace(x):
                hidden = mlp.layers[1].output
                loss = mlp.output.square().sum()
                with loss.backward():
                    hidden.grad
                    if leave == "return":
                        return
                    if leave == "break":
                        break
                    continue

    program()
    for name, parameter in mlp._module.named_parameters():
        same(parameter.grad, parameters[name])


def test_a_block_that_asks_for_nothing_is_a_plain_backward(mlp, x, switch):
    _, parameters = by_hand(mlp._module, x, [])
    with mlp.trace(x):
        loss = mlp.output.square().sum()
        with loss.backward():
            pass
    for name, parameter in mlp._module.named_parameters():
        same(parameter.grad, parameters[name])


def test_an_error_in_the_block_ends_the_pass(mlp, x, switch):
    before = of_model(mlp._module), of_modes()
    with pytest.raises(ZeroDivisionError):
        with mlp.trace(x):
            hidden = mlp.layers[1].output
            loss = mlp.output.sum()
            with loss.backward():
                hidden.grad
                1 / 0
    mlp._module.zero_grad()
    assert differences(before[1], of_modes()) == []
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        loss = mlp.output.sum()
        with loss.backward():
            assert hidden.grad is not None


def test_stop_inside_a_backward_block(mlp, x):
    with mlp.trace(x) as tracer:
        hidden = mlp.layers[1].output
        loss = hidden.sum()
        with loss.backward():
            got = hidden.grad
            tracer.stop()
    same(got, torch.ones(3, 4))


# nnsight.grad.


def test_grad_in_any_order(mlp, x, switch):
    with mlp.trace(x):
        values = [mlp.get(name).output for name in NAMES]
        loss = mlp.output.square().sum()
        expected = torch.autograd.grad(loss, values, retain_graph=True)
        got = nnsight.grad(loss, values, retain_graph=True)
        shuffled = nnsight.grad(loss, {"late": values[4], "early": (values[0], values[2])}, retain_graph=True)
        one = nnsight.grad(loss, values[3], retain_graph=True)
        at = nnsight.grad(loss, at=[mlp.get(name) for name in reversed(NAMES)], retain_graph=True)
        with pytest.raises(BlockError, match=r"`layers\.0\.norm\.output` was not read"):
            nnsight.grad(loss, at=mlp.layers[0].norm)
        alone = nnsight.grad(loss, at=mlp.layers[1], retain_graph=True)
        layers = nnsight.grad(loss, at=mlp.layers)
    assert type(got) is list
    for a, b in zip(got, expected):
        same(a, b)
    same(shuffled["late"], expected[4])
    same(shuffled["early"], (expected[0], expected[2]))
    same(one, expected[3])
    for a, b in zip(at, reversed(expected)):
        same(a, b)
    same(alone, expected[4])
    for a, index in zip(layers, (2, 4, 5)):
        same(a, expected[index])
    assert all(parameter.grad is None for parameter in mlp._module.parameters())


def test_grad_at_a_module_with_a_tuple(x):
    model = nnsight.NNsight(toys.Structured())
    with model.trace(x) as tracer:
        hidden, (twice, _) = model.tuple.output
        loss = model.output.square().sum()
        expected = torch.autograd.grad(loss, [hidden, twice], retain_graph=True)
        got = nnsight.grad(loss, at=tracer.model.tuple)
    same(got[0], expected[0])
    same(got[1][0], expected[1])
    assert got[1][1] is None


def test_grad_outside_and_with_options(mlp, x):
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        out = mlp.output
    ones = torch.ones_like(out)
    got = nnsight.grad(out, [hidden], gradient=ones, retain_graph=True)
    same(got, list(torch.autograd.grad(out, [hidden], ones)))
    unrelated = torch.ones(2, requires_grad=True)
    assert nnsight.grad((unrelated * 2).sum(), [mlp.embed.weight], allow_unused=True) == [None]
