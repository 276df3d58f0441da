"""Operations through a row and through an invoke: what the prompt has alone, or a refusal with the reason."""

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

import nnsight
from nnsight import LanguageModel, NNsight
from nnsight.anatomy.tiny import tiny_model
from nnsight.core import measuring
from nnsight.core.values import leaves_of

SHORT, LONG = "Water is", "The Eiffel Tower is in"


@pytest.fixture(scope="module")
def demo():
    return LanguageModel("nnsight/demo", dispatch=True, attn_implementation="eager")


def operations_of(demo):
    """In the order of the forward: inside it, inside what it calls, and behind that."""
    source = demo.transformer.h[1].attn.source
    yield source.query_states_1
    inner = source.attention_interface_1.source  # which runs the model up to that call
    yield inner.nn_functional_softmax_0
    yield inner.attn_output_0
    yield source.attn_output_1


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def alone(demo):
    with demo.trace(SHORT):
        return [operation.output for operation in operations_of(demo)]


def test_a_row_has_of_each_operation_what_its_prompt_has_alone(demo, alone):
    with demo.trace([LONG, SHORT]) as (_, b):
        own = [operation.output for operation in operations_of(b)]
    for value, expected in zip(own, alone, strict=True):
        assert value.shape == expected.shape
        close(value, expected)


def test_an_invoke_has_of_each_operation_what_its_prompt_has_alone(demo, alone):
    with demo.trace() as tracer:
        with tracer.invoke(LONG):
            longer = [operation.output.shape for operation in operations_of(demo)]
        with tracer.invoke(SHORT):
            own = [operation.output for operation in operations_of(demo)]
    for value, expected, other in zip(own, alone, longer, strict=True):
        close(value, expected)
        assert other != value.shape


@pytest.mark.parametrize("name", ["z", "pattern", "source"])
def test_what_is_inside_a_layer_is_measured_in_all_layers_at_once(monkeypatch, name):
    model = LanguageModel("nnsight/demo", dispatch=True, attn_implementation="eager")

    def inside(model):
        for layer, uniform in zip(model.transformer.h, model.layers, strict=True):
            yield layer.attn.source.attn_output_1.output if name == "source" else getattr(uniform.attn, name)

    with torch.no_grad(), model.trace(SHORT):
        expected = list(inside(model))

    made = []
    monkeypatch.setattr(measuring, "Twin", lambda *given, real=measuring.Twin: made.append(given) or real(*given))
    for _ in range(2):
        with torch.no_grad(), model.trace([LONG, SHORT]) as (_, b):
            own = list(inside(b))
        assert len(made) == 1
        for value, alone in zip(own, expected, strict=True):
            assert value.shape == alone.shape
            close(value, alone)


def test_a_layer_with_a_forward_of_its_own_does_not_hinder_the_others():
    class Layer(nn.Module):
        def forward(self, x):
            y = x * 2
            return y + x

    model = nn.Sequential(Layer(), Layer(), Layer())
    model[1].forward = torch.relu  # without source
    with NNsight(model).trace(torch.ones(2, 3)) as (_, b):
        values = [b[0].source.y_0.output, b[2].source.y_0.output]
    assert [value.tolist() for value in values] == [[[2.0] * 3], [[6.0] * 3]]


def test_layers_of_one_class_that_do_not_do_the_same_are_measured_each():
    class Layer(nn.Module):
        def __init__(self, turns):
            super().__init__()
            self.turns = turns

        def forward(self, x):
            y = x.T if self.turns else x
            z = y * 2
            return z.T if self.turns else z

    x = torch.arange(6.0).view(2, 3)
    with NNsight(nn.Sequential(Layer(False), Layer(True))).trace(x) as (_, b):
        values = [b[0].source.z_0.output, b[1].source.z_0.output]
    assert torch.equal(values[0], x[1:] * 2)
    assert torch.equal(values[1], (x[1:] * 4).T)


