"""A write to the input of a module that is skipped: nothing takes it, and that is said at its line, whoever skipped."""

import pytest
import snapshots
import torch
from torch import nn

import toys
from comparing import same
from nnsight import NNsight
from nnsight.errors import WriteError


def untaken(name, by="at "):
    return pytest.raises(WriteError, match=rf"(?s)to `{name}.input`.*: the \w+ is skipped in this call.*skipped +{by}")


def test_what_is_said_to_write_instead_can_be_pasted(mlp, x):
    told = r"instead +model\.layers\[1\]\.output = .*; or model\.layers\[1\]\.skip\("
    with pytest.raises(WriteError, match=told), mlp.trace(x):
        mlp.layers[1].skip(x)
        mlp.layers[1].input = x


def with_layer_1_giving(mlp, value, x):
    with mlp.trace(x):
        mlp.layers[1].output = value
        return mlp.output


def test_an_input_written_behind_the_skip_is_refused_at_its_line(switch, mlp, x):
    before = snapshots.of_model(mlp._module)
    with mlp.trace(x):
        mlp.layers[1].skip(x)
        with untaken(r"layers\.1", by=r"at test_untaken.py:\d+: mlp.layers\[1\].skip\(x\)"):
            mlp.layers[1].input = x + 1
        with untaken(r"layers\.1"):
            mlp.layers[1].inputs = (x + 1,), {}
        result = mlp.output  # and the block goes on
    same(result, with_layer_1_giving(mlp, x, x))
    assert not snapshots.differences(before, snapshots.of_model(mlp._module))


def test_what_is_written_before_the_skip_can_be_what_the_skip_is_made_of(mlp, x):
    with mlp.trace(x):
        mlp.layers[1].input = x * 2
        mlp.layers[1].skip(mlp.layers[1].input + 1)
        result = mlp.output
    same(result, with_layer_1_giving(mlp, x * 2 + 1, x))


def test_an_input_that_others_have_too_is_changed_in_place_behind_a_skip(mlp, x):
    """Not lost: in a residual layer the very tensor goes around what is skipped."""
    with mlp.trace(x):
        mlp.layers[1].norm.skip(torch.zeros_like(x))
        mlp.layers[1].norm.input[:] = 3
        layer = mlp.layers[1].output
    inner = mlp._module.layers[1]
    same(layer, torch.full_like(x, 3) + inner.down(inner.act(inner.up(torch.zeros_like(x)))))


def test_the_next_call_of_the_module_takes_its_input(x):
    model = NNsight(toys.RNN())
    with model.trace(x):
        model.cell.skip(x)
        with untaken("cell"):
            model.cell.inputs = (x, x), {}
        model.cell.next().inputs = (x * 3, x), {}
        second = model.cell.output
    same(second, model._module.cell(x * 3, x))


@pytest.mark.parametrize("of_the_layer", [True, False])
def test_a_block_is_told_of_an_edit_that_skipped(switch, mlp, x, of_the_layer):
    if of_the_layer:
        mlp.layers[1].edit(lambda layer: layer.skip(layer.input * 2), inplace=True)
    else:
        mlp.edit(lambda model: model.layers[1].skip(model.layers[1].input * 2), inplace=True)
    with mlp.trace(x):
        with untaken(r"layers\.1", by="by an edit"):
            mlp.layers[1].input = x + 1
        given = mlp.layers[1].input
        mlp.layers[1].skip(x)  # the block has the last word
        with untaken(r"layers\.1"):
            mlp.layers[1].input = x + 1
        result = mlp.output
    same(given, mlp._module.layers[0](mlp._module.embed(x)))
    mlp.clear_edits()
    same(result, with_layer_1_giving(mlp, x, x))


@pytest.mark.parametrize("owners", [("layer", "layer"), ("model", "layer"), ("model", "model")])
def test_an_edit_is_told_of_an_earlier_edit_that_skipped(mlp, x, owners):
    def skips(envoy):
        layer = envoy if owners[0] == "layer" else envoy.layers[1]
        layer.skip(layer.input * 2)

    def writes(envoy):
        layer = envoy if owners[1] == "layer" else envoy.layers[1]
        layer.input = x

    for owner, edit in zip(owners, (skips, writes), strict=True):
        (mlp.layers[1] if owner == "layer" else mlp).edit(edit, inplace=True)
    with untaken(r"layers\.1", by="by an edit"), mlp.trace(x):
        pass
    with untaken(r"layers\.1", by="by an edit"):
        mlp(x)
    mlp.clear_edits()
    same(mlp(x), mlp._module(x))


