"""What goes wrong in an edit, and what it waits for in vain: told at its line, and once."""

import traceback
import warnings

import pytest
import snapshots
import torch
from torch import nn

import toys
from comparing import same
from edited import can_leave_out_all, hooked
from nnsight import NNsight
from nnsight.errors import (
    AlreadyPastError,
    BlockError,
    NeverCalledError,
)

# What goes wrong.


def test_an_error_in_an_edit_is_raised_at_the_trace_s_line(switch, mlp, x):
    with mlp.edit() as edited:
        edited.layers[1].output = edited.layers[1].output @ torch.zeros(9, 9)
    before = snapshots.of_model(mlp._module)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as raised, edited.trace(x):
        edited.layers[2].output
    assert any("edited.layers[1].output @ torch.zeros(9, 9)" in note for note in raised.value.__notes__)
    lines = [frame.line for frame in traceback.extract_tb(raised.value.__traceback__) if frame.filename == __file__]
    assert lines[-2].startswith("edited.layers[2].output")
    assert "torch.zeros(9, 9)" in lines[-1]
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        edited(x)
    assert not snapshots.differences(before, snapshots.of_model(mlp._module))
    same(mlp(x), mlp._module(x))


def test_a_write_of_the_wrong_shape_names_the_edit_s_line(switch, mlp, x):
    with mlp.edit() as edited:
        edited.layers[1].output = torch.zeros(3, 7)
    for run in (lambda: edited(x), lambda: edited.trace(x, trace=False)):
        with pytest.raises(RuntimeError) as raised:
            run()
        (note,) = [note for note in raised.value.__notes__ if "an edit changed" in note]
        assert "edited.layers[1].output = torch.zeros(3, 7)" in note
        assert "[3, 4] float32" in note


def test_a_module_that_never_runs_is_named_once_and_breaks_nothing(switch, x):
    wide = NNsight(toys.Wide(5))
    after = []
    with wide.edit() as edited:
        edited.layers[0].output = edited.layers[0].output * 2
        edited.layers[4].output = edited.layers[4].output * 2
        after.append(1)
    wanted = hooked(wide._module, wide._module.layers[0], lambda out: out * 2, x)
    with pytest.warns(
        UserWarning, match=r"`layers\.4\.output` has no value: this forward pass never called it"
    ) as told:
        with edited.trace(x):
            out = edited.output
    same(out, wanted)
    assert told[0].filename == __file__
    assert not after
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(edited(x), wanted)


def test_an_edit_of_a_module_that_is_never_called_says_so(x):
    wide = NNsight(toys.Wide(5))
    wide.layers[4].edit(lambda layer: None, inplace=True)
    with pytest.warns(UserWarning, match=r"`layers\.4` was never called"):
        wide(x)
    wide(x)


@pytest.mark.parametrize("path", ["layers.0", ""])
def test_an_edit_waits_in_vain_for_what_a_block_skips(switch, mlp, x, path):
    mlp.edit(lambda edited: edited.layers[0].act.output, inplace=True)
    mlp.layers[0].edit(lambda layer: layer.up.output, inplace=True)
    skipped = mlp.get(path) if path else mlp
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with mlp.trace(x) as tracer:
                skipped.skip(x)
                out = tracer.result
    same(out, x if not path else mlp._module.head(mlp._module.layers[2](mlp._module.layers[1](x))))
    start = "An edit was left waiting, and what follows there in it did nothing. "
    inner = "`layers.0.up.output` has no value: `layers.0` above it was skipped, so it never ran."
    assert {str(warning.message) for warning in caught} == {
        f"{start}`layers.0.act.output` has no value: `{path or 'model'}` above it was skipped, so it never ran.",
        start + (inner if path else "`layers.0` was never called."),
    }
    assert len(caught) == 2  # said once each
    assert not mlp._module._forward_pre_hooks


def test_a_block_waits_in_vain_for_what_an_edit_skips(switch, mlp, x):
    mlp.edit(lambda edited: edited.layers[0].skip(edited.layers[0].input), inplace=True)
    with mlp.trace(x), pytest.raises(NeverCalledError, match=r"`layers.0` above it was skipped, so it never ran"):
        mlp.layers[0].act.output


def test_an_edit_waits_in_vain_for_what_another_edit_skips(switch, mlp, x):
    mlp.edit(lambda edited: edited.layers[0].act.output, inplace=True)
    mlp.edit(lambda edited: edited.layers[0].skip(edited.layers[0].input), inplace=True)
    with pytest.warns(UserWarning, match="left waiting.*`layers.0` above it was skipped"):
        mlp(x)


def with_operation_skipped(mlp, x):
    with mlp.trace(x) as tracer:
        mlp.layers[0].source.self_act_0.skip(x)
        return tracer.result


def test_an_edit_waits_in_vain_for_what_a_skipped_operation_calls(switch, mlp, x):
    mlp.layers[0].edit(lambda layer: layer.act.output, inplace=True)
    mlp.layers[0].edit(lambda layer: layer.source.self_norm_0.output, inplace=True)
    with pytest.warns(UserWarning, match="past, or was left out with") as told:
        out = with_operation_skipped(mlp, x)
    said = "`layers.0.act.output` is past, or was left out with `layers.0.source.self_act_0`, which was skipped."
    assert said in str(told[0].message)
    assert len(told) == 1
    layers = mlp._module.layers
    same(out, mlp._module.head(layers[2](layers[1](mlp._module.embed(x) + layers[0].down(x)))))


def test_a_sibling_s_skip_is_named(switch, mlp, x):
    with pytest.raises(NeverCalledError, match=r"`layers\.0` above it was skipped"), mlp.trace() as tracer:
        with tracer.invoke(x):
            mlp.layers[0].skip(x)
        with tracer.invoke():
            mlp.layers[0].act.output


