"""What is current on an accelerator, its device and its streams, is of one side; and what else only one of those has.

The streams and the autocast of a real one also stand in test_modes.py.
"""

import contextlib
import os
import pathlib
import subprocess
import sys
import threading

import pytest
import torch

import nnsight
import toys
from nnsight.core import accelerator as ours

HERE = pathlib.Path(__file__).parent


class Pretended:
    """Stands for an accelerator of two devices, where `nnsight.core.accelerator` reads and sets what is current."""

    def __init__(self, monkeypatch):
        self.index, self.streams = 0, [self.stream(0, 0), self.stream(1, 0)]
        self.calls, self.waits, self.bound = 0, [], []
        monkeypatch.setattr(ours, "_device", lambda: self.index)
        monkeypatch.setattr(ours, "_stream", lambda index: self.streams[index])
        monkeypatch.setattr(ours, "_set_device", self.set_device)
        monkeypatch.setattr(ours, "_set_stream", self.set_stream)
        monkeypatch.setattr(ours, "_bind", lambda index: self.bound.append((threading.current_thread().name, index)))
        monkeypatch.setattr(ours, "_devices", lambda: range(2))
        monkeypatch.setattr(ours, "_wait", lambda *streams: self.waits.append([one.stream_id for one in streams]))
        monkeypatch.setattr(ours, "_captures", lambda: False)  # torch's own would ask a driver that isn't there
        monkeypatch.setattr(torch.cuda, "_initialized", True)
        monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)

    @staticmethod
    def stream(index, number):
        return torch.Stream(stream_id=number, device_index=index, device_type=1)

    def set_device(self, index):
        self.index, self.calls = index, self.calls + 1

    def set_stream(self, stream):
        self.set_device(stream.device_index)  # as torch does
        self.streams[stream.device_index] = stream

    def now(self):
        return self.index, [stream.stream_id for stream in self.streams]


@pytest.fixture
def pretended(monkeypatch):
    if torch.accelerator.is_available():
        pytest.skip("there is a real one")
    return Pretended(monkeypatch)


def test_each_side_keeps_its_device_and_the_stream_of_each_device(pretended, mlp, x):
    seen = []
    mlp._module.layers[1].register_forward_hook(lambda *_: seen.append(pretended.now()))
    mlp._module.layers[1].register_forward_hook(lambda *_: pretended.set_stream(pretended.stream(0, 7)))
    with mlp.trace(x):
        mlp.layers[0].output
        pretended.set_stream(pretended.stream(1, 5))
        pretended.set_device(0)
        mlp.layers[1].output
        assert pretended.now() == (0, [0, 5])
        mlp.layers[2].output
        assert pretended.now() == (0, [0, 5])
    assert seen == [(0, [0, 0])]
    assert pretended.now() == (0, [0, 5])


def test_a_stream_that_takes_over_waits_for_the_other(pretended, mlp, x):
    with mlp.trace(x):
        mlp.layers[0].output
        pretended.set_stream(pretended.stream(0, 5))
        assert pretended.waits == []
        mlp.layers[1].output
        assert pretended.waits == [[0, 5], [5, 0]]
        mlp.layers[1].output
        pretended.set_stream(pretended.stream(0, 0))
    assert pretended.waits == [[0, 5], [5, 0]]


class PretendedOfThreads(Pretended):
    """The same, where what is current is each thread's own, as it really is."""

    def __init__(self, monkeypatch):
        self._own = threading.local()
        super().__init__(monkeypatch)

    @property
    def streams(self):
        if not hasattr(self._own, "streams"):
            self._own.streams = [self.stream(0, 0), self.stream(1, 0)]
        return self._own.streams

    @streams.setter
    def streams(self, streams):
        self._own.streams = streams


@pytest.fixture
def on_a_thread(monkeypatch):
    if torch.accelerator.is_available():
        pytest.skip("there is a real one")
    monkeypatch.setattr(nnsight.CONFIG, "switch", "thread")
    return PretendedOfThreads(monkeypatch)


def test_a_stream_waits_for_that_of_the_other_thread_which_hands_over(on_a_thread, mlp, x):
    mlp._module.layers[1].register_forward_hook(lambda *_: on_a_thread.set_stream(on_a_thread.stream(1, 7)))
    with mlp.trace(x):
        mlp.layers[0].output
        assert on_a_thread.waits == []
        on_a_thread.set_stream(on_a_thread.stream(0, 5))
        mlp.layers[1].input
        assert on_a_thread.waits == [[0, 5], [5, 0]]
        mlp.layers[1].output
        assert on_a_thread.waits == [[0, 5], [5, 0], [0, 5], [5, 0], [0, 7]]
        mlp.layers[2].output
        assert on_a_thread.waits[5:] == [[0, 5], [7, 0], [5, 0], [0, 7]]
        assert on_a_thread.now() == (on_a_thread.index, [5, 0])
    assert on_a_thread.waits[9:] == [[0, 5], [7, 0], [5, 0], [0, 7]]


