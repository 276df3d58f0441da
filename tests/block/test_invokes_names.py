"""The names around invokes: what a block deletes there, and what functions that it calls find there."""

import contextlib
import random
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


def test_a_loop_over_invokes_binds_its_name_behind_an_invoke_that_binds_it_too(mlp, x, y):
    patched, own, layer = {}, [], 1  # as a loop before has left it
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            kept = {}
            for layer in range(2):
                kept[layer] = mlp.layers[layer].output
        for layer in range(2):
            with tracer.invoke(y):
                hidden = mlp.layers[layer].output
                hidden[:] = kept[layer].mean()
                patched[layer] = mlp.head.output
        for layer in (0, 0, 1):
            with tracer.invoke(y):
                own.append((layer, mlp.layers[layer].output.shape))
                for layer in range(5):
                    str(layer)
    assert [one for one, _ in own] == [0, 0, 1]
    assert layer == 4
    with mlp.trace(x):
        means = [mlp.layers[layer].output.mean() for layer in range(2)]
    for layer in range(2):
        with mlp.trace(y):
            mlp.layers[layer].output[:] = means[layer]
            wanted = mlp.head.output
        torch.testing.assert_close(patched[layer], wanted)


PARTS = (
    "{name} = {value}",
    "{name} = [{value}]",
    "if {flag}:\n    {name} = [{value}]",
    "for {name} in ({value}, {other}):\n{inner}",
    "for k in range(2):\n{inner}",
    "with tracer.invoke(x):\n    seen.append((n, {name}))",
    "with tracer.invoke(x):\n    {name} = [{value}]\n    seen.append((n, a, b))",
    "with tracer.invoke(x):\n    seen.append((n, {name}))\n"
    "    for {name} in ({value}, {other}):\n        pass\n    seen.append((n, a, b))",
    "with tracer.invoke(x):\n    if {flag}:\n        {name} = [{value}]\n    seen.append((n, a, b))",
)


def drawn(draw, depth=0):
    """Lines of a trace's block: assignments, loops, and invokes that bind and look at the same two names."""
    text = ""
    for _ in range(draw.randint(1, 3 if depth else 5)):
        part = draw.choice([one for one in PARTS if depth < 2 or "{inner}" not in one])
        inner = "".join(f"    {line}\n" for line in drawn(draw, depth + 1).splitlines()) if "{inner}" in part else ""
        values = {"name": draw.choice("ab"), "value": draw.randint(0, 2), "other": draw.randint(0, 2)}
        text += part.format(**values, flag=draw.random() < 0.5, inner=inner.rstrip("\n")) + "\n"
        if "tracer" in part and draw.random() < 0.7:
            text += "n = n + 1\n"
    return text


class InPlace:
    """A tracer whose invokes run where they stand."""

    def invoke(self, _):
        return contextlib.nullcontext()


@pytest.mark.parametrize("in_function", [False, True])
def test_names_mean_what_they_would_if_each_invoke_ran_where_it_stands(mlp, x, tmp_path, in_function):
    n_refused = 0
    for seed in range(150):
        body = "".join(f"        {line}\n" for line in drawn(random.Random(seed)).splitlines())
        lines = ["def run():", "    seen, a, b, n = [], 7, 8, 0", "    with opened() as tracer:", body.rstrip("\n")]
        lines += ["    return seen, a, b, n", "found = run()"]
        if not in_function:
            lines = [line.removeprefix("    ") for line in "\n".join(lines[1:-2]).splitlines()]
            lines += ["found = seen, a, b, n"]
        path = tmp_path / f"{in_function}{seed}.py"
        path.write_text("\n".join(lines))
        code = compile(path.read_text(), str(path), "exec")
        wanted = {"opened": lambda: contextlib.nullcontext(InPlace()), "x": x}
        exec(code, wanted)
        names = {"opened": mlp.trace, "x": x}
        try:
            exec(code, names)
        except errors.BlockError as refused:
            assert "which of the two is meant can't be told" in str(refused) or "no prompt" in str(refused)  # noqa: PT017
            n_refused += 1
            continue
        except errors.InputError:
            continue  # without an invoke
        assert sorted(map(str, names["found"][0])) == sorted(map(str, wanted["found"][0])), path.read_text()
        assert names["found"][1:] == wanted["found"][1:], path.read_text()
    assert n_refused < 75
