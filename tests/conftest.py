"""What every test starts from: one CPU thread, a seed, both switches, and the toy models of `toys.py`."""

import gc
import os
import pathlib
import sys

import pytest
import torch

TESTS = pathlib.Path(__file__).parent
for folder in (TESTS, TESTS / "laws"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

torch.set_num_threads(1)

import nnsight  # noqa: E402
import toys  # noqa: E402


def pytest_collection_finish():
    """What is there by now is looked at by no collection any more: not by those of the tests, which are many."""
    gc.collect()
    gc.freeze()


SEED = int(os.environ.get("SEED", "0"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(SEED)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """What several tests share has the same numbers whichever of them comes first, and takes none from that one."""
    if fixturedef.scope == "function":
        return (yield)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return (yield)


@pytest.fixture(params=["greenlet", "thread"])
def switch(request):
    """Runs a test under both switches; the laws hold with either."""
    before = nnsight.CONFIG.switch
    nnsight.CONFIG.switch = request.param
    yield request.param
    nnsight.CONFIG.switch = before


def the_accelerator():
    """The accelerator's current device, as its tensors name it; skips where there is none."""
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator")
    return torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())


@pytest.fixture(params=["accelerator"])  # a parameter, so that `-k accelerator` finds all that needs one
def accelerator(request):
    return the_accelerator()


@pytest.fixture(params=["cpu", "accelerator"])
def device(request):
    """Runs a test on the CPU, and where there is an accelerator, on that."""
    return torch.device("cpu") if request.param == "cpu" else the_accelerator()


@pytest.fixture
def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def y():
    """Other inputs for the same models, and fewer."""
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def mlp():
    """A wrapped residual MLP of three layers: `embed`, `layers[i].{norm,up,act,down}`, `head`."""
    return nnsight.NNsight(toys.MLP())


@pytest.fixture(scope="module")
def demo():
    """The bundled model, with its weights."""
    return nnsight.LanguageModel("nnsight/demo", dispatch=True)


@pytest.fixture
def spliced(mlp):
    """The MLP with what a sparse autoencoder makes of its first layer's output in place of that."""
    mlp.layers[0].sae = toys.SAE()
    with mlp.edit(inplace=True):
        mlp.layers[0].output = mlp.layers[0].sae(mlp.layers[0].output, hook=True)
    return mlp
