"""`.next()`: a module that is called several times in one step, call by call, with what is inside it."""

import pytest
import torch
from torch import nn

import nnsight
import toys

pytestmark = pytest.mark.usefixtures("switch")


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.Tanh()

    def forward(self, x):
        y = self.act(x)
        return y + 1


class Repeats(nn.Module):
    """Calls its cell, and a function of its own, three times each."""

    def __init__(self):
        super().__init__()
        self.cell, self.end = Cell(), nn.Linear(4, 4)
        toys.seeded(self)

    def helper(self, x):
        y = torch.sin(x)
        return y * 2

    def forward(self, x):
        for _ in range(3):
            x = self.cell(x)
        for _ in range(3):
            x = self.helper(x)
        return self.end(x)


@pytest.fixture
def model():
    return nnsight.NNsight(Repeats())


@pytest.fixture
def x():
    return torch.linspace(-1, 1, 8).view(2, 4)


@pytest.fixture
def calls(x):
    """What a hand-edited forward would collect of each call: the cell's input, its act, its output; the sines."""
    seen = {"input": [], "act": [], "output": [], "sine": []}
    for _ in range(3):
        seen["input"].append(x)
        seen["act"].append(torch.tanh(x))
        x = torch.tanh(x) + 1
        seen["output"].append(x)
    for _ in range(3):
        seen["sine"].append(torch.sin(x))
        x = torch.sin(x) * 2
    return seen


def which(value, calls):
    return [at for at, call in enumerate(calls) if torch.equal(value, call)]


def test_a_child_behind_next_is_the_child_in_that_call(model, x, calls):
    with model.trace(x):
        assert which(model.cell.next().act.output, calls["act"]) == [1]
        assert which(model.cell.output, calls["output"]) == [1]
        assert which(model.cell.next().act.output, calls["act"]) == [2]
    with model.trace(x):
        assert which(model.cell.next().get("act.output"), calls["act"]) == [1]


def test_an_operation_behind_next_is_the_operation_in_that_call(model, x, calls):
    with model.trace(x):
        assert which(model.cell.next().source.self_act_0.output, calls["act"]) == [1]
        assert which(model.cell.next().source.y_0.output, calls["act"]) == [2]
    with model.trace(x):
        model.cell.act.output  # the forward that runs now can't be looked into any more, the next one can
        assert which(model.cell.next().source.self_act_0.output, calls["act"]) == [1]


def test_an_operation_inside_the_next_visit_of_an_operation(model, x, calls):
    helper = model.source.self_helper_0
    with model.trace(x):
        assert which(helper.next().source.y_0.output, calls["sine"]) == [1]
    with model.trace(x):
        assert which(helper.source.y_0.output, calls["sine"]) == [0]
        assert which(helper.next().source.y_0.output, calls["sine"]) == [1]
        assert which(helper.next().source.torch_sin_0.output, calls["sine"]) == [2]


def test_a_write_behind_next_is_made_in_that_call_alone(model, x, calls):
    with model.trace(x) as tracer:
        model.cell.next().act.output = torch.zeros(2, 4)
        last = model.cell.next().output
    with torch.no_grad():
        expected = torch.tanh(torch.ones(2, 4)) + 1
    assert torch.equal(last, expected)
    assert not torch.equal(tracer.result, model._module(x))


def test_next_takes_how_many_calls_on(model, x, calls):
    with model.trace(x):
        assert which(model.cell.next(2).act.output, calls["act"]) == [2]
    with model.trace(x):
        assert which(model.cell.output, calls["output"]) == [0]
        assert which(model.cell.next(2).output, calls["output"]) == [2]
    with model.trace(x):
        assert which(model.cell.next().next().output, calls["output"]) == [2]


def test_from_within_a_call_next_is_the_call_after_it(model, x, calls):
    for kind in ("input", "output"):
        with model.trace(x):
            model.cell.act.output
            assert which(getattr(model.cell.next(), kind), calls[kind]) == [1]


