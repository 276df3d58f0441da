"""`tracer.invoke`: blocks that share one forward pass of any module, each with its own rows, order and names."""

import gc
import os
import pathlib
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import snapshots
import torch
from torch import nn

import nnsight
import toys
from nnsight import NNsight, errors

TESTS = pathlib.Path(__file__).parent.parent


@pytest.fixture
def y():
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(2))


def alone(model, x, path="layers.1"):
    with model.trace(x):
        return model.get(path).output


def test_each_invoke_has_the_rows_that_it_gave(mlp, x, y, switch):
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            one, first = mlp.layers[1].output, tracer.result
        with tracer.invoke(y):
            other, second = mlp.layers[1].output, tracer.result
    torch.testing.assert_close(one, alone(mlp, x))
    torch.testing.assert_close(other, alone(mlp, y))
    torch.testing.assert_close(torch.cat([first, second]), mlp._module(torch.cat([x, y])), rtol=0, atol=0)


def test_the_model_runs_once_on_all_of_them(x, y):
    seen = []

    def note(value):
        if type(value) is torch.Tensor:  # and no fake one, on which it is measured which axes are rows
            seen.append(len(value))
        return value

    model = NNsight(toys.Ask(note))
    with model.trace() as tracer:
        for given in (x, y, x):
            with tracer.invoke(given):
                model.before.output
    assert seen == [8]


def test_a_write_stays_in_its_invoke(mlp, x, y):
    with mlp.trace(x):
        mlp.layers[0].output = mlp.layers[0].output * 3
        expected = mlp.output
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            mlp.layers[0].output = mlp.layers[0].output * 3
            got = mlp.output
        with tracer.invoke(y):
            untouched = mlp.layers[0].output
            mlp.layers[1].up.output[:] = 0
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(untouched, alone(mlp, y, "layers.0"))


@pytest.mark.parametrize("switched", [False, True])
def test_a_name_of_one_is_used_in_the_other_in_both_orders(mlp, x, switched):
    """Also where the line that uses it comes before the model has run at all (PEER 3.1.22)."""
    with mlp.trace(x):
        mlp.layers[2].input = alone(mlp, 2 * x, "layers.0")
        expected = mlp.output
    if switched:
        with mlp.trace() as tracer:
            with tracer.invoke(x):
                mlp.layers[2].input = hidden  # noqa: F821
                got = mlp.output
            with tracer.invoke(2 * x):
                hidden = mlp.layers[0].output
    else:
        with mlp.trace() as tracer:
            with tracer.invoke(2 * x):
                hidden = mlp.layers[0].output
            with tracer.invoke(x):
                mlp.layers[2].input = hidden
                got = mlp.output
    torch.testing.assert_close(got, expected)


def test_a_name_is_used_at_the_very_place_where_it_was_read(mlp, x):
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            mlp.layers[1].output = theirs + 1  # noqa: F821
            got = mlp.layers[1].output
        with tracer.invoke(2 * x):
            theirs = mlp.layers[1].output  # noqa: F841
    torch.testing.assert_close(got, alone(mlp, 2 * x) + 1)


def test_values_pass_to_and_fro_between_two_invokes(mlp, x):
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            a0 = mlp.layers[0].output
            mlp.layers[1].output = b1 * 1  # noqa: F821
            a2 = mlp.layers[2].output
        with tracer.invoke(2 * x):
            mlp.layers[0].output = a0 * 1
            b1 = mlp.layers[1].output  # noqa: F841
            b2 = mlp.layers[2].output
    torch.testing.assert_close(a2, b2)
    torch.testing.assert_close(a0, alone(mlp, x, "layers.0"))


def test_two_that_wait_for_each_other_are_told(mlp, x):
    with pytest.raises(errors.BlockError, match="waits for something of this one"):
        with mlp.trace() as tracer:
            with tracer.invoke(x):
                one = other + 1  # noqa: F821
            with tracer.invoke(x):
                other = one + 1  # noqa: F841
    torch.testing.assert_close(alone(mlp, x), alone(mlp, x))


