"""Law 2: writing back what was read changes nothing, bit for bit."""

import copy

import programs
import pytest
import torch

import nnsight
import toys

SHAPES = sorted(toys.everything())


def called(module, x):
    """The paths of the modules that a forward pass calls from within the tree, in the order of their ends."""
    order, handles = [], []
    for path, child in module.named_modules():
        handles.append(child.register_forward_hook(lambda *_, path=path: order.append(path)))
    module(x)
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(order))


def both(name, x):
    """The wrapped model of a name, its paths, and what it gives and what gradients it has when nobody looks."""
    module = toys.everything()[name]
    out = copy.deepcopy(module)
    result = out(x)
    result.square().sum().backward()
    return (
        nnsight.NNsight(module),
        called(copy.deepcopy(module), x),
        result,
        {k: p.grad for k, p in out.named_parameters()},
    )


def at(model, path):
    return model[path] if path else model


def same(model, out, result, grads):
    assert torch.equal(out, result)
    out.square().sum().backward()
    for name, parameter in model._module.named_parameters():
        assert programs.equal(parameter.grad, grads[name]), name


@pytest.mark.parametrize("name", SHAPES)
def test_writing_back_an_output_changes_nothing(name, x, switch):
    model, paths, result, grads = both(name, x)
    for path in paths:
        model._module.zero_grad()
        with model.trace(x) as tracer:
            at(model, path).output = at(model, path).output
            out = tracer.result
        same(model, out, result, grads)


@pytest.mark.parametrize("name", SHAPES)
def test_writing_back_an_input_changes_nothing(name, x, switch):
    model, paths, result, grads = both(name, x)
    for path in paths:
        model._module.zero_grad()
        with model.trace(x) as tracer:
            at(model, path).input = at(model, path).input
            out = tracer.result
        same(model, out, result, grads)


@pytest.mark.parametrize("name", SHAPES)
def test_writing_back_the_inputs_changes_nothing(name, x):
    model, paths, result, grads = both(name, x)
    for path in paths:
        model._module.zero_grad()
        with model.trace(x) as tracer:
            at(model, path).inputs = at(model, path).inputs
            out = tracer.result
        same(model, out, result, grads)


@pytest.mark.parametrize("name", SHAPES)
def test_writing_back_in_place_changes_nothing(name, x):
    model, paths, result, _ = both(name, x)
    for path in paths:
        with torch.no_grad(), model.trace(x) as tracer:
            for value in programs.tensors(at(model, path).output):
                value[:] = value.clone()
            out = tracer.result
        assert torch.equal(out, result)


def test_writing_everything_back_at_once_changes_nothing(mlp, x, switch):
    plain = mlp._module(x)
    with mlp.trace(x) as tracer:
        mlp.inputs = mlp.inputs
        for layer in mlp.layers:
            layer.input = layer.input
            for part in (layer.norm, layer.up, layer.act, layer.down):
                part.inputs = part.inputs
                part.output = part.output
            layer.output = layer.output
        mlp.head.output = mlp.head.output
        mlp.output = mlp.output
        tracer.result = tracer.result
        out = tracer.result
    assert torch.equal(out, plain)


def test_skipping_with_what_the_module_would_have_given_changes_nothing(mlp, x, switch):
    plain = mlp._module(x)
    with mlp.trace(x) as tracer:
        for layer in mlp.layers:
            layer.skip(layer(layer.input))
        out = tracer.result
    assert torch.equal(out, plain)


def test_a_tuple_and_a_dict_come_back_as_the_objects_they_are(x):
    model = nnsight.NNsight(toys.Structured())
    plain = model._module(x)
    with model.trace(x) as tracer:
        value = model.tuple.output
        model.tuple.output = value
        assert model.tuple.output is value
        assert type(value) is tuple
        value = model.dict.output
        model.dict.output = value
        assert model.dict.output is value
        assert list(value) == ["hidden", "extra"]
        out = tracer.result
    assert torch.equal(out, plain)


def test_a_tuple_put_together_anew_changes_nothing(x):
    model = nnsight.NNsight(toys.Structured())
    plain = model._module(x)
    with model.trace(x) as tracer:
        hidden, (twice, number) = model.tuple.output
        model.tuple.output = (hidden, (twice, number))
        model.dict.output = {**model.dict.output}
        args, kwargs = model.dict.inputs
        out = tracer.result
    assert torch.equal(out, plain)
    assert (args, list(kwargs)) == ((), ["x", "scale"])


def test_a_dtype_a_view_and_a_scalar_come_back_bit_for_bit():
    class Gives(torch.nn.Module):
        def __init__(self, give):
            super().__init__()
            self.give = give

        def forward(self, x):
            return self.give(x)

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            gives = [lambda x: x.t()[1:], lambda x: x.sum(), lambda x: x.half(), lambda x: 3.5, lambda x: None]
            gives += [lambda x: x / 0 * 0]
            self.parts = torch.nn.ModuleList(map(Gives, gives))

        def forward(self, x):
            return [part(x) for part in self.parts]

    model, x = nnsight.NNsight(Odd()), torch.randn(2, 3)
    plain = model._module(x)
    with model.trace(x) as tracer:
        for part in model.parts:
            part.output = part.output
        out = tracer.result
    assert programs.equal(out, plain)
    assert [getattr(value, "dtype", None) for value in out] == [getattr(value, "dtype", None) for value in plain]


def test_a_list_that_holds_itself_is_written_back():
    class Knot(torch.nn.Module):
        def forward(self, x):
            found = [x]
            found.append(found)
            return found

    with nnsight.NNsight(torch.nn.Linear(2, 2)).scan(torch.ones(2)):
        pass  # from now on, what is written is looked through for a scan's tensors
    model = nnsight.NNsight(torch.nn.Sequential(Knot()))
    with model.trace(torch.ones(2)) as tracer:
        model[0].output = model[0].output
    assert tracer.result[1] is tracer.result
