"""Gradients in a block equal what torch gives by hand, bit for bit; and a mistake says what to write instead."""

import asyncio
import contextlib
import copy
import gc
import os
import pathlib
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import torch
from snapshots import differences, of_model, of_modes, of_process
from torch import nn
from torch.overrides import TorchFunctionMode

import nnsight
import toys
from nnsight.core import origins
from nnsight.errors import (
    AlreadyPastError,
    BlockError,
    GradientError,
    IndependentError,
    OtherThreadError,
    OutOfOrderError,
    OutsideTraceError,
    RunOrderError,
    TransformError,
    WriteError,
)


def by_hand(module, x, names, change=None):
    """The gradients of `output.square().sum()` at the named modules' outputs, by hooks alone; also the parameters'.

    `change` maps a name to a function of the gradient, which replaces it.
    """
    module = copy.deepcopy(module)
    found, change = {}, change or {}

    def catch(name):
        def hook(_, __, output):
            tensor = next(iter(toys_tensors(output)))

            def at_gradient(gradient):
                found[name] = gradient.clone()
                return change[name](gradient) if name in change else None

            tensor.register_hook(at_gradient)

        return hook

    for name in names:
        module.get_submodule(name).register_forward_hook(catch(name))
    module(x).square().sum().backward()
    return found, {name: parameter.grad for name, parameter in module.named_parameters()}


def toys_tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from toys_tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from toys_tensors(item)


def same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


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


# Mistakes.


def test_the_wrong_order_names_the_module_and_the_lines(mlp, x, switch):
    with pytest.raises(AlreadyPastError) as caught:
        with mlp.trace(x):
            early = mlp.layers[0].output
            late = mlp.layers[1].output
            loss = mlp.output.sum()
            with loss.backward():
                first = early.grad
                late.grad *= first
    text = str(caught.value)
    assert text.startswith("The gradient of `layers.1.output` is past")
    assert "late.grad *= first" in text
    assert "late = mlp.layers[1].output" in text
    assert "at the gradient of `layers.0.output`, since" in text
    assert "reverse order" in text
    assert str(id(late)) not in text


def test_asking_again_later_says_that_it_was_asked_before(mlp, x):
    with mlp.trace(x):
        early, late = mlp.layers[0].output, mlp.layers[1].output
        loss = mlp.output.sum()
        with pytest.raises(AlreadyPastError, match=r"before +asked at .*first = late\.grad"):
            with loss.backward():
                first = late.grad
                early.grad
                late.grad
    assert first.shape == (3, 4)


def test_a_parameter_is_named(mlp, x):
    with pytest.raises(AlreadyPastError, match=r"The gradient of `layers\.2\.up\.weight` is past"):
        with mlp.trace(x):
            early = mlp.layers[0].output
            loss = mlp.output.sum()
            with loss.backward():
                early.grad
                mlp.layers[2].up.weight.grad


@pytest.mark.parametrize("model_is_gone", [False, True])
def test_behind_the_trace_an_error_names_the_module_if_there_still_is_one(x, model_is_gone):
    model = nnsight.NNsight(toys.MLP())
    with model.trace(x) as tracer:
        early, late = model.layers[0].output, model.layers[1].output
        loss = nnsight.save(model.output.sum())
        if False:
            nnsight.grad(loss, early)  # the word, for which it is noted what the trace hands out
    del tracer
    if model_is_gone:
        del model
    with pytest.raises(AlreadyPastError) as caught, nnsight.backward(loss):
        early.grad
        late.grad
    of_late, of_early = ("late", "early") if model_is_gone else ("layers.1.output", "layers.0.output")
    if not (model_is_gone and sys.version_info < (3, 11)):  # where the line can't be told apart
        assert f"The gradient of `{of_late}` is past" in str(caught.value)
        assert f"at the gradient of `{of_early}`, since" in str(caught.value)
    assert "early, late = model.layers[0].output" in str(caught.value)


def test_a_tensor_that_the_loss_does_not_depend_on(mlp, x, switch):
    with pytest.raises(IndependentError, match=r"does not depend on `layers\.1\.output`") as caught:
        with mlp.trace(x):
            early = mlp.layers[0].output
            late = mlp.layers[1].output
            loss = early.sum()
            with loss.backward():
                late.grad
    assert isinstance(caught.value, OutOfOrderError)
    with mlp.trace(x):
        early, late = mlp.layers[0].output, mlp.layers[1].output
        loss = early.sum()
        with pytest.raises(IndependentError, match=r"does not depend on `layers\.1\.output`"):
            nnsight.grad(loss, [late])


