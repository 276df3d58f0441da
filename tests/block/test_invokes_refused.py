"""Invokes that run where they stand, and what can't be one: told with what to write instead."""

import subprocess
import sys
import warnings

import pytest
import snapshots
import torch

from comparing import alone
from nnsight import errors


def test_a_one_line_body_and_one_that_begins_with_try(mlp, x):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with mlp.trace() as tracer:
            with tracer.invoke(x): one = mlp.layers[1].output  # noqa: E701  # fmt: skip
            with tracer.invoke(2 * x):
                try:
                    other = mlp.layers[1].output
                finally:
                    done = True
    torch.testing.assert_close(one, alone(mlp, x))
    torch.testing.assert_close(other, alone(mlp, 2 * x))
    assert done
    assert all("forward pass of its own" in str(warning.message) for warning in caught)


def test_a_body_with_return_or_break_runs_in_a_forward_pass_of_its_own(mlp, x):
    def returns():
        with mlp.trace() as tracer:
            with tracer.invoke(x):
                return mlp.layers[1].output
        raise AssertionError

    with pytest.warns(UserWarning, match="in a forward pass of its own") as caught:
        value = returns()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    torch.testing.assert_close(value, alone(mlp, x))
    with pytest.warns(UserWarning, match="in a forward pass of its own"):  # noqa: PT031
        with mlp.trace() as tracer:
            for scale in (1, 2):
                with tracer.invoke(scale * x):
                    broken = mlp.layers[1].output
                    break
    torch.testing.assert_close(broken, alone(mlp, x))


def test_without_source_an_invoke_runs_where_it_stands(mlp, x, switch):
    lines = """
with model.trace() as tracer:
    with tracer.invoke(x):
        one = model.layers[1].output
        result = tracer.result
    with tracer.invoke(2 * x):
        model.layers[1].output = one
        other = model.layers[2].output
"""
    names = {"model": mlp, "x": x}
    before = snapshots.of_model(mlp._module)
    with pytest.warns(UserWarning, match="in a forward pass of its own"):
        exec(lines, names)
    assert snapshots.differences(before, snapshots.of_model(mlp._module)) == []
    torch.testing.assert_close(names["one"], alone(mlp, x))
    torch.testing.assert_close(names["result"], mlp._module(x))
    with mlp.trace(2 * x):
        mlp.layers[1].output = names["one"]
        expected = mlp.layers[2].output
    torch.testing.assert_close(names["other"], expected)


def test_without_source_what_needs_the_others_is_refused(mlp, x):
    lines = """
with model.trace() as tracer:
    with tracer.invoke():
        model.layers[1].output
"""
    with pytest.raises(errors.BlockError, match="can't run beside them"):
        exec(lines, {"model": mlp, "x": x})


def test_invokes_work_from_standard_input_one_by_one():
    script = """
import torch, nnsight
model = nnsight.NNsight(torch.nn.Sequential(torch.nn.Identity()))
with model.trace() as tracer:
    with tracer.invoke(torch.ones(1, 2)):
        a = model[0].output
    with tracer.invoke(torch.zeros(3, 2)):
        b = model[0].output
print(tuple(a.shape), tuple(b.shape))
"""
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, timeout=120)
    assert done.stdout == "(1, 2) (3, 2)\n", done.stderr
    assert done.stderr.count("UserWarning") == 2 or done.stderr.count("UserWarning") == 1


def test_what_can_t_be_an_invoke_is_refused(mlp, x):
    with pytest.raises(errors.BlockError, match="can't be opened in another"):
        with mlp.trace() as tracer:
            with tracer.invoke(x):
                with tracer.invoke(x):
                    mlp.layers[0].output
    with pytest.raises(errors.BlockError, match="given a prompt itself"), mlp.trace(x) as tracer:
        with tracer.invoke(x):
            pass
    with pytest.raises(errors.BlockError, match="has not been entered"):
        mlp.trace().invoke(x)
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            pass
    with pytest.raises(errors.BlockError, match="after the trace"):
        tracer.invoke(x)
    torch.testing.assert_close(alone(mlp, x), alone(mlp, x))


def test_a_value_outside_the_invokes_is_told_where_it_belongs(mlp, x):
    asked = {
        "there is no value outside its invokes": lambda tracer: mlp.layers[0].output,
        "`tracer.result` belongs in an invoke": lambda tracer: tracer.result,
        "`tracer.iter` belongs in an invoke": lambda tracer: tracer.iter,
        r"`tracer.stop\(\)` belongs in an invoke": lambda tracer: tracer.stop(),
        r"`tracer.cache\(\)` belongs in an invoke": lambda tracer: tracer.cache(),
    }
    for text, ask in asked.items():
        with pytest.raises(errors.InputError, match=text) as raised:
            with mlp.trace() as tracer:
                with tracer.invoke(x):
                    mlp.layers[0].output
                ask(tracer)
        assert "with tracer.invoke(prompt):" in str(raised.value)


def looks_around():
    return bound_by_an_invoke  # noqa: F821


def test_a_function_that_looks_for_what_an_invoke_binds_is_told_when_that_is_there(mlp, x, y):
    with pytest.raises(NameError, match="bound_by_an_invoke") as raised, mlp.trace() as tracer:
        with tracer.invoke(x):
            bound_by_an_invoke = mlp.layers[0].output  # noqa: F841
        with tracer.invoke(y):
            looks_around()
    note = "around the trace only when the trace has ended: give it to `looks_around` as an argument."
    assert any(note in one for one in raised.value.__notes__)
    with pytest.raises(NameError) as raised, mlp.trace() as tracer:
        with tracer.invoke(x):
            own  # noqa: F821
            own = 1  # noqa: F841
    assert raised.value.__notes__ == ["In invoke 0 of the trace."]


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="there, a body behind several items runs in its place")
def test_an_invoke_in_another_is_told_to_stand_behind_it(mlp, x, y):
    with pytest.raises(errors.BlockError, match=r"(?s)opened in another.*instead +one after the other"):
        with mlp.trace() as tracer, tracer.invoke(x), tracer.invoke(y):
            mlp.layers[0].output


def test_an_invoke_alone_without_a_prompt_has_no_batch_to_see(mlp):
    with pytest.raises(errors.InputError, match=r"(?s)there is none.*you wrote +with tracer.invoke\(\):"):
        with mlp.trace() as tracer:
            with tracer.invoke():
                mlp.layers[0].output
