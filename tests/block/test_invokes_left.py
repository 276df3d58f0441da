"""What invokes leave behind, however they end: nothing on the model, in memory or in other threads."""

import gc
import os
import pathlib
import subprocess
import sys
import threading
import weakref

import pytest
import snapshots
import torch

import nnsight
import toys
from comparing import alone
from nnsight import NNsight, errors

TESTS = pathlib.Path(__file__).parent.parent


def ends_well(model, x):
    with model.trace() as tracer:
        with tracer.invoke(x):
            h = model.layers[0].output
            model.layers[1].output = h
        with tracer.invoke(2 * x):
            model.layers[1].up.output[:] = 0
        with tracer.invoke():
            model.output


def ends_by_an_error(model, x):
    with pytest.raises(KeyError):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.layers[1].output
                raise KeyError
            with tracer.invoke(x):
                model.layers[1].up.input


def ends_by_a_stop(model, x):
    with model.trace() as tracer:
        with tracer.invoke(x):
            model.layers[1].down.input
            tracer.stop()
        with tracer.invoke(x):
            model.layers[1].up.input
            tracer.stop()


def ends_before_it_began(model, x):
    with pytest.raises(KeyError):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.layers[1].output
            raise KeyError


def ends_by_a_wrong_shape(model, x):
    with pytest.raises(RuntimeError):
        with model.trace() as tracer:
            with tracer.invoke():
                model.layers[1].output = torch.zeros(5, 9)
            with tracer.invoke(x):
                model.output
            with tracer.invoke(x):
                model.layers[0].output


def ends_by_what_never_was(model, x):
    with pytest.raises(errors.OutOfOrderError):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.layers[1].output
                model.layers[0].output
            with tracer.invoke(x):
                model.layers[0].output


WAYS = [
    ends_well,
    ends_by_an_error,
    ends_by_a_stop,
    ends_before_it_began,
    ends_by_a_wrong_shape,
    ends_by_what_never_was,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_nothing_of_a_trace_with_invokes_is_left(mlp, x, way, switch):
    way(mlp, x)
    model, process = snapshots.of_model(mlp._module), snapshots.of_process()
    way(mlp, x)
    assert snapshots.differences(model, snapshots.of_model(mlp._module)) == []
    assert snapshots.differences(process, snapshots.of_process()) == []


@pytest.mark.slow
def test_memory_is_flat_over_three_hundred_traces_with_invokes(mlp, x):
    def live():
        return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        for way in WAYS:
            way(mlp, x)
        before = live()
        for at in range(300):
            WAYS[at % 3](mlp, x)
        assert live() - before < 20
    finally:
        gc.enable()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_model_that_invokes_ran_on_is_freed_at_once(x, way, switch):
    gc.collect()
    gc.disable()
    try:
        model = NNsight(toys.MLP())
        way(model, x)
        held = weakref.ref(model._module)
        del model
        assert held() is None
    finally:
        gc.enable()


def test_invokes_in_threads_do_not_see_each_other(mlp, x, switch):
    found = {}

    def job(scale):
        for _ in range(5):
            with mlp.trace() as tracer:
                with tracer.invoke(scale * x):
                    one = mlp.layers[1].output
                with tracer.invoke(-scale * x):
                    mlp.layers[1].output = one
                    other = mlp.output
            found[scale] = one, other

    jobs = [threading.Thread(target=job, args=(scale,)) for scale in (1, 2, 3)]
    for one in jobs:
        one.start()
    for one in jobs:
        one.join()
    for scale in (1, 2, 3):
        torch.testing.assert_close(found[scale][0], alone(mlp, scale * x))


def test_a_trace_of_another_model_stands_in_an_invoke(mlp, x):
    other = NNsight(toys.MLP(seed=1))
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            with other.trace(x):
                theirs = other.layers[1].output
            mlp.layers[1].output = theirs
            got = mlp.layers[1].output
        with tracer.invoke(2 * x):
            mlp.layers[0].output
    torch.testing.assert_close(got, alone(other, x))


FUZZ = """
import functools, random, sys
import torch, nnsight, toys, fuzz

torch.set_num_threads(1)
rng, model, failed = random.Random(int(sys.argv[1])), nnsight.NNsight(toys.MLP()), 0
names = ["embed", *(f"layers.{i}.{part}" for i in range(3) for part in ("norm", "up", "act", "down")), "head"]
x = torch.ones(2, 4)


def act(name):
    envoy, dice = model.get(name), rng.random()
    if dice < 0.25:
        envoy.output = torch.zeros(rng.choice([(2, 9), (5, 4), (4,), (0,)]))
    elif dice < 0.4:
        envoy.output[:] = torch.zeros(rng.choice([(2, 9), (2, 4)]))
    elif dice < 0.5:
        envoy.output @ torch.ones(9, 9)
    else:
        envoy.output


def visit():
    asked = sorted(rng.sample(names, k=rng.randint(1, 3)), key=names.index)
    for name in asked:
        fuzz.deep(rng, functools.partial(fuzz.works, rng))
        fuzz.deep(rng, functools.partial(act, name))


def whole():
    if rng.random() < 0.5:
        model.get(rng.choice(names)).output = torch.zeros(rng.choice([(4, 9), (4, 4), (3, 4)]))


def block():
    with model.trace() as tracer:
        with tracer.invoke(x):
            visit()
        with tracer.invoke(x):
            visit()
        with tracer.invoke():
            whole()


for _ in range(int(sys.argv[2])):
    try:
        fuzz.deep(rng, block)
    except (nnsight.Error, RuntimeError, IndexError):
        failed += 1
for module in model._module.modules():
    assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)
print("survived", failed)
"""


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, {"TORCH_SHOW_CPP_STACKTRACES": "1"}], ids=["greenlet", "thread"])
def test_a_wrong_shape_written_from_an_invoke_ends_no_process(variables, tmp_path):
    """Law 11; where torch writes C++ stacks out, the blocks are fewer."""
    script, blocks = tmp_path / "fuzz_invokes.py", 60 if variables else 1000
    script.write_text(FUZZ)
    path = os.pathsep.join([str(TESTS), str(TESTS / "laws"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", **variables}
    command = [sys.executable, "-W", "error", str(script), "1", str(blocks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    assert blocks // 4 < int(done.stdout.split()[1]) < blocks
    assert nnsight.CONFIG.switch == "auto"
