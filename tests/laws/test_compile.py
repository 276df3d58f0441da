"""A model that holds compiled code runs eagerly while it is traced, and is as compiled as before afterwards.

The backend only counts: no C++ compiler is needed.
"""

import pytest
import snapshots
import torch

import nnsight
import toys

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


class Counting:
    """A backend that counts its compilations, and the calls of what it compiled."""

    def __init__(self):
        self.compilations = self.calls = 0

    def __call__(self, graph, inputs):
        self.compilations += 1

        def run(*args):
            self.calls += 1
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()
    before = snapshots.stance()
    yield
    assert snapshots.stance() == before == "default"
    torch._dynamo.reset()


@pytest.fixture
def backend():
    return Counting()


def in_place(module, backend):
    module.layers[1].compile(backend=backend)
    return module


def wrapped_child(module, backend):
    module.layers[1] = torch.compile(module.layers[1], backend=backend)
    return module


def whole_in_place(module, backend):
    module.compile(backend=backend)
    return module


COMPILED = [in_place, wrapped_child, whole_in_place]


@pytest.mark.parametrize("compiled", COMPILED, ids=lambda way: way.__name__)
def test_taps_within_compiled_code_fire(compiled, backend, x, switch):
    plain = toys.MLP()(x)
    model = nnsight.NNsight(compiled(toys.MLP(), backend))
    layer = toys.MLP().layers[1]
    for warm in (False, True):
        if warm:
            torch.testing.assert_close(model._module(x), plain)
            assert backend.compilations > 0
        with model.trace(x) as tracer:
            into = model.layers[1].input
            act = model.get("layers.1._orig_mod.act" if compiled is wrapped_child else "layers.1.act").output
            assert torch.equal(act, torch.tanh(layer.up(layer.norm(into))))
            model.layers[1].output = torch.zeros(3, 4)
            assert torch.equal(model.layers[2].input, torch.zeros(3, 4))
            assert not torch.equal(tracer.result, plain)
        with model.trace(x) as tracer:
            model.layers[1].output
            assert torch.equal(tracer.result, plain)


@pytest.mark.parametrize("compiled", COMPILED, ids=lambda way: way.__name__)
def test_the_compiled_code_runs_again_afterwards_without_a_new_compilation(compiled, backend, x):
    module = compiled(toys.MLP(), backend)
    model = nnsight.NNsight(module)
    plain = module(x)
    module(x)
    compilations, calls = backend.compilations, backend.calls
    with model.trace(x):
        model.layers[0].output
        model.layers[1].output
        model.layers[2].output
    assert backend.calls == calls
    assert torch.equal(module(x), plain)
    assert backend.compilations == compilations
    assert backend.calls > calls


def test_the_stance_is_restored_when_runs_end_out_of_order(backend, x, switch):
    model = nnsight.NNsight(in_place(toys.MLP(), backend))
    plain = model._module(x)

    def block(x):
        with model.trace(x) as tracer:
            yield tracer.model.layers[1].act.output
            yield tracer.result

    one, other = block(x), block(x)
    next(one)
    next(other)
    assert torch.equal(next(one), plain)
    one.close()
    assert snapshots.stance() == "force_eager"
    assert torch.equal(next(other), plain)
    other.close()
    assert snapshots.stance() == "default"
    calls = backend.calls
    model._module(x)
    assert backend.calls == calls + 1


@pytest.mark.parametrize("end", ["stop", "raise", "drop", "never started"])
def test_the_stance_is_restored_however_a_run_ends(backend, x, end, switch):
    model = nnsight.NNsight(in_place(toys.MLP(), backend))

    def block():
        with model.trace(x) as tracer:
            yield None if end == "never started" else tracer.model.layers[1].act.output
            if end == "stop":
                tracer.stop()
            raise KeyError

    generator = block()
    next(generator)
    if end in ("drop", "never started"):
        del generator
    else:
        with pytest.raises((KeyError, StopIteration)):
            next(generator)
    assert snapshots.stance() == "default"


def test_a_stance_of_the_users_stays(backend, x):
    model = nnsight.NNsight(in_place(toys.MLP(), backend))
    with torch.compiler.set_stance("eager_on_recompile"):
        with model.trace(x):
            assert model.layers[1].act.output.shape == (3, 4)
        assert snapshots.stance() == "eager_on_recompile"


def test_a_function_compiled_by_the_block_still_works(backend, mlp, x):
    twice = torch.compile(lambda value: value * 2, backend=backend)
    with mlp.trace(x):
        out = mlp.layers[0].output
        doubled = twice(out)
        second = mlp.layers[1].output
    assert torch.equal(doubled, out * 2)
    assert second.shape == (3, 4)
    assert backend.compilations == 1


def test_a_model_compiled_by_torch_compile_is_wrapped_or_refused_by_name(backend, x):
    module = torch.compile(toys.MLP(), backend=backend)
    plain = toys.MLP()(x)
    model = nnsight.NNsight(module)
    with model.trace(x) as tracer:
        seen = model.get("_orig_mod.layers.1.act").output
        assert torch.equal(tracer.result, plain)
    assert seen.shape == (3, 4)
