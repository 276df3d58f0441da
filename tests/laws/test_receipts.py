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
