"""Law 1: after a block, however it ended, the module tree is as it was, and so is the process."""

import asyncio
import contextlib
import copy
import pickle
import sys
import threading

import pytest
import snapshots
import torch

import nnsight
import toys


@contextlib.contextmanager
def unchanged(*modules):
    """Fails if the body leaves a module tree or the process other than it found them."""
    models, process = [snapshots.of_model(module) for module in modules], snapshots.of_process()
    yield
    for module, before in zip(modules, models, strict=True):
        assert snapshots.differences(before, snapshots.of_model(module)) == []
    assert snapshots.differences(process, snapshots.of_process()) == []


@pytest.fixture(autouse=True)
def _warm(mlp, x, switch):
    """One trace first: `.save()` is mounted then, and modules that load lazily are loaded."""
    with mlp.trace(x):
        mlp.head.output.save()
    with contextlib.suppress(nnsight.Error), mlp.trace(x):
        mlp.head.output
        mlp.embed.output


def reads(model, x):
    with model.trace(x):
        model.layers[0].output
        model.layers[1].act.input
        model.head.output


def writes(model, x):
    with model.trace(x):
        model.layers[0].input = x
        model.layers[1].up.output = x
        model.layers[1].down.output[:] = 0
        model.layers[2].inputs = ((x,), {})


def skips(model, x):
    with model.trace(x):
        model.layers[0].skip(x)
        model.layers[1].skip(model.layers[1].input * 2)


def calls(model, x):
    with model.trace(x):
        model.head(model.layers[0].output)


def results(model, x):
    with model.trace(x) as tracer:
        tracer.result
        tracer.result = x


def does_nothing(model, x):
    with model.trace(x):
        pass


def stops(model, x):
    with model.trace(x) as tracer:
        model.layers[1].output
        tracer.stop()


def stops_first(model, x):
    with model.trace(x) as tracer:
        tracer.stop()


def stops_at_an_input(model, x):
    with model.trace(x) as tracer:
        model.layers[1].down.input
        tracer.stop()


def returns(model, x):
    def inner():
        with model.trace(x):
            return model.layers[1].output
        raise AssertionError

    assert inner().shape == x.shape


def breaks(model, x):
    for _ in range(2):
        with model.trace(x):
            model.layers[1].output
            break


def continues(model, x):
    for _ in range(2):
        with model.trace(x):
            model.layers[1].skip(x)
            continue


def raises(model, x):
    with pytest.raises(KeyError), model.trace(x):
        model.layers[1].output
        raise KeyError("mine")


def raises_before_anything_ran(model, x):
    with pytest.raises(KeyError), model.trace(x):
        raise KeyError("mine")


def raises_at_a_skip(model, x):
    with pytest.raises(KeyError), model.trace(x):
        model.layers[1].skip(x)
        raise KeyError("mine")


def interrupted(model, x):
    with pytest.raises(KeyboardInterrupt), model.trace(x):
        model.layers[1].output
        raise KeyboardInterrupt


def exits(model, x):
    with pytest.raises(SystemExit), model.trace(x):
        model.layers[1].output
        sys.exit(3)


def asks_for_what_is_past(model, x):
    with pytest.raises(nnsight.errors.AlreadyPastError), model.trace(x):
        model.layers[1].output
        model.layers[0].output


def asks_for_what_never_was(model, x):
    with pytest.raises(nnsight.errors.UnknownNameError), model.trace(x):
        model.layers[1].output
        model.nope


def writes_a_wrong_shape(model, x):
    with pytest.raises(RuntimeError), model.trace(x):
        model.layers[1].output = torch.zeros(3, 9)
        model.head.output


def writes_a_wrong_shape_last(model, x):
    with pytest.raises(RuntimeError), model.trace(x):
        model.layers[1].output = torch.zeros(3, 9)


def interrupted_in_the_model(model, x):
    def hook(*_):
        raise KeyboardInterrupt

    handle = model._module.layers[1].act.register_forward_hook(hook)
    model._module.layers[1].act._forward_hooks.move_to_end(handle.id)
    with pytest.raises(KeyboardInterrupt), model.trace(x):
        model.layers[0].output
        model.head.output
    handle.remove()


def a_generator_is_exhausted(model, x):
    def layers():
        with model.trace(x):
            for layer in model.layers:
                yield layer.output

    assert len(list(layers())) == 3


def a_generator_is_closed(model, x):
    def layers():
        with model.trace(x):
            for layer in model.layers:
                yield layer.output

    generator = layers()
    next(generator)
    generator.close()


def a_generator_is_dropped(model, x):
    def layers():
        with model.trace(x):
            for layer in model.layers:
                yield layer.output

    next(layers())


def a_generator_is_thrown_into(model, x):
    def layers():
        with model.trace(x):
            yield model.layers[0].output

    generator = layers()
    next(generator)
    with pytest.raises(ZeroDivisionError):
        generator.throw(ZeroDivisionError())


def a_tracer_is_dropped_without_leaving(model, x):
    def enter():
        tracer = model.trace(x)
        tracer.__enter__()
        model.layers[1].skip(x)
        tracer.model.layers[1].output

    enter()


def a_tracer_is_never_entered(model, x):
    with contextlib.suppress(nnsight.Error):
        tracer = model.trace(x, trace=True)
        del tracer


def lockstep(model, x):
    with model.trace(x) as a, model.trace(x + 1) as b:
        for one, other in zip(a.model.layers, b.model.layers, strict=True):
            other.output = one.output
    with model.trace(x) as a:
        a.model.layers[0].output
        with model.trace(x + 1) as b:
            b.model.layers[2].skip(x)
            a.model.layers[2].skip(b.model.layers[2].output)


