"""What is done to a model before its weights are there is not lost: they are loaded first, or it is refused."""

import copy
import pickle

import pytest
import tiny
import torch
import transformers
from torch import nn

import nnsight
from nnsight import LanguageModel, errors

P = tiny.PROMPT


@pytest.fixture
def unloaded(folder):
    model = LanguageModel(str(folder))
    assert model.device.type == "meta"
    return model


def test_a_hook_is_heard_and_can_be_removed(unloaded):
    seen = []
    handle = unloaded.transformer.h[1].register_forward_hook(lambda *_: seen.append(1))
    unloaded.trace(P, trace=False)
    handle.remove()
    unloaded.trace(P, trace=False)
    assert seen == [1]


METHODS = {
    "train": (lambda model: model.train(), lambda model: model.training),
    "requires_grad_": (
        lambda model: model.requires_grad_(False),
        lambda model: not any(one.requires_grad for one in model._module.parameters()),
    ),
    "freezing one by one": (
        lambda model: [one.requires_grad_(False) for one in model.parameters()],
        lambda model: not any(one.requires_grad for one in model._module.parameters()),
    ),
    "of a part": (
        lambda model: model.transformer.h[0].requires_grad_(False),
        lambda model: not model.transformer.h[0].mlp.c_fc.weight.requires_grad,
    ),
    "half precision": (lambda model: model.bfloat16(), lambda model: model.lm_head.weight.dtype == torch.bfloat16),
    "to a dtype": (lambda model: model.to(torch.float64), lambda model: model.lm_head.weight.dtype == torch.float64),
    "to a device": (lambda model: model.to("cpu"), lambda model: model.device.type == "cpu"),
    "cpu": (lambda model: model.cpu(), lambda model: model.device.type == "cpu"),
    "attention": (
        lambda model: model.set_attn_implementation("eager"),
        lambda model: model.config._attn_implementation == "eager",
    ),
    "state_dict": (lambda model: model.state_dict(), lambda model: model.device.type == "cpu"),
    "an attribute": (lambda model: setattr(model, "name_or_path", "mine"), lambda model: model.name_or_path == "mine"),
    "a module exchanged": (
        lambda model: setattr(model.transformer.h[1], "mlp", nn.Identity()),
        lambda model: type(model._module.transformer.h[1].mlp) is nn.Identity,
    ),
    "a module attached": (
        lambda model: setattr(model, "sae", nn.Identity()),
        lambda model: type(model._module.sae) is nn.Identity,
    ),
    "a module taken out": (
        lambda model: delattr(model.transformer, "drop"),
        lambda model: "drop" not in model._module.transformer._modules,
    ),
    "the config": (lambda model: setattr(model.config, "mine", 3), lambda model: model.config.mine == 3),
    "what generation does": (
        lambda model: setattr(model.generation_config, "max_length", 5),
        lambda model: model.generation_config.max_length == 5,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_done_is_done_to_the_model_that_has_weights(unloaded, name):
    do, was_done = METHODS[name]
    do(unloaded)
    unloaded.dispatch()
    assert was_done(unloaded)


def test_looking_at_how_a_model_is_built_loads_nothing(unloaded):
    repr(unloaded)
    assert [name for name, _ in unloaded.named_modules()][1] == "model.transformer"
    assert unloaded.get_input_embeddings() is unloaded.transformer.wte._module
    assert unloaded.num_parameters() > 0
    assert unloaded.lm_head.weight.shape[0] == unloaded.config.vocab_size
    assert unloaded.train.__name__ == "train"  # asked for, as an editor does, and not called
    with unloaded.scan(P):
        unloaded.transformer.h[0].output
        unloaded.transformer.wte.num_embeddings
    assert unloaded.device.type == "meta"


def test_the_tree_is_the_same_with_weights(unloaded):
    part = unloaded.transformer.h[1]
    unloaded.requires_grad_(False)
    with unloaded.trace(P):
        assert part.output is unloaded.transformer.h[1].output
    assert part is unloaded.transformer.h[1]


def change_weight(model):
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.zero_()


BY_HAND = {
    r"`transformer.h.0.mlp.c_fc.weight` was changed": change_weight,
    r"Whether `lm_head.weight|transformer.wte.weight` has a gradient": lambda model: (
        model.lm_head.weight.requires_grad_(False)
    ),
    r"`transformer.wte.weight` was cast": lambda model: model._module.bfloat16(),
    r"`transformer.h.0.mlp.c_fc.weight` was exchanged": lambda model: setattr(
        model._module.transformer.h[0].mlp.c_fc, "weight", nn.Parameter(torch.zeros(2))
    ),
    r"`model` was set to training": lambda model: model._module.train(),
    r"A hook was put on `transformer.h.0`": lambda model: model._model.transformer.h[0].register_forward_hook(print),
    r"`forward` of `transformer.h.0.mlp` was exchanged": lambda model: setattr(
        model._module.transformer.h[0].mlp, "forward", torch.zeros_like
    ),
    r"A hook was put on `transformer.h.0.mlp.c_fc.bias`": lambda model: model.transformer.h[
        0
    ].mlp.c_fc.bias.register_hook(print),
    r"A hook was put on `transformer.h.0.mlp.c_fc.weight`": lambda model: model.transformer.h[
        0
    ].mlp.c_fc.weight.register_post_accumulate_grad_hook(print),
    r"`transformer.h.0.mlp` was exchanged": lambda model: setattr(model._module.transformer.h[0], "mlp", nn.Identity()),
}


@pytest.mark.parametrize("told", BY_HAND)
def test_what_would_be_lost_is_refused(unloaded, told):
    BY_HAND[told](unloaded)
    with pytest.raises(
        errors.ModelError, match=told + r"(.|\n)*before the weights were loaded(.|\n)*model.dispatch\(\)"
    ):
        unloaded.trace(P, trace=False)


def mamba():
    """Its class puts a hook for loading on one of its modules."""
    config = transformers.MambaConfig(vocab_size=320, hidden_size=16, state_size=4, num_hidden_layers=1)
    return transformers.MambaForCausalLM(config)


def wav2vec2():
    """Its class makes a weight of two, by a parametrization that has hooks for loading."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    convs = {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    return transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(vocab_size=32, **sizes, **convs))


@pytest.mark.parametrize(
    ("build", "copied"),
    [
        *((build, copied) for build in (mamba, wav2vec2) for copied in (lambda model: model, copy.deepcopy)),
        (mamba, lambda model: pickle.loads(pickle.dumps(model))),  # torch pickles no parametrizations
    ],
)
def test_what_a_class_does_to_its_modules_itself_is_no_change(tmp_path, build, copied):
    whole = build()
    whole.save_pretrained(tmp_path)
    model = copied(nnsight.TransformersModel(str(tmp_path)))
    model.dispatch()
    assert all(torch.equal(mine, there) for mine, there in zip(model.parameters(), whole.parameters(), strict=True))


def test_a_view_of_an_unloaded_model_is_loaded_with_it(unloaded):
    with unloaded.edit() as edited:
        edited.transformer.h[0].mlp.output[:] = 0
    edited.requires_grad_(False)
    assert unloaded.device.type == edited.device.type == "cpu"
    assert not unloaded.lm_head.weight.requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_unloaded_model_is_one_too(unloaded, copied):
    unloaded.config.mine = 3
    unloaded.sae = nn.Linear(2, 2)
    other = copied(unloaded)
    assert other.device.type == "meta"
    other.train()
    assert other.training
    assert other.config.mine == 3
    assert torch.equal(other.sae.weight, unloaded.sae.weight)
    assert unloaded.device.type == "meta"
    unloaded.dispatch()
    assert torch.equal(other.lm_head.weight, unloaded.lm_head.weight)


def test_inputs_that_were_moved_to_its_device_have_no_numbers(unloaded, tokenizer):
    encoded = tokenizer(P, return_tensors="pt").to(unloaded.device)
    for args, kwargs in (((encoded,), {}), ((encoded["input_ids"],), {}), ((), dict(encoded))):
        for run in (unloaded.trace, unloaded.generate):
            with pytest.raises(errors.InputError, match="has no numbers: it is on `meta`"):
                run(*args, **kwargs)
        with pytest.raises(errors.InputError, match="has no numbers"), unloaded.trace() as tracer:
            tracer.invoke(*args, **kwargs)
    assert not unloaded.dispatched
    unloaded.dispatch()
    with pytest.raises(errors.InputError, match="has no numbers"):
        unloaded.trace(encoded)
    encoded = tokenizer(P, return_tensors="pt").to(unloaded.device)
    assert torch.equal(unloaded.trace(encoded, trace=False).logits, unloaded.trace(P, trace=False).logits)


WITHOUT_NUMBERS = {
    "a product": lambda hidden, weight: hidden @ weight.T,
    "a layer's": torch.nn.functional.linear,
    "a sum": lambda hidden, weight: hidden + weight[3],
    "a sum in place": lambda hidden, weight: hidden.add_(weight[3]),
    "an item": lambda hidden, weight: hidden.__setitem__((0, -1), weight.detach().clone()[3]),
    "places": lambda hidden, weight: hidden.index_put_((torch.tensor([0]),), weight[:1]),
    "a list of them": lambda hidden, weight: torch.cat([hidden[0], weight.data]),
}


@pytest.mark.parametrize("use", WITHOUT_NUMBERS)
def test_a_weight_that_was_read_before_it_was_loaded_is_refused_where_it_meets_numbers(unloaded, use):
    """Of some of these, torch makes what happened to be in memory, and of others nothing at all."""
    weight = unloaded.lm_head.weight
    told = "`lm_head.weight` was read before the weights were loaded, and has no numbers"
    with pytest.raises(errors.ModelError, match=told), unloaded.trace(P):
        WITHOUT_NUMBERS[use](unloaded.transformer.ln_f.output, weight)
    with unloaded.trace(P):
        hidden = unloaded.transformer.ln_f.output
        logits = hidden @ unloaded.lm_head.weight.T
    with pytest.raises(errors.ModelError, match=told):
        WITHOUT_NUMBERS[use](hidden, weight)
    assert torch.equal(logits, hidden @ unloaded.lm_head.weight.T)


def test_weights_under_uniform_names_are_such_weights(unloaded):
    direction, matrix = unloaded.W_U[:, 3], unloaded.layers[1].attn.W_V
    hidden = torch.ones(1, 16)
    with pytest.raises(errors.ModelError, match=r"`lm_head.weight` was read before(.|\n)*model.dispatch\(\)"):
        hidden @ direction
    with pytest.raises(errors.ModelError, match=r"`transformer.h.1.attn.c_attn.weight` was read before"):
        hidden @ matrix


def test_such_a_weight_is_a_parameter_with_all_that_it_has_without_numbers(unloaded):
    weight = unloaded.lm_head.weight
    assert weight is unloaded._module.lm_head.weight
    assert isinstance(weight, nn.Parameter)
    assert weight.shape == unloaded.W_U.T.shape
    assert (weight @ weight.T).shape == (weight.shape[0],) * 2
    assert torch.zeros_like(weight, device="cpu").sum() == 0
    for copied in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert type(copied) is nn.Parameter
        assert copied.shape == weight.shape
    with pytest.raises(NotImplementedError) as raised:
        weight.cpu()
    assert "`lm_head.weight` was read before" in raised.value.__notes__[0]
    assert unloaded.transformer.h[1].attn.c_attn.weight.shape[0] == unloaded.layers[1].attn.W_Q.shape[1]
    with unloaded.scan(P):
        shape = unloaded.lm_head.output.shape
    with pytest.raises(errors.ModelError, match="was read before"), unloaded.scan(P):
        unloaded.transformer.ln_f.output @ weight.T
    assert unloaded.device.type == "meta"
    assert shape == unloaded.trace(P, trace=False).logits.shape
