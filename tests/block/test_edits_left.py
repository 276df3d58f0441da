"""What edits leave behind on a model, in copies of it, and beside a debugger."""

import copy
import gc
import pickle
import sys
import weakref

import pytest
import snapshots
import torch

import toys
from comparing import same
from edited import doubled
from nnsight import LanguageModel, NNsight
from nnsight.errors import (
    ModelError,
)

# What it leaves behind.


@pytest.mark.parametrize("end", ["finish", "stop", "error", "model fails", "drop"])
def test_nothing_is_left_on_the_model(switch, x, end):
    module = toys.Fails()
    model = NNsight(module)
    ended = []

    def edit(model):
        try:
            model.first.input = model.first.input * 1
            model.first.output = model.first.output + 1
            model.second.output = model.second.output * 2
        finally:
            ended.append(1)

    edited = model.edit(edit)
    before, modes = snapshots.of_model(module), snapshots.of_process()
    tracer = edited.trace(x)
    try:
        if end == "model fails":
            module.error = ValueError("the model's")
        if end == "drop":

            def holds():
                with edited.trace(x):
                    yield edited.first.output

            held = holds()
            next(held)
            del held
        else:
            with tracer:
                edited.first.output
                if end == "stop":
                    tracer.stop()
                if end == "error":
                    raise KeyError("the block's")
    except (KeyError, ValueError):
        pass
    module.error = None
    assert ended == [1]
    assert not snapshots.differences(before, snapshots.of_model(module))
    now = snapshots.of_process()
    now["threads"] = modes["threads"]
    assert not snapshots.differences(modes, now)


def test_memory_is_flat_and_a_dropped_model_is_freed(switch, x):
    class Big(torch.Tensor):
        pass

    def once():
        module = toys.MLP()
        model = NNsight(module)
        edited = doubled(model)
        model.layers[0].edit(lambda layer: setattr(layer, "output", layer.output + 1), inplace=True)
        with model.edit(inplace=True) as tracer:
            tracer.layers[0].output = tracer.layers[0].output + 1
        edited(x)
        with edited.trace(x) as t, model.trace(x):
            model.output
            t.output
        return weakref.ref(module)

    once()
    gc.collect()
    gc.disable()
    try:
        alive = [once()() for _ in range(3)]
    finally:
        gc.enable()
    assert alive == [None] * 3


# Copies.


def halved(model):
    model.layers[1].output = model.layers[1].output * 0.5


def test_a_deep_copy_is_edited_and_stands_alone(switch, mlp, x):
    for edited in (doubled(mlp), mlp.edit(halved)):
        wanted = edited(x)
        copied = copy.deepcopy(edited)
        same(copied(x), wanted)
        with torch.no_grad():
            copied._module.embed.weight.zero_()
        same(edited(x), wanted)
        assert not torch.equal(copied(x), wanted)


def test_a_pickled_function_form_is_edited_and_a_block_is_refused(mlp, x):
    edited = mlp.edit(halved)
    same(pickle.loads(pickle.dumps(edited))(x), edited(x))
    with pytest.raises(ModelError, match="can't be pickled"):
        pickle.dumps(doubled(mlp))


def test_an_edit_written_before_the_weights_are_there():
    model = LanguageModel("nnsight/demo")
    with model.edit() as edited:
        edited.transformer.h[3].mlp.output *= 0
    inner = model.transformer.h[3].mlp.edit(lambda layer: setattr(layer, "output", layer.output * 0))
    with edited.trace("The Eiffel Tower is in the city of"):
        out = edited.transformer.h[3].mlp.output
    assert not out.any()
    assert model.dispatched
    assert edited._module is model._module
    assert inner._module is model._module.transformer.h[3].mlp
    with model.trace("The Eiffel Tower is in the city of"):
        assert model.transformer.h[3].mlp.output.any()


# Beside a debugger.


def test_tracing_goes_on_as_before(mlp, x):
    seen = []

    def tracing(frame, event, _):
        if frame.f_code.co_filename == __file__:
            seen.append((frame.f_code.co_name, frame.f_lineno, event))
        return tracing

    def traced():
        a = 1
        with mlp.edit() as edited:
            edited.layers[1].output = edited.layers[1].output * 2
        b = 2
        return edited, a + b

    old = sys.gettrace()
    sys.settrace(tracing)
    try:
        edited, _ = traced()
        assert sys.gettrace() is tracing
        edited(x)
    finally:
        sys.settrace(old)
    first = traced.__code__.co_firstlineno
    lines = [line - first for name, line, event in seen if name == "traced" and event == "line"]
    assert {1, 2, 4, 5} <= set(lines)


def test_what_is_printed_of_a_model_has_its_edits(mlp):
    tree = repr(mlp)

    def halve(layer):
        layer.output = layer.output / 2

    mlp.layers[1].edit(halve, inplace=True)
    with mlp.edit() as edited:
        edited.embed.output *= 2
    halved = f"edited at test_edits_left.py:{halve.__code__.co_firstlineno}: def halve(layer):"
    assert repr(mlp) == f"{tree}\n`layers.1` {halved}"
    assert repr(edited).startswith(f"{mlp!r}\nedited at test_edits_left.py:")
    assert repr(mlp.layers[1]).endswith(f")\n{halved}")
    assert "edited" not in repr(mlp.layers[0])
    mlp.clear_edits()
    assert repr(mlp) == tree
