"""Edits in methods of the module's own: `generate`, and what else calls the model."""

import pytest
import torch
from torch import nn

from comparing import same
from nnsight import NNsight


class Rolls(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.inner(x))

    def rollout(self, x, *, times):
        for _ in range(times):
            x = self(x)
        return x

    def encode(self, x):
        return self.inner(x)

    def size(self):
        return self.inner.in_features


def test_a_method_of_the_module_s_own_runs_with_its_edits():
    module, x = Rolls(), torch.randn(3, 4)
    model = NNsight(module)
    edited = model.edit(lambda model: setattr(model.inner, "output", model.inner.output * 2))
    wanted = x
    for _ in range(3):
        wanted = torch.tanh(module.inner(wanted) * 2)
    same(edited.rollout(x, times=3), wanted)
    with edited.trace(x, fn="rollout", times=3) as tracer:
        same(tracer.result, wanted)
    same(model.rollout(x, times=3), module.rollout(x, times=3))
    assert not module.inner._forward_pre_hooks


def test_a_method_in_a_block_runs_without_them_as_a_call_does():
    module, x = Rolls(), torch.randn(3, 4)
    edited = NNsight(module).edit(lambda model: setattr(model.inner, "output", model.inner.output * 2))
    with edited.trace(x):
        same(edited.encode(x), module.inner(x))


def test_an_edit_that_a_method_never_comes_to_says_so_but_not_where_the_method_calls_nothing():
    module, x = Rolls(), torch.randn(3, 4)
    edited = NNsight(module).edit(lambda model: setattr(model.inner, "output", model.inner.output * 2))
    assert edited.size() == 4
    with pytest.warns(UserWarning, match="`model` was never called"):
        same(edited.encode(x), module.inner(x))
    inner = NNsight(module)
    inner.inner.edit(lambda inner: setattr(inner, "output", inner.output * 2), inplace=True)
    same(inner.encode(x), module.inner(x) * 2)
