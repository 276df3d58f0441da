"""How tests compare tensors."""

import torch


def same(one, other):
    """Every number is equal."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def near(one, other):
    """Equal but for how sums are rounded in float32."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def alone(model, x, path="layers.1"):
    """A module's output in a trace of its own, on this prompt alone."""
    with model.trace(x):
        return model.get(path).output
