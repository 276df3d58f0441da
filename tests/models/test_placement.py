"""Models whose weights accelerate keeps elsewhere, and models that run on several threads."""

import pytest
import tiny
import torch
from torch import nn

import toys
from nnsight import LanguageModel, NNsight, errors

accelerate = pytest.importorskip("accelerate")
P, Q = tiny.PROMPT, "The Colosseum is"


@pytest.fixture(params=["cpu_offload", "disk_offload"])
def offloaded(request, tokenizer, tmp_path):
    module = tiny.build("gpt2")
    place = {"offload_dir": str(tmp_path)} if request.param == "disk_offload" else {}
    getattr(accelerate, request.param)(module, execution_device=torch.device("cpu"), **place)
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    return LanguageModel(module, tokenizer=tokenizer)


def test_rows_of_an_offloaded_model_are_those_of_each_prompt(offloaded, gpt2, tokenizer):
    plain = LanguageModel(gpt2, tokenizer=tokenizer)
    with torch.no_grad(), offloaded.trace([P, Q]) as (a, b):
        hidden = [row.transformer.h[1].output for row in (a, b)]
        logits = [row.result.logits for row in (a, b)]
    for row, prompt in enumerate((P, Q)):
        with torch.no_grad(), plain.trace(prompt) as tracer:
            torch.testing.assert_close(hidden[row], tracer.transformer.h[1].output, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(logits[row], tracer.result.logits, rtol=1e-4, atol=1e-5)


def test_past_and_never_called_are_told_apart_in_an_offloaded_model(offloaded):
    with offloaded.trace(P):
        offloaded.transformer.h[1].output
        with pytest.raises(errors.AlreadyPastError, match="the model had run beyond it"):
            offloaded.transformer.h[0].output
    offloaded._module.extra = nn.Linear(4, 4)
    offloaded._tree.forget()
    with pytest.raises(errors.NeverCalledError), offloaded.trace(P):
        offloaded.extra.output


def test_a_weight_that_is_offloaded_has_its_values_in_a_block(offloaded, gpt2):
    with torch.no_grad(), offloaded.trace(P) as tracer:
        hidden = offloaded.transformer.h[0].mlp.output
        weight = offloaded.transformer.h[1].mlp.c_fc.weight
        by_hand = hidden @ tracer.transformer.h[1].mlp.c_fc.weight
    assert torch.equal(weight, gpt2.transformer.h[1].mlp.c_fc.weight)
    assert torch.equal(by_hand, hidden @ weight)
    assert {parameter.device.type for parameter in offloaded._module.parameters()} == {"meta"}


def test_a_data_parallel_is_refused_at_the_trace(x):
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where it keeps its module
    model, x = NNsight(nn.DataParallel(toys.MLP().to(place))), x.to(place)
    with pytest.raises(errors.ModelError, match="`model` is a DataParallel") as caught, model.trace(x):
        pass
    assert "NNsight(model.module)" in str(caught.value)
    with model.module.trace(x):
        assert model.module.layers[0].output.shape == x.shape
    nested = NNsight(nn.Sequential(nn.DataParallel(toys.MLP().to(place))))
    with pytest.raises(errors.ModelError, match=r"`0.module.head` is inside a DataParallel \(`0`\)"), nested.trace(x):
        nested.get("0.module.head").output
    with nested.trace(x):
        assert nested.get("0").output.shape == x.shape
