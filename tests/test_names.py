"""`rename=` gives modules further names, and `model.session()` changes nothing."""

import copy
import pickle

import pytest
import snapshots
import torch

import nnsight
import toys
from nnsight import errors
from nnsight.anatomy.uniform import Layers


def test_a_renamed_module_is_the_same_by_both_names(x, switch):
    module = toys.MLP()
    before = snapshots.of_model(module)
    model = nnsight.NNsight(module, rename={"layers": "blocks", "up": ["rise", "w1"], "layers.0": "first"})
    assert model.blocks is model.layers
    assert model.blocks[1].rise is model.layers[1].up is model.layers[1].w1
    assert model.first is model.layers[0]
    assert model.blocks[1].rise.path == "model.layers.1.up"
    assert model.get("blocks.2.w1") is model.layers[2].up
    with model.trace(x) as tracer:
        cache = tracer.cache(["blocks.0", model.blocks[1].rise])
        model.blocks[0].rise.output = torch.zeros(3, 4)
        inner = tracer.model.blocks[1].rise.output
        out = tracer.blocks[2].output
    assert torch.equal(cache.blocks[1].rise.output, inner)
    assert torch.equal(cache["layers.1.w1"].output, inner)
    assert cache["blocks.0"].path == "model.layers.0"
    assert len(cache.layers) == len(list(cache.blocks)) == 2
    with model.trace(x):
        model.layers[0].up.output = torch.zeros(3, 4)
        assert torch.equal(model.layers[2].output, out)
    assert not snapshots.differences(before, snapshots.of_model(module))


def test_keys_are_names_paths_stars_and_classes(x):
    rename = {".layers": "blocks", "layers.*": "only", torch.nn.Tanh: "act_fn"}
    model = nnsight.NNsight(toys.MLP(depth=1), rename=rename)
    assert model.blocks is model.layers
    assert model.only is model.layers[0]
    assert model.layers[0].act_fn is model.layers[0].act
    dotted = nnsight.NNsight(toys.MLP(), rename={"embed": "layers.before"})
    assert dotted.layers.before is dotted.embed


def test_names_are_kept_by_copies_scans_and_pickles(x):
    model = nnsight.NNsight(toys.MLP(), rename={"layers": "blocks"})
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.blocks is other.layers
        assert torch.equal(other(x), model(x))
    with model.scan(x) as tracer:
        cache = tracer.cache("blocks.*")
        assert model.blocks[0].output.shape == (3, 4)
    assert len(cache.blocks) == 3


@pytest.mark.parametrize(
    ("rename", "text"),
    [
        ({"layer": "blocks"}, "none of `layer`.*nearest +`layers`"),
        ({"layers.*": "first"}, "finds 3 modules below `model`"),
        ({"layers": "embed"}, "`embed` can't name .* is taken"),
        ({"layers": "output"}, "is taken"),
        ({"layers": "parameters"}, "is taken"),
        ({"layers": "blocks", "embed": "blocks"}, "is taken"),
        ({"layers": "blocks", "blocks": "all_of_them", "head": "all_of_them"}, "`all_of_them` can't name .* is taken"),
        ({"layers": "blocks", "blocks.0": "head"}, "`head` can't name .* is taken"),
        ({"layers": "blocks", "blocks.*": "first"}, "finds 3 modules below `model`"),
        ({"layers": "blocks", "embed": "elsewhere.blocks"}, "has no `elsewhere`"),
        ({"layers": "two words"}, "no name in Python"),
        ({"layers": "nowhere.blocks"}, "has no `nowhere`"),
        *[({"layers": name}, "is taken") for name in ("result", "iter", "rows", "cache", "stop", "tokens", "tracer")],
        *[({"layers": name}, "is taken") for name in ("all", "save", "invoke", "barrier", "positions", "lengths")],
        (["layers"], "a list is no mapping"),
        ("layers", "a str is no mapping"),
        ({0: "first"}, "0 is neither a name, a path nor a class"),
        ({"layers": 3}, "the new name of `layers` is a string, or a list of them, not 3"),
        ({"layers": ["blocks", None]}, "a string, or a list of them"),
    ],
)
def test_a_name_that_cannot_be_given_is_refused(rename, text):
    with pytest.raises(errors.RenameError, match=f"(?s){text}") as caught:
        nnsight.NNsight(toys.MLP(), rename=rename)
    assert isinstance(caught.value, ValueError)


