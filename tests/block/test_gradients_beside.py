"""Several backward passes at once, beside traces, tasks and threads."""

import asyncio
import contextlib
import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode

import nnsight
import toys
from comparing import same
from gradients_by_hooks import by_hand
from nnsight.core import backward
from nnsight.core.owner import Owner
from nnsight.errors import (
    GradientError,
    OtherThreadError,
    RunOrderError,
    TransformError,
)


def test_passes_that_interleave_are_refused_on_one_stack(switch):
    early, late = [], []
    for _ in range(2):
        x = torch.ones(3, requires_grad=True)
        early.append(x * 1)
        late.append(early[-1] * 1)

    def interleaved():
        with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
            first.enter_context(nnsight.backward(late[0].sum()))
            late[0].grad
            second.enter_context(nnsight.backward(late[1].sum()))
            late[1].grad
            first.close()
            return early[1].grad

    if switch == "thread":
        same(interleaved(), torch.ones(3))
    else:
        with pytest.raises(RunOrderError, match=r"backward pass of .* are both paused beneath C\+\+"):
            interleaved()
    fresh = torch.ones(3, requires_grad=True)
    with nnsight.backward((fresh * 2).sum()):
        same(fresh.grad, torch.full((3,), 2.0))
    assert torch._C._current_graph_task_id() == -1


def test_so_are_those_of_tasks_that_pass_for_threads(monkeypatch):
    """With gevent's patches: the engine, which one thread has for them all, gave nodes of the one to the other."""
    owners = [Owner(), Owner()]
    monkeypatch.setattr(backward, "this_thread", iter(owners).__next__)
    early, late = [], []
    for _ in range(2):
        early.append(torch.ones(3, requires_grad=True) * 1)
        late.append(early[-1] * 1)
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(nnsight.backward(late[0].sum()))
        late[0].grad
        second.enter_context(nnsight.backward(late[1].sum()))
        late[1].grad
        with pytest.raises(RunOrderError, match="is paused beneath a later one of this thread"):
            first.close()
        same(early[1].grad, torch.ones(3))
    owners[0].end_waiting()
    assert torch._C._current_graph_task_id() == -1


def test_thirty_two_passes_nest_and_the_next_is_refused(switch):
    x = torch.ones(3, requires_grad=True)
    h = x * 2

    def nest(depth):
        with nnsight.backward((h * depth).sum(), retain_graph=True):
            got = h.grad
            if depth < limit:
                nest(depth + 1)
        same(got, torch.full((3,), float(depth)))

    limit = 32
    nest(1)
    limit = 33
    with pytest.raises(GradientError, match="32 backward blocks"):
        nest(1)
    limit = 2
    nest(1)


def test_a_trace_and_the_blocks_in_it_have_one_mode_between_them(mlp, x):
    """Each one costs every torch operation of the block a microsecond."""
    count = torch._C._len_torch_function_stack
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        loss = mlp.output.sum()
        assert count() == 1
        with loss.backward(retain_graph=True):
            with loss.backward(retain_graph=True) as opened:
                assert count() == 1
                inner = hidden.grad
            outer = hidden.grad
            assert repr(opened) == "<backward block, ended>"
            assert count() == 1
        assert count() == 1
    assert count() == 0
    same(inner, outer)


