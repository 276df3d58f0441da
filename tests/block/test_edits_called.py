"""Modules that an edit calls with `hook=True`: a sparse autoencoder spliced into a model, its values there for all."""

from functools import partial

import pytest
import snapshots
import torch

import toys
from comparing import same
from nnsight import LanguageModel, NNsight
from nnsight.errors import NeverCalledError, OutOfOrderError

PROMPT = "The Eiffel Tower is in the city of"


def test_a_trace_reads_and_writes_what_is_inside_what_an_edit_calls(switch, spliced, x):
    sae = spliced.layers[0].sae
    with spliced.trace(x):
        read = sae.encoder.output, sae.output, spliced.output
    same(read, toys.spliced_by_hand(spliced, x))
    with spliced.trace(x):
        sae.encoder.output[:, 2] = 9
        written = sae.encoder.output, sae.output, spliced.output
    same(written, toys.spliced_by_hand(spliced, x, lambda features: features.index_fill(1, torch.tensor(2), 9)))
    with spliced.trace(x):
        sae.encoder.skip(torch.ones(3, 6))
        skipped = sae.encoder.output, sae.output, spliced.output
    same(skipped, toys.spliced_by_hand(spliced, x, torch.ones_like))
    with spliced.trace(x):
        operation = sae.source.torch_relu_0.output
    same(operation, torch.relu(read[0]))
    same(spliced(x), toys.spliced_by_hand(spliced, x)[2])


def test_behind_what_is_inside_it_comes_the_place_where_the_edit_stood(switch, mlp, x):
    layer = mlp.layers[1]
    mlp.sae = toys.SAE()
    with mlp.edit(inplace=True):
        layer.input = mlp.sae(layer.input, hook=True)
        layer.output = mlp.sae(layer.output, hook=True)
    with mlp.edit(inplace=True):
        layer.output = layer.output * 2  # behind the first edit, and in front of the block
    before = snapshots.of_model(mlp._module)
    with mlp.trace(x) as tracer:
        cache = tracer.cache(modules=[layer])
        first = mlp.sae.output
        layer.input = layer.input + 1
        second = mlp.sae.output
        layer.output = layer.output + 3
        out = mlp.output
    assert not snapshots.differences(before, snapshots.of_model(mlp._module))
    module = mlp._module
    sae, given = module.sae, module.layers[0](module.embed(x))
    same(first, sae(given))
    same(second, sae(module.layers[1](first + 1)))
    same(cache[layer.path].output, second * 2 + 3)
    same(out, module.head(module.layers[2](second * 2 + 3)))


def test_the_next_call_of_the_place_is_the_next(switch, x):
    shared = NNsight(toys.Shared())
    shared.sae = toys.SAE()
    for more in (2, 3):
        shared.edit(partial(add, more), inplace=True)
    with shared.trace(x):
        inner = shared.sae.encoder.output
        value = shared.first.output
        later = shared.first.next().output
    module = shared._module
    plain = module.first(x)
    same(inner, module.sae.encoder(plain))
    same(value, plain + 2 + 3)
    same(later, module.first(module.between(value)))


def add(more, model):
    model.sae(model.first.output, hook=True)
    model.first.output = model.first.output + more


def test_another_edit_a_cache_and_an_edit_of_the_module_itself_hear_it_too(switch, spliced, x):
    heard = []
    spliced.layers[0].sae.edit(lambda sae: setattr(sae.encoder, "output", sae.encoder.output * 2), inplace=True)
    spliced.edit(lambda model: heard.append(model.layers[0].sae.encoder.output), inplace=True)
    with spliced.trace(x) as tracer:
        cache = tracer.cache()
    encoded, decoded, output = toys.spliced_by_hand(spliced, x, lambda features: features * 2)
    same(heard, [encoded])
    same(cache[spliced.layers[0].sae.encoder.path].output, encoded)
    same(cache[spliced.layers[0].sae.path].output, decoded)
    same(cache["model"].output, output)


def test_at_each_token_of_a_generation_and_in_its_own_trace_of_several(switch):
    model = LanguageModel("nnsight/demo", dispatch=True)
    layer = model.transformer.h[2]
    layer.sae = toys.SAE(128)
    with model.edit(inplace=True):
        layer.sae(layer.mlp.output, hook=True)
    with model.generate(PROMPT, max_new_tokens=3, min_new_tokens=3) as tracer:
        read = [(layer.sae.encoder.output.shape[1], layer.sae.output.shape[1]) for _ in tracer.iter[:]]
    assert read == [(12, 12), (1, 1), (1, 1)]
    with model.trace(PROMPT) as a, model.trace("Rome is") as b:
        shapes = [one.transformer.h[2].sae.output.shape[1] for one in (a, b)]
        later = a.transformer.h[5].mlp.output
    assert shapes == [12, 3]
    assert later.shape[1] == 12