def test_a_path_as_it_is_printed_is_found_and_so_is_one_that_is_called_model(x):
    model = nnsight.NNsight(toys.MLP(), rename={"model.layers": "blocks", "model.layers.0.up": "first"})
    assert model.blocks is model.layers
    assert model.first is model.layers[0].up
    llama = nnsight.NNsight(toys.MLP(), rename={"layers": "model"})
    with llama.trace(x) as tracer:
        assert llama.model[0].output.shape == tracer.model.model[1].output.shape == (3, 4)


def test_a_method_of_every_envoy_is_the_nearest_name_of_a_model_too(mlp):
    with pytest.raises(errors.UnknownNameError, match=r"nearest +`edit`"):
        mlp.edti


def test_further_names_are_completed_printed_and_the_nearest():
    model = nnsight.NNsight(toys.MLP(), rename={"layers": "blocks", "up": ["rise", "w1"], "layers.0": "first"})
    assert {"blocks", "first"} <= set(dir(model))
    assert "rise" in dir(model.layers[0])
    norm = repr(model.layers[0]._module.norm)  # in the words of the installed torch
    assert (
        repr(model)
        == f"""MLP(
  (embed): Linear(in_features=4, out_features=4, bias=True)
  (blocks/layers): ModuleList(
    (0-2): 3 x Layer(
      (norm): {norm}
      (rise/w1/up): Linear(in_features=4, out_features=4, bias=True)
      (act): Tanh()
      (down): Linear(in_features=4, out_features=4, bias=True)
    )
  )
  (head): Linear(in_features=4, out_features=4, bias=True)
  (first): layers.0
)"""
    )
    module = toys.MLP()
    assert repr(nnsight.NNsight(module)) == repr(module)
    assert repr(model.layers[0].norm) == repr(module.layers[0].norm)
    with pytest.raises(errors.UnknownNameError, match=r"(?s)nearest +`blocks`.*children +embed, blocks/layers, head"):
        model.block


def test_the_path_of_a_module_leads_to_it():
    model = nnsight.NNsight(toys.MLP())
    for envoy in model.modules():
        assert model[envoy.path] is model.get(envoy.path) is envoy
    outer = torch.nn.Module()
    outer.model, outer.head = toys.MLP(), torch.nn.Linear(4, 2)
    llama = nnsight.NNsight(outer)
    for envoy in llama.modules()[1:]:
        assert llama[envoy.path] is envoy
    assert llama["model.layers.0"] is llama.model.layers[0]
    with pytest.raises(errors.UnknownNameError, match="has no `model`"):
        model.layers["model.layers.0"]


def test_one_mapping_serves_models_that_have_only_some_of_its_names():
    model = nnsight.NNsight(toys.MLP(), rename={"layers": "blocks", "transformer.h": "blocks"})
    assert model.blocks is model.layers


KEYS = {"transformer": "model", "h": "layers", "model.layers": "layers", "layers.mlp": "nowhere"}


@pytest.mark.parametrize("keys", [[*KEYS], [*KEYS][::-1], ["model.layers", "transformer", "h"], ["h", "model.layers"]])
def test_keys_lead_through_other_names_in_any_order(keys):
    rename = {key: KEYS[key] for key in keys}
    model = nnsight.LanguageModel("nnsight/demo", rename=rename)
    blocks = model.transformer.h
    if "transformer" in keys:
        assert model.model is model.transformer
        assert model.layers is model.model.layers is model.transformer.layers is model.model.h is blocks
    else:
        assert model.transformer.layers is blocks
        assert isinstance(model.layers, Layers)  # the uniform name: `rename` gave none here
    assert model.get("transformer.h.0") is blocks[0]
    assert blocks[0].path == "model.transformer.h.0"


@pytest.mark.parametrize("turn", [1, -1])
def test_several_keys_may_give_one_module_one_name(turn):
    """Of one dict for many architectures, most keys find nothing, and several find the same."""
    body = ["transformer", "gpt_neox", "decoder"]
    ends = {"h": "layers", "blocks": "layers", "model.layers": "layers", "ln_f": "ln_final", "norm": "ln_final"}
    ends |= {
        "model.ln_final": "ln_final",
        "attn": "self_attn",
        "wte": "embed_tokens",
        "model.embed_tokens": "embed_tokens",
    }
    longer = {key.replace("model.", f"model.{name}."): new for key, new in ends.items() if "." in key for name in body}
    rename = dict([*{**dict.fromkeys(body, "model"), **ends, **longer}.items()][::turn])
    model = nnsight.LanguageModel("nnsight/demo", rename=rename)
    inner = model.transformer
    assert model.model is inner
    assert (model.layers, model.ln_final, model.embed_tokens) == (inner.h, inner.ln_f, inner.wte)
    assert model.layers[1].self_attn is inner.h[1].attn
    assert nnsight.NNsight(toys.MLP(), rename={"layers": "blocks", "blocks": "layers"}).blocks[0]
    assert nnsight.NNsight(toys.MLP(), rename={"layers": "layers"}).layers[0]


