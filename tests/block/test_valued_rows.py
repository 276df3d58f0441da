"""Rows and invokes of models that decide by their values, and so can't run on fake tensors."""

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from comparing import near
from nnsight import NNsight, errors


class Chosen(nn.Module):
    """Decides by a value, which a fake tensor hasn't; keeps count of its calls in all the ways there are."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))
        self.moved = nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, x):
        self.count += 1
        self.seen.append(len(x))
        if self.training:
            self.moved.data += 1
        return self.after(self.before(x) + (1 if x.sum() > 0 else 2))


class Mixture(nn.Module):
    """Has each token go through one of three experts, [row, token, d] flattened as libraries do it."""

    def __init__(self):
        super().__init__()
        self.into, self.router, self.out = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        hidden = self.into(x)
        flat = hidden.flatten(0, 1)
        chosen = self.router(flat).argmax(-1)
        mixed = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            (where,) = (chosen == index).nonzero(as_tuple=True)
            mixed[where] = expert(flat[where])
        return self.out(hidden + mixed.view_as(hidden))


@pytest.fixture
def mixture():
    return NNsight(Mixture().eval())


@pytest.fixture
def prompts():
    return torch.randn(2, 5, 4)


def test_a_row_of_what_a_mixture_gives_is_what_the_prompt_has_alone(mixture, prompts):
    with mixture.trace(prompts) as rows:
        into = [row.into.output for row in rows]
        given = [row.out.input for row in rows]
        out = [row.out.output for row in rows]
        results = [row.result for row in rows]
    for prompt, *values in zip(prompts, into, given, out, results, strict=True):
        with mixture.trace(prompt[None]) as tracer:
            alone = (mixture.into.output, mixture.out.input, mixture.out.output, tracer.result)
        for value, expected in zip(values, alone, strict=True):
            near(value, expected)


def test_a_write_to_a_row_behind_a_mixture_reaches_that_row_alone(mixture, prompts):
    expected = mixture._module(prompts)
    with mixture.trace(prompts) as (a, b):
        b.out.input[:] = 0
        results = a.result, b.result
    near(results[0], expected[:1])
    near(results[1], mixture._module.out.bias.expand(1, 5, 4))


def test_invokes_of_a_mixture_are_its_prompts(mixture, prompts):
    with mixture.trace() as tracer:
        with tracer.invoke(prompts[:1]):
            one = mixture.out.output
        with tracer.invoke(prompts[1:]):
            mixture.out.input = mixture.out.input * 2
            two = mixture.out.output
    near(one, mixture._module(prompts[:1]))
    with mixture.trace(prompts[1:]):
        mixture.out.input = mixture.out.input * 2
        near(two, mixture.out.output)


def test_what_is_picked_by_value_or_flattened_is_refused(mixture, prompts):
    with mixture.trace(prompts) as (a, _):
        for what in (a.router, a.experts[0]):
            with pytest.raises(errors.RowError, match="follows neither rows nor tokens"):
                what.output
        assert a.out.output.shape == (1, 5, 4)


def test_a_size_that_is_that_of_the_rows_by_chance_is_refused(prompts):
    class Picks(nn.Module):
        """As many as there are rows in three calls, one of them the model's own; then one, as values may have it."""

        def __init__(self):
            super().__init__()
            self.calls, self.picked = 0, nn.Identity()

        def forward(self, x):
            self.calls += 1
            return x * self.picked(x[: len(x) if self.calls <= 3 else 1]).sum().item()

    with NNsight(Picks().eval()).trace(prompts) as (a, _):
        with pytest.raises(errors.RowError, match="follows neither rows nor tokens"):
            a.picked.output


@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_numbers_are_left_as_they_are(training):
    module = Chosen().train(training)
    heard = []
    module.before.register_forward_hook(lambda *_: heard.append(1))
    x = torch.randn(3, 4)
    torch.manual_seed(1)
    expected = module(x)
    torch.manual_seed(1)
    with NNsight(module).trace(x) as (a, b, c):
        assert a.before.output.shape == (1, 4)  # measured here, in front of what draws random numbers
        rows = [row.after.output for row in (a, b, c)]
    assert torch.equal(torch.cat(rows), expected)
    calls = 2
    assert (module.count, module.moved, module.seen, heard) == (calls, calls * training, [3] * calls, [1] * calls)


def test_a_model_in_parts_that_are_brought_in_for_their_calls_is_refused():
    module = Chosen().eval()
    module.before._hf_hook = object()  # as accelerate leaves there
    with NNsight(module).trace(torch.randn(3, 4)) as (a, _, _):
        with pytest.raises(errors.RowError, match="can't be run on fake tensors"):
            a.after.output


def test_weights_that_are_made_in_each_call_don_t_stand_in_the_way():
    module = Mixture().eval()
    torch.nn.utils.prune.random_unstructured(module.out, "weight", 0.5)
    prompts = torch.randn(2, 5, 4)
    expected = module(prompts)  # after which the weight has a graph
    with NNsight(module).trace(prompts) as (a, b):
        results = a.out.output, b.out.output
    near(torch.cat(results), expected)


def test_a_large_model_in_training_is_not_copied(monkeypatch):
    monkeypatch.setattr("nnsight.core.valued._MOST_COPIED", 8)
    with NNsight(Chosen()).trace(torch.randn(3, 4)) as (a, _, _):
        with pytest.raises(errors.RowError, match="can't be run on fake tensors"):
            a.after.output
    with NNsight(Chosen().eval()).trace(torch.randn(3, 4)) as (a, _, _):
        assert a.after.output.shape == (1, 4)