def test_a_part_that_was_made_anew_says_to_take_the_part_of_the_gradient(mlp, x):
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        loss = mlp.output.sum()
        with pytest.raises(IndependentError, match=r"take the part of the gradient"):
            with loss.backward():
                hidden[0].grad


def test_a_backward_block_without_with_is_reported(mlp, x):
    loss = mlp._module(x).sum()
    with pytest.warns(RuntimeWarning, match="write `with` before it"):
        nnsight.backward(loss)


def test_the_part_of_a_split_that_the_loss_leaves_out():
    one, other = (torch.ones(4, requires_grad=True) * 1).split(2)
    with pytest.raises(IndependentError):
        with nnsight.backward(one.sum()):
            other.grad


def test_a_loss_without_a_graph(mlp, x):
    with pytest.raises(GradientError, match="it has no graph") as caught:
        with torch.no_grad(), mlp.trace(x):
            loss = mlp.output.sum()
            with loss.backward():
                pass
    assert isinstance(caught.value, NotImplementedError)
    assert "torch.no_grad()" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.ones(2), "requires_grad_"),
        (lambda: torch.ones(2, dtype=torch.long), "int64 values, which have no gradient"),
        (lambda: nn.Parameter(torch.ones(2), requires_grad=False), "frozen"),
        (lambda: inference(), "inference_mode"),
    ],
)
def test_a_tensor_without_a_graph_says_why(mlp, x, make, reason):
    value = make()
    with mlp.trace(x):
        loss = mlp.output.sum()
        with pytest.raises(GradientError, match=reason):
            with loss.backward(retain_graph=True):
                value.grad
        with pytest.raises(GradientError, match=reason):
            nnsight.grad(loss, [value])


def inference():
    with torch.inference_mode():
        return torch.ones(2)


def test_a_loss_of_many_numbers(mlp, x):
    with mlp.trace(x):
        out = mlp.output
        with pytest.raises(GradientError, match=r"this tensor has 12: \[3, 4\](.|\n)*with out\.backward\(\):"):
            with out.backward():
                pass
        with pytest.raises(GradientError, match=r"loss\.sum\(\)"):
            nnsight.grad(out, [x])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "can't become NoneType"),
        (0.0, "can't become float"),
        (torch.ones(4), r"can't become \[4\] float32"),
        (torch.ones(3, 4, dtype=torch.float64), r"can't become \[3, 4\] float64"),
    ],
)
def test_what_can_not_be_a_gradient(mlp, x, value, text):
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        loss = mlp.output.sum()
        with loss.backward():
            with pytest.raises(WriteError, match=r"The gradient of `layers\.1\.output`.*" + text):
                hidden.grad = value


def test_grad_wants_tensors_or_modules(mlp, x):
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        loss = mlp.output.sum()
        with pytest.raises(BlockError, match="either tensors or modules"):
            nnsight.grad(loss)
        with pytest.raises(GradientError, match="at="):
            nnsight.grad(loss, [mlp.layers[1]])
        with pytest.raises(BlockError, match=r"`layers\.0\.output` was not read"):
            nnsight.grad(loss, at=[mlp.layers[0]])
        with pytest.raises(GradientError, match="not float"):
            nnsight.grad(1.0, [hidden])
    with pytest.raises(OutsideTraceError, match="a trace that is open"):
        nnsight.grad(loss, at=[mlp.layers[1]])


def test_a_with_that_no_mode_sees_gets_a_note(mlp, x):
    def helper(loss):
        with loss.backward():
            pass

    with pytest.raises((TypeError, AttributeError)) as caught:
        with mlp.trace(x):
            helper(mlp.output.sum())
    assert "with nnsight.backward(loss):" in caught.value.__notes__[0]


def test_a_backward_block_is_entered_once(mlp, x):
    loss = mlp._module(x).sum()
    block = nnsight.backward(loss)
    with block:
        pass
    with pytest.raises(BlockError, match="entered once"):
        block.__enter__()


def test_torchs_own_errors_come_at_the_users_line(mlp, x, switch):
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        loss = mlp.output.sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            with loss.backward():
                hidden.grad
        with pytest.raises(RuntimeError, match="second time"):
            with loss.backward():
                pass