def test_modes_around_the_call_are_its_own_and_gradients_flow_through_it(switch, mlp, x):
    mlp.sae = toys.SAE()

    def edit(model):
        with torch.no_grad():
            model.sae(model.layers[0].output, hook=True)
        model.layers[1].output = model.sae(model.layers[1].output, hook=True)

    before = snapshots.of_modes()
    with mlp.edit(edit).trace(x):
        without = mlp.sae.encoder.output
        with_grad = mlp.sae.next().encoder.output
        with mlp.output.sum().backward():
            grad = with_grad.grad
    assert snapshots.of_modes() == before
    assert (without.requires_grad, with_grad.requires_grad) == (False, True)
    module, sae = mlp._module, mlp._module.sae
    encoded = sae.encoder(module.layers[1](module.layers[0](module.embed(x))))
    wanted = torch.autograd.grad(module.head(module.layers[2](sae.decoder(torch.relu(encoded)))).sum(), encoded)[0]
    same(grad, wanted)


@pytest.mark.parametrize("end", ["stop", "error", "wrong shape", "drop"])
def test_a_run_that_ends_in_there_unwinds_the_edit_and_leaves_nothing(switch, spliced, x, end):
    ended = []

    def edit(model):
        try:
            model.layers[0].sae(model.layers[0].output, hook=True)
        finally:
            ended.append(1)

    edited = NNsight(spliced._module).edit(edit)
    before = snapshots.of_model(spliced._module)

    def run():
        with edited.trace(x) as tracer:
            encoded = edited.layers[0].sae.encoder.output
            if end == "stop":
                tracer.stop()
            if end == "error":
                raise KeyError("the block's")
            if end == "wrong shape":
                edited.layers[0].sae.encoder.output = torch.zeros(3, 9)
            yield encoded

    if end == "wrong shape":
        with pytest.raises(RuntimeError, match="mat1 and mat2") as raised:
            list(run())
        notes = "\n".join(raised.value.__notes__)
        assert "In an edit: " in notes
        assert "sae.encoder.output = torch.zeros(3, 9)" in notes
    elif end == "error":
        with pytest.raises(KeyError):
            next(run())
    elif end == "stop":
        list(run())
    else:
        held = run()
        next(held)
        del held
    assert ended == [1]
    assert not snapshots.differences(before, snapshots.of_model(spliced._module))


def test_an_error_of_the_module_is_caught_in_the_edit(switch, spliced, x):
    caught = []

    def edit(model):
        try:
            model.layers[0].sae(torch.zeros(3, 9), hook=True)
        except RuntimeError as error:
            caught.append(str(error))
        model.layers[0].output = model.layers[0].output * 0

    edited = NNsight(spliced._module).edit(edit)
    with edited.trace(x):
        zero = edited.layers[0].output
    assert len(caught) == 1
    assert not zero.any()


def test_what_comes_too_late_says_that_an_edit_calls_it(switch, spliced, x):
    with pytest.raises(OutOfOrderError, match=r"sae.encoder.output` is past, or .*: an edit is what does"):
        with spliced.trace(x):
            spliced.layers[1].output
            spliced.layers[0].sae.encoder.output
    spliced.clear_edits()
    with pytest.raises(NeverCalledError, match=r"sae.encoder.output"), spliced.trace(x):
        spliced.layers[0].sae.encoder.output


def test_it_is_scanned(spliced, x):
    with spliced.scan(x) as tracer:
        shape = spliced.layers[0].sae.encoder.output.shape
        row = tracer.rows[1].layers[0].sae.output.shape
    assert shape == (3, 6)
    assert row == (1, 4)


@pytest.mark.parametrize("path", ["", "layers.1"])
def test_what_an_edit_calls_first_of_all_leaves_its_modules_input_to_be_had(switch, mlp, x, path):
    mlp.sae = toys.SAE()
    module, here = mlp._module, mlp.get(path) if path else mlp

    def edit(one):
        one.input = mlp.sae(one.input, hook=True)

    here.edit(edit, inplace=True)
    given = x if path == "" else module.layers[0](module.embed(x))
    coded, rebuilt = module.sae.encoder(given), module.sae(given)
    with mlp.trace(x) as tracer:
        cache = tracer.cache(here, include_inputs=True)
        same((mlp.sae.encoder.output, here.input), (coded, rebuilt))
        here.input = here.input * 2
        out = here.output
    same(out, here._module(rebuilt * 2))
    same(cache[here.path].input, rebuilt * 2)
    with mlp.trace(x):
        mlp.sae.encoder.output
        here.skip(x)
        same(here.output, x)
    with mlp.trace() as tracer:
        with tracer.invoke(x):
            first = mlp.sae.encoder.output, here.input
        with tracer.invoke():
            second = mlp.sae.encoder.output, here.input
    same(first, (coded, rebuilt))
    same(second, (coded, rebuilt))
    assert not any(vars(one).get("forward") or one._forward_pre_hooks for one in module.modules())


def test_invokes_come_in_written_order_behind_it_wherever_they_stood_before(switch, spliced, x):
    """One that waits within what the edit calls goes on from there, at the very place where others wait already."""
    with spliced.trace() as tracer:
        with tracer.invoke():
            spliced.layers[0].output = torch.zeros(3, 4)
        with tracer.invoke(x[:1]):
            spliced.embed.output
            spliced.layers[0].sae.output
            first = spliced.layers[0].output
        with tracer.invoke(x[1:]):
            second = spliced.layers[0].output
    same((first, second), (torch.zeros(1, 4), torch.zeros(2, 4)))