def test_an_edit_whose_block_skips_first_is_told_as_a_block_is(mlp, x):
    def edit(model):
        model.layers[1].skip(x)
        model.layers[1].input = x

    with untaken(r"layers\.1", by=r"at test_untaken.py:\d+: model.layers\[1\].skip\(x\)"), mlp.edit(edit).trace(x):
        pass


def test_rows_are_told_each_by_itself(mlp, x):
    with mlp.trace(x) as (a, b, c):
        a.layers[1].skip(x[:1])
        with untaken(r"layers\.1"):
            a.layers[1].input = x[:1]
        for row in (b, c):  # of these, what the skip gives is made of what was written
            row.layers[1].input = row.layers[1].input * 2
            row.layers[1].skip(row.layers[1].input)
        with untaken(r"layers\.1"):
            a.tracer.model.layers[1].input = x
        result = a.tracer.result
    into = mlp._module.layers[0](mlp._module.embed(x))
    same(result, with_layer_1_giving(mlp, torch.cat([x[:1], into[1:] * 2]), x))


def test_invokes_are_told_of_an_edit_each_by_itself(mlp, x):
    with mlp.edit() as edited:
        edited.layers[1].skip(edited.layers[1].input * 2)
    told = []
    with edited.trace() as tracer:
        for at in range(2):
            with tracer.invoke(x[at : at + 1]):
                own = x[at : at + 1]  # Python 3.12 can't leave out a body that begins with `try`
                try:
                    edited.layers[1].input = own
                except WriteError as error:
                    told.append(str(error).splitlines()[0])
    assert told == ["Nothing takes what is written to `layers.1.input`: the module is skipped in this call."] * 2


def test_an_invoke_is_told_of_its_own_skip_and_of_the_whole_batch_s(mlp, x):
    with mlp.trace() as tracer:
        with tracer.invoke(x[:1]):
            mlp.layers[1].skip(x[:1])
            with untaken(r"layers\.1"):
                mlp.layers[1].input = x[:1]
            one = mlp.output
        with tracer.invoke(x[1:]):
            mlp.layers[1].input = x[1:] * 2
            mlp.layers[1].skip(mlp.layers[1].input)
            two = mlp.output
        with tracer.invoke():
            whole = x  # nor one that begins with `with`
            with untaken(r"layers\.1"):
                mlp.layers[1].input = whole
    result = with_layer_1_giving(mlp, torch.cat([x[:1], x[1:] * 2]), x)
    same(one, result[:1])
    same(two, result[1:])


def test_each_step_of_a_generation_is_a_call_of_its_own(x):
    class Generates(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return torch.tanh(self.inner(x))

        def generate(self, x, n):
            for _ in range(n):
                x = self(x)
            return x

    model = NNsight(Generates())
    with model.trace(x, 2, fn="generate") as tracer:
        for step in tracer.iter[:]:
            if step == 0:
                model.inner.skip(x)
                with untaken("inner"):
                    model.inner.input = x
            else:
                model.inner.input = x * 2
        result = tracer.result
    same(result, torch.tanh(model._module.inner(x * 2)))


def test_an_edit_that_skips_the_whole_model_is_told_where_a_step_begins(x):
    class Generates(nn.Linear):
        def generate(self, x, n):
            for _ in range(n):
                x = self(x)
            return x

    model = NNsight(Generates(4, 4))
    model.edit(lambda edited: edited.skip(edited.input * 2), inplace=True)
    with model.trace(x, 2, fn="generate") as tracer:
        for _ in tracer.iter[:]:
            with untaken("model", by="by an edit"):
                model.input = x
        result = tracer.result
    same(result, x * 4)


def test_an_operation_in_a_forward_is_told_too(x):
    model = NNsight(toys.MLP())
    with model.trace(x):
        layer = model.layers[0]
        layer.source.self_norm_0.skip(x)
        with untaken(r"layers\.0\.source\.self_norm_0"):
            layer.source.self_norm_0.input = x
