"""Edits: what can't be written says so when it is written, and what can be is at work."""

import linecache
import subprocess
import sys

import pytest
import torch
from torch import nn

import toys
from comparing import same
from nnsight import NNsight
from nnsight.errors import BlockError, OutsideTraceError, StillRunningError


def in_a_cell(code, **names):
    """Runs code as a notebook cell: at module level, with its source in `linecache`."""
    name = f"<cell {len(linecache.cache)}>"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    exec(compile(code, name, "exec"), names)
    return names


@pytest.mark.parametrize("body", ["pass", "...", "'to come'"])
def test_an_edit_without_a_body_is_another_view_of_the_model(mlp, x, body):
    names = in_a_cell(f"with model.edit() as edited:\n    {body}", model=mlp)
    assert names["edited"] is not mlp
    with names["edited"].trace(x) as tracer:
        assert torch.equal(tracer.result, mlp._module(x))


# Names.


def test_in_a_cell_the_names_of_an_edit_are_those_of_its_writing(mlp, x):
    cell = """
edited = model
for i in range(3):
    with edited.edit() as edited:
        edited.layers[i].output[:] = found.index(i)
i = 100
"""
    names = in_a_cell(cell, model=mlp, found=[0, 1, 2])
    with names["edited"].trace(x):
        outputs = [layer.output for layer in names["edited"].layers]
    for index, output in enumerate(outputs):
        assert (output == index).all()


def test_in_a_cell_an_edit_may_bind_a_global_and_use_what_is_defined_later(mlp, x):
    cell = """
with model.edit() as edited:
    global count
    count += 1
    edited.layers[0].output = later(edited.layers[0].output)
def later(value):
    return value * 0
edited(x)
edited(x)
"""
    assert in_a_cell(cell, model=mlp, x=x, count=0)["count"] == 2


class Base:
    def factor(self):
        return 2


class Derived(Base):
    def factor(self):
        return 0

    def edited(self, model):
        with model.edit() as edited:
            edited.layers[0].output = edited.layers[0].output * super().factor()
        return edited

    def invoked(self, model, x):
        with model.trace() as tracer:
            with tracer.invoke(x):
                got = model.layers[0].output * super().factor()
        return got


def test_super_without_arguments_is_that_of_the_method_around(mlp, x):
    with Derived().edited(mlp).trace(x) as tracer:
        got = tracer.layers[0].output
    with mlp.trace(x):
        plain = mlp.layers[0].output
    same(got, plain * 2)
    same(Derived().invoked(mlp, x), plain * 2)


def test_save_is_there_when_an_edit_is_written():
    program = """
import torch
from nnsight import NNsight
model, found = NNsight(torch.nn.Linear(2, 2)), []
edited = model.edit(lambda model: found.append(model.output.save()))
edited(torch.ones(1, 2))
assert len(found) == 1
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


# What would do nothing.


def test_an_edit_in_an_edit_is_refused_when_it_is_written(mlp, x):
    with pytest.raises(BlockError, match=r"can't be made in another|can't leave it out"):  # on Python 3.12
        with mlp.edit() as one, mlp.edit() as other:
            other.layers[0].output = one.layers[0].output * 0
    with pytest.raises(BlockError, match="can't be made in another"):
        with mlp.edit() as one:
            with one.edit() as other:
                other.layers[0].output = other.layers[0].output * 0


def test_an_edit_that_a_function_makes_in_an_edit_is_refused_when_it_runs(mlp, x):
    for make in (lambda model: model.edit(lambda model: None), lambda model: model.layers[0].edit()):
        with pytest.raises(BlockError, match="can't be made in another"):
            mlp.edit(make)(x)


def test_an_edit_that_nothing_names_is_refused(mlp, x):
    with pytest.raises(BlockError, match="has no name here") as raised:
        with mlp.edit():
            mlp.layers[0].output[:] = 0
    assert "inplace=True" in str(raised.value)
    with mlp.edit(inplace=True):
        mlp.layers[0].output[:] = 0
    with mlp.trace(x):
        assert not mlp.layers[0].output.any()


@pytest.mark.parametrize("key", ["a", 1.5, slice(None, None, -1), [0, 0], True, slice("a", None), None])
def test_what_is_no_step_is_refused_as_in_a_trace(mlp, x, key):
    edited = mlp.edit(lambda tracer, model: list(tracer.iter[key]))
    with pytest.raises(BlockError) as of_edit:
        edited(x)
    with pytest.raises(BlockError) as of_trace, mlp.trace(x) as tracer:
        tracer.iter[key]
    assert str(of_edit.value).splitlines()[0] == str(of_trace.value).splitlines()[0]


@pytest.mark.parametrize("key", [0, slice(None), slice(0, 1), slice(None, None, 2), [0, 4], range(3), (0,)])
def test_the_first_step_is_among_these(mlp, x, key):
    found = []
    mlp.edit(lambda tracer, model: found.extend(tracer.iter[key]))(x)
    assert found == [0]


@pytest.mark.parametrize("key", [1, slice(1, None), slice(5, 9), [4], []])
def test_the_first_step_is_not_among_these(mlp, x, key):
    found = []
    mlp.edit(lambda tracer, model: found.extend(tracer.iter[key]))(x)
    assert found == []


@pytest.mark.parametrize("what", ["model", "layer", True])
def test_what_is_no_function_is_refused_as_an_edit(mlp, what):
    given = {"model": mlp, "layer": mlp.layers[0]}.get(what, what)
    with pytest.raises(BlockError, match="takes a function") as raised:
        mlp.edit(given)
    assert ("inplace=True" if what is True else "layer.edit(") in str(raised.value)


def test_asking_the_view_while_the_original_is_traced_says_so(mlp, x):
    edited = mlp.edit(lambda model: None)
    with mlp.trace(x):
        with pytest.raises(OutsideTraceError, match="while the original is traced"):
            edited.layers[0].output
        mlp.layers[0].output
    with pytest.raises(OutsideTraceError, match="no trace of this model is open"):
        edited.layers[0].output


# Operations of the edited module itself.


@pytest.mark.parametrize("own_forward", [False, True])
def test_an_edit_asks_for_operations_of_the_edited_module_itself(switch, x, own_forward):
    model = NNsight(toys.seeded(toys.Layer()))
    if own_forward:
        forward = model._module.forward
        model._module.forward = forward
    before = dict(vars(model._module))
    with model.edit() as edited:
        edited.source.self_up_0.output = torch.zeros_like(edited.source.self_up_0.output)
    wanted = model._module(x * 0) * 0 + x + model._module.down(model._module.act(torch.zeros_like(x)))
    same(edited(x), wanted)
    with edited.trace(x):
        got = edited.output
    same(got, wanted)
    assert dict(vars(model._module)) == before
    assert not torch.equal(model(x), wanted)


def test_an_edit_in_place_of_a_layer_asks_for_its_operations(switch, mlp, x):
    with mlp.layers[1].edit(inplace=True) as layer:
        layer.source.self_up_0.output = layer.source.self_up_0.output * 0
    with mlp.trace(x):
        act = mlp.layers[1].act.input
    assert not act.any()
    assert "forward" not in vars(mlp._module.layers[1])


def test_operations_that_are_asked_for_too_late_in_an_edit_say_so(switch, x):
    model = NNsight(toys.seeded(toys.Layer()))
    with model.edit() as edited:
        edited.norm.output
        edited.source.self_up_0.output
    with pytest.raises(StillRunningError, match="can't be had in this call"):
        edited(x)


class EncoderDecoder(nn.Module):
    """Its `generate` calls the encoder by itself, before the steps."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(toys.WIDTH, toys.WIDTH), nn.Linear(toys.WIDTH, toys.WIDTH)

    def forward(self, x, encoded=None):
        return self.decoder(self.encoder(x) if encoded is None else encoded) + x

    def generate(self, x, n=2):
        encoded = self.encoder(x)
        for _ in range(n):
            x = self(x, encoded)
        return x


