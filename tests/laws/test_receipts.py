"""A finished tracer says what was read, written and skipped, with shapes."""

import contextlib
import copy
import gc
import pickle

import pytest
import torch

import nnsight
import toys
from nnsight import errors


def test_a_receipt_lists_reads_writes_and_skips_with_shapes(mlp, x, switch):
    with mlp.trace(x) as tracer:
        mlp.layers[0].output
        mlp.layers[1].input = x
        mlp.layers[1].up.output = x
        mlp.layers[2].skip(x)
        tracer.result
    text = repr(tracer)
    lines = text.splitlines()

    def line(*words):
        found = [line for line in lines if all(word in line for word in words)]
        assert found, f"no line with {words} in\n{text}"
        return found[0]

    assert "3, 4" in line("read", "layers.0")
    assert "3, 4" in line("wrote", "layers.1")
    assert "3, 4" in line("wrote", "layers.1.up")
    assert "3, 4" in line("skip", "layers.2")
    assert not any("layers.1.down" in line or "embed" in line for line in lines)


def test_a_receipt_of_a_tuple_and_a_dict(x):
    model = nnsight.NNsight(toys.Structured())
    with model.trace(x) as tracer:
        model.tuple.output
        model.dict.output
    text = repr(tracer)
    assert "tuple" in text
    assert "dict" in text
    assert text.count("3, 4") >= 3


@pytest.mark.parametrize("how", ["finished", "stopped", "failed in the block", "failed in the model"])
def test_a_receipt_says_how_the_run_ended(x, how):
    model = nnsight.NNsight(toys.Fails(error=ValueError() if how == "failed in the model" else None))
    with contextlib.suppress(KeyError, ValueError), model.trace(x) as tracer:
        model.first.output
        if how == "stopped":
            tracer.stop()
        if how == "failed in the block":
            raise KeyError
    texts = repr(tracer)
    assert "first" in texts
    assert ("stopped" in texts) == (how == "stopped")
    assert ("failed" in texts) == how.startswith("failed")


def test_the_receipts_of_different_endings_differ(x):
    texts = set()
    for how in range(4):
        model = nnsight.NNsight(toys.Fails(error=ValueError() if how == 3 else None))
        with contextlib.suppress(KeyError, ValueError), model.trace(x) as tracer:
            model.first.output
            if how == 1:
                tracer.stop()
            if how == 2:
                raise KeyError
        texts.add(repr(tracer))
    assert len(texts) == 4


def test_a_receipt_before_within_and_after(mlp, x):
    tracer = mlp.trace(x, trace=True)
    before = repr(tracer)
    with tracer:
        open_ = repr(tracer)
        mlp.layers[0].output
        paused = repr(tracer)
    after = repr(tracer)
    assert all(isinstance(text, str) for text in (before, open_, paused, after))
    assert "layers.0" not in open_
    assert "layers.0" in paused
    assert "layers.0" in after


def test_a_receipt_holds_no_tensor(mlp, x):
    import weakref

    with torch.no_grad(), mlp.trace(x) as tracer:
        seen = weakref.ref(mlp.layers[0].output)
    assert "layers.0" in repr(tracer)
    assert seen() is None


def test_a_receipt_of_a_failed_question_names_what_came_before(mlp, x):
    with pytest.raises(errors.AlreadyPastError), mlp.trace(x) as tracer:
        mlp.layers[1].output = torch.zeros(3, 4)
        mlp.layers[0].output
    assert "layers.1" in repr(tracer)


def test_a_skip_is_one_line_unless_the_block_read_the_input_too(mlp, x):
    with mlp.trace(x) as tracer:
        mlp.layers[1].skip(x)
    assert repr(tracer).splitlines()[0].endswith("finished: 1 skipped>")
    with mlp.trace(x) as tracer:
        mlp.layers[1].skip(mlp.layers[1].input * 2)
    assert repr(tracer).splitlines()[0].endswith("finished: 1 read, 1 skipped>")


@pytest.mark.filterwarnings("error")
def test_a_trace_refuses_to_be_copied_and_goes_on(mlp, x):
    before = mlp(x)
    with mlp.trace(x) as tracer:
        mlp.layers[0].output
        for thing in (tracer, tracer.model, tracer.model.layers[1]):
            for duplicate in (copy.deepcopy, copy.copy, pickle.dumps):
                if duplicate is copy.copy and thing is not tracer:
                    continue
                with pytest.raises(TypeError, match="can't be copied or pickled"):
                    duplicate(thing)
        result = tracer.result
    gc.collect()
    assert torch.equal(result, before)
    with pytest.raises(TypeError, match="a trace can't be copied"):
        copy.deepcopy(mlp.trace(x))


def listed(tracer, *words):
    """The lines of a receipt in which these words are."""
    return [line for line in repr(tracer).splitlines()[1:] if all(word in line for word in words)]


def test_what_was_changed_in_place_is_listed_as_changed_and_the_rest_as_read(mlp, x, switch):
    with mlp.trace(x) as tracer:
        mlp.embed.output
        mlp.layers[0].output[:] = 0
        mlp.layers[1].input.mul_(2)
        kept = mlp.layers[2].output
        mlp.head.output[:, 0] = 0
    kept.zero_()
    with torch.no_grad():
        mlp.head.weight.zero_()
    assert repr(tracer).splitlines()[0].endswith("finished: 2 read, 3 changed in place>")
    assert listed(tracer, "changed in place", "layers.0.output")
    assert listed(tracer, "changed in place", "layers.1.input")
    assert listed(tracer, "changed in place", "head.output")
    assert listed(tracer, "read", "embed")
    assert listed(tracer, "read", "layers.2")