def test_a_name_that_is_past_when_it_comes_says_what_was_waited_for(mlp, x):
    with pytest.raises(errors.OutOfOrderError) as raised:
        with mlp.trace() as tracer:
            with tracer.invoke(x):
                mlp.layers[0].output = late  # noqa: F821
            with tracer.invoke(x):
                late = mlp.layers[2].output
    notes = "\n".join(raised.value.__notes__)
    assert "it had waited for `late` of invoke 1. Where that comes too late in the model, read it in a trace" in notes
    assert late.shape == (3, 4)


def test_what_as_binds_is_its_own_invoke_in_the_block_of_another_too(mlp, x, switch):
    with mlp.trace() as tracer:
        with tracer.invoke(x) as one:
            pass
        with tracer.invoke(2 * x[:1]) as other:
            theirs = one.layers[0].output
            mine = other.layers[0].output
            one.layers[1].output = one.layers[1].output * 0
            whole = tracer.model.layers[2].output
    torch.testing.assert_close(theirs, alone(mlp, x, "layers.0"))
    torch.testing.assert_close(mine, alone(mlp, 2 * x[:1], "layers.0"))
    torch.testing.assert_close(whole, alone(mlp, 2 * x[:1], "layers.2"))


def test_a_function_that_outlives_its_trace_has_what_the_invoke_before_bound(mlp, x):
    hidden = "around"
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            hidden = mlp.layers[0].output
        with tracer.invoke(2 * x):
            later = lambda: hidden  # noqa: E731
            at_once = later()
    assert later() is at_once is hidden


def test_a_trace_offers_only_what_a_block_may_ask_of_it(mlp, x):
    with mlp.trace(x) as tracer:
        own = {name for name in vars(type(tracer)) if not name.startswith("_")}
    asked = {"all", "barrier", "cache", "invoke", "iter", "model", "next", "result", "rows", "run", "stop"}
    assert own == asked


def test_scratch_names_that_all_use_do_not_mix(mlp, x):
    found = {}
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            h = mlp.layers[0].output
            h = h + mlp.layers[1].output
            found["one"] = h
        with tracer.invoke(2 * x):
            h = mlp.layers[0].output
            h = h + mlp.layers[1].output
            found["other"] = h
    for key, given in (("one", x), ("other", 2 * x)):
        torch.testing.assert_close(found[key], alone(mlp, given, "layers.0") + alone(mlp, given))


def test_a_function_in_an_invoke_binds_a_name_around_it(mlp, x, y):
    count, seen = 5, {}
    with mlp.trace() as tracer:  # and no warning that one runs alone
        with tracer.invoke(x):

            def look():
                nonlocal count
                count += 1
                seen["x"] = mlp.layers[1].output

            look()
            look()
        with tracer.invoke(y):
            seen["y"] = mlp.layers[1].output
    torch.testing.assert_close(seen["x"], alone(mlp, x))
    torch.testing.assert_close(seen["y"], alone(mlp, y))
    assert count == 7


def test_a_loop_of_invokes_has_its_own_loop_variable_in_each(mlp, x):
    found = {}
    with mlp.trace() as tracer:
        for scale in (1, 2, 3):
            with tracer.invoke(scale * x):
                found[scale] = mlp.layers[1].output
                last = scale
    assert (scale, last) == (3, 3)
    for key in (1, 2, 3):
        torch.testing.assert_close(found[key], alone(mlp, key * x))


def test_a_total_is_added_up_over_the_invokes(mlp, x):
    total = 0
    with mlp.trace() as tracer:
        for scale in (1, 2, 3):
            with tracer.invoke(scale * x):
                total += mlp.layers[0].output.sum()
    torch.testing.assert_close(total, sum(alone(mlp, scale * x, "layers.0").sum() for scale in (1, 2, 3)))


def test_code_that_runs_again_in_one_namespace_never_uses_a_stale_name(mlp, x, tmp_path):
    cell = """
with model.trace() as tracer:
    with tracer.invoke(given):
        model.layers[2].input = hidden
        got = model.output
    with tracer.invoke(2 * given):
        hidden = model.layers[0].output
"""
    path = tmp_path / "cell.py"
    path.write_text(cell)
    code, names = compile(cell, str(path), "exec"), {"model": mlp}
    seen = []
    for given in (x, x + 1):
        names["given"] = given
        if seen:  # the name stands for the value of the run before: which one is meant can't be told
            with pytest.raises(errors.BlockError, match=r"`hidden` stands for something already.*invoke 1"):
                exec(code, names)
            del names["hidden"]
        exec(code, names)
        seen.append(names["got"])
        with mlp.trace(given):
            mlp.layers[2].input = alone(mlp, 2 * given, "layers.0")
            expected = mlp.output
        torch.testing.assert_close(names["got"], expected)
    assert not torch.equal(*seen)


