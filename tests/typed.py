"""What a type checker sees of a user's program: checked by mypy with the package (`make check`), and never run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import assert_type

import nnsight
from nnsight.anatomy.layer import LayerNode
from nnsight.anatomy.proof import Report
from nnsight.anatomy.sites import Site
from nnsight.anatomy.uniform import Layers, Sites
from nnsight.block.cache import Cache
from nnsight.block.tracer import Tracer
from nnsight.models.positions import LanguageTracer
from nnsight.scopes import RowScope


def language_model(model: nnsight.LanguageModel) -> None:
    with model.trace("text") as tracer:
        assert_type(tracer, LanguageTracer)
        assert_type(tracer.positions, Tensor)
        assert_type(tracer.cache(), Cache)
        assert_type(model.layers[3], LayerNode)
        assert_type(model.layers[2:4], Layers)
        assert_type(model.layers[3].output, Tensor)
        assert_type(model.layers[3].attn.q, Tensor)
        assert_type(model.logits, Tensor)
        assert_type(model.site("layers.3.attn.z"), Site)
    with model.trace(["one", "two"]) as (one, _):
        assert_type(one, RowScope)
    assert_type(model.project(torch.ones(1)), Tensor)
    assert_type(model.sites(), Sites)
    assert_type(model.to("cpu"), nnsight.LanguageModel)
    assert_type(model.without_adapter(), nnsight.LanguageModel)
    assert_type(nnsight.verify(model), Report)


def any_module(model: nnsight.NNsight) -> None:
    with model.trace(torch.ones(2)) as tracer:
        assert_type(tracer, Tracer)
        model.output = 2 * model.output
    assert_type(model.trace(torch.ones(2), trace=False), Any)
    assert_type(model.edit(lambda model: None), nnsight.NNsight)
    assert_type(model.named_modules(), list[tuple[str, nnsight.Envoy]])


def gradients(metric: Tensor, value: Tensor) -> None:
    assert_type(nnsight.grad(metric, value), Tensor)
    assert_type(nnsight.grad(metric, [value, value]), list[Tensor])
    assert_type(nnsight.grad(metric, {"of": value}), Any)
    assert_type(nnsight.grad(metric, value, allow_unused=True), Any)


class Attention(nnsight.Envoy):
    @nnsight.eproperty(key="output")
    def heads(self, value: Tensor) -> Tensor:
        return value.unflatten(-1, (2, -1))


def classes_of_ones_own(attention: Attention) -> None:
    assert_type(attention.heads, Tensor)
    attention.heads = torch.ones(2)
