"""What attention and MLP are given is theirs alone: a change of it reaches no other that is given the same tensor."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from architectures import FAMILIES, close, given, hooked, model_of, quietly, trace

from comparing import same

_LLAMA = ("model.layers.1.self_attn", "model.layers.1.mlp")
_BERT = "bert.encoder.layer.1"
GIVEN = {  # the modules of layer 1 that attention and MLP are computed in
    "gpt2": ("transformer.h.1.attn", "transformer.h.1.mlp"),
    "llama": _LLAMA,
    "gemma2": _LLAMA,
    "falcon": ("transformer.h.1.self_attention", "transformer.h.1.mlp"),
    "bloom": ("transformer.h.1.self_attention", "transformer.h.1.mlp"),
    "granite": _LLAMA,
    "gpt_neox": ("gpt_neox.layers.1.attention", "gpt_neox.layers.1.mlp"),
    "mixtral": _LLAMA,
    "olmo2": _LLAMA,
    "bert": (f"{_BERT}.attention.self", f"{_BERT}.intermediate"),
    "mamba": ("backbone.layers.1.mixer", None),
    "gptj": ("transformer.h.1.attn", "transformer.h.1.mlp"),
    "phi": _LLAMA,
    "cohere": _LLAMA,
    "exaone4": _LLAMA,
    "opt": ("model.decoder.layers.1.self_attn", "model.decoder.layers.1.fc1"),  # which is given all tokens in one row
    "xglm": ("model.layers.1.self_attn", "model.layers.1.fc1"),
    "roberta-prelayernorm": tuple(
        f"roberta_prelayernorm.encoder.layer.1.{name}" for name in ("attention.self", "intermediate")
    ),
}
SHARED = ["falcon", "olmo2", "bert", "gptj", "phi", "cohere", "exaone4"]
ALONE = ["gpt2", "llama", "gemma2", "bloom", "granite", "mixtral"]


@cache
def model_for(name):
    return model_of(name) if name in FAMILIES else quietly(name)


def both(names):
    pairs = [(name, part) for name in names for part in ("attn", "mlp") if GIVEN[name][part == "mlp"] is not None]
    return pytest.mark.parametrize(("name", "part"), pairs)


def more(value):
    if value.ndim == 2:
        return more(value.unflatten(0, (2, -1))).flatten(0, 1)
    value = value.clone()
    value[:, -1] += 1 + value[:, -1].abs()
    return value


@both(GIVEN)
def test_a_change_of_what_a_part_is_given_is_that_parts_alone_in_place_too(name, part):
    model = model_for(name)
    wanted = hooked(model, inputs={GIVEN[name][part == "mlp"]: more})
    assert not torch.equal(wanted, hooked(model))
    with trace(model), torch.no_grad():
        node = getattr(model.layers[1], part)
        node.input = more(node.input)
        same(model.logits, wanted)
    with trace(model), torch.no_grad():
        value = getattr(model.layers[1], part).input
        value[:, -1] += 1 + value[:, -1].abs()
        same(model.logits, wanted)


@both(SHARED)
def test_the_gradient_of_what_a_part_is_given_is_of_what_the_part_makes_of_it(name, part):
    model, path = model_for(name), GIVEN[name][part == "mlp"]
    kept = []

    def copy(value):
        kept.append(value.clone())
        return kept[0]

    module = model._module.get_submodule(path)
    ids, others = given(model)

    def before(_, args, kwargs):
        if args:
            return (copy(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: copy(kwargs[name])}

    with module.register_forward_pre_hook(before, with_kwargs=True):
        logits = model._module(ids, **others).logits
    (wanted,) = torch.autograd.grad(logits[:, -1].square().sum(), kept)
    with trace(model):
        value = getattr(model.layers[1], part).input
        found = model.logits
    same(found, logits)
    close(torch.autograd.grad(found[:, -1].square().sum(), value)[0], wanted)


@pytest.mark.parametrize("part", ["attn", "mlp"])
@pytest.mark.parametrize("name", ["olmo2", "falcon"])
def test_a_change_in_place_of_one_rows_part_is_as_one_of_the_batch(name, part):
    model = model_for(name)
    ids, others = given(model)
    wanted = hooked(model, inputs={GIVEN[name][part == "mlp"]: lambda value: torch.cat([value[:1], more(value[1:])])})
    with model.trace(ids, **others) as (first, second), torch.no_grad():
        value = getattr(second.layers[1], part).input
        value[:, -1] += 1 + value[:, -1].abs()
        same(second.logits, wanted[1:])
        same(first.logits, wanted[:1])


def test_what_is_inside_attention_follows_from_what_it_was_changed_to_be_given():
    model = model_for("falcon")
    with trace(model), torch.no_grad():
        attn = model.layers[1].attn
        attn.input = more(attn.input)
        wanted = attn.q, attn.k, attn.output
    with trace(model), torch.no_grad():
        attn = model.layers[1].attn
        value = attn.input
        value[:, -1] += 1 + value[:, -1].abs()
        for found, one in zip((attn.q, attn.k, attn.output), wanted, strict=True):
            same(found, one)


@both(ALONE)
def test_where_nothing_else_is_given_it_the_very_tensor_is_handed_out(name, part):
    model, path = model_for(name), GIVEN[name][part == "mlp"]
    with trace(model), torch.no_grad():
        assert getattr(model.layers[1], part).input is model.get(path).input


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_it_is_so_in_each_step_of_a_generation(part):
    model, ids = model_for("olmo2"), torch.tensor([[3, 14, 15, 9, 26]])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}

    def logits(change):
        with torch.no_grad(), model.generate(ids, **options) as tracer:
            steps = []
            for _ in tracer.iter[:]:
                change(getattr(model.layers[1], part))
                steps.append(model.logits[:, -1])
        return torch.stack(steps)

    def assign(node):
        node.input = more(node.input)

    def change(node):
        value = node.input
        value[:, -1] += 1 + value[:, -1].abs()

    same(logits(change), logits(assign))
    assert not torch.equal(logits(change), logits(lambda node: node.input))