def test_an_error_in_one_leaves_the_others_right_and_their_names_bound(mlp, x, switch):
    with pytest.raises(ZeroDivisionError) as raised:
        with mlp.trace() as tracer:
            with tracer.invoke(x):
                before = mlp.layers[0].output
                1 / 0
            with tracer.invoke(2 * x):
                other, result = mlp.layers[1].output, tracer.result
    trace = raised.value.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    assert trace.tb_frame.f_code.co_filename == __file__
    assert pathlib.Path(__file__).read_text().splitlines()[trace.tb_lineno - 1].strip() == "1 / 0"
    assert "In invoke 0 of the trace." in raised.value.__notes__
    torch.testing.assert_close(before, alone(mlp, x, "layers.0"))
    torch.testing.assert_close(other, alone(mlp, 2 * x))
    torch.testing.assert_close(result, mlp._module(2 * x))


def test_errors_in_several_are_all_told(mlp, x):
    with pytest.raises(KeyError) as raised:
        with mlp.trace() as tracer:
            with tracer.invoke(x):
                raise KeyError("one")
            with tracer.invoke(x):
                mlp.layers[0].output
                raise ValueError("the other")
    assert "Invoke 1 of this trace failed too: ValueError: the other" in raised.value.__notes__


def test_an_error_of_the_model_s_ends_all(x):
    module = toys.Fails()
    model = NNsight(module)
    module.error = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                first = model.first.output
                model.second.output
            with tracer.invoke(x):
                other = model.first.output
                tracer.result
    assert first.shape == other.shape == (3, 4)
    module.error = None
    assert alone(model, x, "second").shape == (3, 4)


def test_stop_in_one_leaves_the_others_right(mlp, x, switch):
    after = "not"
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            stopped = mlp.layers[0].output
            tracer.stop()
            after = "ran"
        with tracer.invoke(2 * x):
            value, result = mlp.layers[2].output, tracer.result
    assert after == "not"
    torch.testing.assert_close(stopped, alone(mlp, x, "layers.0"))
    torch.testing.assert_close(value, alone(mlp, 2 * x, "layers.2"))
    torch.testing.assert_close(result, mlp._module(2 * x))


def test_the_model_stops_where_all_have(x):
    model = NNsight(toys.Finally())
    with model.trace() as tracer:
        for scale in (1, 2):
            with tracer.invoke(scale * x):
                model.first.output
                tracer.stop()
    assert model._module.log == ["entered", "left"]
    assert "stopped" in repr(tracer)


def test_a_barrier_has_each_wait_for_the_others_in_rounds(mlp, x):
    shared, log = [], []
    with mlp.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(x):
            for at in (0, 1):
                log.append(("a", at))
                barrier()
                shared.append(mlp.layers[at].output)
                barrier()
        with tracer.invoke(2 * x):
            for at in (0, 1):
                barrier()
                log.append(("b", at))
                barrier()
                mlp.layers[at].output = shared[-1]
            got = mlp.layers[2].output
    assert log == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    with mlp.trace(2 * x):
        mlp.layers[1].output = alone(mlp, x)
        expected = mlp.layers[2].output
    torch.testing.assert_close(got, expected)


def test_a_barrier_that_waits_for_too_many_is_told(mlp, x):
    with pytest.raises(errors.BlockError, match="waits for 3 invokes, and only 2 came"):
        with mlp.trace() as tracer:
            barrier = tracer.barrier(3)
            for _ in range(2):
                with tracer.invoke(x):
                    barrier()
    with pytest.raises(errors.BlockError, match="stands in none"), mlp.trace(x) as tracer:
        tracer.barrier(1)()
    with pytest.raises(errors.BlockError, match="number of invokes"), mlp.trace(x) as tracer:
        tracer.barrier(0)


