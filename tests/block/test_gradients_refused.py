"""What can't be a gradient, or is asked for too late: told at the user's line, with what to write instead."""

import sys
import warnings

import pytest
import torch
from torch import nn

import nnsight
import toys
from comparing import same
from gradients_by_hooks import by_hand
from nnsight.errors import (
    AlreadyPastError,
    BlockError,
    GradientError,
    IndependentError,
    OutOfOrderError,
    OutsideTraceError,
    WriteError,
)


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
