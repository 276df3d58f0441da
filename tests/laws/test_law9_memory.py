"""Law 9: memory is flat over a thousand runs, and over a hundred dropped ones, with the garbage collector off."""

import contextlib
import gc
import os
import threading
import weakref

import pytest
import torch

import nnsight
import toys
from nnsight import errors
from nnsight.core.owner import this_thread

BIG = 512  # a [256, BIG] float32 activation is half a megabyte


@pytest.fixture(autouse=True)
def _no_collector():
    """Everything here has to be freed by reference counting alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def resident():
    """The process's resident memory, in megabytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


linux = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")


def count_live(kind=torch.Tensor):
    return sum(issubclass(type(found), kind) for found in gc.get_objects())


class Makes(torch.nn.Module):
    """Makes a tensor, and keeps a weak reference to it."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def forward(self, x):
        x = x + 1
        self.made.append(weakref.ref(x))
        return x


class Marks(torch.nn.Module):
    """Knows which of the tensors that its children made are alive."""

    def __init__(self):
        super().__init__()
        self.made = []
        self.first, self.second, self.third = (Makes(self.made) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        x = self.second(x)
        x = self.third(x)
        return x + 1


@pytest.fixture
def marks():
    return nnsight.NNsight(Marks())


def alive(model):
    return sum(made() is not None for made in model._module.made)


# What a single run leaves behind


def reads(model, x):
    with model.trace(x):
        model.first.output
        model.second.output


def writes(model, x):
    with model.trace(x):
        model.first.output = x
        model.second.input = x


def skips(model, x):
    with model.trace(x):
        model.first.skip(x)


def stops(model, x):
    with model.trace(x) as tracer:
        model.first.output
        tracer.stop()


def results(model, x):
    with model.trace(x) as tracer:
        tracer.result


def raises(model, x):
    with contextlib.suppress(KeyError), model.trace(x):
        value = model.first.output
        raise KeyError(value.shape)


def is_past(model, x):
    with contextlib.suppress(errors.AlreadyPastError), model.trace(x):
        model.second.output
        model.first.output


def fails_in_the_model(model, x):
    with contextlib.suppress(RuntimeError), model.trace(x):
        model.first.output = torch.zeros(7, 7)
        model.second.output


def is_dropped(model, x):
    def layers():
        with model.trace(x):
            yield model.first.output
            yield model.second.output

    next(layers())


def is_dropped_by_hand(model, x):
    tracer = model.trace(x, trace=True)
    tracer.__enter__()
    tracer.model.first.output
    del tracer


def is_entered_and_never_started(model, x):
    tracer = model.trace(x, trace=True)
    tracer.__enter__()
    del tracer


def is_never_entered(model, x):
    model.trace(x, trace=True)


def is_nested(model, x):
    with model.trace(x) as a, model.trace(x + 1) as b:
        b.model.first.output = a.model.first.output


WAYS = [
    reads,
    writes,
    skips,
    stops,
    results,
    raises,
    is_past,
    fails_in_the_model,
    is_dropped,
    is_dropped_by_hand,
    is_entered_and_never_started,
    is_never_entered,
    is_nested,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_no_value_of_a_run_outlives_it(marks, way, switch):
    way(marks, torch.zeros(4, 4))  # what loads lazily holds the frames of its first time
    x = torch.zeros(4, 4)
    mine = weakref.ref(x)
    for _ in range(3):
        way(marks, x)
    assert alive(marks) == 0
    del x
    assert mine() is None


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_dropped_model_is_freed_by_reference_counting(way, switch):
    model = nnsight.NNsight(Marks())
    module = weakref.ref(model._module)
    child = weakref.ref(model._module.first)
    wrapper = weakref.ref(model)
    way(model, torch.zeros(4, 4))
    del model
    assert wrapper() is None
    assert module() is None
    assert child() is None


def test_a_model_that_was_never_traced_is_freed_by_reference_counting():
    model = nnsight.NNsight(toys.MLP())
    module = weakref.ref(model._module)
    model.layers[0].act
    model.layers[-1], model.layers[1:], model["layers.0.act"], list(model.layers), repr(model)
    del model
    assert module() is None


def test_a_model_is_freed_once_the_exception_of_its_trace_is_gone(switch):
    model = nnsight.NNsight(toys.Fails(error=None))
    model._module.error = ValueError("the model's own")
    module = weakref.ref(model._module)
    caught = None
    try:
        with model.trace(torch.zeros(3, 4)):
            model.second.output
    except ValueError as error:
        caught = error
    assert caught is not None
    del model
    caught.__traceback__ = None
    del caught
    assert module() is None


def test_a_model_is_freed_after_an_error_of_ours_that_was_caught(switch):
    model = nnsight.NNsight(toys.MLP())
    module = weakref.ref(model._module)
    with contextlib.suppress(errors.AlreadyPastError), model.trace(torch.zeros(3, 4)):
        model.layers[1].output
        model.layers[0].output
    del model
    assert module() is None


def test_envoys_that_are_kept_keep_no_run(marks):
    x = torch.zeros(4, 4)
    first, second = marks.first, marks.second
    with marks.trace(x) as tracer:
        first.output
        second.output
    assert alive(marks) == 0
    repr(tracer)
    assert alive(marks) == 0


def test_a_paused_run_holds_the_value_at_its_port_and_no_other(marks, switch):
    x = torch.zeros(4, 4)
    mine = weakref.ref(x)
    with marks.trace(x):
        del x
        marks.first.output
        assert alive(marks) == 1
        marks.third.output
        assert [made() is not None for made in marks._module.made] == [
            False,
            True,
            True,
        ]  # the third's input is the model's
    assert mine() is None
    assert alive(marks) == 0


def read(layer):
    layer.output


def read_input(layer):
    layer.input


def write(layer):
    layer.output = layer.output * 1


def write_input(layer):
    layer.input = layer.input * 1


@pytest.mark.parametrize("touch", [read, read_input, write, write_input], ids=lambda touch: touch.__name__)
@pytest.mark.parametrize("invoked", [False, True])
def test_a_model_that_goes_on_is_kept_no_value_of_where_the_block_had_it_pause(switch, touch, invoked):
    layers = torch.nn.Sequential(*(Makes([]) for _ in range(6)))
    made, alive_at = [], []

    def note(*_):
        made.extend(layer.made.pop() for layer in layers if layer.made)
        alive_at.append([one() is not None for one in made])

    for layer in layers:
        layer.register_forward_hook(note)
    x = torch.zeros(4, 4)
    layers(x)
    plain = alive_at[-1]
    made.clear()
    model = nnsight.NNsight(layers)
    if invoked:
        with model.trace() as tracer, tracer.invoke(x):
            touch(model[1])
    else:
        with model.trace(x):
            touch(model[1])
    assert plain == alive_at[-1] == [False] * 4 + [True] * 2


def test_a_finished_tracer_holds_its_result_at_most(marks, switch):
    x = torch.zeros(4, 4)
    mine = weakref.ref(x)
    with marks.trace(x) as tracer:
        del x
        marks.first.output
    repr(tracer)
    assert alive(marks) == 0
    assert mine() is None


def test_a_run_that_has_started_holds_no_input(switch):
    """Seen where the model's own call lets go of it: a method that is called with a list, which it empties."""

    class Empties(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.child = torch.nn.Identity()

        def forward(self, xs):
            return self.child(xs.pop().sum())

    model, x = nnsight.NNsight(Empties()), torch.zeros(4, 4)
    mine = weakref.ref(x)
    with model.trace([x]):
        del x
        model.child.output
        assert mine() is None


# A thousand, and a hundred


@linux
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_memory_is_flat(way, switch):
    """A thousand runs that each make a megabyte; the ways that build a twin, and threads, run fewer."""
    model = nnsight.NNsight(Marks())
    many = 1000 if switch == "greenlet" else 200
    many = 60 if way is is_past else many
    x = torch.zeros(256, BIG)

    def run(times):
        for _ in range(times):
            way(model, x)
        model._module.made.clear()

    run(20)
    before, tensors = resident(), count_live()
    threads = threading.active_count()
    run(many)
    assert count_live() <= tensors + 1
    assert resident() - before < 12
    assert threading.active_count() <= threads + 1


@linux
@pytest.mark.slow
def test_python_objects_are_flat(mlp, x, switch):
    """No kind of object is more numerous after 300 further runs than after the first."""

    def run(times):
        for _ in range(times):
            with mlp.trace(x):
                mlp.layers[0].input = mlp.layers[0].input
                mlp.layers[1].skip(x)
                mlp.head.output.save()
            with contextlib.suppress(KeyError), mlp.trace(x):
                mlp.layers[0].output
                raise KeyError

    run(30)
    gc.collect()
    before = len(gc.get_objects())
    run(300)
    assert len(gc.get_objects()) - before < 60


@linux
@pytest.mark.slow
def test_a_hundred_runs_dropped_without_leaving_their_block(switch):
    """Dropped one after the other, and all at once; each holds four megabytes on its paused stack."""

    class Holds(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.child, self.made = torch.nn.Identity(), []

        def forward(self, x):
            big = torch.ones(1024, 1024)
            self.made.append(weakref.ref(big))
            x = self.child(x)
            return x * big.sum()

    model = nnsight.NNsight(Holds())

    def half_way():
        with model.trace(torch.ones(1)):
            yield model.child.output
            raise AssertionError

    before = resident()
    for _ in range(100):
        next(half_way())
    assert all(made() is None for made in model._module.made)
    paused = [half_way() for _ in range(20)]
    for generator in paused:
        next(generator)
    assert sum(made() is not None for made in model._module.made) == 20
    del generator
    paused.clear()
    assert all(made() is None for made in model._module.made)
    assert resident() - before < 100
    assert not model._module._forward_hooks
    assert not model._module._forward_pre_hooks
    assert not model._module.child._forward_hooks


def test_runs_dropped_in_another_thread_end_when_their_own_passes_again(marks, switch):
    x = torch.zeros(4, 4)

    def half_way():
        with marks.trace(x) as tracer:
            yield tracer.model.first.output

    generators = [half_way() for _ in range(5)]
    for generator in generators:
        next(generator)
    del generator
    assert alive(marks) == 5

    def drop():
        generators.clear()

    thread = threading.Thread(target=drop)
    thread.start()
    thread.join()
    with marks.trace(x):
        pass
    assert alive(marks) == 0
    assert not marks._module._forward_hooks
    assert not marks._module._forward_pre_hooks


def test_a_thread_that_ends_kills_its_paused_runs(switch):
    kept, module = [], toys.Finally()
    model = nnsight.NNsight(module)

    def work():
        tracer = model.trace(torch.ones(3, 4), trace=True)
        tracer.__enter__()
        tracer.model.first.output
        kept.append(tracer)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    deadline = threading.Event()
    for _ in range(50):
        if module.log == ["entered", "left"]:
            break
        deadline.wait(0.02)
    assert module.log == ["entered", "left"]
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
    kept.clear()


def test_a_thread_that_ends_with_dropped_runs_leaves_nothing(marks, switch):
    def work():
        for _ in range(5):
            tracer = marks.trace(torch.zeros(4, 4), trace=True)
            tracer.__enter__()
            tracer.model.first.output

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alive(marks) == 0
    assert not marks._module._forward_hooks
    assert not marks._module._forward_pre_hooks


def test_a_run_that_is_dropped_after_its_thread_has_looked_leaves_nothing_on_the_model():
    """Another thread may drop a run at the very moment in which its own one has ended the last that it knew of."""
    model, left = nnsight.NNsight(toys.MLP()), []

    def opens_and_ends():
        generator = paused(model, torch.ones(3, 4))
        next(generator)
        left.append(generator)
        this_thread().runs.clear()

    thread = threading.Thread(target=opens_and_ends)
    thread.start()
    thread.join()
    assert any(module._forward_pre_hooks for module in model._module.modules())
    del left[:]
    gc.collect()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model._module.modules())


def paused(model, x):
    with model.trace(x):
        yield model.layers[1].output


def test_no_thread_is_left_by_the_thread_switch(marks):
    before, kind = threading.active_count(), nnsight.CONFIG.switch
    nnsight.CONFIG.switch = "thread"
    try:
        for way in WAYS:
            way(marks, torch.zeros(4, 4))
    finally:
        nnsight.CONFIG.switch = kind
    assert threading.active_count() <= before


@pytest.mark.parametrize("first", [False, True])
def test_rows_that_are_written_one_by_one_keep_one_copy_of_the_batch(first):
    model = nnsight.NNsight(toys.MLP())

    def batches():
        return sum(type(one) is torch.Tensor and one.shape == (40, 4) for one in gc.get_objects())

    with torch.no_grad(), model.trace(torch.randn(40, 4)) as tracer:
        values = [row.layers[1].output for row in tracer.rows] if first else []
        before = batches()
        for i, row in enumerate(tracer.rows):
            row.layers[1].output = values[i] * 2 if first else row.layers[1].output * 2
        assert batches() <= before + 4