def test_an_invoke_without_a_prompt_sees_the_whole_batch(mlp, x, y):
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            mlp.layers[0].output = mlp.layers[0].output * 2
        with tracer.invoke():
            whole = mlp.layers[0].output
            mlp.layers[1].output[:] = 0
        with tracer.invoke(y):
            part = mlp.layers[1].output
    assert whole.shape == (5, 4)
    torch.testing.assert_close(whole[:3], alone(mlp, x, "layers.0") * 2)
    assert not part.any()


def test_only_an_invoke_without_a_prompt_is_told_what_to_give(mlp):
    with pytest.raises(errors.InputError):
        with mlp.trace() as tracer:
            with tracer.invoke():
                mlp.layers[0].output


def test_a_cache_in_an_invoke_keeps_its_own_rows(mlp, x, y):
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            cache = tracer.cache("layers.*")
        with tracer.invoke(y):
            other = tracer.cache(mlp.layers[1], include_inputs=True)
        with tracer.invoke():
            whole = tracer.cache("layers.1")
    torch.testing.assert_close(cache["layers.1"].output, alone(mlp, x))
    torch.testing.assert_close(other["layers.1"].output, alone(mlp, y))
    assert other["layers.1"].input.shape == (2, 4)
    assert whole["layers.1"].output.shape == (5, 4)


def test_inner_values_of_a_hooked_call_are_read_in_its_invoke_and_in_others(mlp, x, y):
    mlp.extra = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            out = mlp.extra(mlp.layers[0].output, hook=True)
            own = mlp.extra[0].output
        with tracer.invoke(y):
            served = mlp.extra[0].output
    assert torch.equal(own.relu(), out)
    assert served is own


def test_a_one_line_body_and_one_that_begins_with_try(mlp, x):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with mlp.trace() as tracer:
            with tracer.invoke(x): one = mlp.layers[1].output  # noqa: E701  # fmt: skip
            with tracer.invoke(2 * x):
                try:
                    other = mlp.layers[1].output
                finally:
                    done = True
    torch.testing.assert_close(one, alone(mlp, x))
    torch.testing.assert_close(other, alone(mlp, 2 * x))
    assert done
    assert all("forward pass of its own" in str(warning.message) for warning in caught)


def test_a_body_with_return_or_break_runs_in_a_forward_pass_of_its_own(mlp, x):
    def returns():
        with mlp.trace() as tracer:
            with tracer.invoke(x):
                return mlp.layers[1].output
        raise AssertionError

    with pytest.warns(UserWarning, match="in a forward pass of its own") as caught:
        value = returns()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    torch.testing.assert_close(value, alone(mlp, x))
    with pytest.warns(UserWarning, match="in a forward pass of its own"):  # noqa: PT031
        with mlp.trace() as tracer:
            for scale in (1, 2):
                with tracer.invoke(scale * x):
                    broken = mlp.layers[1].output
                    break
    torch.testing.assert_close(broken, alone(mlp, x))


def test_without_source_an_invoke_runs_where_it_stands(mlp, x, switch):
    lines = """
with model.trace() as tracer:
    with tracer.invoke(x):
        one = model.layers[1].output
        result = tracer.result
    with tracer.invoke(2 * x):
        model.layers[1].output = one
        other = model.layers[2].output
"""
    names = {"model": mlp, "x": x}
    before = snapshots.of_model(mlp._module)
    with pytest.warns(UserWarning, match="in a forward pass of its own"):
        exec(lines, names)
    assert snapshots.differences(before, snapshots.of_model(mlp._module)) == []
    torch.testing.assert_close(names["one"], alone(mlp, x))
    torch.testing.assert_close(names["result"], mlp._module(x))
    with mlp.trace(2 * x):
        mlp.layers[1].output = names["one"]
        expected = mlp.layers[2].output
    torch.testing.assert_close(names["other"], expected)


def test_without_source_what_needs_the_others_is_refused(mlp, x):
    lines = """
with model.trace() as tracer:
    with tracer.invoke():
        model.layers[1].output
"""
    with pytest.raises(errors.BlockError, match="can't run beside them"):
        exec(lines, {"model": mlp, "x": x})


def test_invokes_work_from_standard_input_one_by_one():
    script = """
import torch, nnsight
model = nnsight.NNsight(torch.nn.Sequential(torch.nn.Identity()))
with model.trace() as tracer:
    with tracer.invoke(torch.ones(1, 2)):
        a = model[0].output
    with tracer.invoke(torch.zeros(3, 2)):
        b = model[0].output
print(tuple(a.shape), tuple(b.shape))
"""
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, timeout=120)
    assert done.stdout == "(1, 2) (3, 2)\n", done.stderr
    assert done.stderr.count("UserWarning") == 2 or done.stderr.count("UserWarning") == 1


