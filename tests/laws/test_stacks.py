"""A model's stack is used again by the next run, and nobody can tell."""

import gc
import sys
import threading
import weakref
from contextvars import ContextVar

import pytest
import torch
from greenlet import getcurrent

import nnsight
import toys
from nnsight.core import cpp_warnings


@pytest.fixture
def model():
    return nnsight.NNsight(toys.MLP())


@pytest.fixture(autouse=True)
def unwatched():
    """As where no coverage or debugger is on, with which each run has a stack of its own."""
    before = sys.gettrace(), sys.getprofile()
    sys.settrace(None)
    sys.setprofile(None)
    yield
    sys.settrace(before[0])
    sys.setprofile(before[1])


def stack_of(model, x, ask=lambda model: model.layers[1].output):
    """The greenlet that the model ran in."""
    seen = []
    handle = model.layers[0]._module.register_forward_hook(lambda *_: seen.append(weakref.ref(getcurrent())))
    with model.trace(x):
        ask(model)
    handle.remove()
    return seen[0]()


def deeply(function, depth=6):
    """Calls a function beneath the C frames of `map`."""
    return next(map(lambda _: deeply(function, depth - 1) if depth else function(), (None,)))  # noqa: C417


def in_a_thread(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def test_the_next_run_has_the_same_stack(model, x):
    def work():
        first = stack_of(model, x)
        return first is stack_of(model, x) is not None

    assert in_a_thread(work)


def test_from_deeper_in_the_c_stack_it_has_another_one(model, x):
    def work():
        untouched = model._module(x)
        first = stack_of(model, x)
        second = deeply(lambda: stack_of(model, x))
        again = stack_of(model, x)
        with model.trace(x):
            model.layers[1].output
            result = model.output
        return first is not second, second is again, torch.equal(result, untouched)

    assert in_a_thread(work) == (True, True, True)


def test_a_stack_that_waits_holds_nothing_of_its_last_run(x):
    variable = ContextVar("variable")

    class Value:
        pass

    model, value = nnsight.NNsight(toys.MLP()), Value()
    kept = weakref.ref(model._module), weakref.ref(value)
    token = variable.set(value)
    stack_of(model, x)
    variable.reset(token)
    with model.trace(x):
        model.layers[1].output
    del model, value, token
    assert [reference() for reference in kept] == [None, None]


def test_a_context_variable_of_one_run_is_not_there_in_the_next(model, x):
    variable, seen = ContextVar("variable", default=0), []

    def note(*_):
        seen.append(variable.get())
        variable.set(9)

    handle = model.layers[0]._module.register_forward_hook(note)
    for value in (1, 2):
        variable.set(value)
        with model.trace(x):
            model.layers[1].output
    handle.remove()
    assert seen == [1, 2]
    assert variable.get() == 2


def test_a_tracer_that_is_set_later_sees_the_model(model, x):
    stack_of(model, x)
    seen = set()

    def trace(frame, event, _):
        seen.add(frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name)

    sys.settrace(trace)
    try:
        with model.trace(x):
            model.layers[1].output
    finally:
        sys.settrace(None)
    assert any(name.endswith("forward") for name in seen), seen


def test_after_an_error_and_a_stop_the_stack_serves_again(model, x):
    def work():
        untouched, stacks = model._module(x), []
        for _ in range(3):
            with pytest.raises(RuntimeError), model.trace(x):
                model.layers[0].output = torch.ones(3, 999)
            with model.trace(x) as tracer:
                model.layers[0].output
                tracer.stop()
            with pytest.raises(KeyError), model.trace(x):
                model.layers[0].output
                raise KeyError
            stacks.append(stack_of(model, x))
        with model.trace(x):
            model.layers[1].output
            result = model.output
        return len(set(map(id, stacks))), torch.equal(result, untouched)

    assert in_a_thread(work) == (1, True)


def test_with_its_thread_a_waiting_stack_is_freed(model, x):
    gc.disable()
    try:
        reference = in_a_thread(lambda: weakref.ref(stack_of(model, x)))
        in_a_thread(lambda: stack_of(model, x) is None)  # greenlet frees those of an ended thread when it next passes
        assert reference() is None
    finally:
        gc.enable()


class Doubles(torch.autograd.Function):
    """Calls a module in its forward: beneath a function of torch's that hears the warnings of C++ itself."""

    @staticmethod
    def forward(ctx, x, module):
        return module(x) * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.skipif(cpp_warnings.OUTERMOST is None, reason="this build of torch doesn't show who hears its warnings")
def test_each_side_has_its_own_hearer_of_the_warnings_of_cpp(model, x):
    """Torch keeps a pointer into the C stack, which means nothing on another stack, or when its call is over."""
    heard = [cpp_warnings.warning_handler()]
    handle = model.layers[2]._module.register_forward_hook(lambda *_: heard.append(cpp_warnings.warning_handler()))
    nested = nnsight.NNsight(toys.Calls([lambda x: Doubles.apply(x, model._module)]))
    nested._module.inner = model._module
    with nested.trace(x):
        hidden = nested.inner.layers[1].output
        heard.append(cpp_warnings.warning_handler())
    handle.remove()
    with model.trace(x):
        hidden = model.layers[1].output
        with model.output.sum().backward():
            hidden.grad
            heard.append(cpp_warnings.warning_handler())
    heard.append(cpp_warnings.warning_handler())
    models = heard.pop(2)
    assert set(heard) == {heard[0]} != {models}
