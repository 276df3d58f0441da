"""Edits beside other runs, in generations, with gradients, modes, caches and compiled modules."""

import pathlib
import subprocess
import sys
import threading

import pytest
import snapshots
import torch

import toys
from comparing import same
from edited import doubled, hooked
from nnsight import NNsight
from nnsight.errors import (
    OtherThreadError,
    OutsideTraceError,
    RunOrderError,
)

# Beside other runs.


def test_lockstep_with_the_model_that_is_not_edited(switch, mlp, x):
    edited = doubled(mlp)
    wanted, untouched = edited(x), mlp(x)
    for first, second in ((mlp, edited), (edited, mlp)):
        with first.trace(x) as one, second.trace(x) as other:
            h = {one.model.path: None}
            for layer in range(3):
                h[layer] = (mlp.layers[layer].output, edited.layers[layer].output)
            outs = mlp.output, edited.output
            del other
        same(h[1][0] * 2, h[1][1])
        same(outs[0], untouched)
        same(outs[1], wanted)


def test_the_first_name_of_the_model_works_in_a_trace_of_its_edited_view(switch, mlp, x):
    edited = doubled(mlp).edit(lambda model: None)
    with edited.trace(x):
        out = mlp.output
    same(out, edited(x))
    with mlp.trace(x), pytest.raises(OutsideTraceError):
        edited.output


def test_nested_runs_of_the_edited_model(switch, mlp, x):
    edited = doubled(mlp)
    wanted = edited(x)
    with edited.trace(x):
        first = edited.layers[0].output
        with edited.trace(first * 0 + x):
            inner = edited.output
        plain = mlp._module(x)
        out = edited.output
    same(inner, wanted)
    same(out, wanted)
    same(plain, mlp(x))


def test_an_edit_opens_a_trace_of_its_own(switch, mlp, x):
    def edit(model):
        with mlp.trace(x):
            donor = mlp.layers[1].output
        model.layers[1].output = donor

    wanted = mlp(x)
    same(mlp.edit(edit)(x + 5), wanted)
    with mlp.edit(edit).trace(x + 5) as tracer:
        pass
    same(tracer.result, wanted)


def test_threads_of_one_edited_model_do_not_see_each_other(switch, mlp):
    edited = doubled(mlp).edit(lambda model: setattr(model.layers[0], "output", model.layers[0].output + 1))
    inputs = [torch.randn(3, 4) for _ in range(4)]
    wanted = [edited(one) for one in inputs]
    wrong = []

    def work(i):
        for _ in range(15):
            with edited.trace(inputs[i]):
                inner = edited.layers[1].output
                out = edited.output
            if not (torch.equal(out, wanted[i]) and torch.equal(edited(inputs[i]), wanted[i]) and inner is not None):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Generation.


def test_an_edit_runs_for_every_token(switch, demo):
    model = demo
    direction = torch.randn(model.config.n_embd, generator=torch.Generator().manual_seed(3)) * 20
    module = model._module
    untouched = model.generate("The Eiffel Tower is in the city of", max_new_tokens=4)
    handle = module.transformer.h[6].mlp.register_forward_hook(lambda _, __, out: out + direction)
    wanted = model.generate("The Eiffel Tower is in the city of", max_new_tokens=4)
    handle.remove()

    with model.edit() as steered:
        steered.transformer.h[6].mlp.output += direction

    same(steered.generate("The Eiffel Tower is in the city of", max_new_tokens=4), wanted)
    with steered.generate("The Eiffel Tower is in the city of", max_new_tokens=4) as tracer:
        first = steered.transformer.h[0].mlp.output
    same(tracer.result, wanted)
    assert first.shape[1] > 1
    assert wanted.tolist() != untouched.tolist()
    same(model.generate("The Eiffel Tower is in the city of", max_new_tokens=4), untouched)


