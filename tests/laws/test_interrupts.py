"""A Ctrl-C, or what the handler of another signal raises, wherever it may come: nothing is left behind.

It comes at the beginning of each call of a function of ours.
"""

import inspect
import pathlib
import sys

import pytest
import snapshots
import torch

import nnsight
import toys
from nnsight.block.gradient import BackwardBlock
from nnsight.block.tracer import Tracer
from nnsight.core.owner import this_thread

OURS = str(pathlib.Path(nnsight.__file__).parent)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class Alarm(Exception):
    """What a handler of `SIGALRM` raises, as the time limits of test runners do."""


class Interrupts:
    """Raises an exception at the beginning of the call of this number, as a signal would."""

    def __init__(self, number, kind):
        self.number, self.kind, self.count, self.came = number, kind, 0, None

    def __call__(self, frame, event, _):
        code = frame.f_code
        # Python swallows what is raised in a `__del__`, or in a generator that is closed; a function mode stands
        # between a `with` of torch's own and what that puts back.
        passes = code.co_flags & inspect.CO_GENERATOR or code.co_name in ("__del__", "__torch_function__")
        if event == "call" and code.co_filename.startswith(OURS) and not passes:
            self.count += 1
            if self.count == self.number:
                self.came = f"{code.co_filename}:{frame.f_lineno}"
                raise self.kind

    def around(self, program, model):
        before = sys.gettrace()
        sys.settrace(self)
        try:
            program(model)
        except self.kind:
            pass
        finally:
            sys.settrace(before)


def reads_and_writes(model):
    with model.trace(X):
        model.layers[0].input = model.layers[0].input * 1
        model.layers[1].skip(model.layers[1].input)
        model.layers[2].output = model.layers[2].norm.output


def asks_for_operations(model):
    with model.trace(X):
        model.layers[0].source.self_up_0.output = model.layers[0].source.self_up_0.output * 2


def goes_through_steps(model):
    with model.trace(X, 2, fn="generate") as tracer:
        for _ in tracer.iter[:]:
            model.head.output = model.head.output * 2


def has_invokes(model):
    with model.trace() as tracer:
        with tracer.invoke(X):
            model.layers[0].output = model.layers[0].output * 2
        with tracer.invoke(X):
            hidden = model.layers[1].output
        with tracer.invoke():
            result = tracer.result
    return hidden, result


def is_edited(model):
    def edit(edited):
        edited.layers[0].output = edited.layers[0].output * 2
        edited.layers[1].skip(edited.layers[1].input)

    edited = model.edit(edit)
    edited(X)
    with edited.trace(X):
        edited.layers[2].output


def calls_in_an_edit(model):
    def edit(edited):
        edited.layers[1].output = edited.layers[1].down(edited.layers[1].output, hook=True)

    model.edit(edit)(X)


def takes_gradients(model):
    with model.trace(X):
        hidden = model.embed.output = model.embed.output.detach().requires_grad_()
        loss = model.output.sum()
        with nnsight.backward(loss, inputs=[hidden]):
            hidden.grad


class Generating(toys.MLP):
    def generate(self, x, steps):
        for _ in range(steps):
            x = self(x)
        return x


PROGRAMS = (
    *(reads_and_writes, asks_for_operations, goes_through_steps, has_invokes),
    *(is_edited, calls_in_an_edit, takes_gradients),
)
# In the others an `Exception` may come where the library, or torch, takes it for a reason why something can't be done.
IN_THE_BLOCK = (reads_and_writes, asks_for_operations, goes_through_steps, takes_gradients)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This backward block was not entered")
@pytest.mark.parametrize(
    ("program", "kind"),
    [*((program, KeyboardInterrupt) for program in PROGRAMS), *((program, Alarm) for program in IN_THE_BLOCK)],
    ids=lambda part: part.__name__,
)
def test_an_interrupt_wherever_it_comes_leaves_the_model_and_the_modes_as_they_were(program, kind):
    module = Generating()
    wanted, wrong = module(X), []
    before, modes = snapshots.of_model(module), snapshots.of_modes()
    warm = nnsight.NNsight(module)
    program(warm)
    number, step = 1, 17 if program is has_invokes else 1
    while True:
        model, interrupts = nnsight.NNsight(module), Interrupts(number, kind)
        interrupts.around(program, model)
        if interrupts.came is None:
            break
        left = snapshots.differences(before, snapshots.of_model(module))
        with model.trace(X):
            out = model.output
        if left or snapshots.of_modes() != modes or this_thread().runs or not torch.equal(out, wanted):
            wrong.append((number, interrupts.came, left))
            while torch._C._len_torch_function_stack():
                torch._C._pop_torch_function_stack()
            module = Generating()
            before = snapshots.of_model(module)
        number += step
    assert number > 100
    assert [one for one in wrong if one[1] not in BEYOND_REACH] == []


# Where a `with` is about to be left, and has not begun to.
BEYOND_REACH = tuple(
    f"{inspect.getsourcefile(kind)}:{inspect.getsourcelines(kind.__exit__)[1]}" for kind in (BackwardBlock, Tracer)
)