def test_what_a_model_did_at_its_end_on_a_stream_of_its_own_is_waited_for(on_a_thread, mlp, x):
    mlp._module.layers[2].register_forward_hook(lambda *_: on_a_thread.set_stream(on_a_thread.stream(0, 9)))
    with mlp.trace(x):
        mlp.layers[0].output
    assert on_a_thread.waits == [[0, 9]]


def test_a_thread_that_begins_on_another_stream_than_the_block_has_by_then_waits(on_a_thread, mlp, x):
    on_a_thread.set_stream(on_a_thread.stream(0, 3))
    with mlp.trace(x):
        on_a_thread.set_stream(on_a_thread.stream(0, 5))
        mlp.layers[0].output
        assert on_a_thread.waits[0] == [3, 5]
        assert on_a_thread.waits[-1] == [5, 3]


def test_an_edit_on_a_thread_has_its_stream_waited_for(on_a_thread, mlp, x):
    def edit(model):
        model.layers[0].output
        on_a_thread.set_stream(on_a_thread.stream(0, 5))
        model.layers[1].output

    mlp.edit(edit)(x)
    assert on_a_thread.waits == [[0, 5], [5, 0], [0, 5]]


def test_no_thread_waits_while_a_graph_is_captured(on_a_thread, monkeypatch, mlp, x):
    monkeypatch.setattr(ours, "_captures", lambda: threading.current_thread().name == "nnsight-model")
    with mlp.trace(x):
        mlp.layers[0].output
        on_a_thread.set_stream(on_a_thread.stream(0, 5))
        mlp.layers[1].output
    assert on_a_thread.waits == []


def test_what_is_not_changed_is_not_set(pretended, mlp, x):
    with mlp.trace(x):
        mlp.layers[0].output
        mlp.layers[1].output
    assert pretended.calls == 0


def test_one_device_is_the_current_one(pretended, monkeypatch, mlp, x):
    monkeypatch.setattr(ours, "_devices", lambda: range(1))
    with mlp.trace(x):
        mlp.layers[0].output
        pretended.streams[0] = side = pretended.stream(0, 5)
        mlp.layers[1].output
        assert pretended.streams[0] == side
        assert pretended.waits == [[0, 5], [5, 0]]


def test_a_model_on_a_thread_of_its_own_has_the_context_of_the_device(pretended, monkeypatch, mlp, x):
    monkeypatch.setattr(nnsight.CONFIG, "switch", "thread")
    pretended.set_device(1)
    with mlp.trace(x):
        assert pretended.bound == []
        mlp.layers[0].output
        assert pretended.bound == [("nnsight-model", 1)]
        mlp.layers[1].output
    assert len(pretended.bound) == 1
    monkeypatch.setattr(torch.cuda, "_initialized", False)
    with mlp.trace(x):
        mlp.layers[0].output
    assert len(pretended.bound) == 1


def test_a_side_that_began_before_the_accelerator_did_has_what_a_thread_begins_with(pretended, monkeypatch, mlp, x):
    seen = []
    mlp._module.layers[1].register_forward_hook(lambda *_: seen.append(pretended.now()))
    monkeypatch.setattr(torch.cuda, "_initialized", False)
    with mlp.trace(x):
        mlp.layers[0].output
        monkeypatch.setattr(torch.cuda, "_initialized", True)
        pretended.set_stream(pretended.stream(1, 5))
        mlp.layers[1].output
        assert pretended.now() == (1, [0, 5])
    assert seen == [(0, [0, 0])]


def test_a_fork_in_which_the_accelerator_is_lost_asks_it_nothing(pretended, monkeypatch, mlp, x):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(ours, "_device", lambda: pytest.fail("it was asked"))
    with mlp.trace(x):
        assert mlp.layers[1].output.shape == (3, 4)


SCRIPT = """
import contextlib, os, torch, nnsight, toys
kind = torch.accelerator.current_accelerator().type
is_initialized = lambda: torch.get_device_module(kind).is_initialized()
module = toys.Under(contextlib.nullcontext, lambda: torch.accelerator.current_stream() if is_initialized() else None)
model, x = nnsight.NNsight(module), torch.ones(3, 4)
torch.set_num_threads(1)

def trace():
    with model.trace(x):
        model.child.output

def in_a_fork(work):
    process = os.fork()
    if not process:
        try:
            work()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0

trace()
"""
SCRIPTS = {
    "a trace on the CPU initialises nothing": """
assert not is_initialized()
in_a_fork(lambda: torch.ones(1, device=kind))  # fails where the parent has as much as counted the devices
""",
    "a fork that has lost the accelerator can trace on the CPU": """
torch.ones(1, device=kind)
in_a_fork(trace)
""",
    "the block is the first to use the accelerator": """
module.log.clear()
with model.trace(x):
    model.before.output
    stream = torch.Stream(device=kind)
    torch.accelerator.set_stream(stream)
    model.after.output
    assert torch.accelerator.current_stream() == stream
assert torch.accelerator.current_stream() == stream
assert [seen.stream_id for seen in module.log] == [0] * 4
""",
}