def test_what_can_t_be_an_invoke_is_refused(mlp, x):
    with pytest.raises(errors.BlockError, match="can't be opened in another"):
        with mlp.trace() as tracer:
            with tracer.invoke(x):
                with tracer.invoke(x):
                    mlp.layers[0].output
    with pytest.raises(errors.BlockError, match="given a prompt itself"), mlp.trace(x) as tracer:
        with tracer.invoke(x):
            pass
    with pytest.raises(errors.BlockError, match="has not been entered"):
        mlp.trace().invoke(x)
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            pass
    with pytest.raises(errors.BlockError, match="after the trace"):
        tracer.invoke(x)
    torch.testing.assert_close(alone(mlp, x), alone(mlp, x))


def test_a_value_outside_the_invokes_is_told_where_it_belongs(mlp, x):
    asked = {
        "there is no value outside its invokes": lambda tracer: mlp.layers[0].output,
        "`tracer.result` belongs in an invoke": lambda tracer: tracer.result,
        "`tracer.iter` belongs in an invoke": lambda tracer: tracer.iter,
        r"`tracer.stop\(\)` belongs in an invoke": lambda tracer: tracer.stop(),
        r"`tracer.cache\(\)` belongs in an invoke": lambda tracer: tracer.cache(),
    }
    for text, ask in asked.items():
        with pytest.raises(errors.InputError, match=text) as raised:
            with mlp.trace() as tracer:
                with tracer.invoke(x):
                    mlp.layers[0].output
                ask(tracer)
        assert "with tracer.invoke(prompt):" in str(raised.value)


def looks_around():
    return bound_by_an_invoke  # noqa: F821


def test_a_function_that_looks_for_what_an_invoke_binds_is_told_when_that_is_there(mlp, x, y):
    with pytest.raises(NameError, match="bound_by_an_invoke") as raised, mlp.trace() as tracer:
        with tracer.invoke(x):
            bound_by_an_invoke = mlp.layers[0].output  # noqa: F841
        with tracer.invoke(y):
            looks_around()
    note = "around the trace only when the trace has ended: give it to `looks_around` as an argument."
    assert any(note in one for one in raised.value.__notes__)
    with pytest.raises(NameError) as raised, mlp.trace() as tracer:
        with tracer.invoke(x):
            own  # noqa: F821
            own = 1  # noqa: F841
    assert raised.value.__notes__ == ["In invoke 0 of the trace."]


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="there, a body behind several items runs in its place")
def test_an_invoke_in_another_is_told_to_stand_behind_it(mlp, x, y):
    with pytest.raises(errors.BlockError, match=r"(?s)opened in another.*instead +one after the other"):
        with mlp.trace() as tracer, tracer.invoke(x), tracer.invoke(y):
            mlp.layers[0].output


def test_an_invoke_alone_without_a_prompt_has_no_batch_to_see(mlp):
    with pytest.raises(errors.InputError, match=r"(?s)there is none.*you wrote +with tracer.invoke\(\):"):
        with mlp.trace() as tracer:
            with tracer.invoke():
                mlp.layers[0].output


def test_a_stuck_barrier_says_so_once(mlp, x, y):
    with pytest.raises(errors.BlockError, match="only 2 came to it") as raised, mlp.trace() as tracer:
        barrier = tracer.barrier(3)
        with tracer.invoke(x):
            barrier()
        with tracer.invoke(y):
            barrier()
    assert raised.value.__notes__ == [
        "Invoke 1 of this trace failed too, in the same way.",
        "In invoke 0 of the trace.",
    ]


def test_what_an_invoke_binds_gives_and_takes_its_own_result(mlp, x, y, switch):
    expected = mlp._module(x)
    with mlp.trace() as tracer:
        with tracer.invoke(x) as one:
            assert one.tracer is tracer
        with tracer.invoke(y) as other:
            first = one.result
            other.result = torch.zeros(2, 4)
        with tracer.invoke() as both:
            whole = both.result
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(whole, torch.cat([first, torch.zeros(2, 4)]))
    with pytest.raises(errors.OutsideTraceError, match="The result of an invoke"):
        one.result