def test_an_edit_of_what_generate_calls_by_itself_names_the_module_to_edit(x):
    model = NNsight(EncoderDecoder())

    def silence(model):
        model.encoder.output = model.encoder.output * 0

    with pytest.warns(UserWarning, match=r"edit that module: model\.encoder\.edit\(\.\.\., inplace=True\)"):
        model.edit(silence).trace(x, fn="generate").run()

    @model.encoder.edit(inplace=True)
    def silenced(encoder):
        encoder.output = encoder.output * 0

    with model.trace(x, fn="generate") as tracer:
        got = tracer.result
    model.clear_edits()
    model.encoder.weight.data.zero_()
    model.encoder.bias.data.zero_()
    same(got, model._module.generate(x))


# Texts.


def test_an_edit_that_bound_no_tracer_is_told_how(mlp, x):
    with mlp.edit() as edited:
        for _ in tracer.iter[1:]:  # noqa: F821
            edited.layers[0].output[:] = 0
    with pytest.raises(NameError) as raised:
        edited.trace(x, trace=False)
    assert any("`as (tracer, edited)`" in note for note in raised.value.__notes__)

    @mlp.edit
    def other(model):
        model.layers[0].output[:] = tracer.step  # noqa: F821

    with pytest.raises(NameError) as raised:
        other.trace(x, trace=False)
    assert any("def edited(tracer, model)" in note for note in raised.value.__notes__)
    with mlp.edit() as edited:
        edited.layers[0].output[:] = missing  # noqa: F821
    with pytest.raises(NameError) as raised:
        edited.trace(x, trace=False)
    assert len(raised.value.__notes__) == 1


@pytest.mark.parametrize("name", ["invoke", "barrier", "stop", "cache", "rows"])
def test_what_only_a_trace_has_is_told_where_it_is(mlp, x, name):
    with mlp.edit() as (tracer, edited):
        getattr(tracer, name)
    with pytest.raises(BlockError, match=f"(?s)no `{name}`.*instead +with edited.trace"):
        edited.trace(x, trace=False)


def test_an_edit_can_not_trace_the_model_that_it_edits(mlp, x, switch):
    found = []
    with mlp.edit() as edited:
        with edited.trace(x):
            edited.layers[0].output
    with pytest.raises(BlockError, match="An edit can't trace the model that it edits") as raised:
        edited.trace(x, trace=False)
    assert len(raised.value.__notes__) == 1
    others = [mlp]  # by its name, a model is the edited one in an edit
    with mlp.edit() as edited:
        with others[0].trace(x) as tracer:
            found.append(tracer.layers[0].output)
        with edited.head.trace(x):
            found.append(edited.head.output)
    edited.trace(x, trace=False)
    assert len(found) == 2
