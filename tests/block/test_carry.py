"""Bodies of a `with` that run elsewhere: which can be taken out of their place, and that nothing of it shows."""

import contextlib
import doctest
import linecache
import subprocess
import sys
import textwrap
import threading
import types

import pytest
import torch

import toys
from nnsight import NNsight
from nnsight.block import statements
from nnsight.block.around import write_back
from nnsight.block.carry import Block, Body
from nnsight.block.leave_out import Skip, unpacks
from nnsight.errors import BlockError

older = pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="Python 3.12 gives no opcode events there")


class Later:
    """Runs the body of its `with` when that is over, and binds its names around it as if it had run in place."""

    def __enter__(self):
        frame = sys._getframe(1)
        self.block = Block.of(frame, "another form")
        entered = (1, 2) if unpacks(frame) else "entered"
        self.frame, self.skip = frame, Skip(frame, self.block, entered)
        self.ran_before = list(LOG)
        return entered

    def __exit__(self, kind, error, traceback):
        assert self.skip.done(error), error
        assert self.ran_before == LOG  # nothing of the body has run
        frame, self.frame = self.frame, None
        local = frame.f_locals if frame.f_locals is not frame.f_globals else {}
        names = {name: local[name] for name in self.block.names.intersection(local)}
        body = Body(self.block, names)
        try:
            body()
        finally:
            write_back(frame, body.bound(), body.unbound())
        return True


LOG = []
COUNT = 0


@pytest.fixture(autouse=True)
def _log():
    LOG.clear()


def test_names_go_in_and_come_out():
    outer, changed = 5, 1
    with Later() as (first, second):
        changed += first + second + outer
        new = [changed + i for i in range(outer) if i > 3]
    assert (first, second, changed, new) == (1, 2, 9, [13])


@older
def test_on_one_line():
    with Later() as entered: LOG.append(entered)  # fmt: skip  # noqa: E701
    with Later(): LOG.append("no name")  # fmt: skip  # noqa: E701
    assert LOG == ["entered", "no name"]


@older
def test_a_try_first():
    with Later() as entered:
        try:
            LOG.append(entered)
            raise KeyError
        except KeyError:
            LOG.append("caught")
        finally:
            LOG.append("finally")
    assert LOG == ["entered", "caught", "finally"]


@older
def test_what_stands_behind_it_in_the_same_with_is_a_part_of_the_body():
    @contextlib.contextmanager
    def under():
        LOG.append("in")
        yield "under"
        LOG.append("out")

    with Later() as entered, under() as name:
        LOG.append((entered, name))
    assert LOG == ["in", ("entered", "under"), "out"]


def test_what_stands_before_it_is_entered_first():
    with contextlib.nullcontext("before") as name, Later() as entered:
        LOG.append((name, entered))
    assert LOG == [("before", "entered")]


def test_over_several_lines():
    with Later() as (
        first,
        second,
    ):
        while True:
            LOG.append(first)
            if len(LOG) > second:
                break
    assert LOG == [1, 1, 1]


def test_in_a_loop_each_time_anew():
    for i in range(3):
        with Later():
            LOG.append(i)
    assert LOG == [0, 1, 2]


def test_functions_lambdas_and_classes_in_it_see_its_names():
    with Later() as entered:
        inner = entered + "!"

        def function():
            return inner

        class Class:
            name = function()

        LOG.append((function(), (lambda: inner)(), Class.name))
    assert LOG == [("entered!",) * 3]


def test_one_within_another():
    with Later() as outer:
        LOG.append(outer)
        with Later() as inner:
            LOG.append(inner + outer)
        LOG.append("after")
    assert LOG == ["entered", "enteredentered", "after"]


def test_a_global_that_is_bound():
    global COUNT
    COUNT = 1
    with Later():
        COUNT += 1
    assert COUNT == 2


def test_a_nonlocal_that_is_bound():
    count = 1

    def inner():
        nonlocal count
        with Later():
            count += 1

    inner()
    assert count == 2


def test_private_names_in_a_method():
    class Owner:
        __secret = 3

        def go(self):
            with Later():
                LOG.append(self.__secret)

    Owner().go()
    assert LOG == [3]


def test_in_a_class_body_and_a_generator():
    class Body:
        value = 2
        with Later():
            LOG.append(value)

    def generate():
        yield 1
        with Later():
            LOG.append("generator")
        yield 2

    assert list(generate()) == [1, 2]
    assert LOG == [2, "generator"]


def test_an_error_in_it_has_its_line():
    with pytest.raises(ZeroDivisionError) as raised:
        with Later():
            one = 1
            one / 0
    last = raised.traceback[-1]
    assert str(last.statement).strip() == "one / 0"
    assert str(last.path) == __file__
    assert one == 1


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("break", "break"),
        ("continue", "continue"),
        ("yield 1", "yield"),
        ("x = yield", "yield"),
        ("await g()", "await"),
        ("async with g(): pass", "await"),
    ],
)
def test_what_belongs_to_what_is_around_it_is_refused(what, named):
    define = "async def" if named == "await" else "def"
    source = f"{define} run(Later):\n    for i in 'ab':\n        with Later():\n            print\n            {what}\n"
    name = f"<refused {what}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names, before = {}, sys.gettrace()
    exec(compile(source, name, "exec"), names)
    with pytest.raises(BlockError, match=f"`{named}` in it belongs to what stands around it") as raised:
        if named == "await":
            names["run"](Later).send(None)
        else:
            list(names["run"](Later) or ())
    assert "another form" in str(raised.value)
    assert sys.gettrace() is before


