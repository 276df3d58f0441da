"""The subtle semantics of the existing package, by the numbers of section 2 of `PEER.md`, and what holds here.

2.4, 2.10, 2.12 and 2.14 are in `test_peer_defects.py`.
"""

import threading
import time
import warnings

import pytest
import torch

import nnsight
import toys
from nnsight import NNsight, errors

PROMPT, OTHER = "The Eiffel Tower is in the city of", "The Colosseum is in the city of"


def test_subtle_2_01_what_is_out_of_order_is_raised_at_its_line_and_can_be_caught_there(mlp, x):
    cleaned = []
    with mlp.trace(x):
        mlp.layers[1].output
        try:
            mlp.layers[0].output
        except errors.OutOfOrderError as error:
            said = str(error)
        finally:
            cleaned.append(True)
        after = "ran"
    assert "is past" in said
    assert ".i0" not in said
    assert (cleaned, after) == ([True], "ran")


def test_an_input_of_a_module_that_has_none_and_a_value_of_a_list_of_modules_are_told(mlp, x):
    class Constant(torch.nn.Module):
        def forward(self):
            return torch.ones(4)

    class Adds(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.constant = Constant()

        def forward(self, x):
            return x + self.constant()

    with pytest.raises(errors.BlockError, match=r"`constant` was called without any input(.|\n)*instead +.inputs"):
        with NNsight(Adds()).trace(x) as tracer:
            assert tracer.constant.inputs == ((), {})
            tracer.constant.input
    with pytest.raises(errors.NeverCalledError, match=r"a ModuleList has no forward(.|\n)*model.layers\[0\].output"):
        with mlp.trace(x):
            mlp.layers.output


def test_subtle_2_02_a_module_called_several_times_is_read_at_its_next_call(x):
    model = NNsight(toys.RNN(steps=3))
    with model.trace(x) as tracer:
        first = model.cell.output
        assert model.cell.output is first
        second = model.cell.next().output
        assert list(tracer.iter[:]) == [0]  # steps are those of a generation
    states, state = [], torch.zeros_like(x)
    for _ in range(2):
        state = model._module.cell(x, state)
        states.append(state)
    assert torch.equal(first, states[0])
    assert torch.equal(second, states[1])


def test_subtle_2_03_what_a_block_binds_survives_it_also_after_an_error_and_rebound(mlp, x):
    count, kept, rebound = 1, "before", None
    with pytest.raises(KeyError), mlp.trace(x):
        count += 1
        rebound = mlp.layers[0].output.save()
        derived = rebound * 2
        rebound = "again"
        kept = "after"
        raise KeyError
    assert (count, kept, rebound) == (2, "after", "again")
    assert derived.shape == (3, 4)


def test_subtle_2_05_one_model_in_itself_and_in_a_session_and_in_threads(mlp, x):
    with mlp.session():
        with mlp.trace(x):
            first = mlp.layers[0].output
            with mlp.trace(first):
                inner = mlp.layers[0].output
            outer = mlp.layers[1].output
    with mlp.trace(first):
        assert torch.equal(inner, mlp.layers[0].output)
    assert torch.equal(outer, mlp._module.layers[1](first))
    found = []

    def job():
        with mlp.trace(x):
            found.append(mlp.layers[0].output)

    jobs = [threading.Thread(target=job) for _ in range(3)]
    for one in jobs:
        one.start()
    for one in jobs:
        one.join()
    assert all(torch.equal(value, first) for value in found)
    assert len(found) == 3


def test_subtle_2_06_a_name_of_another_invoke_is_waited_for_whichever_is_written_first(demo):
    with demo.trace() as tracer:
        with tracer.invoke(OTHER):
            demo.transformer.h[3].mlp.output[:, -1] = hidden  # noqa: F821
            patched = demo.lm_head.output[0, -1]
        with tracer.invoke(PROMPT):
            hidden = demo.transformer.h[3].mlp.output[:, -1]
    with demo.trace(OTHER):
        demo.transformer.h[3].mlp.output[:, -1] = hidden
        expected = demo.lm_head.output[0, -1]
    torch.testing.assert_close(patched, expected, rtol=1e-4, atol=1e-4)


def test_subtle_2_07_a_value_is_cut_where_its_rows_are_and_not_by_a_size_that_happens_to_match(x):
    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.weights = torch.nn.Identity(), toys.seeded(torch.nn.Linear(4, 2, bias=False))
            self.table = torch.nn.Identity()

        def forward(self, x):
            return self.inner(x) @ self.table(self.weights.weight).T

    model = NNsight(Table())
    with model.trace() as tracer:
        for at in range(2):
            with tracer.invoke(x[at : at + 1]):
                row, table = model.inner.output, model.table.output
    assert row.shape == (1, 4)
    assert table.shape == (2, 4)  # as many as there are rows


def test_subtle_2_07_prompts_of_other_lengths_have_their_own_positions(demo):
    with demo.trace() as tracer:
        with tracer.invoke(PROMPT):
            one = demo.transformer.h[0].mlp.output
        with tracer.invoke(OTHER):
            other = demo.transformer.h[0].mlp.output
    assert [one.shape[1], other.shape[1]] == [12, 10]


@pytest.mark.filterwarnings("error")
def test_subtle_2_08_a_loop_whose_run_ends_sooner_ends_with_it_and_what_follows_runs(demo):
    with demo.generate(PROMPT, max_new_tokens=3, min_new_tokens=3) as tracer:
        steps = list(tracer.iter[:10])
        after = tracer.result
    assert steps == [0, 1, 2]
    assert after.shape[1] == 15
    with demo.generate(PROMPT, max_new_tokens=3, min_new_tokens=3) as tracer:
        for step in tracer.iter[:]:
            if step == 1:
                break
        left = demo.lm_head.output
    assert left.shape[1] == 1
    with pytest.raises(errors.AlreadyPastError, match="Step 0 is past"):
        with demo.generate(PROMPT, max_new_tokens=3) as tracer:
            for step in (2, 0):
                list(tracer.iter[step])


def test_subtle_2_09_stop_in_one_invoke_leaves_the_result_to_the_others(demo):
    with demo.generate(max_new_tokens=3, min_new_tokens=3) as tracer:
        with tracer.invoke(PROMPT):
            for _ in tracer.iter[:]:
                tracer.stop()
        with tracer.invoke(OTHER):
            result = tracer.result
    assert torch.equal(result, demo.generate(OTHER, max_new_tokens=3, min_new_tokens=3))


def test_subtle_2_10_an_error_in_one_invoke_loses_nothing_of_the_others(demo):
    with pytest.raises(ZeroDivisionError):
        with demo.trace() as tracer:
            with tracer.invoke(PROMPT):
                1 / 0
            with tracer.invoke(OTHER):
                value = demo.lm_head.output
    assert value.shape[:2] == (1, 10)


def test_subtle_2_11_a_tuple_is_changed_by_a_new_one_or_in_place(demo):
    with demo.trace(PROMPT):
        whole = demo.transformer.h[0].attn.output
        assert isinstance(whole, tuple)
        with pytest.raises(TypeError):
            whole[0] = 0
        demo.transformer.h[0].attn.output = (torch.zeros_like(whole[0]), *whole[1:])
        one = demo.transformer.h[0].mlp.output
    with demo.trace(PROMPT):
        demo.transformer.h[0].attn.output[0][:] = 0
        other = demo.transformer.h[0].mlp.output
        logits = demo.output.logits
    assert torch.equal(one, other)
    assert logits.ndim == 3


def test_subtle_2_13_users_hooks_stand_within_the_module(mlp, x):
    handle = mlp._module.layers[0].register_forward_hook(lambda _module, _args, output: output * 2)
    with mlp.trace(x):
        seen, passed_on = mlp.layers[0].output, mlp.layers[1].input
    handle.remove()
    assert torch.equal(seen, passed_on)


def test_subtle_2_15_a_wrapped_module_costs_nothing_outside_a_trace(x):
    """Not one Python call more; what a trace costs is measured in `benchmarks/`."""
    module = toys.MLP()
    plain = module._call_impl.__func__, module.forward.__func__
    began = time.perf_counter()
    model = NNsight(module)
    assert time.perf_counter() - began < 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.trace(x):
            model.layers[0].output
    assert (module._call_impl.__func__, module.forward.__func__) == plain
    assert "forward" not in vars(module)
    assert nnsight.CONFIG.switch == "auto"