@pytest.mark.parametrize("asked", [slice(1, 3), slice(0, None, 2), 2, [0, 3], slice(None)], ids=str)
def test_steps_are_chosen(demo, asked):
    model, seen = demo, []
    every = list(range(4))
    wanted = every[asked] if isinstance(asked, slice) else asked if isinstance(asked, list) else [asked]
    with model.edit() as (tracer, edited):
        for step in tracer.iter[asked]:
            seen.append((step, tracer.step, edited.transformer.h[0].mlp.output.shape[1]))  # noqa: PERF401
    edited.generate("The Eiffel Tower is in the city of", max_new_tokens=4, min_new_tokens=4)
    assert [step for step, _, _ in seen] == [step for _, step, _ in seen] == wanted
    assert [length > 1 for _, _, length in seen] == [step == 0 for step in wanted]


def test_a_function_may_take_the_tracer_too(mlp, x):
    steps = []
    edited = mlp.layers[1].edit(lambda tracer, layer: steps.append((tracer.step, list(tracer.all()))))
    edited(x)
    assert steps == [(0, [0])]


def test_an_edit_of_a_shared_module_runs_at_each_of_its_calls(switch, x):
    rnn = NNsight(toys.RNN(steps=3))
    seen = []
    with rnn.cell.edit(inplace=True) as (tracer, cell):
        seen.append(tracer.step)
        cell.output = cell.output * 0.5
    wanted = hooked(rnn._module, rnn._module.cell, lambda out: out * 0.5, x)
    same(rnn(x), wanted)
    with rnn.trace(x):
        same(rnn.cell.output.clone(), rnn.cell.output)
        out = rnn.output
    same(out, wanted)
    assert seen == [0, 1, 2] * 2


def test_next_is_the_next_call_within_the_edited_one(switch, x):
    rnn = NNsight(toys.RNN(steps=3))
    edited = rnn.edit(lambda model: setattr(model.cell.next(), "output", torch.zeros(3, 4)))
    calls = []

    def second(output):
        calls.append(None)
        return torch.zeros(3, 4) if len(calls) == 2 else None

    same(edited(x), hooked(rnn._module, rnn._module.cell, second, x))


# Gradients and modes.


def test_gradients_flow_through_an_edit(switch, mlp, x):
    bias = torch.zeros(4, requires_grad=True)
    with mlp.edit() as edited:
        edited.layers[1].output = edited.layers[1].output + bias
    edited(x).sum().backward()
    by_edit = bias.grad.clone()
    other = torch.zeros(4, requires_grad=True)
    hooked(mlp._module, mlp._module.layers[1], lambda out: out + other, x).sum().backward()
    same(by_edit, other.grad)


def test_modes_of_an_edit_stay_in_it(switch, mlp, x):
    def edit(model):
        with torch.no_grad():
            model.layers[0].output
            assert not torch.is_grad_enabled()
            model.layers[1].output = model.layers[1].output * 1

    before = snapshots.of_modes()
    with mlp.edit(edit).trace(x):
        out = mlp.output
    assert snapshots.of_modes() == before
    assert out.requires_grad


# Beside caches and loops over steps.


def test_a_cache_keeps_what_edits_and_block_left(switch, mlp, x):
    edited = doubled(mlp)
    with edited.trace(x) as tracer:
        cache = tracer.cache()
        edited.layers[1].output = edited.layers[1].output + 1
    layer = mlp._module.layers[1](mlp._module.layers[0](mlp._module.embed(x)))
    same(cache["model.layers.1"].output, layer * 2 + 1)


def test_a_loop_over_steps_sees_the_edited_model(switch, demo):
    model, seen, read = demo, [], []
    with model.edit() as (tracer, edited):
        edited.transformer.h[4].mlp.output = edited.transformer.h[4].mlp.output * 0 + tracer.step
        seen.append(tracer.step)
    with edited.generate("The Eiffel Tower is in the city of", max_new_tokens=3, min_new_tokens=3) as generation:
        for step in generation.iter[:]:
            read.append((step, edited.transformer.h[4].mlp.output.unique().tolist()))  # noqa: PERF401
    assert seen == [0, 1, 2]
    assert read == [(0, [0.0]), (1, [1.0]), (2, [2.0])]


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_compiled_module_is_edited_and_compiled_afterwards(x):
    torch.compiler.reset()
    module = toys.MLP()
    wanted = hooked(module, module.layers[1], lambda out: out * 2, x)
    untouched = module(x)
    compiled = NNsight(torch.compile(module, backend="eager"))
    before = snapshots.stance()
    edited = compiled.edit(lambda model: setattr(model.layers[1], "output", model.layers[1].output * 2))
    same(edited(x), wanted)
    with edited.trace(x):
        out = edited.output
    same(out, wanted)
    same(compiled(x), untouched)
    assert snapshots.stance() == before