def test_next_in_an_edit_means_the_same(model, x, calls):
    seen = []

    def look(edited):
        seen.append(edited.cell.act.output)
        seen.append(edited.cell.next().input)
        seen.append(edited.cell.next().act.output)

    model.edit(look)(x)
    assert [which(seen[0], calls["act"]), which(seen[1], calls["input"]), which(seen[2], calls["act"])] == [
        [0],
        [1],
        [2],
    ]


def test_next_in_a_scan_and_in_an_invoke(model, x, calls):
    with model.scan(x):
        assert model.cell.next().act.output.shape == (2, 4)
    with model.trace() as tracer:
        with tracer.invoke(x):
            first = model.cell.next().act.output
        with tracer.invoke(x):
            second = model.cell.next(2).act.output
    assert which(first, calls["act"]) == [1]
    assert which(second, calls["act"]) == [2]


def test_a_next_that_nothing_is_asked_behind_is_an_error_at_its_line(model, x):
    with pytest.raises(nnsight.errors.BlockError, match=r"`cell.next\(\)` was not used") as caught, model.trace(x):
        model.cell.next()
        model.end.output
    assert "you wrote   model.cell.next()\n" in str(caught.value)
    with pytest.raises(nnsight.errors.BlockError, match="was not used"), model.trace() as tracer:
        with tracer.invoke(x):
            model.cell.next()
    with pytest.raises(nnsight.errors.BlockError, match="was not used"):
        model.edit(lambda edited: edited.cell.next())(x)
    assert torch.equal(model.trace(x, trace=False), model._module(x))


@pytest.mark.parametrize("calls", [0, -1, 1.0, True, "1"])
def test_next_takes_a_whole_number_of_calls(model, x, calls):
    with pytest.raises(nnsight.errors.BlockError, match="a whole number, 1 or more"), model.trace(x):
        model.cell.next(calls)


def test_more_calls_than_there_are(model, x):
    with pytest.raises(nnsight.errors.CalledFewerTimesError, match=r"3 more calls of `cell`"), model.trace(x):
        model.cell.next(3).act.output


def test_a_trace_has_no_next(model, x):
    with pytest.raises(nnsight.errors.BlockError, match=r"tracer\.iter\[:\]"), model.trace(x) as tracer:
        tracer.next()


@pytest.mark.parametrize("key", [slice(3), slice(1, 3), slice(0, 3, 2), slice(1, None), slice(2, 3), slice(1, -1)])
def test_what_a_loop_over_steps_says_in_a_trace_is_how_to_loop_over_calls(model, x, calls, key):
    with pytest.raises(nnsight.errors.BlockError, match="A trace is one step") as caught, model.trace(x) as tracer:
        for _ in tracer.iter[key]:
            model.cell.output
    told = dict(
        line.split(maxsplit=1) for line in str(caught.value).replace("for calls ", "for_calls ").splitlines()[2:]
    )
    values = []
    loop = told["for_calls"].replace("module", "model.cell") + "; values.append(value)"
    with model.trace(x):
        exec(loop, {"model": model, "values": values, "n": 3})
    assert [which(value, calls["output"])[0] for value in values] == list(range(3))[key]
    if key == slice(3):
        values, cells = [], []
        loop, _, _ = told["otherwise"].partition(" with the same body")
        with model.trace(x):
            exec(loop + " cells.append(model.cell.act.output); values.append(model.cell.output)", locals())
        assert [which(value, calls["act"])[0] for value in cells] == [0, 1, 2]
        assert [which(value, calls["output"])[0] for value in values] == [0, 1, 2]


def test_a_later_step_of_a_trace_is_told_as_a_later_call(model, x, calls):
    for key in (2, [0, 2]):
        with pytest.raises(nnsight.errors.BlockError, match=r"module\.next\(2\)\.output for a later call"):
            with model.trace(x) as tracer:
                tracer.iter[key]
    with model.trace(x):
        assert which(model.cell.next(2).output, calls["output"]) == [2]
