"""Law 10: the cost of a trace does not grow with the number of modules, counted in calls rather than in seconds."""

import contextlib
import sys
from functools import partial

import pytest
import torch

import nnsight
import toys


def calls_of(run):
    """How many functions, Python's and C's, are called while `run` runs, on this thread and on the model's."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def read_one(model, x):
    with model.trace(x):
        model.layers[1].output


def read_last(model, x):
    with model.trace(x):
        model.layers[2].output
        model.output


def write_one(model, x):
    with model.trace(x):
        model.layers[1].output = x
        model.layers[2].input = x


def skip_one(model, x):
    with model.trace(x):
        model.layers[1].skip(x)


def ask_nothing(model, x):
    with model.trace(x):
        pass


def stop(model, x):
    with model.trace(x) as tracer:
        model.layers[0].output
        tracer.stop()


def raise_(model, x):
    try:
        with model.trace(x):
            model.layers[0].output
            raise KeyError
    except KeyError:
        pass


def nest(model, x):
    with model.trace(x):
        model.layers[0].output
        with model.trace(x):
            model.layers[1].output


WAYS = [read_one, read_last, write_one, skip_one, ask_nothing, stop, raise_, nest]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_trace_makes_as_many_calls_for_a_thousand_modules_as_for_ten(way, x, switch):
    counts = []
    for n in (10, 1000):
        model = nnsight.NNsight(toys.Wide(n))
        way(model, x)
        way(model, x)
        counts.append(calls_of(lambda model=model: way(model, x)))
    assert counts[0] == counts[1]


def test_the_counter_counts(x):
    module = toys.Wide(10)
    assert calls_of(lambda: module(x)) > 3
    assert calls_of(lambda: [module(x), module(x)]) > 1.5 * calls_of(lambda: module(x))


def test_modules_beside_and_beneath_do_not_count_either(x):
    """A thousand modules elsewhere in the tree, in depth, leave the count as it is."""

    def deep(n):
        module = torch.nn.Identity()
        for _ in range(n):
            module = torch.nn.Sequential(module)
        return module

    counts = []
    for n in (2, 400):
        module = toys.Wide(3)
        module.aside = deep(n)
        model = nnsight.NNsight(module)
        for _ in range(2):
            read_one(model, x)
        counts.append(calls_of(lambda model=model: read_one(model, x)))
    assert counts[0] == counts[1]


def test_no_module_but_those_asked_for_and_above_them_is_touched(x, switch):
    module = toys.MLP(depth=6)
    touched = set()
    original = torch.nn.Module.__setattr__
    model = nnsight.NNsight(module)
    with model.trace(x):
        model.layers[2].act.output
        for path, child in module.named_modules():
            if child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child):
                touched.add(path)
    assert touched <= {"", "layers", "layers.2", "layers.2.act"}
    assert torch.nn.Module.__setattr__ is original


def test_a_wrapped_model_costs_nothing_outside_a_trace(x):
    module = toys.MLP(depth=6)
    before = calls_of(lambda: module(x))
    model = nnsight.NNsight(module)
    read = calls_of(lambda: model._module(x))
    with model.trace(x):
        model.layers[2].output
    assert read == calls_of(lambda: module(x)) == before


def test_building_the_wrapper_makes_no_envoy_per_module():
    small, large = toys.Wide(10), toys.Wide(1000)
    assert calls_of(lambda: nnsight.NNsight(small)) == calls_of(lambda: nnsight.NNsight(large))


def test_lockstep_makes_a_few_times_the_calls_of_one_trace_after_the_other():
    """Who may go on is found out by walking frames, at each change of the run; it costs as much as a few modules do."""
    model = nnsight.LanguageModel("nnsight/demo", dispatch=True)
    ids = torch.tensor([[3, 14, 15, 9, 26]])

    def one_by_one():
        for _ in range(2):
            with model.trace(ids):
                [layer.output for layer in model.transformer.h]

    def lockstep():
        with model.trace(ids) as a, model.trace(ids) as b:
            [(one.output, other.output) for one, other in zip(a.transformer.h, b.transformer.h, strict=True)]

    for way in (one_by_one, lockstep):
        way()
    assert calls_of(lockstep) < 8 * calls_of(one_by_one)


def test_what_one_of_many_open_traces_costs_grows_little_with_how_many_there_are(x):
    """At each change of the run, the frames of all others were walked: eight hundred tasks took twenty seconds."""
    model = nnsight.NNsight(toys.MLP())

    def in_lockstep(count):
        with contextlib.ExitStack() as stack:
            tracers = [stack.enter_context(model.trace(x)) for _ in range(count)]
            for i in range(3):
                for tracer in tracers:
                    tracer.model.layers[i].output

    in_lockstep(2)
    few, many = (calls_of(partial(in_lockstep, count)) / count for count in (10, 80))
    assert many < 2 * few
