"""`model.generator.output`, which the existing package has for `tracer.result` (PEER.md 1.7)."""

import warnings

import pytest
import tiny
import torch

import nnsight
from nnsight import LanguageModel, NNsight, TransformersModel, errors

PROMPT, OTHER = "The Eiffel Tower is in the city of", "The Colosseum is in the city of"
pytestmark = pytest.mark.filterwarnings("ignore:`model.generator.output` is deprecated:FutureWarning")


def test_it_is_the_result_of_the_generation_in_which_it_is_asked(demo):
    expected = demo.generate(PROMPT, max_new_tokens=3)
    with demo.generate(PROMPT, max_new_tokens=3) as tracer:
        hidden = demo.transformer.h[3].mlp.output
        result = demo.generator.output.save()
        assert tracer.generator.output is tracer.model.generator.output is result
        assert demo.get("generator.output") is result
    assert torch.equal(result, expected)
    assert hidden.shape[1] == 12
    with demo.generate(PROMPT, max_new_tokens=3) as one, demo.generate(OTHER, max_new_tokens=3):
        assert torch.equal(one.generator.output, expected)
        assert demo.generator.output.shape[1] == 13


def test_a_row_and_an_invoke_have_their_own(demo):
    alone = [demo.generate(prompt, max_new_tokens=3, min_new_tokens=3) for prompt in (PROMPT, OTHER)]
    with demo.generate([PROMPT, OTHER], max_new_tokens=3, min_new_tokens=3) as (a, b):
        rows = [a.generator.output, b.generator.output]
    with demo.generate(max_new_tokens=3, min_new_tokens=3) as tracer:
        with tracer.invoke(PROMPT):
            one = demo.generator.output
        with tracer.invoke(OTHER) as second:
            other = second.generator.output
        with tracer.invoke():
            whole = demo.generator.output
    for found in (rows, [one, other]):
        assert all(map(torch.equal, found, alone))
    assert whole.shape == (2, 15)


def test_what_is_assigned_is_the_result(demo):
    with demo.generate(PROMPT, max_new_tokens=2) as tracer:
        demo.generator.output = torch.zeros(1)
        assert torch.equal(tracer.result, torch.zeros(1))
    with demo.generate([PROMPT, PROMPT], max_new_tokens=2) as (a, b):
        a.generator.output = torch.zeros_like(b.generator.output)
        assert not a.tracer.result[0].any()
        assert a.tracer.result[1].any()


@pytest.mark.filterwarnings("always")
def test_it_says_what_to_write_once_for_each_line(demo):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(2):
            with demo.generate(PROMPT, max_new_tokens=1):
                demo.generator.output
                demo.generator.output = torch.zeros(1)
    assert [str(one.message) for one in told] == ["`model.generator.output` is deprecated: write `tracer.result`."] * 2
    assert {one.filename for one in told} == {__file__}
    assert {one.category for one in told} == {FutureWarning}


def test_a_streamer_and_other_names_and_one_forward_pass_are_answered_with_what_to_write(demo):
    with pytest.raises(errors.UnknownNameError, match=r"has no `streamer`(.|\n)*because +The token that a step has"):
        with demo.generate(PROMPT, max_new_tokens=2):
            demo.generator.streamer.output
    with pytest.raises(errors.UnknownNameError, match="has no `outptu`"):
        with demo.generate(PROMPT, max_new_tokens=2):
            demo.generator.outptu = 0
    with pytest.raises(errors.BlockError, match=r"one forward pass\.(.|\n)*instead +tracer.result"):
        with demo.trace(PROMPT):
            demo.generator.output
    with pytest.raises(errors.OutsideTraceError, match=r"`generator\.output` was asked for where no trace"):
        demo.generator.output
    assert not hasattr(demo.generator, "streamer")


def test_what_the_streamer_would_have_had_is_what_the_next_step_is_called_with(demo):
    with demo.generate(PROMPT, max_new_tokens=3, min_new_tokens=3) as tracer:
        tokens = [demo.inputs[1]["input_ids"][:, -1] for _ in tracer.iter[1:]]
        result = tracer.result
    assert torch.equal(torch.stack(tokens, dim=1), result[:, 12:-1])


def test_a_module_of_this_name_is_that_module(demo):
    class Speaks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.generator(x)

    with NNsight(Speaks()).trace(torch.ones(1, 2)) as tracer:
        assert tracer.generator.output.shape == (1, 2)
    module = tiny.build("gpt2")
    module.generator = module.lm_head
    tokenizer = tiny.make_tokenizer()
    for model in (
        LanguageModel(module, tokenizer=tokenizer),
        LanguageModel(tiny.build("gpt2"), tokenizer=tokenizer, rename={"lm_head": "generator"}),
    ):
        with model.generate(PROMPT, max_new_tokens=1) as tracer:
            assert tracer.generator.output.shape[-1] == 320
    model.other, late = torch.nn.Linear(16, 2), LanguageModel(tiny.build("gpt2"), tokenizer=tokenizer)
    late.generator = model.other._module
    assert late.generator._module is model.other._module


def test_a_model_that_can_t_generate_has_none():
    for model in (TransformersModel(tiny.build_other("bert")), nnsight.NNsight(torch.nn.Linear(2, 2))):
        with pytest.raises(errors.UnknownNameError, match="has no `generator`"):
            model.generator