def test_a_new_name_may_lead_through_another(x):
    for rename in ({"embed": "blocks.before", "layers": "blocks"}, {"layers": "blocks", "embed": "blocks.before"}):
        model = nnsight.NNsight(toys.MLP(), rename=rename)
        assert model.blocks.before is model.layers.before is model.embed


def test_a_session_changes_nothing(mlp, x):
    with mlp.session() as session:
        with mlp.trace(x):
            hidden = mlp.layers[0].output.save()
        with mlp.trace(x):
            mlp.layers[0].output = hidden * 2
            out = mlp.output
        total = hidden.sum()
    assert total == hidden.sum()
    assert out.shape == (3, 4)
    assert repr(session) == "<session>"
    with pytest.raises(ZeroDivisionError), mlp.session():
        1 / 0
    with pytest.raises(errors.BlockError, match="remote="), mlp.session(remote=True):
        pass


# Attributes of an Envoy.


def test_an_attached_module_can_be_deleted(x):
    model = nnsight.NNsight(toys.MLP())
    model.sae, model.note = torch.nn.Linear(4, 4), "mine"
    assert model.sae(x).shape == (3, 4)
    del model.sae, model.note
    assert not hasattr(model, "sae")
    assert not hasattr(model._module, "sae")
    assert not hasattr(model, "note")
    assert "sae" not in repr(model)
    with pytest.raises(errors.UnknownNameError, match="has no `sae`"):
        del model.sae
    with model.trace(x) as tracer:
        assert tracer.result.shape == (3, 4)


@pytest.mark.parametrize("name", ["outptu", "ouput", "outputs", "imput", "skp", "sorce"])
def test_a_misspelt_write_outside_a_trace_is_no_attribute(name):
    model = nnsight.NNsight(toys.MLP())
    with pytest.raises(errors.UnknownNameError, match=f"(?s)has no `{name}`.*nearest"):
        setattr(model.layers[0], name, 3)
    model.layers[0].note = model.layers[0].out = 3
    assert model.layers[0].note == 3


def test_a_child_with_a_name_of_ours_is_completed():
    module = torch.nn.Module()
    module.output = torch.nn.Linear(2, 2)
    model = nnsight.NNsight(module)
    assert "E_output" in dir(model)
    assert model.E_output is model["output"]


# Other methods than the forward.


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)
        self.number = 3

    def forward(self, x):
        return self.inner(x)

    def encode(self, x, *, times=1):
        return self.inner(x) * times


def test_another_method_or_a_function_is_traced_by_fn(x, switch):
    model = nnsight.NNsight(Two())
    with model.trace(x, fn="encode", times=2) as tracer:
        inner = model.inner.output
        assert torch.equal(tracer.result, inner * 2)
    with model.trace(x, fn="encode") as (a, _b, _c):
        assert torch.equal(a.inner.output, inner[:1])
    with model.trace(x, fn=lambda given: model._module(given) + 1) as tracer:
        inner = model.inner.output
        model.inner.output = inner * 3
        assert torch.equal(tracer.result, inner * 3 + 1)
    with model.scan(x, fn="encode"):
        assert model.inner.output.shape == (3, 4)
    assert model.trace(x, fn="encode", times=2, trace=False).shape == (3, 4)


def test_what_fn_can_not_be_says_so(x):
    model = nnsight.NNsight(Two())
    with pytest.raises(errors.UnknownNameError, match=r"(?s)has no `encod`.*nearest +`encode`"):
        model.trace(x, fn="encod")
    for wrong in ("number", "inner.bias"):
        with pytest.raises(errors.UnknownNameError, match=f"has no `{wrong}`"):
            model.trace(x, fn=wrong)
    with pytest.raises(errors.InputError, match="`fn` is a method's name, or a function, not 3"):
        model.trace(x, fn=3)
    with pytest.raises(errors.InputError, match="A scan runs a copy"), model.scan(x, fn=lambda y: y):
        model.inner.output
    with (
        pytest.raises(errors.RowError, match="a function runs the model"),
        model.trace(x, fn=model._module) as (a, _, _),
    ):
        a.inner.output.shape
