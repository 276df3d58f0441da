"""Law 11: no error, of Python or of C++, on either side of the switch, at any depth, ends the process or hangs it."""

import ctypes
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import nnsight
import toys

HERE = pathlib.Path(__file__).parent


def run_fuzz(blocks, seed, threads=1, switch="auto", device="cpu", **variables):
    """Runs the fuzz in a process of its own; a crash shows as a return code below zero."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", **variables}
    command = [sys.executable, "-W", "error", str(HERE / "fuzz.py"), *map(str, (blocks, seed, threads, switch, device))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"return code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    said = [line for line in done.stderr.splitlines() if line and "symbolizing C++ stack trace" not in line]
    assert said == []
    counts = {name: int(n) for name, n in re.findall(r"'(\w+)': (\d+)", done.stdout)}
    assert counts["blocks"] >= blocks
    assert counts["torch_errors"] > blocks // 10
    assert counts["fine"] > blocks // 10
    return counts


@pytest.mark.slow
def test_blocks_from_random_depths():
    """Without the ladder, the process dies within the first few hundred, here and in four threads."""
    run_fuzz(6_000, seed=1)


@pytest.mark.slow
def test_blocks_in_four_threads():
    run_fuzz(6_000, seed=2, threads=4)


@pytest.mark.slow
def test_blocks_while_torch_shows_cpp_stack_traces():
    """The switch is a thread then, by itself; with a greenlet, the process dies within the first few hundred."""
    run_fuzz(6_000, seed=3, TORCH_SHOW_CPP_STACKTRACES="1")


@pytest.mark.slow
def test_blocks_while_torch_shows_cpp_stack_traces_in_four_threads():
    run_fuzz(4_000, seed=6, threads=4, TORCH_SHOW_CPP_STACKTRACES="1")


@pytest.mark.slow
def test_blocks_with_the_thread_switch():
    run_fuzz(4_000, seed=4, switch="thread")


@pytest.mark.slow
def test_blocks_with_the_thread_switch_in_four_threads():
    run_fuzz(4_000, seed=5, threads=4, switch="thread")


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 4])
def test_blocks_on_an_accelerator(accelerator, threads):
    run_fuzz(2_000, seed=7, threads=threads, device=accelerator.type)


# The ladder, counted

COUNTING = """
import ctypes
import fuzz, nnsight, torch

torch.set_num_threads(1)
nnsight.CONFIG.switch = "greenlet"
libc_backtrace = ctypes.CDLL(None).backtrace

def frames(most=64):
    # The innermost C frames, as return addresses; 64 is as far as torch walks when an operation fails.
    buffer = (ctypes.c_void_p * most)()
    return buffer[: libc_backtrace(buffer, most)]

class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.seen = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), []

    def forward(self, x):
        self.seen.append(frames())
        x = self.first(x)
        self.seen.append(frames())
        x = self.second(x)
        self.seen.append(frames())
        return x

def a_run(model, through):
    # Reads two values, each from the depth that `through` gives; the frames in the forward, three times.
    model._module.seen.clear()
    tracer = model.trace(torch.ones(3, 4), trace=True)
    through(tracer.__enter__)
    through(lambda: tracer.model.first.output)
    through(lambda: tracer.model.second.input)
    through(lambda: tracer.__exit__(None, None, None))
    return list(model._module.seen)

# Without a trace, the frames are those of whoever calls: the count would see them.
module = Counting()
module(torch.ones(3, 4))
fuzz.through_sorted(lambda: module(torch.ones(3, 4)), 20)
assert module.seen[0] != module.seen[3]

# Until the first switch back, the opener's frames lie whole beneath the model's, and can be walked and taken off.
class Deepest(torch.nn.Module):
    def forward(self, x):
        self.seen = len(frames(1024))
        return x

model = nnsight.NNsight(Deepest())
with model.trace(torch.ones(1)):
    before = len(frames(1024))
    model.output
assert model._module.seen - before >= 72, model._module.seen - before

model = nnsight.NNsight(Counting())
a_run(model, lambda call: call())
shallow = a_run(model, lambda call: call())
assert [len(found) for found in shallow] == [64, 64, 64], [len(found) for found in shallow]
for way in fuzz.WAYS:
    assert shallow == a_run(model, lambda call: way(call, 20)), way
    assert shallow == a_run(model, lambda call: way(call, len(model._module.seen) * 7 + 1)), way
print("the same", len(fuzz.WAYS))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "backtrace"), reason="libc has no backtrace")
def test_64_frames_of_the_model_belong_to_its_own_slice():
    """The same addresses whether the block stands at the bottom of the stack or deep in C: none is the user's."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", COUNTING], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"return code {done.returncode}\n{done.stderr}"
    assert done.stdout == "the same 6\n"


@pytest.mark.slow
def test_the_variable_that_shows_cpp_stack_traces_selects_the_thread_switch():
    script = """
import threading, torch, nnsight
seen = []
class Model(torch.nn.Module):
    def forward(self, x):
        seen.append(threading.get_ident())
        return x
with nnsight.NNsight(Model()).trace(torch.ones(1)):
    pass
print(seen[0] == threading.get_ident())
"""
    for value, expected in (("1", "False"), ("0", "True")):
        environment = {**os.environ, "TORCH_SHOW_CPP_STACKTRACES": value}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.strip() == expected, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["greenlet", "thread"])
def test_a_run_dropped_by_the_collector_within_threadings_own_lock(switch):
    """The collector may run anywhere, so also where `Thread.start` and the end of a thread hold their lock."""
    script = f"""
import faulthandler, threading
faulthandler.dump_traceback_later(60, exit=True)
import torch, nnsight
nnsight.CONFIG.switch = {switch!r}
model = nnsight.NNsight(torch.nn.Sequential(torch.nn.Identity()))
def block():
    with model.trace(torch.ones(1)):
        yield model[0].output
generator = block()
next(generator)
with threading._active_limbo_lock:
    del generator
with model.trace(torch.ones(1)):
    model[0].output
print("survived")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "survived\n", done.stderr


def test_deep_recursion_on_either_side_is_a_recursion_error(mlp, x, switch):
    def forever(n):
        return forever(n + 1)

    plain = mlp._module(x)
    with pytest.raises(RecursionError), mlp.trace(x):
        mlp.layers[0].output
        forever(0)
    model = nnsight.NNsight(toys.Ask(forever))
    with pytest.raises(RecursionError), model.trace(x):
        model.after.output
    assert torch.equal(mlp._module(x), plain)
    with mlp.trace(x) as tracer:
        assert torch.equal(tracer.result, plain)
