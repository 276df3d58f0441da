"""Law 1, the process: importing changes nothing, and a first trace mounts `.save()` and nothing else."""

import os
import subprocess
import sys

import pytest

IMPORTING = """
import sys, torch, snapshots
before = snapshots.of_process()
loaded = set(sys.modules)
object_before = dict(vars(object))
import nnsight
after = snapshots.of_process()
differences = snapshots.differences(before, after)
assert differences == [], differences
assert not any(hasattr(kind, "save") for kind in (*snapshots.MOUNTED, object))
new = {name.partition(".")[0] for name in set(sys.modules) - loaded}
assert "transformers" not in new, new
assert torch._C._len_torch_function_stack() == 0
model = nnsight.NNsight(torch.nn.Linear(2, 2))
assert snapshots.differences(before, snapshots.of_process()) == []
with model.trace(torch.ones(2)):
    kept = model.output.save()
    three = (3).save()
    listed = [].save()
assert three == 3 and listed == []
assert all(hasattr(kind, "save") for kind in snapshots.MOUNTED)
assert not hasattr(object, "save") and not hasattr(bytes, "save") and not hasattr(torch.nn.Module, "save")
assert dict(vars(object)) == object_before
differences = snapshots.differences(before, snapshots.of_process())
assert differences == [], differences
"""


@pytest.mark.slow
def test_importing_changes_nothing_and_a_trace_mounts_save_alone():
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": here + os.pathsep + os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


LATE = """
import torch, nnsight

model = nnsight.NNsight(torch.nn.Linear(2, 2))
with model.trace(torch.ones(2)):
    model.output.save()

import collections, dataclasses, enum, importlib, pickle, typing


def attempt(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


# Both look at every attribute of a class with annotations.
if pydantic := attempt("pydantic"):

    class Model(pydantic.BaseModel):
        name: str
        items: list[int] = []

    assert Model(name="a").model_dump() == {"name": "a", "items": []}
if anyio := attempt("anyio"):
    anyio.run(anyio.sleep, 0)


@dataclasses.dataclass
class Point:
    x: int = 0


class Colour(str, enum.Enum):
    red = "red"


class Pair(typing.NamedTuple):
    a: int


class Typed(typing.TypedDict):
    a: int


values = [Point(), Colour.red, Pair(1), {1}, "s", 2.0]
assert pickle.loads(pickle.dumps(values)) == values
assert collections.UserString("a") + "b" == "ab" and collections.UserList([1]) + [2] == [1, 2]
# IPython asks UserString for all that `str` has, when it completes for the first time. Its shell takes `__main__` over.
if attempt("IPython.core.guarded_eval"):
    from IPython.core.completer import provisionalcompleter
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    shell.user_ns["model"] = model
    with provisionalcompleter():
        assert any("weight" in found.text for found in shell.Completer.completions("model.weig", 10))
print("all well")
"""


@pytest.mark.slow
def test_what_is_imported_after_a_trace_still_works(tmp_path, monkeypatch):
    """`.save()` on builtin types must not be in the way of code that looks at all of a type's attributes."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LATE], capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("all well\n"), done.stderr


HEAVY = """
import sys, torch
loaded = set(sys.modules)
import nnsight
from nnsight import NNsight
others = {name.partition(".")[0] for name in set(sys.modules) - loaded} - {"nnsight", "greenlet"}
assert not others, others
assert "torch._dynamo" not in sys.modules
assert not any(name.startswith(("nnsight.models", "nnsight.plots", "nnsight.core.fakes")) for name in sys.modules)
"""


def test_what_it_takes_to_wrap_a_module_imports_nothing_but_greenlet_and_itself():
    done = subprocess.run([sys.executable, "-c", HEAVY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