FORKS = """
import os, torch
process = os.fork()
if not process:
    torch.ones(1, device=torch.accelerator.current_accelerator())
    os._exit(0)
assert os.waitpid(process, 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("claim", SCRIPTS)
def test_what_only_a_fresh_process_shows(claim, accelerator):
    if "initialises nothing" in claim and subprocess.run([sys.executable, "-c", FORKS], capture_output=True).returncode:
        pytest.skip("here, a fork can't use the accelerator where torch has just been imported")
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", SCRIPT + SCRIPTS[claim]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def slowly(x):
    """`x`, after a while in which the device is busy."""
    for _ in range(20):
        x = torch.where(torch.linalg.matrix_norm(x @ x.T) < 0, 0, x)
    return x


@pytest.mark.parametrize("on", ["the block", "the model"])
def test_a_side_that_works_on_a_stream_of_its_own_has_right_values_and_gives_them(accelerator, on):
    """Neither waits by hand, and what one side is given has just been queued on the other's stream."""
    if accelerator.type == "mps":
        pytest.skip("it has one stream")
    side, x = torch.Stream(device=accelerator), torch.randn(2048, 256).to(accelerator)

    class OnItsOwn(toys.MLP):
        def forward(self, x):
            main = torch.accelerator.current_stream()
            side.wait_stream(main)
            with side:
                out = super().forward(x)
            main.wait_stream(side)
            return out

    plain = toys.MLP(width=256).to(accelerator)
    plain.layers[1].register_forward_pre_hook(lambda _, args: slowly(args[0]))
    plain.layers[1].register_forward_hook(lambda _, __, out: slowly(torch.tanh(out) * 2))
    expected = plain(x)
    module = (OnItsOwn if on == "the model" else toys.MLP)(width=256).to(accelerator)
    module.layers[1].register_forward_pre_hook(lambda _, args: slowly(args[0]))
    model, main = nnsight.NNsight(module), torch.accelerator.current_stream()
    for _ in range(5):
        with model.trace(x) as tracer, side if on == "the block" else contextlib.nullcontext():
            mine = torch.accelerator.current_stream()
            model.layers[1].output = slowly(torch.tanh(model.layers[1].output) * 2)
            assert torch.accelerator.current_stream() == mine
            torch.testing.assert_close(tracer.result, expected)
        assert torch.accelerator.current_stream() == main


def test_a_backward_pass_runs_on_the_streams_of_its_forward_and_the_block_on_its_own(accelerator):
    if accelerator.type == "mps":
        pytest.skip("it has one stream")
    module, x = toys.MLP(width=256).to(accelerator), torch.randn(512, 256).to(accelerator)
    kept = []
    handle = module.layers[1].register_forward_hook(lambda _, __, out: kept.append(out))
    (expected,) = torch.autograd.grad(module(x).square().sum(), kept)
    handle.remove()
    kept.clear()  # the graph's end at the weights, which would go on as it began: on the main stream
    model, main = nnsight.NNsight(module), torch.accelerator.current_stream()
    with torch.Stream(device=accelerator) as side:
        side.wait_stream(main)
        with model.trace(x):
            hidden = model.layers[1].output
            loss = model.output.square().sum()
    main.wait_stream(side)
    with nnsight.backward(loss, retain_graph=True):
        gradient = hidden.grad
        assert torch.accelerator.current_stream() == main
        hidden.grad = gradient  # what goes on is on the other stream again
    assert torch.equal(gradient, expected)
    assert torch.equal(nnsight.grad(loss, [hidden])[0], expected)


def test_a_trace_is_captured_in_a_graph_and_replayed(accelerator):
    if accelerator.type != "cuda":
        pytest.skip("torch.cuda.graph")
    module, x = toys.MLP(width=64).to(accelerator), torch.zeros(8, 64).to(accelerator)
    model = nnsight.NNsight(module)

    def trace(x):
        with torch.no_grad(), model.trace(x):
            hidden = model.layers[1].output
            model.layers[1].output = hidden * 2
            return hidden, model.output

    trace(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = trace(x)
    x.copy_(torch.randn(8, 64))
    graph.replay()
    for one, other in zip(captured, trace(x), strict=True):
        torch.testing.assert_close(one, other)
        assert one.any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_module_is_read_eagerly_and_is_compiled_afterwards(accelerator, x):
    module, x = toys.MLP().to(accelerator), x.to(accelerator)
    eager = module(x)
    module.layers[1].compile()
    plain = module(x)
    torch.testing.assert_close(plain, eager)
    model = nnsight.NNsight(module)
    with model.trace(x) as tracer:
        into, act = model.layers[1].input, model.layers[1].act.output
        assert torch.equal(tracer.result, eager)
    layer = module.layers[1]
    assert torch.equal(act, torch.tanh(layer.up(layer.norm(into))))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(module(x), plain)
    torch._dynamo.reset()
