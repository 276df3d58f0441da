"""The tree of Envoys: children, names, order, what is the module's own, and where a model lies."""

import pytest
import torch
from torch import nn

import nnsight
import toys
from nnsight import NNsight, errors


class TwoWays(nn.Module):
    """Has a method beside its forward."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        toys.seeded(self)

    def forward(self, x):
        return self.second(self.first(x))

    def twice(self, x, *, shift=0.0):
        return self(self(x)) + shift


class Alone(nn.Module):
    """Is called without inputs."""

    def __init__(self):
        super().__init__()
        self.table = self.Table()

    class Table(nn.Module):
        def forward(self):
            return torch.ones(2, 4)

    def forward(self, x):
        return x + self.table()


class Taken(nn.Module):
    """Has children with names of ours, as BERT has an `output`."""

    def __init__(self):
        super().__init__()
        self.output, self.source, self.plain = nn.Identity(), nn.Tanh(), nn.Linear(4, 4)

    def forward(self, x):
        return self.source(self.output(self.plain(x)))


def test_to_and_cpu_move_the_module_and_return_the_envoy(mlp, x):
    assert mlp.to(torch.float64) is mlp
    assert mlp.layers[0].up.weight.dtype == torch.float64
    assert mlp.cpu() is mlp
    assert mlp.layers[1].to(torch.float32) is mlp.layers[1]
    assert mlp.layers[1].up.weight.dtype == torch.float32
    mlp.to("meta")
    assert mlp.device == torch.device("meta")


def test_device_and_devices_are_those_of_the_parameters(mlp):
    assert mlp.device == torch.device("cpu")
    assert mlp.devices == {torch.device("cpu")}
    mlp.layers[1].to("meta")
    assert mlp.devices == {torch.device("cpu"), torch.device("meta")}
    assert mlp.layers[1].device == torch.device("meta")
    assert mlp.layers[0].act.device is None
    assert mlp.layers[0].act.devices == set()


def test_another_method_is_traced_by_its_name(x):
    model = NNsight(TwoWays())
    expected = model._module.twice(x, shift=1.0)
    with model.trace(x, fn="twice", shift=1.0) as tracer:
        once = model.output
        again = model.next().output
        result = tracer.result
    assert torch.equal(once, model._module(x))
    assert torch.equal(again, model._module(once))
    assert torch.equal(result, expected)
    assert torch.equal(model.trace(x, fn="twice", shift=1.0, trace=False), expected)
    with pytest.raises(AttributeError, match="twise"):
        model.trace(x, fn="twise")


def test_a_module_that_is_called_without_inputs_says_so(x):
    model = NNsight(Alone())
    with model.trace(x[:2]):
        assert model.table.inputs == ((), {})
        with pytest.raises(errors.BlockError, match="without any input"):
            model.table.input
        table = model.table.output
    assert torch.equal(table, torch.ones(2, 4))


def test_a_plain_attribute_is_the_envoy_s_own_and_a_module_the_module_s_too(mlp):
    mlp.layers[0].note = "mine"
    assert mlp.layers[0].note == "mine"
    assert not hasattr(mlp._module.layers[0], "note")
    mlp.layers[0].extra = nn.Identity()
    assert mlp._module.layers[0].extra is mlp.layers[0].extra._module
    mlp.layers[0].norm.eps = 1.0  # the module has it
    assert mlp._module.layers[0].norm.eps == 1.0
    del mlp.layers[0].note
    with pytest.raises(AttributeError):
        mlp.layers[0].note


def test_a_child_with_a_name_of_ours_is_had_by_index_and_as_e_name(x):
    model = NNsight(Taken())
    assert model.E_output._module is model._module.output
    assert model["output"] is model.E_output
    assert model.E_source.path == "model.source"
    assert {"E_output", "E_source"} <= set(dir(model))
    assert "E_plain" not in dir(model)
    with model.trace(x):
        inner, whole = model.E_output.output, model.output
    assert torch.equal(inner.tanh(), whole)
    with pytest.raises(AttributeError):
        model.E_outptu


def test_parent_and_root_lead_up_the_tree(mlp):
    up = mlp.layers[1].up
    assert up.parent is mlp.layers[1]
    assert up.parent.parent is mlp.layers
    assert up.parent.parent.parent is mlp
    assert up.root is mlp.root is mlp
    assert mlp.parent is None
    assert (up.path, mlp.path) == ("model.layers.1.up", "model")


def test_only_a_container_has_a_length_and_everything_is_true(mlp):
    assert len(mlp.layers) == 3
    assert len(NNsight(nn.Sequential(nn.Tanh()))) == 1
    for one in (mlp, mlp.layers[0]):
        with pytest.raises(TypeError, match="has no length"):
            len(one)
    assert bool(mlp)
    assert bool(NNsight(nn.ModuleList()))
    assert bool(NNsight(nn.Sequential()))


def test_modules_come_as_torch_s_do_and_are_chosen_by_a_function(mlp):
    names = [name for name, _ in mlp.named_modules()]
    assert names == ["model" + ("." + name if name else "") for name, _ in mlp._module.named_modules()]
    assert names[0] == "model"
    assert [one._module for one in mlp.modules()] == list(mlp._module.modules())
    linear = mlp.modules(include_fn=lambda one: isinstance(one._module, nn.Linear))
    assert [one.path for one in linear][:3] == ["model.embed", "model.layers.0.up", "model.layers.0.down"]
    assert mlp.modules(include_fn=lambda one: one.path.endswith("act"), names=True) == [
        (f"model.layers.{at}.act", mlp.layers[at].act) for at in range(3)
    ]
    assert mlp.layers[2].modules()[0] is mlp.layers[2]
    assert mlp.layers[2].named_modules(include_fn=lambda one: one.path.endswith("up")) == [
        ("model.layers.2.up", mlp.layers[2].up)
    ]


def test_a_session_takes_the_options_that_ask_for_nothing_and_refuses_others(mlp, x):
    with mlp.session(remote=False, backend=None):
        with mlp.trace(x):
            value = mlp.layers[0].output
    assert value.shape == (3, 4)
    for options in ({"remote": True}, {"backend": print}, {"no_such": 1}):
        with pytest.raises(nnsight.Error, match="takes no options"):
            mlp.session(**options)


def test_iterating_gives_the_children_and_a_slice_a_list(mlp):
    assert [one.path for one in mlp] == ["model.embed", "model.layers", "model.head"]
    assert [one.path for one in mlp.layers[1:]] == ["model.layers.1", "model.layers.2"]
    assert mlp.layers[-1] is mlp.layers[2]
    assert isinstance(mlp.layers[:2], list)


FORGOTTEN = {
    "written": lambda model: setattr(model.layers[1], "up", torch.ones(3, 4)),
    "written by its number": lambda model: model.layers.__setitem__(1, torch.ones(3, 4)),
    "written into": lambda model: model.layers[1].__setitem__((slice(None), -1), 0),
    "written into everywhere": lambda model: model.layers[1].__setitem__(slice(None), 0),
    "written into by a mask": lambda model: model.layers[1].__setitem__(torch.ones(3, 4) > 0, 0),
    "given another module for a value": lambda model: setattr(model.layers[1], "up", model.layers[1].down),
    "a value's attribute": lambda model: model.layers[1].shape,
    "a value's method": lambda model: model.layers[1].argmax(-1),
    "cut as a value": lambda model: model.layers[1][:, -1],
    "computed with": lambda model: torch.zeros_like(model.layers[1]),
    "computed with by name": lambda model: torch.add(torch.ones(3, 4), other=model.layers[1]),
    "added to a value": lambda model: torch.ones(3, 4) + model.layers[1],
    "scaled": lambda model: model.layers[1] * 2,
    "subtracted from a number": lambda model: 1 - model.layers[1],
    "made negative": lambda model: -model.layers[1],
    "one of several": lambda model: torch.cat([torch.ones(3, 4), model.layers[1]]),
    "given to a function of torch's in Python": lambda model: torch.norm(model.layers[1]),
}


@pytest.mark.parametrize("how", FORGOTTEN)
def test_a_module_that_is_taken_for_its_value_is_told_apart(mlp, x, how):
    with pytest.raises(nnsight.Error, match=r"instead +model\.layers\[1\](\.up)?\.output") as caught, mlp.trace(x):
        FORGOTTEN[how](mlp)
    assert isinstance(caught.value, errors.WriteError | errors.BlockError | errors.UnknownNameError)
    assert "you wrote   " in str(caught.value)
    assert "lambda model" in str(caught.value) or "FORGOTTEN[how]" in str(caught.value)


def test_a_child_is_exchanged_by_its_number_and_by_its_name(mlp, x):
    before = mlp(x)
    mlp.layers[1] = nn.Identity()
    assert type(mlp._module.layers[1]) is nn.Identity
    with mlp.trace(x) as tracer:
        inner, result = mlp.layers[1].output, tracer.result
    assert torch.equal(result, mlp._module(x))
    assert not torch.equal(result, before)
    mlp.layers["1"] = nn.ReLU()
    assert type(mlp._module.layers[1]) is nn.ReLU
    mlp["layers.1"] = nn.Tanh()
    assert type(mlp._module.layers[1]) is nn.Tanh
    assert inner.shape == (3, 4)
    with pytest.raises(errors.UnknownIndexError, match="no child at index 7"):
        mlp.layers[7] = nn.ReLU()


def test_what_can_be_chained_in_torch_is_chained_with_the_envoy(x):
    model = NNsight(TwoWays())
    assert model.eval() is model
    assert model.train(False).requires_grad_(False).double().float() is model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.first.half() is model.first
    assert model.first.weight.dtype == torch.float16
    assert model.float().apply(lambda module: None) is model
    assert model.register_forward_hook(lambda *_: None) is not model
    lazy = nnsight.LanguageModel("nnsight/demo")
    assert lazy.eval() is lazy
    assert lazy.dispatched
    assert lazy.transformer.h[0].half() is lazy.transformer.h[0]
    assert lazy.transformer.h[0].mlp.c_fc.weight.dtype == torch.float16


@pytest.mark.parametrize("name", ["eval", "float", "cpu"])
def test_what_is_chained_on_a_trace_s_model_is_of_that_trace(mlp, x, name):
    with mlp.trace(x) as outer, mlp.trace(x + 1):
        same = getattr(outer.model, name)().layers[0].output
    assert torch.equal(same, mlp._module.layers[0](mlp._module.embed(x)))


def test_the_modules_of_a_trace_s_model_are_of_that_trace(mlp, x):
    with mlp.trace(x) as outer, mlp.trace(x + 1):
        found = outer.model.modules(lambda envoy: envoy.path.endswith("layers.0"))
        (same,) = (scope.output for scope in found)
    assert torch.equal(same, mlp._module.layers[0](mlp._module.embed(x)))


class NeedsMore(nn.Module):
    """Is called by its model with more than the stream, as a Llama's layer is."""

    def forward(self, hidden, turn=None):
        up, down = turn
        return hidden * up + down


class Turning(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = NeedsMore()

    def forward(self, x):
        return self.layer(x, turn=(2.0, 1.0))


def test_a_module_called_without_what_its_model_gives_it_is_told_where_that_is():
    model, x = NNsight(Turning()), torch.ones(2)
    with model.trace(x):
        with pytest.raises(TypeError, match="NoneType") as raised:
            model.layer(x)
        assert raised.value.__notes__[0].startswith("`layer` was called here with 1 of the 2 inputs that its forward")
        args, options = model.layer.inputs
        model.layer.output = model.layer(model.layer.output, *args[1:], **options)
        twice = model.output
        with pytest.raises(TypeError) as raised:
            model.layer(x, turn=(None, None))
        assert not getattr(raised.value, "__notes__", [])
    assert torch.equal(twice, torch.full((2,), 7.0))
