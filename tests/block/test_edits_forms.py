"""The forms in which an edit is written, and the names in it."""

import pytest
import torch
from torch import nn

import nnsight
import toys
from comparing import same
from edited import can_leave_out_all, doubled
from nnsight import NNsight
from nnsight.errors import (
    NeverCalledError,
)

# The forms in which it is written.


def test_a_skip_is_of_calls_and_not_of_a_forward_that_is_called_by_itself(switch):
    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(self.inner.forward(self.inner(x)))

    model = NNsight(Thrice())
    inner, x = model._module.inner, torch.randn(3, 4)
    model.inner.edit(lambda inner: inner.skip(inner.input * 2), inplace=True)
    same(model(x), inner(x * 2) * 2)
    with model.trace(x) as tracer:
        same(tracer.result, inner(x * 2) * 2)


def test_an_edit_of_a_module_skips_that_module(switch, mlp, x):
    module, n_calls = mlp._module, []
    handle = module.layers[1].up.register_forward_hook(lambda *_: n_calls.append(1))
    mlp.layers[1].edit(lambda layer: layer.skip(layer.input * 2), inplace=True)
    wanted = module.head(module.layers[2](module.layers[0](module.embed(x)) * 2))
    n_calls.clear()
    with mlp.trace(x) as outer:
        mlp.input
        with mlp.trace(x) as nested:
            same(nested.result, wanted)
        with mlp.trace(x) as nested:
            same(nested.result, wanted)
        same(outer.result, wanted)
    with mlp.layers[1].trace(x) as tracer:
        same(tracer.result, x * 2)
    with mlp.trace() as tracer:
        with tracer.invoke(x[:1]):
            first = mlp.output
        with tracer.invoke(x[1:]):
            rest = mlp.output
    torch.testing.assert_close(torch.cat([first, rest]), wanted)
    with mlp.trace(x):
        mlp.layers[1].skip(x)
        same(mlp.layers[1].output, x)
    assert n_calls == []
    handle.remove()
    with pytest.raises(NeverCalledError, match=r"`layers.1` above it was skipped"), mlp.trace(x):
        mlp.layers[1].up.output
    mlp.clear_edits()
    some = mlp.edit(lambda model: model.skip(model.input * 0) if model.input[0, 0] > 0 else None)
    same(some(x.abs()), x * 0)
    same(some(-x.abs()), module(-x.abs()))
    again = mlp.layers[0].edit(lambda layer: layer.skip(layer.input * 5)).edit(lambda layer: layer.skip(x))
    same(again(x), x)
    assert not any("forward" in vars(one) or one._forward_pre_hooks for one in module.modules())


@can_leave_out_all
def test_on_one_line_with_a_try_first_and_with_more_items_than_one(switch, mlp, x):
    wanted = doubled(mlp)(x)
    with mlp.edit() as short: short.layers[1].output *= 2  # fmt: skip  # noqa: E701

    with mlp.edit() as tried:
        try:
            tried.layers[1].output *= 2
        finally:
            pass

    with mlp.edit() as under, torch.no_grad():
        under.layers[1].output *= 2
        assert not torch.is_grad_enabled()

    for edited in (short, tried, under):
        same(edited(x), wanted)


def test_the_three_forms_are_one(switch, mlp, x):
    wanted = doubled(mlp)(x)

    @mlp.edit
    def decorated(model):
        model.layers[1].output = model.layers[1].output * 2

    with mlp.edit() as (tracer, unpacked):
        unpacked.layers[1].output = unpacked.layers[1].output * 2

    with mlp.edit() as by_its_first_name:
        mlp.layers[1].output *= 2

    forms = [
        decorated,
        unpacked,
        by_its_first_name,
        mlp.edit(lambda m: setattr(m.layers[1], "output", m.layers[1].output * 2)),
    ]
    for edited in forms:
        assert type(edited) is NNsight
        assert edited is not mlp
        same(edited(x), wanted)
    assert tracer.model is unpacked


def test_a_model_with_two_children_still_iterates_over_them(x):
    pair = NNsight(toys.seeded(toys.Pair()))
    with pair.edit() as edited:
        edited.first.output = edited.first.output * 2
    with pair.edit() as (_, unpacked):
        unpacked.first.output = unpacked.first.output * 2
    assert [child.path for child in edited] == ["model.first", "model.second"]
    same(edited(x), unpacked(x))


def test_names_are_those_at_the_time_of_writing_and_stay_in_the_block(mlp, x):
    factor, n = 2, 0
    with mlp.edit() as edited:
        n += 1
        inside = edited.layers[1].output * factor
        edited.layers[1].output = inside
    factor = 100
    wanted = doubled(mlp)(x)
    same(edited(x), wanted)
    same(edited(x), wanted)
    assert n == 0
    assert "inside" not in locals()
    assert factor == 100


def test_a_list_outside_takes_what_an_edit_finds(mlp, x):
    found = []
    with mlp.edit() as edited:
        found.append(nnsight.save(edited.layers[0].output).save())
    edited(x)
    with edited.trace(x):
        pass
    assert len(found) == 2
    same(found[0], found[1])


def test_in_a_method_and_in_a_closure(mlp, x):
    class Steerer:
        __strength = 2

        def __init__(self, model):
            self.model = model

        def steer(self):
            with self.model.edit() as edited:
                edited.layers[1].output = edited.layers[1].output * self.__strength
            return edited

    def outer(strength):
        def inner():
            with mlp.edit() as edited:
                edited.layers[1].output = edited.layers[1].output * strength
            return edited

        return inner()

    wanted = doubled(mlp)(x)
    same(Steerer(mlp).steer()(x), wanted)
    same(outer(2)(x), wanted)