def test_the_model_s_own_errors_stay_its_own(switch, x):
    module = toys.Catches(child=toys.Fails(RuntimeError("the child's")))
    model = NNsight(module)
    seen = []
    with model.child.edit(inplace=True) as child:
        seen.append(1)
        child.second.output = child.second.output * 2
        seen.append(2)
    wanted = module(x)
    same(model(x), wanted)  # the model catches what its child raises, and the edit ends there
    same(model(x), wanted)
    assert seen == [1, 1]
    assert module.log == ["RuntimeError"] * 3


@pytest.mark.parametrize("catches", [False, True])
def test_a_module_fails_while_several_edits_wait_for_it(switch, x, catches):
    """torch goes through the module's hooks then, which must not change meanwhile."""
    child = toys.Fails(RuntimeError("the child's"))
    model, ends = NNsight(toys.Catches(child=child) if catches else toys.Pair(second=child)), []

    def waiting(part):
        try:
            part.output = part.output * 2
        finally:
            ends.append(1)

    for envoy in [model.get("child" if catches else "second")] * 3 + [model]:
        envoy.edit(waiting, inplace=True)
    for _ in range(2):
        if catches:
            same(model(x), model._module(x) * 2)
        else:
            with pytest.raises(RuntimeError, match="the child's"), model.trace(x):
                model.output
    assert len(ends) == 8


def test_an_interrupt_in_an_edit_comes_out(switch, mlp, x):
    def interrupted(model):
        model.layers[1].output
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), mlp.edit(interrupted).trace(x):
        mlp.output
    same(mlp(x), mlp._module(x))


def test_an_edit_may_come_when_a_value_is_changed_in_place(switch, mlp, x):
    with mlp.edit() as edited:
        edited.layers[0].output[:] = 0
        edited.layers[1].output[:, 1] += 1
    module = mlp._module
    h = module.layers[1](torch.zeros(3, 4))
    h = h + torch.tensor([0.0, 1, 0, 0])
    same(edited(x), module.head(module.layers[2](h)))


def test_an_edit_that_asks_the_run_around_it_is_refused_and_may_go_on(switch, mlp, x):
    around, caught = [], []
    with mlp.edit() as edited:
        edited.layers[0].output
        try:
            around[0].layers[2].output
        except (RunOrderError, OtherThreadError) as error:
            caught.append(error)
        edited.layers[1].output = edited.layers[1].output * 2
    wanted = hooked(mlp._module, mlp._module.layers[1], lambda out: out * 2, x)
    with edited.trace(x) as tracer:
        around.append(tracer)
        edited.layers[1].output
        out = edited.output
    same(out, wanted)
    assert len(caught) == 1


def test_a_call_that_was_passed_over_does_not_keep_the_next_from_being_left_out(switch, x):
    rnn = NNsight(toys.RNN(steps=3))
    with rnn.trace(x):
        rnn.cell.next().skip(torch.zeros(3, 4))
        out = rnn.output
    same(out, rnn._module.head(rnn._module.cell(x, torch.zeros(3, 4))))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_errors_in_edits_at_any_depth_end_no_process(switch, seed):
    fuzz = pathlib.Path(__file__).parent.parent / "laws" / "fuzz_edits.py"
    command = [sys.executable, "-W", "ignore", str(fuzz), str(seed), switch]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) > 30


def test_an_edit_changes_an_operation_inside_a_forward(switch, mlp, x):
    with mlp.edit() as edited:
        edited.layers[1].source.self_up_0.output = edited.layers[1].source.self_up_0.output * 0
    wanted = hooked(mlp._module, mlp._module.layers[1].up, lambda out: out * 0, x)
    same(edited(x), wanted)
    with edited.trace(x):
        out = edited.output
    same(out, wanted)
    assert "forward" not in vars(mlp._module.layers[1])
