"""The names around invokes: what a block deletes there, and what functions that it calls find there."""

import warnings

import pytest
import torch

from comparing import alone
from nnsight import errors


@pytest.mark.filterwarnings("ignore:This invoke runs in a forward pass of its own:UserWarning")
def test_what_a_block_deletes_is_gone_around_it(mlp, x, y):
    outer, kept, other, caught = 1, 2, 3, 4
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            hidden = mlp.layers[0].output
            del outer, hidden
            other = 5
            del other
            try:
                mlp.layers[9]
            except IndexError as caught:
                str(caught)
    assert kept == 2
    for name in ("outer", "hidden", "other", "caught"):
        assert name not in locals()
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            outer = mlp.layers[0].output
        with tracer.invoke(y):
            outer = outer.sum() + mlp.layers[0].output.sum()
            total = outer * 1
            del outer
    assert "outer" not in locals()
    assert total.ndim == 0
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            outer = mlp.layers[0].output
            del outer
        with tracer.invoke(y):
            outer = mlp.layers[1].output
    assert outer.shape == y.shape


def test_what_a_block_deletes_at_the_top_of_a_file_is_gone_and_stands_for_nothing_in_the_next_one(mlp, x, tmp_path):
    path = tmp_path / "cell.py"
    path.write_text("""
with model.trace() as tracer:
    with tracer.invoke(x):
        hidden = model.layers[0].output
        del outer, hidden
    with tracer.invoke(x):
        again = model.layers[1].output
        outer
""")
    names = {"model": mlp, "x": x, "outer": 1}
    with pytest.raises(NameError, match="name 'outer' is not defined"):
        exec(compile(path.read_text(), str(path), "exec"), names)
    assert {"outer", "hidden"}.isdisjoint(names)
    assert names["again"].shape == (3, 4)
    path = tmp_path / "other.py"
    path.write_text("""
with model.trace() as tracer:
    with tracer.invoke(x):
        model.layers[0].output
        del outer, stays
    stays = 2
    with tracer.invoke(x):
        outer = same
""")
    names = {"model": mlp, "x": x, "outer": 1, "same": 1, "stays": 1}
    exec(compile(path.read_text(), str(path), "exec"), names)
    assert (names["outer"], names["stays"]) == (1, 2)
    path = tmp_path / "third.py"
    path.write_text("""
with model.trace() as tracer:
    with tracer.invoke(x):
        hidden = model.layers[0].output
        del hidden
        hidden
    with tracer.invoke(x):
        hidden = 1
""")
    with pytest.raises(NameError, match="'hidden' is not defined") as raised:
        exec(compile(path.read_text(), str(path), "exec"), {"model": mlp, "x": x, "hidden": 1})
    assert raised.value.__notes__ == ["In invoke 0 of the trace."]


def run_cell(text, path, names):
    path.write_text(text)
    names.setdefault("__name__", "a_module")
    exec(compile(text, str(path), "exec"), names)
    return names


LOOKS = """
import functools

def helper():
    return hidden.sum()

def deeper():
    return helper()

@functools.cache
def cached():
    return hidden.sum()

class Probe:
    def run(self):
        return hidden.sum()

probe = Probe()
hidden = None
"""


@pytest.mark.parametrize("call", ["helper()", "deeper()", "cached()", "probe.run()", "Probe().run()"])
def test_a_function_that_looks_around_for_what_its_block_binds_never_sees_what_stood_there(call, mlp, x, tmp_path):
    names = run_cell(LOOKS, tmp_path / "defined.py", {"model": mlp, "x": x})
    cell = f"""
with model.trace() as tracer:
    with tracer.invoke(x):
        hidden = model.layers[0].output
        total = {call}
"""
    name = call.partition("(")[0].partition(".")[0]
    with pytest.warns(UserWarning, match=f"its own.*`{name}` looks around it for `hidden`, which it binds"):
        run_cell(cell, tmp_path / "cell.py", names)
    assert torch.equal(names["total"], alone(mlp, x, "layers.0").sum())
    cell = f"""
with model.trace() as tracer:
    with tracer.invoke(x):
        hidden = model.layers[0].output
    with tracer.invoke(x):
        total = {call}
"""
    with pytest.raises(
        errors.BlockError, match=rf"`{name}` looks around this invoke for `hidden`, which invoke 0 binds"
    ):
        run_cell(cell, tmp_path / "other.py", names)


def test_a_function_within_the_same_function_looks_for_its_names_too(mlp, x):
    hidden = None

    def helper():
        return hidden

    with warnings.catch_warnings(record=True) as told, mlp.trace() as tracer:
        warnings.simplefilter("always")
        with tracer.invoke(x):
            hidden = mlp.layers[0].output
            found = helper()
    assert found is hidden
    assert "`helper` looks around it for `hidden`, which it binds" in str(told[0].message)
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            inner = mlp.layers[0].output
            both = [(lambda: inner)() for _ in range(2)]
    assert both[0] is both[1] is inner


def test_a_function_that_looks_for_something_else_is_called_in_the_batch(mlp, x, tmp_path):
    names = run_cell(LOOKS, tmp_path / "defined.py", {"model": mlp, "x": x})
    cell = """
hidden = torch.ones(2)
with model.trace() as tracer:
    with tracer.invoke(x):
        total, value = helper(), model.layers[0].output
    with tracer.invoke(x):
        other = model.layers[0].output
"""
    names["torch"] = torch
    assert run_cell(cell, tmp_path / "cell.py", names)["total"] == 2
    elsewhere = run_cell(LOOKS + "hidden = torch.ones(3)", tmp_path / "elsewhere.py", {"torch": torch})
    names["helper"] = elsewhere["helper"]
    exec("def again(n): return n and again(n - 1)", names)
    cell = """
with model.trace() as tracer:
    with tracer.invoke(x):
        hidden = model.layers[0].output
        total = helper() + again(2)
"""
    assert run_cell(cell, tmp_path / "other.py", names)["total"] == 3


def test_a_function_that_opens_an_invoke_keeps_its_names_to_itself(mlp, x):
    def plain(tracer):
        hidden = 1

        def helper():
            return hidden

        with tracer.invoke(x):
            found.append(helper())

    def binds(tracer):
        with tracer.invoke(x):
            hidden = mlp.layers[0].output  # noqa: F841

    found = []
    with mlp.trace() as tracer:
        binds(tracer)
        plain(tracer)
    assert found == [1]
