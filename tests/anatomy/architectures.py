"""Tiny language models of a dozen architectures, and what each calls what all have: the raw names, written by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from nnsight import LanguageModel
from nnsight.anatomy.tiny import tiny_ids, tiny_model

IDS = torch.tensor([[3, 14, 15, 9, 26]])
SMALL = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 64}  # of a GPT2Config


@dataclass(frozen=True)
class Raw:
    """Where a family has what; `attn` and `mlp` are modules below a layer whose outputs are added, times `scale`.

    Attributes:
        projection: The matrix that is given `z`, below a layer.
        config: What its config is made with.
    """

    layers: str
    norm: str
    attn: tuple[str, ...]
    mlp: tuple[str, ...]
    projection: str | None = None
    unembed: str = "lm_head"
    scale: float = 1.0
    cap: float | None = None
    logits_scale: float = 1.0
    config: Mapping = field(default_factory=dict)


NEWEST = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 10)
_LLAMA = ("model.layers", "model.norm", ("self_attn",), ("mlp",), "self_attn.o_proj")
_POST = ("post_attention_layernorm",), ("post_feedforward_layernorm",), "self_attn.o_proj"
FAMILIES = {
    "gpt2": Raw("transformer.h", "transformer.ln_f", ("attn",), ("mlp",), "attn.c_proj"),
    "llama": Raw(*_LLAMA, config={"num_attention_heads": 4, "num_key_value_heads": 2}),
    # Before transformers 5.23, its sdpa leaves out the soft cap of the scores.
    "gemma2": Raw("model.layers", "model.norm", *_POST, cap=30.0, config={"attn_implementation": "eager"}),
    "falcon": Raw("transformer.h", "transformer.ln_f", ("self_attention",), ("mlp",), "self_attention.dense"),
    "bloom": Raw(
        "transformer.h", "transformer.ln_f", ("self_attention.dense",), ("mlp.dense_4h_to_h",), "self_attention.dense"
    ),
    "granite": Raw(
        *_LLAMA, scale=0.22, logits_scale=0.125, config={"residual_multiplier": 0.22, "logits_scaling": 8.0}
    ),
    "gpt_neox": Raw(
        *("gpt_neox.layers", "gpt_neox.final_layer_norm", ("attention",), ("mlp",), "attention.dense"),
        unembed="lm_head" if NEWEST else "embed_out",
    ),
    "mixtral": Raw(*_LLAMA),
    "olmo2": Raw("model.layers", "model.norm", *_POST),
    "bert": Raw(
        "bert.encoder.layer", "", ("attention.output.dense",), ("output.dense",), "attention.output.dense", "cls"
    ),
    "falcon_h1": Raw(
        "model.layers", "model.final_layernorm", ("mamba", "self_attn"), ("feed_forward",), "self_attn.o_proj"
    ),
    "mamba": Raw("backbone.layers", "backbone.norm_f", ("mixer",), ()),
}
WITHOUT_ROWS = set() if NEWEST else {"falcon_h1"}  # which older transformers can't run on fake tensors
ATTENDING = [name for name, raw in FAMILIES.items() if raw.projection is not None]
every = pytest.mark.parametrize("name", FAMILIES)
PLAIN = [name for name in FAMILIES if name != "bert"]  # no norm is applied to the whole stream
IN_PLACE = {"falcon": "mlp"}  # what the model adds to itself afterwards


@cache
def model_of(name: str) -> LanguageModel:
    return quietly(name, **FAMILIES[name].config)


def fresh(name: str) -> LanguageModel:
    """Another wrapper of the same weights, for a test that changes it."""
    return LanguageModel(model_of(name)._module)


def given(model: LanguageModel, seed: int = 0) -> tuple[torch.Tensor, dict]:
    return tiny_ids(model._module, seed=seed)


def trace(model: LanguageModel, seed: int = 0):
    ids, others = given(model, seed)
    return model.trace(ids, **others)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def quietly(kind: str, change: Callable = lambda config: None, n_layers: int = 3, **options) -> LanguageModel:
    """A tiny model of a config's defaults, some of which deserve a remark that isn't about us."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        config = CONFIG_MAPPING[kind](**options)
        change(config)
        return LanguageModel(tiny_model(config, n_layers=n_layers))
    finally:
        transformers.logging.set_verbosity(level)


def first(value):
    return value[0] if isinstance(value, tuple) else value


def with_first(value, new):
    return (new, *value[1:]) if isinstance(value, tuple) else new


def hooked(
    model: LanguageModel, seed: int = 0, outputs: Mapping[str, Callable] = {}, inputs: Mapping[str, Callable] = {}
):
    """The logits by plain torch hooks, each given the first tensor of a module's output or input.

    What they return takes its place; None leaves it.
    """
    ids, others = given(model, seed)
    module, handles = model._module, []
    for path, change in outputs.items():

        def after(_, __, output, change=change):
            new = change(first(output))
            return None if new is None else with_first(output, new)

        handles.append(module.get_submodule(path).register_forward_hook(after))
    for path, change in inputs.items():

        def before(_, args, kwargs, change=change):
            if args:
                new = change(args[0])
                return None if new is None else ((new, *args[1:]), kwargs)
            name = next(iter(kwargs))
            new = change(kwargs[name])
            return None if new is None else (args, {**kwargs, name: new})

        handles.append(module.get_submodule(path).register_forward_pre_hook(before, with_kwargs=True))
    try:
        with torch.no_grad():
            return module(ids, **others).logits
    finally:
        for handle in handles:
            handle.remove()


def passing(model: LanguageModel, path: str, change: Callable | None = None):
    """What a module returns by a plain hook, and the logits with their graph.

    What `change` makes of it takes its place, and comes second.
    """
    module, found = model._module, []
    ids, others = given(model)

    def after(_, __, output):
        found.append(first(output))
        if change is None:
            return None
        found.append(change(first(output)))
        return with_first(output, found[1])

    handle = module.get_submodule(path).register_forward_hook(after)
    try:
        return found, module(**{module.main_input_name: ids}, **others).logits
    finally:
        handle.remove()


def seen(model: LanguageModel, *paths: str, seed: int = 0) -> list[torch.Tensor]:
    """Copies of the first tensors that modules return, by plain torch hooks."""
    found: dict[str, torch.Tensor] = {}

    def note(path):
        return lambda value: found.__setitem__(path, value.clone())

    hooked(model, seed, {path: note(path) for path in paths})
    return [found[path] for path in paths]
