"""`rename=` gives modules further names, and `model.session()` changes nothing."""

import copy
import pickle

import pytest
import snapshots
import torch

import nnsight
import toys
from nnsight import errors


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
        ({"layers": "two words"}, "no name in Python"),
        ({"layers": "nowhere.blocks"}, "has no `nowhere`"),
    ],
)
def test_a_name_that_cannot_be_given_is_refused(rename, text):
    with pytest.raises(errors.RenameError, match=f"(?s){text}") as caught:
        nnsight.NNsight(toys.MLP(), rename=rename)
    assert isinstance(caught.value, ValueError)


def test_one_mapping_serves_models_that_have_only_some_of_its_names():
    model = nnsight.NNsight(toys.MLP(), rename={"layers": "blocks", "transformer.h": "blocks"})
    assert model.blocks is model.layers


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