def test_what_is_assigned_to_an_invoke_reaches_the_model(mlp, x, y):
    with mlp.trace() as tracer:
        with tracer.invoke(x) as one:
            one.output = torch.zeros(3, 4)
            written = tracer.result
        with tracer.invoke(y):
            other = tracer.result
    assert (written == 0).all()
    torch.testing.assert_close(other, mlp._module(y))


def test_a_trace_without_a_prompt_and_without_invokes_is_told_what_to_give(mlp):
    with pytest.raises(errors.InputError):
        with mlp.trace():
            pass


def test_inputs_that_can_t_be_one_batch_are_told(mlp, x):
    with pytest.raises(errors.InputError, match="can't be one batch"):
        with mlp.trace() as tracer:
            with tracer.invoke(x):
                mlp.layers[0].output
            with tracer.invoke(x.double()):
                mlp.layers[0].output


def test_one_invoke_alone_equals_a_trace_bit_for_bit(mlp, x):
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            mlp.layers[1].skip(mlp.layers[1].input * 2)
            got = mlp.output
    with mlp.trace(x):
        mlp.layers[1].skip(mlp.layers[1].input * 2)
        expected = mlp.output
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_gradients_through_invokes_equal_those_of_each_alone(mlp, x):
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            a, loss = mlp.layers[0].output, mlp.output.square().sum()
        with tracer.invoke(2 * x):
            b, other = mlp.layers[0].output, mlp.output.square().sum()
    got = torch.autograd.grad(loss + other, [a, b])
    for gradient, given in zip(got, (x, 2 * x), strict=True):
        with mlp.trace(given):
            hidden, loss = mlp.layers[0].output, mlp.output.square().sum()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss, hidden)[0])


def test_a_backward_block_stands_in_an_invoke(mlp, x):
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            hidden = mlp.layers[0].output
            loss = mlp.output.square().sum()
            with loss.backward(retain_graph=True):
                gradient = hidden.grad
        with tracer.invoke(2 * x):
            mlp.layers[1].output
    with mlp.trace(x):
        other = mlp.layers[0].output
        loss = mlp.output.square().sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, other)[0])


# Laws 1, 7, 9 and 11


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


@pytest.mark.filterwarnings("ignore:This invoke runs in a forward pass of its own:UserWarning")
def test_what_a_block_deletes_is_gone_around_it(mlp, x, y):
    outer, kept, other, caught = 1, 2, 3, 4
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            hidden = mlp.layers[0].output
            del outer, hidden
            other = 5
            del other
            try:
                mlp.layers[9]
            except IndexError as caught:
                str(caught)
    assert kept == 2
    for name in ("outer", "hidden", "other", "caught"):
        assert name not in locals()
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            outer = mlp.layers[0].output
        with tracer.invoke(y):
            outer = outer.sum() + mlp.layers[0].output.sum()
            total = outer * 1
            del outer
    assert "outer" not in locals()
    assert total.ndim == 0
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            outer = mlp.layers[0].output
            del outer
        with tracer.invoke(y):
            outer = mlp.layers[1].output
    assert outer.shape == y.shape


def test_what_a_block_deletes_at_the_top_of_a_file_is_gone_and_stands_for_nothing_in_the_next_one(mlp, x, tmp_path):
    path = tmp_path / "cell.py"
    path.write_text("""
with model.trace() as tracer:
    with tracer.invoke(x):
        hidden = model.layers[0].output
        del outer, hidden
    with tracer.invoke(x):
        again = model.layers[1].output
        outer
""")
    names = {"model": mlp, "x": x, "outer": 1}
    with pytest.raises(NameError, match="name 'outer' is not defined"):
        exec(compile(path.read_text(), str(path), "exec"), names)
    assert {"outer", "hidden"}.isdisjoint(names)
    assert names["again"].shape == (3, 4)
    path = tmp_path / "other.py"
    path.write_text("""
with model.trace() as tracer:
    with tracer.invoke(x):
        model.layers[0].output
        del outer, stays
    stays = 2
    with tracer.invoke(x):
        outer = same
""")
    names = {"model": mlp, "x": x, "outer": 1, "same": 1, "stays": 1}
    exec(compile(path.read_text(), str(path), "exec"), names)
    assert (names["outer"], names["stays"]) == (1, 2)
    path = tmp_path / "third.py"
    path.write_text("""
with model.trace() as tracer:
    with tracer.invoke(x):
        hidden = model.layers[0].output
        del hidden
        hidden
    with tracer.invoke(x):
        hidden = 1
""")
    with pytest.raises(NameError, match="'hidden' is not defined") as raised:
        exec(compile(path.read_text(), str(path), "exec"), {"model": mlp, "x": x, "hidden": 1})
    assert raised.value.__notes__ == ["In invoke 0 of the trace."]