def test_an_edit_of_a_later_call_waits_in_vain_where_an_earlier_one_was_skipped(switch, x):
    model = NNsight(toys.RNN(steps=2))
    seen = []

    def twice(edited):
        seen.append(edited.cell.act.output)
        edited.cell.output
        seen.append(edited.cell.act.output)

    model.edit(twice, inplace=True)
    model(x)
    assert len(seen) == 2
    text = r"left waiting.*`cell\.act\.output` has no such call: `cell` above it was skipped once"
    with pytest.warns(UserWarning, match=text), model.trace(x):
        model.cell.skip(x)
    assert len(seen) == 3


def test_an_edit_that_comes_too_late_since_a_block_skips_is_told(switch, x):
    """The first call of a shared module was skipped with what is around it: the second one serves the edit."""
    shared = nn.Tanh()
    model, seen = NNsight(toys.Pair(nn.Sequential(shared), shared)), []

    def both(edited):
        seen.append(edited.first[0].output)
        edited.first.output = edited.first.output * 2
        seen.append(edited.first.output)

    model.edit(both, inplace=True)
    model(x)
    assert len(seen) == 2
    with pytest.warns(UserWarning, match=r"left waiting.*`first\.output`.*Before that, `first` was skipped"):
        with model.trace(x):
            model.first.skip(x)
    assert len(seen) == 3


def test_what_an_edit_asks_too_late_stays_an_error_where_a_block_skips_it(switch, mlp, x):
    mlp.edit(lambda edited: [edited.layers[1].output, edited.layers[0].act.output], inplace=True)
    with pytest.raises(AlreadyPastError, match=r"`layers\.0\.act\.output` is past"), mlp.trace(x):
        mlp.layers[0].skip(x)


def test_an_edit_that_asks_in_the_wrong_order_is_an_error_at_its_line(switch, mlp, x):
    with mlp.edit() as edited:
        late = edited.layers[2].output
        edited.layers[0].output = late
    with pytest.raises(AlreadyPastError, match=r"edited\.layers\[0\]\.output = late"):
        edited(x)
    with pytest.raises(AlreadyPastError) as raised, edited.trace(x):
        edited.output
    assert "edited.layers[0].output = late" in raised.value.__notes__[0]
    same(mlp(x), mlp._module(x))


@can_leave_out_all
def test_an_edit_catches_what_it_waits_for_in_vain(switch, x):
    wide, caught = NNsight(toys.Wide(5)), []
    with wide.edit() as edited:
        try:
            edited.layers[4].output
        except NeverCalledError as error:
            caught.append(error)
    same(edited(x), wide(x))
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (lambda model: model.edit("a"), "takes a function, not a str"),
        (lambda model: model.edit(nn.Linear(2, 2)), "takes a function, not a Linear"),
        (lambda model: model.edit(lambda: None), "called with the model alone"),
        (lambda model: model.edit(lambda a, b, c: None), "called with the model alone"),
        (lambda model: model.edit(lambda: (yield)), "generator or a coroutine"),
    ],
)
def test_what_is_no_edit_is_refused(mlp, mistake, text):
    with pytest.raises(BlockError, match=text):
        mistake(mlp)
    assert mlp._tree.edits == ()


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (lambda tracer: tracer.result, "has no result"),
        (lambda tracer: tracer.stop(), "has no `stop`"),
        (lambda tracer: tracer.invoke("a"), "has no `invoke`"),
        (lambda tracer: tracer.cache(), "has no `cache`"),
        (lambda tracer: list(tracer.iter[-1]), "counted from the end"),
    ],
)
def test_what_an_edit_has_not_is_refused_at_its_line(switch, mlp, x, asked, text):
    edited = mlp.edit(lambda tracer, model: asked(tracer))
    with pytest.raises(BlockError, match=text):
        edited(x)
    same(mlp(x), mlp._module(x))


def test_a_body_that_belongs_to_what_is_around_it_is_refused(mlp):
    count = 0
    for _ in range(2):
        with pytest.raises(BlockError, match="`break` in it"):
            with mlp.edit():
                break

    def bind():
        nonlocal count
        with mlp.edit(inplace=True):
            count += 1

    with pytest.raises(BlockError, match="can't bind `count`"):
        bind()
    assert count == 0
    assert mlp._tree.edits == ()


def test_without_source_the_function_form_is_named(mlp):
    code = "with mlp.edit() as edited:\n    edited.output = 0\n"
    with pytest.raises(BlockError, match="source can't be had") as raised:
        exec(code, {"mlp": mlp})
    assert "@model.edit" in str(raised.value)


class Catches(nn.Module):
    """A model that goes on where what it calls fails, as one does that has a slower way."""

    def __init__(self):
        super().__init__()
        self.fast, self.slow = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        try:
            return self.fast(x)
        except ZeroDivisionError:
            return self.slow(x)

    def generate(self, x, steps):
        for _ in range(steps):
            x = self(x)
        return x


def fails_before(edited):
    raise ZeroDivisionError if edited.fast.input.shape else None


def fails_behind(edited):
    raise ZeroDivisionError if edited.fast.output.shape else None


@pytest.mark.parametrize("edit", [fails_before, fails_behind])
def test_an_error_of_an_edit_that_the_model_catches_is_raised_behind_it(switch, x, edit):
    model = NNsight(Catches())
    edited = model.edit(edit)
    with pytest.raises(ZeroDivisionError) as raised:
        edited(x)
    assert "The model caught this error of an edit" in raised.value.__notes__[-1]
    with pytest.raises(ZeroDivisionError), edited.trace(x):
        pass
    with pytest.raises(ZeroDivisionError):
        edited.trace(x, 3, fn="generate", trace=False)
    same(model(x), model._module.fast(x))
