"""What uniform names refuse, and what to write instead."""

import copy

import families
import pytest
import torch
import transformers
from architectures import IDS, SMALL, hooked, model_of, trace

from comparing import same
from nnsight import LanguageModel
from nnsight.errors import (
    AlreadyPastError,
    AnatomyError,
    NotOnThisLayerError,
    OutsideTraceError,
    UnknownIndexError,
    UnknownNameError,
    WriteError,
)

# Mistakes.


def test_there_is_no_such_layer():
    model = model_of("gpt2")
    with pytest.raises(UnknownIndexError, match=r"There is no layer 3\.[\s\S]*3 layers: 0 to 2, or -3 to -1"):
        model.layers[3]
    with pytest.raises(IndexError, match="There is no layer -4"):
        model.layers[-4]
    assert [layer.index for layer in model.layers[1:]] == [1, 2]
    assert model.layers[1:][-1].index == 2


def test_a_misspelt_name_has_the_nearest():
    model = model_of("gpt2")
    with pytest.raises(UnknownNameError, match=r"nearest\s+`pattern`"):
        model.layers[1].attn.patern
    with pytest.raises(UnknownNameError, match="output"):
        model.layers[1].attn.ouput = torch.zeros(1)
    with pytest.raises(AttributeError, match="has no `layer`"):
        model.layer
    with trace(model), pytest.raises(UnknownNameError, match="has no `ouput`"):
        model.layers[1].ouput = torch.zeros(1)


def test_a_layer_that_is_assigned_is_told_with_what_to_write():
    model = copy.deepcopy(model_of("gpt2"))
    text = r"layers\[1\]\.output = \.\.\., or for another module model\.get\('transformer\.h'\)\[1\] = "
    with pytest.raises(WriteError, match=text):
        model.layers[1] = torch.nn.Identity()
    with pytest.raises(UnknownIndexError):
        model.layers[9] = torch.nn.Identity()
    model.get("transformer.h")[1] = torch.nn.Identity()
    assert type(model._module.transformer.h[1]) is torch.nn.Identity


def test_a_name_that_is_further_in_is_told_with_where_it_is():
    model = model_of("gpt2")
    with pytest.raises(UnknownNameError, match="has no `z`") as caught:
        model.layers[1].z
    assert caught.value.__notes__ == ["`model.layers[1].attn.z` is one."]
    with pytest.raises(UnknownNameError, match="has no `act`") as caught:
        model.layers[1].act
    assert caught.value.__notes__ == ["`model.layers[1].mlp.act` is one."]
    with pytest.raises(UnknownNameError, match=r"it is all of them\.[\s\S]*\[layer\.attn for layer in model\.layers\]"):
        model.layers.attn