def run_cell(text, path, names):
    path.write_text(text)
    names.setdefault("__name__", "a_module")
    exec(compile(text, str(path), "exec"), names)
    return names


LOOKS = """
import functools

def helper():
    return hidden.sum()

def deeper():
    return helper()

@functools.cache
def cached():
    return hidden.sum()

class Probe:
    def run(self):
        return hidden.sum()

probe = Probe()
hidden = None
"""


@pytest.mark.parametrize("call", ["helper()", "deeper()", "cached()", "probe.run()", "Probe().run()"])
def test_a_function_that_looks_around_for_what_its_block_binds_never_sees_what_stood_there(call, mlp, x, tmp_path):
    names = run_cell(LOOKS, tmp_path / "defined.py", {"model": mlp, "x": x})
    cell = f"""
with model.trace() as tracer:
    with tracer.invoke(x):
        hidden = model.layers[0].output
        total = {call}
"""
    name = call.partition("(")[0].partition(".")[0]
    with pytest.warns(UserWarning, match=f"its own.*`{name}` looks around it for `hidden`, which it binds"):
        run_cell(cell, tmp_path / "cell.py", names)
    assert torch.equal(names["total"], alone(mlp, x, "layers.0").sum())
    cell = f"""
with model.trace() as tracer:
    with tracer.invoke(x):
        hidden = model.layers[0].output
    with tracer.invoke(x):
        total = {call}
"""
    with pytest.raises(
        errors.BlockError, match=rf"`{name}` looks around this invoke for `hidden`, which invoke 0 binds"
    ):
        run_cell(cell, tmp_path / "other.py", names)


def test_a_function_within_the_same_function_looks_for_its_names_too(mlp, x):
    hidden = None

    def helper():
        return hidden

    with warnings.catch_warnings(record=True) as told, mlp.trace() as tracer:
        warnings.simplefilter("always")
        with tracer.invoke(x):
            hidden = mlp.layers[0].output
            found = helper()
    assert found is hidden
    assert "`helper` looks around it for `hidden`, which it binds" in str(told[0].message)
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            inner = mlp.layers[0].output
            both = [(lambda: inner)() for _ in range(2)]
    assert both[0] is both[1] is inner


def test_a_function_that_looks_for_something_else_is_called_in_the_batch(mlp, x, tmp_path):
    names = run_cell(LOOKS, tmp_path / "defined.py", {"model": mlp, "x": x})
    cell = """
hidden = torch.ones(2)
with model.trace() as tracer:
    with tracer.invoke(x):
        total, value = helper(), model.layers[0].output
    with tracer.invoke(x):
        other = model.layers[0].output
"""
    names["torch"] = torch
    assert run_cell(cell, tmp_path / "cell.py", names)["total"] == 2
    elsewhere = run_cell(LOOKS + "hidden = torch.ones(3)", tmp_path / "elsewhere.py", {"torch": torch})
    names["helper"] = elsewhere["helper"]
    exec("def again(n): return n and again(n - 1)", names)
    cell = """
with model.trace() as tracer:
    with tracer.invoke(x):
        hidden = model.layers[0].output
        total = helper() + again(2)
"""
    assert run_cell(cell, tmp_path / "other.py", names)["total"] == 3


def test_a_function_that_opens_an_invoke_keeps_its_names_to_itself(mlp, x):
    def plain(tracer):
        hidden = 1

        def helper():
            return hidden

        with tracer.invoke(x):
            found.append(helper())

    def binds(tracer):
        with tracer.invoke(x):
            hidden = mlp.layers[0].output  # noqa: F841

    found = []
    with mlp.trace() as tracer:
        binds(tracer)
        plain(tracer)
    assert found == [1]
