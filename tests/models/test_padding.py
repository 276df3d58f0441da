"""Law 4: a batch of prompts equals the prompts one by one."""

import pytest
import tiny
import torch

from nnsight import LanguageModel

PROMPTS = [tiny.PROMPT, "Rome", "The Colosseum is", "in"]
PADDED_LEFT = ["gpt2", "llama", "opt", "bloom", "gpt_neox", "mamba", "mixtral", "roberta"]
PADDED_RIGHT = ["rwkv", "bart"]  # they would count the padding as tokens


@pytest.fixture(scope="module", params=PADDED_LEFT + PADDED_RIGHT)
def named(request, tokenizer):
    return request.param, LanguageModel(tiny.build(request.param), tokenizer=tokenizer)


def logits_of(model, prompts, **kwargs):
    with torch.no_grad(), model.trace(prompts, **kwargs):
        mask = model.inputs[1]["attention_mask"]
        logits = model.output.logits
    return [row[hidden == 1] for row, hidden in zip(logits, mask, strict=True)]


def test_a_short_prompt_in_a_padded_batch_has_the_logits_it_has_alone(named):
    _, model = named
    for together, prompt in zip(logits_of(model, PROMPTS), PROMPTS, strict=True):
        torch.testing.assert_close(together, logits_of(model, prompt)[0], rtol=1e-4, atol=1e-5)


def test_padding_on_the_other_side_gives_the_same_where_it_can(named):
    name, model = named
    other = "left" if name in PADDED_RIGHT else "right"
    same = all(
        torch.allclose(together, logits_of(model, prompt)[0], rtol=1e-4, atol=1e-5)
        for together, prompt in zip(logits_of(model, PROMPTS, padding_side=other), PROMPTS, strict=True)
    )
    assert same == (name not in PADDED_RIGHT)


def test_a_batch_generates_what_its_prompts_generate_alone(named):
    name, model = named
    if name in PADDED_RIGHT:
        with pytest.raises(ValueError, match="it would go on from the padding"):
            model.generate(PROMPTS, max_new_tokens=3)
        return
    together = model.generate(PROMPTS, max_new_tokens=3, do_sample=False)
    for row, prompt in zip(together, PROMPTS, strict=True):
        alone = model.generate(prompt, max_new_tokens=3, do_sample=False)
        assert row[-3:].tolist() == alone[0, -3:].tolist()


def test_the_pad_id_is_one_that_the_model_has(gpt2):
    tokenizer = tiny.make_tokenizer(pad_token="<|pad|>")
    assert tokenizer.pad_token_id >= 320
    with LanguageModel(gpt2, tokenizer=tokenizer).trace([[5, 6], [7]]) as tracer:
        ids = tracer.inputs[1]["input_ids"]
    assert ids.tolist() == [[5, 6], [0, 7]]