@pytest.mark.parametrize("how", ["block", "grad"])
def test_a_gradient_that_is_not_finite_is_reported_once(how):
    x = torch.zeros(2, requires_grad=True)
    early = x * 1
    hidden = early.sqrt()
    loss = hidden.sum()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if how == "block":
            with nnsight.backward(loss):
                hidden.grad
                early.grad
                x.grad
        else:
            nnsight.grad(loss, [x, early, hidden])
    (one,) = caught
    assert one.category is RuntimeWarning
    assert "is not finite" in str(one.message)
    assert one.filename == __file__


INF, NAN, LARGE = float("inf"), float("nan"), 3e38  # two of the last add up to more than float32 holds


@pytest.mark.parametrize("how", ["block", "grad"])
@pytest.mark.parametrize(
    ("dtype", "values", "is_finite"),
    [
        (torch.float32, [1.0, -2.0], True),
        (torch.float32, [LARGE, LARGE], True),
        (torch.float32, [LARGE, INF], False),
        (torch.float32, [INF, -INF], False),
        (torch.float64, [NAN, 1.0], False),
        (torch.float16, [6e4, 6e4], True),
        (torch.float16, [6e4, NAN], False),
        (torch.bfloat16, [-INF, 1.0], False),
        (torch.complex64, [1 + 2j, 1j], True),
        (torch.complex64, [complex(1, INF), 1j], False),
        (torch.complex64, [complex(LARGE, LARGE), complex(LARGE, LARGE)], True),
    ],
)
def test_whether_a_gradient_is_finite_is_told_of_its_numbers_not_of_their_sum(how, dtype, values, is_finite):
    x = torch.zeros(2, dtype=dtype, requires_grad=True)
    hidden = x * 1
    gradient = torch.tensor(values, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if how == "block":
            with nnsight.backward(hidden, gradient):
                got = hidden.grad
        else:
            got = nnsight.grad(hidden, [hidden, x], gradient=gradient)[0]
    torch.testing.assert_close(got, gradient, rtol=0, atol=0, equal_nan=True)
    assert len(caught) == (0 if is_finite else 1)


@pytest.mark.parametrize("value", [1.0, INF])
def test_gradients_of_several_dtypes_and_sparse_ones_are_looked_at(value):
    table = nn.Embedding(5, 2, sparse=True)
    rows = table(torch.tensor([1, 1, 3]))
    wide = rows.double() * 1
    loss = (wide * torch.tensor([1.0, 1.0, value], dtype=torch.float64)[:, None]).sum()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grads = nnsight.grad(loss, [wide, rows, table.weight], retain_graph=True)
        with nnsight.backward(loss):
            of_table = table.weight.grad
    assert grads[2].is_sparse
    same(of_table.to_dense(), grads[2].to_dense())
    assert len(caught) == (0 if value == 1 else 2)


def test_a_value_in_a_reentrant_checkpoint_says_so(x, switch):
    model = nnsight.NNsight(Checkpointed(reentrant=True))
    x.requires_grad_()
    with model.trace(x):
        inner = model.inner.up.output
        loss = model.output.sum()
        with pytest.raises(GradientError, match="reentrant checkpoint"):
            with loss.backward(retain_graph=True):
                inner.grad
        with pytest.raises(GradientError, match="comes in parts"):
            with loss.backward():
                model.inner.up.weight.grad


def test_a_value_in_a_checkpoint_that_is_not_reentrant(x, switch):
    model = nnsight.NNsight(Checkpointed(reentrant=False))
    expected, parameters = by_hand(model._module, x, ["inner.norm"])
    with model.trace(x):
        inner = model.inner.norm.output
        loss = model.output.square().sum()
        with loss.backward():
            got = inner.grad
    same(got, expected["inner.norm"])
    for name, parameter in model._module.named_parameters():
        same(parameter.grad, parameters[name])


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner = toys.seeded(toys.Layer())
        self.reentrant = reentrant

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=self.reentrant) * 2


# Several passes.


def test_passes_that_interleave_are_refused_on_one_stack(switch):
    early, late = [], []
    for _ in range(2):
        x = torch.ones(3, requires_grad=True)
        early.append(x * 1)
        late.append(early[-1] * 1)

    def interleaved():
        with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
            first.enter_context(nnsight.backward(late[0].sum()))
            late[0].grad
            second.enter_context(nnsight.backward(late[1].sum()))
            late[1].grad
            first.close()
            return early[1].grad

    if switch == "thread":
        same(interleaved(), torch.ones(3))
    else:
        with pytest.raises(RunOrderError, match=r"backward pass of .* are both paused beneath C\+\+"):
            interleaved()
    fresh = torch.ones(3, requires_grad=True)
    with nnsight.backward((fresh * 2).sum()):
        same(fresh.grad, torch.full((3,), 2.0))
    assert torch._C._current_graph_task_id() == -1