def test_what_the_model_changes_itself_is_not_the_block_s_doing(x):
    model = nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True)))
    with model.trace(x) as tracer:
        before = model[0].output
        model[1].output
    assert not (before < 0).any()
    assert not listed(tracer, "changed in place")


def test_a_change_in_place_is_found_in_a_tuple_and_behind_other_reads_of_the_same_place(x):
    model = nnsight.NNsight(toys.Structured())
    with model.trace(x) as tracer:
        model.tuple.output[1][0].zero_()
        model.dict.output["extra"][0].zero_()
    assert len(listed(tracer, "changed in place")) == 2
    with model.trace(x) as tracer:
        output, inputs = model.tuple.inner.output, model.tuple.inner.inputs
        assert inputs
        output.zero_()
        other = model.tuple.inner.output
        model.dict.output
        other.zero_()
    (line,) = listed(tracer, "changed in place")
    assert "tuple.inner.output" in line
    assert len(listed(tracer, "read")) == 3
    with model.trace(x) as tracer:
        model.tuple.inner.output
        inputs = model.tuple.inner.inputs
        model.tuple.inner.output
        inputs[0][0].mul_(1)
    assert "tuple.inner.input" in listed(tracer, "changed in place")[0]
    with model.trace(x) as tracer:
        model.tuple.inner.output.zero_()
        model.tuple.inner.output.sum()
    assert [line.split("  ")[1] for line in repr(tracer).splitlines()[1:3]] == ["changed in place", "read"]


def test_a_change_that_is_also_assigned_is_both(mlp, x):
    with mlp.trace(x) as tracer:
        mlp.layers[0].output += 1
    assert [line.split("  ")[1] for line in repr(tracer).splitlines()[1:3]] == ["changed in place", "wrote"]


def test_a_row_is_named_where_it_alone_was_read_and_else_all_that_it_may_be(mlp, x):
    with mlp.trace(x) as (a, b, _):
        a.layers[0].output[:] = 0
        b.layers[0].output.sum()
        first, second = a.layers[1].output, b.layers[1].output
        first[:] = second
    tracer = a.tracer
    assert listed(tracer, "changed in place", "layers.0.output of row 0 ")
    assert listed(tracer, "read", "layers.0.output of row 1 ")
    assert listed(tracer, "changed in place", "layers.1.output of row 0 or row 1 ")


def test_rows_that_are_changed_one_by_one_are_named_one_by_one(mlp):
    """The text of forty of them took all memory: that of each had those of all before it, twice."""
    with mlp.trace(torch.randn(40, 4)) as tracer:
        for row in tracer.rows:
            row.layers[0].output[:] += 1
        tracer.rows[7].layers[0].output.sum()
    assert listed(tracer, "changed in place", "layers.0.output of row 0 ")
    for i in range(1, 40):
        assert listed(tracer, "changed in place", f"layers.0.output of row {i} or an earlier one ")
    assert repr(tracer).startswith("<trace of MLP, finished: 1 read, 40 changed in place>")


def test_a_long_receipt_is_shown_in_part_and_printed_whole(mlp, x):
    with mlp.trace(x) as tracer:
        for _ in range(200):
            mlp.layers[0].output
        mlp.layers[1].output
    shown, whole = repr(tracer).splitlines(), str(tracer).splitlines()
    assert (len(shown), len(whole)) == (123, 203)  # and a title, and the result
    assert shown[0] == whole[0] == "<trace of MLP, finished: 201 read>"
    assert shown[101] == "  ... 81 more, which print(tracer) has"
    assert shown[-2:] == whole[-2:]
    assert "layers.1.output" in shown[-2]


def test_of_many_rows_that_were_read_the_last_are_named(mlp):
    with mlp.trace(torch.randn(9, 4)) as tracer:
        values = [row.layers[0].output for row in tracer.rows]
        values[2][:] = 0
    assert "layers.0.output of row 6 or row 7 or row 8 or another" in repr(tracer)


def test_invokes_and_stops_and_errors_and_inference_mode(mlp, x):
    with mlp.trace() as tracer:
        with tracer.invoke(x[:1]):
            mlp.layers[0].output[:] = 0
        with tracer.invoke(x[1:]):
            mlp.layers[0].output.sum()
    assert listed(tracer, "changed in place", "of invoke 0 ")
    assert listed(tracer, "read", "of invoke 1 ")
    with contextlib.suppress(KeyError), mlp.trace(x) as tracer:
        mlp.layers[0].output.zero_()
        raise KeyError
    assert listed(tracer, "changed in place")
    with mlp.trace(x) as tracer:
        mlp.layers[0].output.zero_()
        tracer.stop()
    assert listed(tracer, "changed in place")
    with torch.inference_mode(), mlp.trace(x) as tracer:
        mlp.layers[0].output.zero_()
    assert listed(tracer, "read", "layers.0")
    with torch.inference_mode():
        made_there = torch.ones(3, 4)
    with torch.no_grad(), mlp.trace(made_there) as tracer:
        mlp.embed.input
        mlp.layers[0].output
    assert len(listed(tracer, "read")) == 2


def test_a_run_that_ended_holds_no_value(mlp, x):
    import weakref

    for how in (contextlib.nullcontext, lambda: contextlib.suppress(KeyError)):
        with how(), torch.no_grad(), mlp.trace(x) as tracer:
            seen = weakref.ref(mlp.layers[0].output)
            if how is not contextlib.nullcontext:
                raise KeyError
        assert seen() is None
        assert listed(tracer, "read")