def out_of_order(model, x):
    def layers(x):
        with model.trace(x) as tracer:
            for layer in tracer.model.layers:
                layer.skip(x)
                yield layer.output

    one, other = layers(x), layers(x + 1)
    next(one)
    next(other)
    one.close()
    assert len(list(other)) == 2


def a_thread(model, x):
    thread = threading.Thread(target=reads, args=(model, x))
    thread.start()
    thread.join()


def tasks(model, x):
    async def one():
        with model.trace(x) as tracer:
            for layer in tracer.model.layers:
                layer.output
                await asyncio.sleep(0)

    async def both():
        await asyncio.gather(one(), one())

    asyncio.run(both())


def a_sub_module_alone(model, x):
    with model.layers[1].trace(x):
        model.layers[1].act.output = x


def a_plain_call(model, x):
    model.trace(x, trace=False)


WAYS = [
    reads, writes, skips, calls, results, does_nothing, stops, stops_first, stops_at_an_input, returns, breaks,
    continues, raises, raises_before_anything_ran, raises_at_a_skip, interrupted, exits, asks_for_what_is_past,
    asks_for_what_never_was, writes_a_wrong_shape, writes_a_wrong_shape_last, interrupted_in_the_model,
    a_generator_is_exhausted, a_generator_is_closed, a_generator_is_dropped, a_generator_is_thrown_into,
    a_tracer_is_dropped_without_leaving, a_tracer_is_never_entered, lockstep, out_of_order, a_thread, tasks,
    a_sub_module_alone, a_plain_call,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_nothing_is_changed_after_a_block(mlp, x, way):
    expected = mlp._module(x)
    with unchanged(mlp._module):
        way(mlp, x)
    assert torch.equal(mlp._module(x), expected)


@pytest.mark.parametrize(
    "way", [reads, writes, skips, raises, stops, a_generator_is_dropped], ids=lambda way: way.__name__
)
def test_a_models_own_hooks_and_forward_are_as_they_were(mlp, x, way):
    """What accelerate and users put on a module: a forward on the instance, hooks, and their order."""
    module = mlp._module
    layer = module.layers[1]
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 2
    layer.register_forward_pre_hook(lambda *_: None)
    layer.register_forward_hook(lambda *_: None, always_call=True)
    layer.register_forward_hook(lambda *_: None, with_kwargs=True, prepend=True)
    layer.register_full_backward_hook(lambda *_: None)
    expected = module(x)
    with unchanged(module):
        way(mlp, x)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("name", toys.everything())
def test_nothing_is_changed_by_reading_every_module_of_every_shape_of_tree(name, x):
    model = nnsight.NNsight(toys.everything()[name])
    with unchanged(model._module):
        for path, _ in model._module.named_modules():
            with contextlib.suppress(nnsight.errors.BlockError), model.trace(x):
                (model[path] if path else model).output


def test_a_model_that_fails_is_as_it_was(x):
    model = nnsight.NNsight(toys.Fails(error=ValueError("the model's own")))
    with unchanged(model._module):
        for _ in range(2):
            with pytest.raises(ValueError, match="the model's own"), model.trace(x):
                model.first.output
                model.second.output


def test_a_model_that_swallows_the_unwinding_is_as_it_was(x):
    model = nnsight.NNsight(toys.Catches(kind=BaseException))
    with unchanged(model._module), model.trace(x) as tracer:
        model.child.output
        tracer.stop()


def test_the_parameters_are_the_very_ones(mlp, x):
    before = {name: (parameter, parameter.clone()) for name, parameter in mlp._module.named_parameters()}
    for way in WAYS:
        way(mlp, x)
    for name, parameter in mlp._module.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_wrapping_a_model_does_not_touch_it(x):
    module = toys.MLP()
    module(x)
    with unchanged(module):
        model = nnsight.NNsight(module)
        repr(model)
        dir(model)
        list(model.named_modules())
        model.layers[0].act
        assert torch.equal(model(x), module(x))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("port", ["input", "output"])
def test_a_module_copied_while_a_run_waits_for_it_is_a_plain_copy(x, how, port):
    """The forward copies the module that the block waits for, as another thread might."""
    copies = []

    def question(x):
        copies.append(how(module.after))
        return x

    module = toys.Ask(question)
    plain = module.after(x)
    copies.clear()
    model = nnsight.NNsight(module)
    with model.trace(x):
        getattr(model.after, port)
    (copied,) = copies
    assert torch.equal(copied(x), plain)
    assert copied.forward == type(copied).forward.__get__(copied)
    hooked = nnsight.NNsight(copied)
    with hooked.trace(x):
        assert torch.equal(hooked.output, plain)


def test_what_was_attached_stays_and_nothing_else(mlp, x):
    added = torch.nn.Linear(4, 4)
    mlp.sae = added
    with unchanged(mlp._module), mlp.trace(x):
        mlp.layers[0].output = mlp.sae(mlp.layers[0].output)
    assert mlp._module.sae is added


def test_the_random_numbers_are_those_of_a_plain_forward(x):
    module = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    model = nnsight.NNsight(module)
    torch.manual_seed(3)
    expected, state = module(x), torch.get_rng_state()
    torch.manual_seed(3)
    with model.trace(x):
        model[1].output
        out = model.output
    assert torch.equal(out, expected)
    assert torch.equal(torch.get_rng_state(), state)
    with contextlib.suppress(nnsight.Error), model.trace(x):
        model[1].output
        model[0].output
    torch.manual_seed(3)
    with contextlib.suppress(nnsight.Error), model.trace(x):
        model[1].output
        model[0].output
    assert torch.equal(torch.get_rng_state(), state)
