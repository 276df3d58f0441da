"""What can be typed as a prompt, seen as the model sees it."""

import numpy as np
import pytest
import tiny
import torch
from tiny import PROMPT
from transformers import BatchEncoding

from nnsight import LanguageModel

ROME = "The Colosseum is in Rome"


def seen(model, *args, **kwargs):
    """The keyword arguments that the model's forward is called with."""
    with model.trace(*args, **kwargs):
        given, keywords = model.inputs
    assert given == ()
    return keywords


@pytest.fixture
def ids(tokenizer):
    return tokenizer(PROMPT)["input_ids"]


FORMS = {
    "a string": lambda ids: PROMPT,
    "a list of one string": lambda ids: [PROMPT],
    "a tuple of one string": lambda ids: (PROMPT,),
    "a list of ids": lambda ids: ids,
    "a list of lists of ids": lambda ids: [ids],
    "a 1-D tensor": torch.tensor,
    "a 2-D tensor": lambda ids: torch.tensor([ids]),
    "a tensor of 32 bits": lambda ids: torch.tensor([ids], dtype=torch.int32),
    "a list of 1-D tensors": lambda ids: [torch.tensor(ids)],
    "a list of 0-D tensors": lambda ids: list(torch.tensor(ids)),
    "an array": lambda ids: np.array(ids),
    "a 2-D array": lambda ids: np.array([ids]),
    "numpy's integers": lambda ids: list(np.array(ids)),
    "a dict of lists": lambda ids: {"input_ids": [ids]},
    "a dict of tensors": lambda ids: {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))},
    "an encoding": lambda ids: BatchEncoding({"input_ids": [ids], "special_tokens_mask": [[0] * len(ids)]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_one_prompt_is_the_same_run(model, tokenizer, ids, form):
    with model.trace(FORMS[form](ids)):
        logits = model.output.logits
    plain = model._module(**tokenizer(PROMPT, return_tensors="pt")).logits
    torch.testing.assert_close(logits, plain, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["a string", "a list of ids", "a 1-D tensor", "an array", "a dict of lists"])
def test_a_prompt_comes_with_a_mask_of_ones_and_nothing_else(model, ids, form):
    keywords = seen(model, FORMS[form](ids))
    assert keywords["input_ids"].tolist() == [ids]
    assert keywords["attention_mask"].tolist() == [[1] * len(ids)]
    assert {name for name, value in keywords.items() if value is not None} == {"input_ids", "attention_mask"}


def test_rows_of_unequal_length_are_padded_on_the_left(model):
    keywords = seen(model, [[5, 6, 7], [8]])
    assert keywords["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert keywords["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert keywords["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_rows_of_equal_length_get_no_positions(model):
    assert "position_ids" not in seen(model, [[5, 6, 7], [8, 9, 10]])


def test_keywords_stand_beside_a_prompt(model, ids):
    with model.trace(PROMPT, labels=ids, output_hidden_states=True):
        out = model.output
    assert out.loss.ndim == 0
    assert len(out.hidden_states) == 3


def test_keywords_alone_are_a_prompt(model, ids):
    assert seen(model, input_ids=[ids])["input_ids"].tolist() == [ids]
    assert seen(model, input_ids=torch.tensor(ids))["input_ids"].tolist() == [ids]


def test_embeddings_are_a_prompt_and_keep_their_gradient(model, ids):
    embeds = model._module.transformer.wte(torch.tensor([ids])).detach().requires_grad_()
    with model.trace(inputs_embeds=embeds):
        logits = model.output.logits
    logits.sum().backward()
    assert embeds.grad is not None
    torch.testing.assert_close(logits, model.trace(PROMPT, trace=False).logits)


def test_token_types_of_a_tokenizers_go_to_models_that_take_them(model, tokenizer):
    encoding = BatchEncoding({"input_ids": [[5, 6]], "token_type_ids": [[1, 1]]})
    assert seen(model, encoding)["token_type_ids"].tolist() == [[1, 1]]
    llama = LanguageModel(tiny.build("llama"), tokenizer=tokenizer)
    assert "token_type_ids" not in seen(llama, encoding)


def test_labels_in_rows_are_padded_with_what_the_loss_ignores(model):
    keywords = seen(model, [[5, 6, 7], [8]], labels=[[5, 6, 7], [8]])
    assert keywords["labels"].tolist() == [[5, 6, 7], [-100, -100, 8]]


def test_a_mask_of_the_users_replaces_ours(model, ids):
    mask = [1] * len(ids)
    mask[2] = 0
    keywords = seen(model, PROMPT, attention_mask=torch.tensor([mask]))
    assert keywords["attention_mask"].tolist() == [mask]
    assert "position_ids" not in keywords  # a token that is hidden in the middle keeps its place


def test_positions_of_the_users_are_left_alone(model):
    positions = torch.tensor([[3, 4, 5], [3, 4, 5]])
    assert seen(model, [[5, 6, 7], [8]], position_ids=positions)["position_ids"].equal(positions)


def test_a_padded_encoding_of_the_tokenizers_gets_positions_too(model):
    tokenizer = tiny.make_tokenizer(pad_token="<|end|>", padding_side="left")
    both = tokenizer([PROMPT, "Rome"], padding=True, return_tensors="pt")
    keywords = seen(model, both)
    lead = int((both["attention_mask"][1] == 0).sum())
    assert keywords["position_ids"][1].tolist() == [0] * lead + list(range(len(both["input_ids"][1]) - lead))


def test_options_of_the_tokenizer_reach_it(model, ids):
    assert seen(model, PROMPT, truncation=True, max_length=3)["input_ids"].tolist() == [ids[:3]]
    assert seen(model, PROMPT, return_tensors="pt", padding=True)["input_ids"].tolist() == [ids]


def test_special_tokens_can_be_left_out(gpt2):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    model = LanguageModel(gpt2, tokenizer=tokenizer)
    with_one = seen(model, "Rome")["input_ids"][0].tolist()
    assert with_one[0] == 0
    assert seen(model, "Rome", add_special_tokens=False)["input_ids"][0].tolist() == with_one[1:]


def test_padding_to_a_length_and_to_the_right_can_be_asked_for(model):
    keywords = seen(model, "Rome", padding="max_length", max_length=12)
    assert keywords["input_ids"].shape == (1, 12)
    assert keywords["attention_mask"][0, 0] == 0
    assert seen(model, [[5, 6], [7]], padding_side="right")["input_ids"].tolist() == [[5, 6], [7, 0]]


def test_the_users_tokenizer_is_never_changed(gpt2):
    tokenizer = tiny.make_tokenizer(padding_side="right")
    model = LanguageModel(gpt2, tokenizer=tokenizer)
    model.trace([PROMPT, "Rome"], truncation=True, max_length=4, trace=False)
    assert model.tokenizer is tokenizer
    assert tokenizer.pad_token is None
    assert tokenizer.padding_side == "right"


def test_chat_messages_go_through_the_template(gpt2):
    tokenizer = tiny.make_tokenizer(chat_template=tiny.CHAT)
    model = LanguageModel(gpt2, tokenizer=tokenizer)
    asks, tells = {"role": "user", "content": "Rome"}, {"role": "assistant", "content": "The"}

    def text(*args, **kwargs):
        rows = seen(model, *args, **kwargs)
        return [tokenizer.decode(i[m == 1]) for i, m in zip(rows["input_ids"], rows["attention_mask"], strict=True)]

    assert text([asks]) == ["user: Rome\nassistant:"]
    assert text([[asks], [asks, tells]]) == ["user: Rome\nassistant:", "user: Rome\nassistant: The\nassistant:"]
    assert text([asks], add_generation_prompt=False) == ["user: Rome\n"]


def test_a_cache_of_the_users_goes_on_where_it_ends(model, ids):
    first = model.trace(ids[:4], use_cache=True, trace=False)
    rest = model.trace(ids[4:], past_key_values=first.past_key_values, trace=False)
    whole = model.trace(ids, trace=False)
    torch.testing.assert_close(rest.logits, whole.logits[:, 4:])


def test_text_goes_on_behind_a_cache_too(model):
    first = model.trace("The city", use_cache=True, trace=False)
    rest = model.trace(" of Rome", past_key_values=first.past_key_values, trace=False)
    whole = model.trace("The city of Rome", trace=False)
    torch.testing.assert_close(rest.logits[:, -1], whole.logits[:, -1])


def test_behind_a_padded_cache_positions_go_on_too(model, ids):
    first = model.trace([ids[:4], ids[:2]], use_cache=True, trace=False)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    rest = model.trace([ids[4:6], ids[2:4]], past_key_values=first.past_key_values, attention_mask=mask, trace=False)
    whole = model.trace([ids[:6], ids[:4]], trace=False)
    torch.testing.assert_close(rest.logits, whole.logits[:, -2:])


def test_positions_count_from_the_first_token_that_is_seen(model):
    mask = torch.tensor([[0, 1, 0, 1]])
    assert seen(model, [5, 6, 7, 8], attention_mask=mask)["position_ids"].tolist() == [[0, 0, 1, 2]]


def test_positions_are_left_to_generate(model):
    asked = dict(model._generation_inputs([[5, 6], [7]], max_new_tokens=1))
    assert asked.keys() == {"input_ids", "attention_mask", "max_new_tokens", "pad_token_id"}


def test_nothing_is_printed_or_warned(model, capfd):
    model.trace([PROMPT, "Rome"], trace=False)
    model.trace("Rome " * 20, truncation=True, max_length=32, trace=False)
    model.generate([PROMPT, "Rome"], max_new_tokens=2)
    assert capfd.readouterr() == ("", "")


def test_a_resized_vocabulary_is_noticed(tokenizer):
    module = tiny.build("gpt2")
    model = LanguageModel(module, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="321 is not a token"):
        model.trace([321])
    module.resize_token_embeddings(330)
    assert model.trace([321], trace=False).logits.shape == (1, 1, 330)
