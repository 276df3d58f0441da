"""`tracer.invoke`: blocks that share one forward pass of any module, each with its own rows, order and names."""

import dis
import pathlib

import pytest
import torch
from torch import nn

import toys
from comparing import alone
from nnsight import NNsight, errors


def test_each_invoke_has_the_rows_that_it_gave(mlp, x, y, switch):
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            one, first = mlp.layers[1].output, tracer.result
        with tracer.invoke(y):
            other, second = mlp.layers[1].output, tracer.result
    torch.testing.assert_close(one, alone(mlp, x))
    torch.testing.assert_close(other, alone(mlp, y))
    torch.testing.assert_close(torch.cat([first, second]), mlp._module(torch.cat([x, y])), rtol=0, atol=0)


def test_a_loop_over_invokes_reads_the_code_that_it_stands_in_once(mlp, x, monkeypatch):
    def with_invokes(count):
        with mlp.trace() as tracer:
            for _ in range(count):
                with tracer.invoke(x) as invoke:
                    invoke.embed.output

    read, read_through = [], dis.get_instructions
    monkeypatch.setattr(dis, "get_instructions", lambda code: read.append(code) or read_through(code))
    with_invokes(2)
    assert read.pop()
    read.clear()
    with_invokes(20)
    assert not read


def test_the_work_for_each_of_many_invokes_does_not_grow_with_their_number():
    class Counted(nn.Linear):
        """Counts how often it is looked up."""

        times = 0

        def __hash__(self):
            Counted.times += 1
            return id(self)

    def looked_up(invokes):
        model = NNsight(nn.Sequential(Counted(2, 2), Counted(2, 2)))
        Counted.times = 0
        with torch.no_grad(), model.trace() as tracer:
            for at in range(invokes):
                with tracer.invoke(torch.full((1, 2), float(at))):
                    for layer in model:
                        layer.output
        return Counted.times

    assert looked_up(40) < 3 * looked_up(20)  # as the cube of them, before


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
    asked = {"all", "barrier", "cache", "invoke", "iter", "model", "next", "result", "rows", "run", "stop", "tracer"}
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