def test_a_loop_of_its_own_may_break():
    with Later():
        for i in range(5):
            if i == 2:
                break
        else:
            LOG.append("else")
    assert i == 2
    assert LOG == []


def test_without_source_or_a_with_of_its_own_it_is_refused():
    with pytest.raises(BlockError, match="its source can't be had"):
        exec("with Later():\n    pass\n", {"Later": Later})
    with pytest.raises(BlockError, match="`with` statement of its own"), contextlib.ExitStack() as stack:
        stack.enter_context(Later())
    with pytest.raises(BlockError, match="is no name"):
        with Later() as LOG[:]:
            pass


def test_a_file_that_was_changed_is_refused(tmp_path):
    path = tmp_path / "changes.py"
    path.write_text("def run(Later, LOG):\n    with Later():\n        LOG.append(1)\n")
    names = {}
    exec(compile(path.read_text(), str(path), "exec"), names)
    path.write_text("def run(Later, LOG):\n    with Later():\n        something_else(1)\n")
    with pytest.raises(BlockError, match="changed since it was loaded"):
        names["run"](Later, LOG)


def test_a_debugger_s_trace_function_goes_on_and_sees_the_body():
    seen = []

    def tracing(frame, event, _):
        if frame.f_code.co_filename == __file__ and event == "line":
            seen.append(frame.f_lineno)
        return tracing

    def traced():
        with Later():
            LOG.append(1)
        return sys.gettrace()

    old = sys.gettrace()
    sys.settrace(tracing)
    try:
        assert traced() is tracing
    finally:
        sys.settrace(old)
    first = traced.__code__.co_firstlineno
    lines = [line - first for line in seen if first <= line <= first + 3]
    assert lines == sorted(lines), lines
    assert set(lines) == {1, 2, 3}


def test_in_threads_at_once():
    wrong = []

    def work(i):
        for _ in range(50):
            mine = []
            with Later():
                mine.append(i)
            if mine != [i]:
                wrong.append(mine)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Where programs come from.

PROGRAM = """
import torch
from torch import nn
from nnsight import NNsight

model = NNsight(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
factor = 0
with model.edit() as edited:
    edited[0].output = edited[0].output * factor
print(float(edited(torch.ones(1, 2)).detach().abs().sum()))
"""


@pytest.mark.slow
def test_a_script(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    ran = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True)
    assert ran.stdout == "0.0\n"


@pytest.mark.slow
def test_standard_input_is_refused_clearly():
    ran = subprocess.run([sys.executable, "-"], input=PROGRAM, capture_output=True, text=True, check=False)
    assert ran.stdout == "0.0\n" or "its source can't be had" in ran.stderr


def test_a_doctest():
    text = """
    >>> with model.edit() as edited:
    ...     edited.layers[1].output = edited.layers[1].output * 0
    >>> bool((edited(x) == model(x)).all())
    False
    """
    names = {"model": NNsight(toys.MLP()), "x": torch.ones(2, 4)}
    test = doctest.DocTestParser().get_doctest(textwrap.dedent(text), names, "a doctest", "<text>", 0)
    runner = doctest.DocTestRunner()
    runner.run(test)
    assert runner.failures == 0


@pytest.mark.slow
def test_a_notebook_cell():
    pytest.importorskip("IPython")
    cells = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_cell({PROGRAM!r}).raise_error()
shell.run_cell("with model.edit() as other: other.output = other.output * factor\\nprint('second')").raise_error()
"""
    ran = subprocess.run([sys.executable, "-c", cells], capture_output=True, text=True, check=False)
    if sys.version_info[:2] == (3, 12):
        assert "can't leave it out" in ran.stdout + ran.stderr
    else:
        assert ran.stdout == "0.0\nsecond\n", ran.stdout + ran.stderr


def test_python_may_lose_count_of_what_other_threads_parse(monkeypatch, x):
    """CPython 3.11 counts one depth for all threads, and raises where another one parses in between."""
    parse, failed = statements.ast.parse, []

    def parse_while_others_do(text):
        if not failed:
            failed.append(text)
            raise SystemError("AST constructor recursion depth mismatch (before=45, after=38)")
        return parse(text)

    statements.parsed.cache_clear()
    statements._withs.cache_clear()
    monkeypatch.setattr(
        statements, "ast", types.SimpleNamespace(**{**vars(statements.ast), "parse": parse_while_others_do})
    )
    model = NNsight(toys.MLP())
    with model.trace() as tracer:
        with tracer.invoke(x):
            output = model.output
    assert failed
    assert torch.equal(output, model._module(x))