def test_a_write_of_a_row_changes_that_prompt_alone(demo):
    def flat(model):
        attention = model.transformer.h[1].attn.source.attention_interface_1.source
        pattern = attention.nn_functional_softmax_0.output
        attention.nn_functional_softmax_0.output = torch.full_like(pattern, 1 / pattern.shape[-1])

    def last(logits):
        return logits[0, -1]

    with demo.trace(SHORT):
        flat(demo)
        expected = last(demo.lm_head.output)
    with demo.trace(LONG):
        untouched = last(demo.lm_head.output)
    with demo.trace([LONG, SHORT]) as (a, b):
        flat(b)
        found = last(b.lm_head.output), last(a.lm_head.output)
    close(found[0], expected)
    close(found[1], untouched)
    with demo.trace() as tracer:
        with tracer.invoke(LONG):
            other = last(demo.lm_head.output)
        with tracer.invoke(SHORT):
            flat(demo)
            own = last(demo.lm_head.output)
    close(own, expected)
    close(other, untouched)


def test_inputs_and_inplace_changes_of_a_row(demo):
    with demo.trace(SHORT):
        projected = demo.transformer.h[1].attn.source.self_c_proj_0
        expected = projected.input
        projected.output[:, -1] = 0
        logits = demo.lm_head.output[0, -1]
    with demo.trace([LONG, SHORT]) as (_, b):
        projected = b.transformer.h[1].attn.source.self_c_proj_0
        close(projected.input, expected)
        projected.output[:, -1] = 0
        close(b.lm_head.output[0, -1], logits)


def test_operations_of_a_row_in_each_step(demo):
    options = {"max_new_tokens": 3, "min_new_tokens": 3}

    def patterns(model, tracer):
        attention = model.transformer.h[1].attn.source.attention_interface_1.source
        return [attention.nn_functional_softmax_0.output for _step in tracer.iter[:]]

    with demo.generate(SHORT, **options) as tracer:
        expected = patterns(demo, tracer)
    with demo.generate([LONG, SHORT], **options) as (_, b):
        found = patterns(b, b.tracer)
    for one, other in zip(found, expected, strict=True):
        close(one, other)


def test_an_axis_that_cant_be_told_is_refused_with_the_reason():
    class Folds(nn.Module):
        def forward(self, x):
            folded = x.repeat(2, 1)
            kept = torch.tanh(folded)
            return kept[: len(x)]

    model = nnsight.NNsight(nn.Sequential(Folds()))
    x = torch.arange(6.0).view(3, 2)
    with pytest.raises(nnsight.errors.RowError, match=r"follows neither rows nor tokens"), model.trace(x) as tracer:
        tracer.rows[1][0].source.kept_0.output
    with model.trace(x) as tracer:
        whole = tracer.model[0].source.kept_0.output
    assert whole.shape == (6, 2)


def test_a_row_cant_skip_an_operation(demo):
    with pytest.raises(nnsight.errors.RowError, match="was not skipped for row 0"), demo.trace([LONG, SHORT]) as (_, b):
        b.transformer.h[1].attn.source.self_c_proj_0.skip(torch.zeros(1))


@pytest.mark.slow
@pytest.mark.parametrize("other", [[8, 9, 10, 11], [8, 9, 10, 11, 12, 13, 14]])
def test_where_tokens_are_gone_through_in_chunks_a_row_of_a_padded_batch_is_refused(other):
    """Qwen3-Next fills prompts up to 64 tokens, behind the padding: there rows began with that."""
    model = LanguageModel(tiny_model(CONFIG_MAPPING["qwen3_next"](), n_layers=2))
    prompt, options = [4, 5, 6, 7], {"use_cache": False}

    def source_of(model):
        source = model.model.layers[0].linear_attn.source
        called = {"torch_chunk_gated_delta_rule_0", "self_chunk_gated_delta_rule_0"} & {*source.names}
        return getattr(source, called.pop()).source

    with torch.no_grad(), model.trace([prompt], **options):
        names = list(source_of(model).names)
    refused = 0
    for name in names:
        with torch.no_grad(), model.trace([prompt], **options):
            try:
                expected = getattr(source_of(model), name).output
            except nnsight.errors.Error:  # not called with these inputs
                continue
        try:
            with torch.no_grad(), model.trace([prompt, other], **options) as (row, _):
                found = getattr(source_of(row), name).output
        except nnsight.errors.RowError as error:
            refused += "gone through in chunks there" in str(error)
            continue
        for one, alone in zip(leaves_of(found), leaves_of(expected), strict=True):
            if isinstance(alone, torch.Tensor):
                close(one, alone)
    assert refused > 20 if len(other) > len(prompt) else not refused
