"""`model.write_stub(path)`: a module in which a type checker finds the tree of one model."""

import importlib
import sys

import pytest
import torch
from torch import nn

import nnsight
import toys
from nnsight import LanguageModel, NNsight, errors

CHECKED = """
import nnsight
from demo_tree import Model
from mixed_tree import Model as Mixed

model = Model("nnsight/demo")
reveal_type(model.transformer.h[5].attn.c_attn.weight)
reveal_type(model.transformer.h[2:])
reveal_type([block.mlp.c_fc.nf for block in model.transformer.h])
reveal_type(model.config.n_head)
reveal_type(model.layers[3].attn.q)
reveal_type(model.layers[1:])
with model.trace("a") as tracer:
    reveal_type(tracer.positions)
with model.trace(["a", "b"]) as (a, b):
    reveal_type(a.tokens)
reveal_type(model.edit(lambda edited: None))
reveal_type(nnsight.verify(model))

def look(mixed: Mixed) -> None:
    reveal_type(mixed.parts[1])
    reveal_type(mixed.parts[0].weight)
    reveal_type(mixed.E_output)
    reveal_type(mixed.front)
"""


class Mixed(nn.Module):
    """Has unlike children in a row, and one with a name that every Envoy has."""

    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.output = nn.LayerNorm(4)
        self.rate, self._hidden = 0.5, 3
        toys.seeded(self)

    def forward(self, x):
        return self.output(self.parts(x))


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Where stubs are written, and imported from."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name, one in sys.modules.items() if str(tmp_path) in str(getattr(one, "__file__", ""))]:
        del sys.modules[name]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_type_checker_knows_the_tree_of_a_stub(stubs, monkeypatch):
    api = pytest.importorskip("mypy.api")
    LanguageModel("nnsight/demo").write_stub(stubs / "demo_tree.py")
    NNsight(Mixed(), rename={"parts": "front"}).write_stub(stubs / "mixed_tree.pyi")
    (stubs / "study.py").write_text(CHECKED)
    monkeypatch.chdir(stubs)
    report, _, _ = api.run(["study.py", "--follow-imports", "silent", "--cache-dir", "cache"])
    shown = [line.split('is "')[1].rstrip('"').replace("torch._tensor.", "") for line in report.splitlines()[:-1]]
    assert shown == [
        "Tensor",
        "list[demo_tree.GPT2Block]",
        "list[int]",
        "int",
        "Tensor",
        "nnsight.anatomy.uniform.Layers",
        "Tensor",
        "list[str]",
        "demo_tree.Model",
        "nnsight.anatomy.proof.Report",
        "mixed_tree.LayerNorm",
        "Tensor",
        "mixed_tree.LayerNorm",
        "mixed_tree.Sequential",
    ]


def test_the_class_of_a_stub_is_the_models_own_at_run_time(stubs):
    module = Mixed()
    path = NNsight(module).write_stub(stubs / "mine_tree.py")
    assert path == stubs / "mine_tree.py"
    model = importlib.import_module("mine_tree").Model(module)
    assert isinstance(model, NNsight)
    x = torch.ones(1, 4)
    with model.trace(x):
        inner = model.parts[1].output
        model.parts[2].output = inner
    assert torch.equal(inner, module.parts[1](module.parts[0](x)))
    assert path.read_text() == model.write_stub(path).read_text()  # of a model of that class, the same


def test_like_modules_have_one_class_in_a_stub(stubs):
    text = LanguageModel("nnsight/demo").write_stub(str(stubs / "demo_tree.py")).read_text()
    assert text.count("class GPT2Block(") == 1
    assert "h: Modules[GPT2Block]" in text
    assert "Model('nnsight/demo')" in text


def test_a_stub_builds_on_classes_of_the_users_own(stubs):
    (stubs / "kinds.py").write_text("import nnsight\nclass Norm(nnsight.Envoy):\n    size = 3\n")
    kinds = importlib.import_module("kinds")
    text = NNsight(Mixed(), envoys={nn.LayerNorm: kinds.Norm}).write_stub(stubs / "mine_tree.py").read_text()
    assert "class LayerNorm(kinds.Norm):" in text
    assert "import kinds" in text
    assert "_hidden" not in text


def test_no_file_that_is_no_stub_is_overwritten(stubs):
    (stubs / "study.py").write_text("results = 1\n")
    with pytest.raises(errors.InputError, match=r"study.py' is there, and is no stub"):
        NNsight(Mixed()).write_stub(stubs / "study.py")
    assert (stubs / "study.py").read_text() == "results = 1\n"


@pytest.mark.parametrize("name", ["gpt2-tree.py", "gpt2", "class.py", "tree.txt"])
def test_a_stub_that_could_not_be_imported_is_refused(stubs, name):
    with pytest.raises(errors.InputError, match="can't be imported"):
        NNsight(Mixed()).write_stub(stubs / name)


def test_a_stub_is_of_the_whole_model():
    assert not hasattr(nnsight.Envoy, "write_stub")