def test_thirty_two_passes_nest_and_the_next_is_refused(switch):
    x = torch.ones(3, requires_grad=True)
    h = x * 2

    def nest(depth):
        with nnsight.backward((h * depth).sum(), retain_graph=True):
            got = h.grad
            if depth < limit:
                nest(depth + 1)
        same(got, torch.full((3,), float(depth)))

    limit = 32
    nest(1)
    limit = 33
    with pytest.raises(GradientError, match="32 backward blocks"):
        nest(1)
    limit = 2
    nest(1)


def test_a_trace_and_the_blocks_in_it_have_one_mode_between_them(mlp, x):
    """Each one costs every torch operation of the block a microsecond."""
    count = torch._C._len_torch_function_stack
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        loss = mlp.output.sum()
        assert count() == 1
        with loss.backward(retain_graph=True):
            with loss.backward(retain_graph=True) as opened:
                assert count() == 1
                inner = hidden.grad
            outer = hidden.grad
            assert repr(opened) == "<backward block, ended>"
            assert count() == 1
        assert count() == 1
    assert count() == 0
    same(inner, outer)


def test_what_is_noted_of_a_value_is_not_heard_by_a_mode_of_the_blocks(mlp, x):
    heard = []

    class Hears(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            heard.append(func)
            return func(*args, **(kwargs or {}))

    with mlp.trace(x):
        with Hears():
            hidden, out = mlp.layers[1].output, mlp.output
        assert nnsight.grad(out.sum(), hidden).shape == (3, 4)
    assert heard == []


def test_a_block_that_outlives_its_trace_still_has_gradients(mlp, x, switch):
    with contextlib.ExitStack() as stack:
        with mlp.trace(x):
            hidden = mlp.layers[1].output
            loss = mlp.output.sum()
            (expected,) = torch.autograd.grad(loss, hidden, retain_graph=True)
            stack.enter_context(nnsight.backward(loss))
        got = hidden.grad
    same(got, expected)
    assert torch._C._len_torch_function_stack() == 0


def test_blocks_that_are_left_in_the_order_they_were_entered(mlp, x, switch):
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        out = mlp.output
        losses = out.sum(), out.square().sum()
        expected = [torch.autograd.grad(loss, hidden, retain_graph=True)[0] for loss in losses]
        first, second = contextlib.ExitStack(), contextlib.ExitStack()
        first.enter_context(nnsight.backward(losses[0], retain_graph=True))
        second.enter_context(nnsight.backward(losses[1], retain_graph=True))
        first.close()
        got = hidden.grad
        second.close()
    same(got, expected[1])
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_gradient_inside_vmap_is_refused_and_can_be_had_outside_of_it(mlp, x, switch, has_begun):
    with mlp.trace(x):
        early, late = mlp.layers[0].output, mlp.layers[1].output
        loss = mlp.output.square().sum()
        expected = torch.autograd.grad(loss, [late, early], retain_graph=True)
        with loss.backward():
            got = [late.grad] if has_begun else []
            with pytest.raises(TransformError, match="can't go on inside `vmap`"):
                torch.vmap(lambda row: row * early.grad.sum())(x)
            got += [early.grad] if has_begun else [late.grad, early.grad]
    same(tuple(got), expected)


def test_a_block_that_another_thread_leaves_is_refused_there(mlp, x, switch):
    loss = mlp._module(x).sum()
    opened = nnsight.backward(loss)
    opened.__enter__()
    seen = []

    def leave():
        with pytest.raises(OtherThreadError, match="opened on another thread") as caught:
            opened.__exit__(None, None, None)
        seen.append(caught.value)

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert len(seen) == 1
    assert mlp.head.weight.grad is None
    with nnsight.backward(loss):
        assert mlp.head.weight.grad is not None
    assert torch._C._len_torch_function_stack() == 0


def test_lockstep_traces_with_a_gradient_each(x, switch):
    one, two = nnsight.NNsight(toys.MLP()), nnsight.NNsight(toys.MLP(seed=1))
    expected = [by_hand(model._module, x, ["layers.1"])[0]["layers.1"] for model in (one, two)]
    with one.trace(x), two.trace(x):
        a, b = one.layers[1].output, two.layers[1].output
        first, second = one.output.square().sum(), two.output.square().sum()
        with first.backward():
            got_a = a.grad
            with second.backward():
                got_b = b.grad
    same(got_a, expected[0])
    same(got_b, expected[1])


def test_another_task_of_the_thread_sees_torchs_own_gradient(mlp, x, switch):
    mlp._module(x).sum().backward()
    stored = mlp.head.weight.grad
    seen = []

    async def block():
        with mlp.trace(x):
            hidden = mlp.layers[1].output
            loss = mlp.output.square().sum()
            with loss.backward():
                seen.append(hidden.grad)
                await asyncio.sleep(0)
                seen.append(mlp.layers[0].up.weight.grad)

    async def other():
        seen.append(mlp.head.weight.grad)

    async def both():
        await asyncio.gather(block(), other())

    asyncio.run(both())
    assert len(seen) == 3
    assert seen[1] is stored


def test_a_trace_inside_a_backward_block(mlp, x, switch):
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        loss = mlp.output.sum()
        expected = torch.autograd.grad(loss, [hidden, mlp.embed.weight], retain_graph=True)
        with loss.backward():
            got = hidden.grad
            with mlp.trace(got):
                patched = mlp.layers[0].output
                inner = mlp.output
            weight = mlp.embed.weight.grad
    same((got, weight), expected)
    same(inner, mlp._module(got))
    assert patched.shape == (3, 4)


# What stays.


@pytest.mark.parametrize("form", ["with", "function"])
def test_gradients_in_an_edit(mlp, x, switch, form):
    got = []
    if form == "with":
        with mlp.edit() as (_, edited):
            hidden = edited.layers[0].output
            loss = edited.layers[1].output.square().sum()
            with loss.backward(retain_graph=True):
                got.append(hidden.grad)
            got.append(nnsight.grad(loss, at=edited.layers[0], retain_graph=True))
    else:

        def edit(model):
            hidden = model.layers[0].output
            loss = model.layers[1].output.square().sum()
            with loss.backward(retain_graph=True):
                got.append(hidden.grad)
            got.append(nnsight.grad(loss, at=model.layers[0], retain_graph=True))

        edited = mlp.edit(edit)
    with edited.trace(x):
        early = edited.layers[0].output
        late = edited.layers[1].output
        (expected,) = torch.autograd.grad(late.square().sum(), early)
    same(got, [expected, expected])
    assert torch._C._len_torch_function_stack() == 0


def test_nothing_of_torch_changes_and_nothing_stays_on_the_model(mlp, x, switch):
    with mlp.trace(x):
        pass
    x.requires_grad_()
    before = of_model(mlp._module), of_process()
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        loss = mlp.output.sum()
        inside = dict(vars(torch.Tensor))
        with loss.backward():
            hidden.grad
            mlp.layers[0].norm.weight.grad = torch.zeros(4)
            x.grad
            assert dict(vars(torch.Tensor)) == inside
    mlp._module.zero_grad()
    after = of_model(mlp._module), of_process()
    for one in (before[0], after[0]):
        for _, entry in one:
            for name in list(entry):
                if name.startswith("tensor"):
                    entry[name] = entry[name][:3]
    assert differences(before[0], after[0]) == []
    assert differences(before[1], after[1]) == []
    assert x._backward_hooks is None
    assert dict(vars(torch.Tensor)) == inside


def test_a_trace_that_names_no_backward_has_no_mode(mlp, x):
    with mlp.trace(x):
        assert torch._C._len_torch_function_stack() == 0
        mlp.output


def test_a_generator_that_ends_late_takes_its_mode_with_it(mlp, x, switch):
    def block():
        with mlp.trace(x):
            hidden = mlp.layers[1].output
            yield
            loss = hidden.sum()
            with loss.backward():
                hidden.grad

    before = of_modes()
    one, two = block(), block()
    next(one)
    next(two)
    one.close()
    two.close()
    assert differences(before, of_modes()) == []


def test_memory_is_freed_when_the_block_ends(x, switch):
    """Law 9, with the collector off: neither tensors nor passes stay, whether a block ends well or not."""
    seen = []

    def block(model, fails, asks):
        with model.trace(x):
            hidden = model.layers[1].output
            loss = model.output.sum()
            with loss.backward() as opened:
                if asks:
                    gradient = hidden.grad
                    seen.append(weakref.ref(gradient))
                seen.extend([weakref.ref(hidden), weakref.ref(loss), weakref.ref(opened._backward)])
                if fails:
                    raise ZeroDivisionError

    gc.collect()
    gc.disable()
    model = nnsight.NNsight(toys.MLP())
    try:
        for fails in (False, True):
            for asks in (False, True):
                with contextlib.suppress(ZeroDivisionError):
                    block(model, fails, asks)
        assert [one for one in seen if one() is not None] == []
        freed = weakref.ref(model._module)
        del model
        assert freed() is None
    finally:
        gc.enable()


def test_what_is_noted_of_tensors_is_forgotten_with_them(mlp, x):
    def block():
        with mlp.trace(x):
            [layer.output for layer in mlp.layers]
            if False:
                nnsight.grad(x, x)

    kept = []
    for _ in range(1000):
        block()
        kept.append(len(origins._noted))
    assert max(kept) < 1500


def test_a_dropped_generator_frees_its_backward_pass(x, switch):
    seen = []

    def block(model):
        with model.trace(x):
            hidden = model.layers[1].output
            loss = model.output.sum()
            with loss.backward() as opened:
                seen.extend([weakref.ref(hidden.grad), weakref.ref(hidden), weakref.ref(opened._backward)])
                yield

    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            model = nnsight.NNsight(toys.MLP())
            running = block(model)
            next(running)
            del running
            seen.append(weakref.ref(model._module))
            del model
        assert [one for one in seen if one() is not None] == []
    finally:
        gc.enable()
    assert torch._C._current_graph_task_id() == -1
    assert torch._C._len_torch_function_stack() == 0


def test_gradients_with_a_language_model():
    model = nnsight.LanguageModel("nnsight/demo")
    prompts = ["The Colosseum is in the city of", "Paris"]
    with model.trace(prompts):
        outputs = [layer.output for layer in model.transformer.h]
        hidden = [output[0] if isinstance(output, tuple) else output for output in outputs]  # transformers 5.2: a tuple
        logits = model.lm_head.output
        loss = logits[:, -1].logsumexp(-1).sum()
        expected = torch.autograd.grad(loss, hidden, retain_graph=True)
        with loss.backward():
            got = [value.grad for value in reversed(hidden)]
    for one, other in zip(got, reversed(expected)):
        same(one, other)


def test_gradients_of_a_row(switch):
    model = nnsight.LanguageModel("nnsight/demo")
    with model.trace(["The Colosseum is in the city of", "Paris is"]) as (one, other):
        left, right = one.transformer.h[3].output, other.transformer.h[5].output
        right, left = (value[0] if isinstance(value, tuple) else value for value in (right, left))
        loss = other.lm_head.output[0, -1].logsumexp(-1)
        (expected,) = torch.autograd.grad(loss, right, retain_graph=True)
        with loss.backward(retain_graph=True):
            got = right.grad
            of_the_other_row = left.grad
        with pytest.raises(BlockError, match="not of a row"):
            nnsight.grad(loss, at=other.transformer.h[5])
    same(got, expected)
    assert got.shape[1] == len(model.tokenizer("Paris is")["input_ids"])
    assert not of_the_other_row.any()


def test_generation_has_no_graph_and_says_what_to_do():
    model = nnsight.LanguageModel("nnsight/demo")
    with pytest.raises(GradientError, match=r"`generate` runs the model under torch\.no_grad\(\)(.|\n)*model\.trace"):
        with model.generate("The Colosseum is in the city of", max_new_tokens=2):
            loss = model.lm_head.output.sum()
            with loss.backward():
                pass
    with pytest.raises(GradientError, match="`generate` runs"):
        with model.generate("The Colosseum is in the city of", max_new_tokens=2):
            loss = model.lm_head.output.sum()
            nnsight.grad(loss, at=model.lm_head)


@pytest.mark.parametrize("how", ["block", "function", "plain call", "assigned", "copied"])
def test_a_value_changed_in_place_behind_its_use_says_to_assign_it(how):
    model = nnsight.LanguageModel("nnsight/demo")
    square = torch.nn.Linear(128, 128)
    is_right = how in ("assigned", "copied")
    with contextlib.ExitStack() as stack:
        if not is_right:
            raised = stack.enter_context(pytest.raises(RuntimeError, match="modified by an inplace operation"))
        with model.trace("Paris is"):
            layer = model.transformer.h[3].mlp
            had = layer.output.clone() if how == "copied" else layer.output
            features = square(had)
            if how == "assigned":
                layer.output = layer.output + features
            else:
                layer.output[:] = had + features
            loss = model.lm_head.output.sum()
            if how == "function":
                nnsight.grad(loss, square.weight)
            elif how == "plain call":
                loss.backward()
            else:
                with loss.backward():
                    gradient = features.grad
    if is_right:
        assert gradient.any()
    else:
        assert "Assign it, `layer.output = new`, or use a copy" in raised.value.__notes__[0]


def test_a_part_of_what_was_changed_in_place_says_to_copy_it_before(mlp, x):
    with pytest.raises(IndependentError, match=r"read a copy before: part = layer.output\[:, -1\].clone\(\)$"):
        with mlp.trace(x):
            part = mlp.layers[1].output[:, -1]
            mlp.layers[1].output[:, -1] = part * 2
            nnsight.grad(mlp.output.sum(), part)


NO_METRICS = {
    "nnsight.grad(loss.item(), value)": "not float.*instead +the tensor that it was made of, without .item",
    "nnsight.grad([value], loss)": r"not list.*instead +one number.*it comes first: nnsight.grad\(metric, values\)$",
    "nnsight.grad(lambda: loss, value)": r"not function.*instead +the tensor that it returns: nnsight.grad\(metric\(\)",
    "nnsight.grad(loss, 'layers.1')": r"this is str.*instead +nnsight.grad\(metric, at=model.get\('layers.1'\)\)",
}


@pytest.mark.parametrize("line", NO_METRICS)
def test_what_is_no_metric_or_no_value_says_what_is_meant(mlp, x, line):
    with pytest.raises(GradientError, match="(?s)" + NO_METRICS[line]), mlp.trace(x):
        value = mlp.layers[1].output
        exec(line, {"nnsight": nnsight, "value": value, "loss": mlp.output.sum()})


@pytest.mark.slow
def test_no_program_of_nested_passes_and_errors_ends_the_process():
    """Law 11: errors of torch's in the engine, in the block and at depth, in a process of its own."""
    folder = pathlib.Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(folder.parent)])}
    done = subprocess.run(
        [sys.executable, str(folder / "fuzz_gradients.py"), "0", "120"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr[-2000:]


def test_behind_invokes_the_gradients_at_one_place_are_read_in_any_order(switch, mlp, x):
    with mlp.trace() as tracer:
        with tracer.invoke(x[:1]):
            one = mlp.layers[1].output
            first = mlp.output
        with tracer.invoke(x[1:]):
            other = mlp.layers[1].output
            second = mlp.output
    with nnsight.backward(first.square().sum() + second.square().sum()):
        gradients = [one.grad, other.grad]
    expected, _ = by_hand(mlp._module, x, ["layers.1"])
    assert torch.equal(torch.cat(gradients), expected["layers.1"])


def test_of_what_a_row_had_before_a_write_it_is_not_said_that_it_is_a_part(mlp, x):
    with mlp.trace(x) as (a, *_):
        before = a.layers[1].output
        a.layers[1].output = torch.zeros(1, 4)
        with pytest.raises(IndependentError, match="or what was there before a write"):
            nnsight.grad(a.tracer.result.sum(), [before])


@pytest.mark.parametrize("edited_by", ["model", "layer"])
def test_edits_are_at_work_while_a_backward_pass_is_paused(switch, mlp, x, edited_by):
    """Of something else, which another task on this thread may be in: torch has one engine call for both."""
    leaf = torch.ones(3, requires_grad=True)

    def double(layer):
        layer.output = layer.output * 2

    if edited_by == "model":
        mlp.edit(lambda model: double(model.layers[1]), inplace=True)
    else:
        mlp.layers[1].edit(double, inplace=True)
    expected = mlp(x)
    with mlp.trace(x) as tracer:
        mlp.layers[0].output
        with nnsight.backward((leaf * leaf).sum()):
            leaf.grad
            inside = tracer.result
    with mlp.trace(x) as tracer:
        mlp.layers[0].output
        with nnsight.backward((leaf * leaf).sum()):
            leaf.grad
            mlp.layers[1].up.output
        after = tracer.result
    assert torch.equal(inside, expected)
    assert torch.equal(after, expected)
    assert not torch.equal(expected, mlp._module(x))