def test_what_is_noted_of_a_value_is_not_heard_by_a_mode_of_the_blocks(mlp, x):
    heard = []

    class Hears(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            heard.append(func)
            return func(*args, **(kwargs or {}))

    with mlp.trace(x):
        with Hears():
            hidden, out = mlp.layers[1].output, mlp.output
        assert nnsight.grad(out.sum(), hidden).shape == (3, 4)
    assert heard == []


def test_a_block_that_outlives_its_trace_still_has_gradients(mlp, x, switch):
    with contextlib.ExitStack() as stack:
        with mlp.trace(x):
            hidden = mlp.layers[1].output
            loss = mlp.output.sum()
            (expected,) = torch.autograd.grad(loss, hidden, retain_graph=True)
            stack.enter_context(nnsight.backward(loss))
        got = hidden.grad
    same(got, expected)
    assert torch._C._len_torch_function_stack() == 0


def test_blocks_that_are_left_in_the_order_they_were_entered(mlp, x, switch):
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        out = mlp.output
        losses = out.sum(), out.square().sum()
        expected = [torch.autograd.grad(loss, hidden, retain_graph=True)[0] for loss in losses]
        first, second = contextlib.ExitStack(), contextlib.ExitStack()
        first.enter_context(nnsight.backward(losses[0], retain_graph=True))
        second.enter_context(nnsight.backward(losses[1], retain_graph=True))
        first.close()
        got = hidden.grad
        second.close()
    same(got, expected[1])
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_gradient_inside_vmap_is_refused_and_can_be_had_outside_of_it(mlp, x, switch, has_begun):
    with mlp.trace(x):
        early, late = mlp.layers[0].output, mlp.layers[1].output
        loss = mlp.output.square().sum()
        expected = torch.autograd.grad(loss, [late, early], retain_graph=True)
        with loss.backward():
            got = [late.grad] if has_begun else []
            with pytest.raises(TransformError, match="can't go on inside `vmap`"):
                torch.vmap(lambda row: row * early.grad.sum())(x)
            got += [early.grad] if has_begun else [late.grad, early.grad]
    same(tuple(got), expected)


def test_a_block_that_another_thread_leaves_is_refused_there(mlp, x, switch):
    loss = mlp._module(x).sum()
    opened = nnsight.backward(loss)
    opened.__enter__()
    seen = []

    def leave():
        with pytest.raises(OtherThreadError, match="opened on another thread") as caught:
            opened.__exit__(None, None, None)
        seen.append(caught.value)

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert len(seen) == 1
    assert mlp.head.weight.grad is None
    with nnsight.backward(loss):
        assert mlp.head.weight.grad is not None
    assert torch._C._len_torch_function_stack() == 0


def test_lockstep_traces_with_a_gradient_each(x, switch):
    one, two = nnsight.NNsight(toys.MLP()), nnsight.NNsight(toys.MLP(seed=1))
    expected = [by_hand(model._module, x, ["layers.1"])[0]["layers.1"] for model in (one, two)]
    with one.trace(x), two.trace(x):
        a, b = one.layers[1].output, two.layers[1].output
        first, second = one.output.square().sum(), two.output.square().sum()
        with first.backward():
            got_a = a.grad
            with second.backward():
                got_b = b.grad
    same(got_a, expected[0])
    same(got_b, expected[1])


def test_a_pass_that_cannot_end_with_its_thread_leaves_no_hook(mlp, x, monkeypatch):
    def refuse(self):
        raise RunOrderError("not now")

    with mlp.trace(x):
        hidden = mlp.layers[0].output
        loss = mlp.output.sum()
    monkeypatch.setattr("nnsight.core.backward.Backward.stop", refuse)
    kept = []

    def open_and_end():
        kept.append(nnsight.backward(loss))
        kept[0].__enter__()
        hidden.grad

    thread = threading.Thread(target=open_and_end)
    thread.start()
    thread.join()
    assert not loss._backward_hooks
    assert not hidden._backward_hooks


def test_another_task_of_the_thread_sees_torchs_own_gradient(mlp, x, switch):
    mlp._module(x).sum().backward()
    stored = mlp.head.weight.grad
    seen = []

    async def block():
        with mlp.trace(x):
            hidden = mlp.layers[1].output
            loss = mlp.output.square().sum()
            with loss.backward():
                seen.append(hidden.grad)
                await asyncio.sleep(0)
                seen.append(mlp.layers[0].up.weight.grad)

    async def other():
        seen.append(mlp.head.weight.grad)

    async def both():
        await asyncio.gather(block(), other())

    asyncio.run(both())
    assert len(seen) == 3
    assert seen[1] is stored


def test_a_trace_inside_a_backward_block(mlp, x, switch):
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        loss = mlp.output.sum()
        expected = torch.autograd.grad(loss, [hidden, mlp.embed.weight], retain_graph=True)
        with loss.backward():
            got = hidden.grad
            with mlp.trace(got):
                patched = mlp.layers[0].output
                inner = mlp.output
            weight = mlp.embed.weight.grad
    same((got, weight), expected)
    same(inner, mlp._module(got))
    assert patched.shape == (3, 4)
