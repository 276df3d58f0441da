"""Law 5, the places: a file, standard input, `-c`, `-i`, `exec`, a doctest, a notebook, under coverage and in pdb."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap
import types

import pytest
import torch

import nnsight

pytestmark = pytest.mark.slow

TESTS = pathlib.Path(__file__).parent.parent

START = """\
import torch
torch.set_num_threads(1)
import nnsight, toys
model = nnsight.NNsight(toys.MLP())
x = torch.ones(2, 4)
expected = []
handle = model._module.layers[1].register_forward_hook(lambda module, args, out: expected.append(out))
plain = model._module(x)
handle.remove()
"""

BLOCK = """\
with model.trace(x):
    seen = model.layers[1].output
    model.layers[2].output = seen * 2
    after = model.head.input
assert torch.equal(seen, expected[0]) and torch.equal(after, seen * 2)
print("all well")
"""


def environment(**more):
    path = os.pathsep.join(filter(None, [str(TESTS), str(TESTS / "laws"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", **more}


def python(*args, given="", cwd=None, **more):
    """Runs Python with the tests' modules in reach; fails with its stderr where it fails."""
    done = subprocess.run(
        [sys.executable, *args],
        input=given,
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_file(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(START + BLOCK)
    done = python(script)
    assert (done.stdout, done.stderr) == ("all well\n", "")


def test_a_module(tmp_path):
    (tmp_path / "amodule.py").write_text(START + BLOCK)
    done = python("-m", "amodule", cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("all well\n", "")


def test_standard_input():
    done = python("-", given=START + BLOCK)
    assert (done.stdout, done.stderr) == ("all well\n", "")


def test_dash_c():
    done = python("-c", START + BLOCK)
    assert (done.stdout, done.stderr) == ("all well\n", "")


def test_the_repl():
    block = """\
    with model.trace(x):
        seen = model.layers[1].output
        model.layers[2].output = seen * 2

    print("block:", torch.equal(seen, expected[0]))
    with model.trace(x): one = model.layers[0].output

    tracer = model.trace(x, trace=True)
    scope = tracer.__enter__()
    late = tracer.model.layers[1].output
    print("paused:", torch.equal(late, expected[0]))
    _ = tracer.__exit__(None, None, None)
    with model.trace(x):
        late = model.layers[2].output
        model.layers[0].output

    print("error:", torch.equal(model(x), plain))
    """
    done = python("-i", "-q", given=START + textwrap.dedent(block))
    assert done.stdout.splitlines() == ["block: True", "paused: True", "error: True"]
    assert "AlreadyPastError" in done.stderr


def test_the_repl_by_code_interact(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import code\ncode.interact(banner='', exitmsg='')\n")
    done = python(script, given=START + BLOCK.replace("assert", "\nassert"))
    assert "all well" in done.stdout
    assert "Error" not in done.stderr


def test_exec_with_and_without_a_file_name(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"start, block = {START!r}, {BLOCK!r}\n"
        "exec(start)\nexec(block)\nexec(compile(block, '/no/such/file.py', 'exec'))\nexec(block, dict(globals()))\n"
    )
    assert python(script).stdout == "all well\n" * 3


def test_a_doctest(tmp_path):
    lines = ["    " + (">>> " if not line.startswith(" ") else "... ") + line for line in (START + BLOCK).splitlines()]
    (tmp_path / "documented.py").write_text('"""A doctest.\n\n' + "\n".join(lines) + '\n    all well\n"""\n')
    done = python("-m", "doctest", "-v", "documented.py", cwd=tmp_path)
    assert "0 failed" in done.stdout or "Test passed." in done.stdout


def test_a_zip_file(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.writestr("__main__.py", START + BLOCK)
    assert python(tmp_path / "app.zip").stdout == "all well\n"


def test_compiled_without_its_source(tmp_path):
    import py_compile

    (tmp_path / "gone.py").write_text(START + BLOCK)
    py_compile.compile(str(tmp_path / "gone.py"), cfile=str(tmp_path / "only.pyc"), doraise=True)
    (tmp_path / "gone.py").unlink()
    assert python(tmp_path / "only.pyc").stdout == "all well\n"


AWAITS = """\
import asyncio
with model.trace(x) as tracer:
    await asyncio.sleep(0)
    awaited = model.layers[1].output
    await asyncio.sleep(0)
print(torch.equal(awaited, timed))
"""


def test_a_notebook(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = [
        START,
        BLOCK,
        "%%time\nwith model.trace(x):\n    timed = model.layers[1].output",
        "with model.trace(x): one = model.layers[1].output\nprint(torch.equal(one, expected[0]))",
        AWAITS,
        "with model.trace(x):\n    late = model.layers[2].output\n    wrong = model.layers[0].output",
        "print(late.shape, torch.equal(model(x), plain))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    before = dict(os.environ)
    os.environ.update(environment())
    try:
        client = nbclient.NotebookClient(
            notebook,
            timeout=120,
            kernel_name="python3",
            allow_errors=True,
            resources={"metadata": {"path": str(tmp_path)}},
        )
        client.execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    printed = [
        "".join(out.get("text", "") for out in cell.outputs if out.get("name") == "stdout") for cell in notebook.cells
    ]
    errors = [[out for out in cell.outputs if out.output_type == "error"] for cell in notebook.cells]
    assert [len(found) for found in errors] == [0, 0, 0, 0, 0, 1, 0], errors
    assert printed[1] == "all well\n"
    assert printed[3] == "True\n"
    assert printed[4] == "True\n"
    assert printed[6] == "torch.Size([2, 4]) True\n"
    assert errors[5][0].ename == "AlreadyPastError"
    assert "wrong = model.layers" in "\n".join(errors[5][0].traceback)


MEASURED = """\
import torch
torch.set_num_threads(1)
import nnsight


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.second = torch.nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        if x.shape[0] == 7:
            x = x + 1  # forward, never
        x = x * 2  # forward, between
        x = self.second(x)
        return x + 1  # forward, last


def helper(model):
    return model.second.output  # helper


model = nnsight.NNsight(Model())
with model.trace(torch.ones(2, 4)):
    first = model.first.output  # block, first
    if first is None:
        first = 0  # block, never
    second = helper(model)  # block, second
    third = second + 1  # block, last
print("all well")  # after
"""


@pytest.mark.parametrize("switch", ["greenlet", "thread"])
def test_coverage_counts_the_block_and_the_forward(tmp_path, switch):
    pytest.importorskip("coverage")
    (tmp_path / "measured.py").write_text(
        MEASURED.replace("model = nnsight", f"nnsight.CONFIG.switch = {switch!r}\nmodel = nnsight")
    )
    (tmp_path / "rc").write_text("[run]\nconcurrency = greenlet,thread\nbranch = true\ninclude = measured.py\n")
    assert python("-m", "coverage", "run", "--rcfile=rc", "measured.py", cwd=tmp_path).stdout == "all well\n"
    python("-m", "coverage", "json", "--rcfile=rc", "-o", "out.json", cwd=tmp_path)
    found = json.loads((tmp_path / "out.json").read_text())["files"]["measured.py"]
    lines = (tmp_path / "measured.py").read_text().splitlines()
    marked = {i: line.partition("  # ")[2] for i, line in enumerate(lines, 1) if "  # " in line}
    executed = {what for i, what in marked.items() if i in found["executed_lines"]}
    assert executed == set(marked.values()) - {"forward, never", "block, never"}
    missing = {marked.get(i) for i in found["missing_lines"]}
    assert missing == {"forward, never", "block, never"}


DEBUGGED = """\
import torch
torch.set_num_threads(1)
import nnsight


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.second = torch.nn.Linear(4, 4)

    def forward(self, x):
        inside = self.first(x)
        doubled = inside * 2
        return self.second(doubled)


model = nnsight.NNsight(Model())
before = "before"
with model.trace(torch.ones(2, 4)):
    breakpoint()
    hidden = model.first.output
    shape = tuple(hidden.shape)
    model.second.output = hidden
    last = model.output
print("all well", torch.equal(last, hidden))
"""


def number(source, text):
    """The number of the line that contains `text`."""
    return next(i for i, line in enumerate(source.splitlines(), 1) if text in line)


def test_pdb_stops_in_a_block_and_steps_over_a_read(tmp_path):
    script = tmp_path / "debugged.py"
    script.write_text(DEBUGGED)
    done = python(script, given="n\nn\np 'shape is', hidden.shape\nn\np shape\np before\nw\nc\n")
    assert "('shape is', torch.Size([2, 4]))" in done.stdout
    assert "(2, 4)" in done.stdout
    assert "'before'" in done.stdout
    stops = [line for line in done.stdout.splitlines() if line.startswith(("-> ", "(Pdb) -> "))]
    assert any("hidden = model.first.output" in line for line in stops)
    assert any("shape = tuple(hidden.shape)" in line for line in stops)
    assert any("model.second.output = hidden" in line for line in stops)
    assert "all well True" in done.stdout


def test_pdb_stops_in_the_models_forward(tmp_path):
    """On the greenlet switch: with the thread switch the model runs in a thread that pdb does not trace."""
    script = tmp_path / "debugged.py"
    script.write_text(DEBUGGED)
    line = number(DEBUGGED, "doubled = inside * 2")
    done = python(
        script,
        given=f"b {script}:{line}\nc\np 'inside is', tuple(inside.shape)\n"
        "n\np 'doubled is', tuple(doubled.shape)\nclear 1\nc\n",
    )
    assert "('inside is', (2, 4))" in done.stdout
    assert "('doubled is', (2, 4))" in done.stdout
    assert "-> return self.second(doubled)" in done.stdout
    assert "all well True" in done.stdout


def test_pdb_steps_on_after_an_error_in_a_block(tmp_path):
    script = tmp_path / "debugged.py"
    source = DEBUGGED.replace(
        "    last = model.output\n",
        "    last = model.output\n    try:\n        model.first.output\n"
        "    except nnsight.Error as error:\n        name = type(error).__name__\n",
    )
    script.write_text(source)
    steps = 9 + (sys.version_info >= (3, 13))  # from there on, pdb stops at the line of `breakpoint()` itself
    done = python(script, given="n\n" * steps + "p 'name is', name\nc\n")
    assert "('name is', 'AlreadyPastError')" in done.stdout
    assert "all well True" in done.stdout


def test_pdb_run_as_a_module(tmp_path):
    script = tmp_path / "debugged.py"
    source = DEBUGGED.replace("    breakpoint()\n", "")
    script.write_text(source)
    line = number(source, "shape = tuple")
    done = python("-m", "pdb", script, given=f"b {line}\nc\np 'shape is', hidden.shape\nc\nq\n")
    assert "('shape is', torch.Size([2, 4]))" in done.stdout
    assert "all well True" in done.stdout


def test_other_tools_that_watch_python(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(START + BLOCK)
    assert "all well" in python("-m", "cProfile", script).stdout
    assert "all well" in python("-X", "dev", "-W", "ignore", script).stdout


PYDEVD = """
def values(of):
    found = {}
    for name in dir(of):
        try:
            found[name] = getattr(of, name)
        except Exception as error:
            found[name] = error
    return found


def internal_evaluate_expression_json(context, expression, names):
    return eval(compile(expression, "<string>", "eval"), names)
"""


def test_a_debugger_that_unfolds_an_object_or_shows_what_the_pointer_is_over_does_not_run_the_model(
    monkeypatch, mlp, x, switch
):
    pydevd = types.ModuleType("_pydevd_bundle.pydevd_resolver")
    exec(PYDEVD, vars(pydevd))
    monkeypatch.setitem(sys.modules, pydevd.__name__, pydevd)
    untouched = mlp._module(x)
    names = {"mlp": mlp}
    with mlp.trace(x) as tracer:
        before = pydevd.values(mlp)
        first = mlp.layers[0].output
        names["tracer"] = tracer
        refused = [before["output"], pydevd.values(mlp)["input"], pydevd.values(tracer)["result"]]
        refused.append(pydevd.values(mlp.layers[2])["output"])
        assert pydevd.values(mlp.layers[0])["output"] is first
        for context in ("hover", "watch"):
            try:
                second = pydevd.internal_evaluate_expression_json(context, "mlp.layers[1].output", names)
            except nnsight.errors.BlockError as error:
                refused.append(error)
        third = mlp.layers[2].output
    assert len(refused) == 5
    assert all("doesn't run on for a debugger's list" in str(error) for error in refused)
    assert torch.equal(mlp._module.layers[2](second), third)
    assert torch.equal(tracer.result, untouched)