ELSEWHERE = {
    "mlp.skip": "model.transformer.h[1].mlp.skip",
    "mlp.c_fc": "model.transformer.h[1].mlp.c_fc",
    "attn.c_attn": "model.layers[1].attn.module.c_attn",
    "attn.inputs": "model.layers[1].attn.module.inputs",
    "mlp.W_O": "model.layers[1].attn.W_O",
    "attn.W_out": "model.layers[1].mlp.W_out",
    "attn.W_U": "model.W_U",
    "attn.weights": "model.layers[1].attn.pattern",
    "attn.heads": "model.layers[1].attn.z[:, :, head]",
    "mlp.neurons": "model.layers[1].mlp.act",
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_name_that_stands_elsewhere_is_told_with_the_place(name):
    """Nothing is read to find it: outside of a trace, too."""
    part, _, last = name.partition(".")
    with pytest.raises(UnknownNameError) as caught:
        getattr(getattr(model_of("gpt2").layers[1], part), last)
    assert str(caught.value).endswith(f"instead     {ELSEWHERE[name]}")


def test_a_name_of_the_models_on_a_layer_is_told():
    with pytest.raises(UnknownNameError) as caught:
        model_of("gpt2").layers[1].W_U
    assert caught.value.__notes__ == ["`model.W_U` is one."]


NO_TENSOR = {
    "m.layers[1].attn.output = 0": r"not an int.*instead +`\[:\] = 0` behind that name",
    "m.layers[1].attn.z = 0.5": r"not a float.*instead +`\[:\] = 0.5` behind that name",
    "m.layers[1].attn.result = False": r"not a bool.*instead +`\[:\] = False` behind that name",
    "m.layers[1].output = [m.layers[0].output, m.layers[1].output]": r"not a list.*torch.stack\(tensors\)$",
    "m.layers[1].attn.output = m.transformer.h[1].attn.output": r"not a tuple.*its first item, value\[0\]$",
    "m.layers[1].output = m.layers[1].output.detach().numpy()": r"not an ndarray.*torch.as_tensor\(value\)$",
    "m.project([m.layers[0].output])": r"What `model.project` is given is a tensor, not a list",
    "m.layers[1].output = 'zero'": r"is a tensor, not a str.*you wrote",
}


@pytest.mark.parametrize("line", NO_TENSOR)
def test_what_is_no_tensor_is_refused_with_what_to_write(line):
    with pytest.raises(WriteError, match="(?s)" + NO_TENSOR[line]):
        exec(f"with m.trace(ids):\n    {line}", {"m": model_of("gpt2"), "ids": IDS})


def test_a_layer_is_called_as_its_module_is():
    model = model_of("gpt2")
    hidden = torch.randn(1, 2, model.d_model)
    with torch.no_grad():
        found, expected = model.layers[1](hidden), model.layers[1].raw(hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_layers_that_are_added_later_are_layers_or_told():
    model = LanguageModel(families.build("llama"))
    assert model.n_layers == 2
    added = copy.deepcopy(model._module.model.layers[1])
    added.self_attn.layer_idx = 2
    model._module.model.layers.append(added)
    with pytest.raises(AnatomyError, match=r"config, by which they are found, counts 2(.|\n)*num_hidden_layers"):
        model.layers[-1]
    model.config.num_hidden_layers = 3
    with torch.no_grad(), model.trace(IDS):
        stream = model.layers[-1].output
    with torch.no_grad():
        expected = model._module.model(IDS, output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(model._module.model.norm(stream), expected.last_hidden_state)


def test_what_a_layer_lacks_is_not_on_it():
    model = model_of("mamba")
    with trace(model):
        with pytest.raises(NotOnThisLayerError, match=r"has no `attn\.pattern`: no attention is computed in it"):
            model.layers[1].attn.pattern
        with pytest.raises(NotOnThisLayerError, match="has no `mlp`: nothing in it works on each token alone"):
            model.layers[1].mlp.output
        with pytest.raises(NotOnThisLayerError):
            model.layers[1].mlp.output = torch.zeros(1)
    assert len(model.layers.having("attn.pattern")) == 0
    assert len(model.layers.having("attn.output")) == 3
    assert repr(model.layers.having("mlp")) == "no layers"


@pytest.mark.parametrize("name", ["gpt2", "granite", "falcon_h1", "falcon"])
def test_only_a_tensor_of_the_values_shape_can_be_assigned(name):
    model = model_of(name)
    sites = [(1, None, "input"), (1, "attn", "output"), (1, "mlp", "output"), (1, None, "output")]
    if name == "falcon":
        sites = [(1, None, "input"), (1, "mlp", "output"), (1, None, "output")]
    with trace(model), torch.no_grad():
        for index, part, port in sites:
            node = model.layers[index] if part is None else getattr(model.layers[index], part)
            for wrong in (None, 3.0, (getattr(node, port),)):
                with pytest.raises(WriteError, match=f"is a tensor, not a {type(wrong).__name__}"):
                    setattr(node, port, wrong)
            with pytest.raises(WriteError, match="another shape"):
                setattr(node, port, getattr(node, port)[:, :-1])
        logits = model.logits
    same(logits, hooked(model))


def test_a_value_asked_for_too_late_is_past():
    model = model_of("gpt2")
    with trace(model), torch.no_grad():
        model.layers[1].output
        with pytest.raises(AlreadyPastError):
            model.layers[0].attn.output
        with pytest.raises(AlreadyPastError):
            model.layers[1].input = torch.zeros(2, 7, model.d_model)


@pytest.mark.parametrize("name", ["gpt2", "granite", "falcon_h1", "bert", "mamba"])
def test_outside_a_trace_there_are_no_values(name):
    model = model_of(name)
    nodes = [(model.layers[1], "input"), (model.layers[1], "output"), (model.layers[1].attn, "output")]
    for node, port in [*nodes, (model, "logits")]:
        with pytest.raises(OutsideTraceError):
            getattr(node, port)
        with pytest.raises(OutsideTraceError):
            setattr(node, port, torch.zeros(1))
    with trace(model) as tracer:
        scope = tracer.layers[1]
    with pytest.raises(OutsideTraceError, match="after the block"):
        scope.output


@pytest.mark.parametrize("name", ["norm", "layers", "embed", "n_layers", "W_E", "project"])
def test_a_name_that_is_no_value_can_not_be_assigned(name):
    model = model_of("gpt2")
    with trace(model) as tracer:
        for node in (model, model.uniform, tracer.model):
            with pytest.raises(WriteError, match=f"`{name}` is not a value that can be assigned"):
                setattr(node, name, torch.zeros(1))


def test_an_error_of_the_models_is_its_own():
    model = LanguageModel(transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL)).eval())
    model.uniform

    def broken(*_, **__):
        raise AttributeError("broken in the model")

    model._module.transformer.h[0].ln_1.forward = broken
    for read in (
        lambda: model.layers[1].output,
        lambda: model.layers[1].input,
        lambda: model.layers[1].attn.output,
        lambda: model.layers[1].attn.z,
        lambda: model.logits,
        lambda: model.uniform.logits,
    ):
        with pytest.raises(AttributeError, match="broken in the model"), model.trace([[1, 2, 3]]):
            read()
