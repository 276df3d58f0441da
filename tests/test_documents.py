"""Every example that a person can copy runs, and prints what the page says: README.md, docs/, and the docstrings."""

import ast
import difflib
import doctest
import importlib
import pkgutil
import re

import pytest
import torch
import transformers

import documents
import nnsight

# Before, a GPT-2 block returns a tuple, and `.output` is what the module returned.
returns_tensors = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 5),
    reason="the pages show a transformers whose GPT-2 blocks return a tensor",
)


@returns_tensors
@pytest.mark.slow
@pytest.mark.parametrize("page", documents.PAGES, ids=lambda page: str(page.relative_to(documents.ROOT)))
def test_a_page_prints_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as a script's folder is
    torch.manual_seed(0)
    names = documents.namespace()
    for example in documents.examples_of(page):
        printed, error = documents.run(example, names)
        if example.shown is None:
            assert error is None, f"{example.place} raises:\n{printed}"
        elif not documents.same(example.shown, printed):
            lines = difflib.unified_diff(
                example.shown.splitlines(), printed.splitlines(), "shown", "printed", lineterm=""
            )
            pytest.fail(
                "\n".join([f"{example.place} prints something else than the page shows:", *lines]), pytrace=False
            )


def test_the_pages_have_examples():
    counts = {page.name: len(documents.examples_of(page)) for page in documents.PAGES}
    assert counts["README.md"] >= 12, counts
    assert counts["module-access.md"] >= 4, counts


def test_the_page_of_errors_has_every_class_that_is_raised():
    classes = {each.__name__: each for each in vars(nnsight.errors).values() if isinstance(each, type)}
    families = {"Error", "BlockError", "OutOfOrderError"}
    page = (documents.ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (?:`(\w+)` )?\|", page, re.MULTILINE))
    assert set(rows) == set(classes) - families
    for name, other in rows.items():
        assert not other or other in [base.__name__ for base in classes[name].__bases__], name


def test_an_example_that_prints_something_else_is_noticed(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n\n```python\n1 / 0\n```\n")
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    first, second = documents.examples_of(page)
    assert (first.line, second.line) == (2, 10)
    assert not documents.same(first.shown, documents.run(first, {})[0])
    assert documents.run(second, {})[0] == "ZeroDivisionError: division by zero\n"
    assert documents.same("to within 6.2e-07", "to within 0.0e+00\n")
    assert not documents.same("to within 6.2e-07", "to within 1.0e-05\n")
    assert not documents.same("to within 6.2e-05", "to within 0.0e+00\n")


def test_the_map_of_the_code_names_every_file():
    map_ = (documents.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = map_[map_.index("    src/nnsight/\n") : map_.index("    tests/ ")]
    folders, named = {6: ""}, []
    for line in block.splitlines()[1:]:
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        if name.endswith("/"):
            folders[depth + 2] = folders[depth] + name
        else:
            named.append(folders[depth] + name)
    package = documents.ROOT / "src" / "nnsight"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    # A folder's line stands for its `__init__.py`.
    assert sorted(named) == sorted(name for name in files if not name.endswith("/__init__.py"))


def test_imports_point_up_the_map_of_the_code():
    map_ = (documents.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = map_[map_.index("    src/nnsight/\n") : map_.index("    tests/ ")]
    order = [re.split(r"[./]", line.strip())[0] for line in block.splitlines()[2:] if re.match(r" {6}\S", line)]
    package = documents.ROOT / "src" / "nnsight"
    down = []
    for path in package.rglob("*.py"):
        here = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # what is imported where a module is
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nnsight"):
                above, *_ = [*node.module.split(".")[1:], *(one.name for one in node.names)]
                if here in order and above in order and order.index(above) > order.index(here):
                    down.append(f"{path.name} imports {above}")
    assert not down


MODULES = ["nnsight", *(found.name for found in pkgutil.walk_packages(nnsight.__path__, "nnsight."))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    report = []
    runner = doctest.DocTestRunner(optionflags=documents.SAME)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
