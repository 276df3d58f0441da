"""What can't be an input: each mistake has a text of its own, raised at the call, and the model runs afterwards."""

import pytest
import tiny
import torch
from tiny import PROMPT

from nnsight import LanguageModel, errors

CHAT = [{"role": "user", "content": "Rome"}]


def empty(tracer):
    """A trace without a prompt may still get some, with `tracer.invoke`, until its block ends."""
    with tracer:
        pass


MISTAKES = {
    "nothing": (lambda m: empty(m.trace()), "There is no input: GPT2LMHeadModel needs a prompt"),
    "nothing but an option": (lambda m: empty(m.trace(output_hidden_states=True)), "There is no input"),
    "nothing to generate from": (lambda m: m.generate(max_new_tokens=3), "There is no input"),
    "an empty prompt": (lambda m: m.trace(""), "The prompt is empty: it has zero tokens"),
    "an empty list": (lambda m: m.trace([]), "The list of prompts is empty"),
    "an empty prompt in a list": (lambda m: m.trace(["Rome", ""]), "Prompt 2 of 2 is empty"),
    "an empty row of ids": (lambda m: m.trace([[1, 2], []]), "Prompt 2 of 2 is empty"),
    "an empty tensor": (lambda m: m.trace(torch.zeros(0, 3, dtype=torch.long)), "The prompt is empty"),
    "two prompts by position": (
        lambda m: m.trace("Rome", "Paris"),
        r"(?s)takes one prompt, and 2.*\['Rome', 'Paris'\]",
    ),
    "a prompt twice": (
        lambda m: m.trace("Rome", input_ids=[[1]]),
        "two prompts: one by position, and one as `input_ids=",
    ),
    "two keyword prompts": (
        lambda m: m.trace(input_ids=[[1]], inputs_embeds=torch.zeros(1, 1, 16)),
        "two prompts: one as `input_ids=`, and one as `inputs_embeds=`",
    ),
    "a misspelt keyword": (
        lambda m: m.trace("Rome", output_hidden_state=True),
        "(?s)`output_hidden_state` is no input of GPT2LMHeadModel.*nearest +`output_hidden_states`",
    ),
    "a misspelt option": (
        lambda m: m.trace("Rome", trunkation=True),
        "(?s)`trunkation` is no input.*nearest +`truncation`",
    ),
    "a misspelt option of generation": (
        lambda m: m.generate("Rome", max_new_token=3),
        "(?s)`max_new_token` is no option of generation.*nearest +`max_new_tokens`",
    ),
    "an option of generation by another library's name": (
        lambda m: m.generate("Rome", max_tokens=3),
        "(?s)`max_tokens` is no option of generation.*nearest +`max_new_tokens`",
    ),
    "a misspelt keyword and no prompt": (
        lambda m: m.trace(output_hidden_state=True),
        "(?s)`output_hidden_state` is no input of GPT2LMHeadModel.*nearest +`output_hidden_states`",
    ),
    "generation in a trace": (
        lambda m: m.trace("Rome", max_new_tokens=3),
        r"(?s)`max_new_tokens` is an option of generation.*write +model.generate\(..., max_new_tokens=...\)",
    ),
    "generation in a scan": (
        lambda m: m.scan("Rome", max_new_tokens=3),
        r"(?s)`max_new_tokens` is an option of generation.*you wrote +lambda m: m.scan",
    ),
    "a length alone": (
        lambda m: m.trace("Rome", max_length=3),
        "(?s)`max_length` alone changes nothing.*truncation=True",
    ),
    "an id beyond the vocabulary": (
        lambda m: m.trace([1, 320]),
        "320 is not a token of GPT2LMHeadModel: its ids are 0 to 319",
    ),
    "a negative id": (lambda m: m.generate([-1, 2]), "-1 is not a token of"),
    "floats as ids": (
        lambda m: m.trace(torch.zeros(1, 3)),
        "(?s)`input_ids` holds integers, and this is a float32 Tensor.*embeds",
    ),
    "booleans as ids": (lambda m: m.trace(torch.ones(1, 3, dtype=torch.bool)), "`input_ids` holds integers.*bool"),
    "three dimensions": (lambda m: m.trace(torch.zeros(1, 2, 3, dtype=torch.long)), "and this has 3 dimensions"),
    "no dimension": (lambda m: m.trace(torch.tensor(3)), "and this has 0 dimensions"),
    "too many tokens": (
        lambda m: m.trace("Rome " * 40),
        "(?s)has positions for 32.*write +truncation=True, max_length=32",
    ),
    "a number": (lambda m: m.trace(3), "This int can't be read as a prompt"),
    "None": (lambda m: m.trace(None), "This NoneType can't be read as a prompt"),
    "a list of floats": (lambda m: m.trace([0.5]), "This list can't be read as a prompt"),
    "a mixed list": (lambda m: m.trace(["Rome", [1, 2]]), "the first is a string, and number 2 isn't"),
    "ids, then text": (
        lambda m: m.trace([[1, 2], "Rome"]),
        "`input_ids` is a list of integers, or a list of such lists",
    ),
    "words in rows": (lambda m: m.trace([["a", "b"]]), "`input_ids` is a list of integers"),
    "a dict without ids": (
        lambda m: m.trace({"labels": [1]}),
        "(?s)neither `input_ids` nor `inputs_embeds`.*it has +`labels`",
    ),
    "a dict with a strange name": (lambda m: m.trace({"input_ids": [1], "inputs_id": 2}), "`inputs_id` is no input"),
    "chat without a template": (lambda m: m.trace(CHAT), "has no chat template"),
    "an option for ids": (
        lambda m: m.trace([1, 2], truncation=True, max_length=1),
        "Ids don't go through the tokenizer",
    ),
    "an option for an encoding": (
        lambda m: m.trace({"input_ids": [1]}, add_special_tokens=False),
        "Tokenized inputs don't go through the tokenizer again",
    ),
    "an option for nothing": (lambda m: m.trace(input_ids=[1], truncation=True), "There is no text to tokenize"),
    "an option of chats for text": (lambda m: m.trace("Rome", tools=[]), "`tools` has no meaning for text"),
    "labels of another length": (
        lambda m: m.trace([1, 2, 3], labels=[1, 2]),
        r"(?s)one entry a token.*ids +\[1, 3\].*\[1, 2\]",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_explains_itself_at_the_call(model, mistake, capfd):
    make, text = MISTAKES[mistake]
    with pytest.raises(errors.InputError, match=text) as caught:
        make(model)
    assert caught.value.__cause__ is None
    assert model.trace(PROMPT, trace=False).logits.shape == (1, 8, 320)
    assert capfd.readouterr() == ("", "")


def test_different_mistakes_have_different_texts(model):
    texts = set()
    for make, _ in MISTAKES.values():
        with pytest.raises(errors.InputError) as caught:
            make(model)
        texts.add(str(caught.value))
    same = 5  # three ways to give nothing, two of a misspelt keyword, two of an empty prompt, two of an empty row
    assert len(texts) == len(MISTAKES) - same


def test_a_prompt_that_is_too_long_for_rotary_positions_runs(tokenizer):
    model = LanguageModel(tiny.build("llama"), tokenizer=tokenizer)
    assert model.trace([5] * 40, trace=False).logits.shape == (1, 40, 320)


def test_text_without_a_tokenizer_says_how_to_give_one(gpt2):
    model = LanguageModel(gpt2)
    assert model.tokenizer is None
    assert model.trace([1, 2], trace=False).logits.shape == (1, 2, 320)
    with pytest.raises(
        errors.InputError, match=r"(?s)no tokenizer.*because.*without one.*LanguageModel\(..., tokenizer="
    ):
        model.trace("Rome")


def test_padding_behind_a_filled_cache_is_refused(model):
    cache = model.trace([[1, 2], [3, 4]], use_cache=True, trace=False).past_key_values
    with pytest.raises(errors.InputError, match="can't be padded behind a filled cache"):
        model.trace([[5, 6], [7]], past_key_values=cache)


def test_a_keyword_that_only_generate_knows_is_left_to_it(model):
    with pytest.raises(ValueError, match="max_new_token"):
        model.generate("Rome", max_new_token=3)


def test_a_model_that_is_wrapped_already_is_told(model):
    with pytest.raises(errors.ModelError, match="This LanguageModel is a model that is wrapped already"):
        LanguageModel(model)


def test_a_tokenizers_name_is_told_how_to_become_one(gpt2):
    with pytest.raises(errors.ModelError, match=r"AutoTokenizer.from_pretrained\('gpt2'\)"):
        LanguageModel(gpt2, tokenizer="gpt2")


def test_a_misspelt_name_of_a_trace_is_answered_with_the_traces_names(model):
    with pytest.raises(errors.UnknownNameError, match=r"(?s)A trace has no `invok`.*nearest +`invoke`"):
        with model.trace() as tracer:
            tracer.invok(PROMPT)
    with pytest.raises(errors.UnknownNameError, match="has no `itre`") as caught:
        with model.generate(PROMPT, max_new_tokens=2) as tracer:
            tracer.itre[:]
    assert "A trace has `iter`." in caught.value.__notes__


def test_what_is_a_traces_and_not_a_models_is_told(model):
    with pytest.raises(errors.UnknownNameError, match=r"and then tracer.cache"):
        model.cache()


def test_a_scan_is_told_of_rows_where_it_is_asked_for_invokes(model):
    with pytest.raises(errors.BlockError, match=r"(?s)A scan has no invokes.*model.scan\(\[p, q\]\)"):
        with model.scan(PROMPT) as tracer:
            with tracer.invoke(PROMPT):
                pass


def test_a_scan_shows_the_blocks_line_where_another_package_asks_for_a_value(model):
    with pytest.raises(errors.FakeValueError, match=r"you wrote +test_mistakes.py:\d+: model.tokenizer.decode"):
        with model.scan(PROMPT):
            model.tokenizer.decode(model.lm_head.output[0, -1].argmax())


def test_a_cache_of_a_tensor_is_told_to_take_the_module(model):
    with pytest.raises(TypeError, match=r"the module itself is meant, without `.output`"):
        with model.trace(PROMPT) as tracer:
            tracer.cache(model.transformer.h[0].output)


def test_a_whole_number_as_a_loss_is_told_what_a_loss_is(model):
    with pytest.raises(errors.GradientError, match="a loss of floating-point values, such as a logit"):
        with model.trace(PROMPT):
            loss = model.lm_head.output[0, -1].argmax()
            with loss.backward():
                pass


def test_a_value_without_its_batch_axis_is_told_the_shape(model):
    with pytest.raises(errors.WriteError, match=r"instead +a value of the shape \[1, \d+, 16\]"):
        with model.trace([PROMPT, PROMPT]) as (a, _b):
            a.transformer.h[0].mlp.output = a.transformer.h[0].mlp.output[0]


def test_a_prompt_by_keyword_is_told_its_place(model):
    for name in ("prompt", "text", "sentences"):
        with pytest.raises(
            errors.InputError, match=rf"(?s)`{name}` is no input.*by its position: model.trace\(prompt\)"
        ):
            model.trace(**{name: PROMPT})
