"""The logit lens: its numbers against plain torch hooks, its shapes, and what it refuses."""

import pytest
import torch

import lenses
from nnsight import LanguageModel, errors
from nnsight.analysis import logit_lens, top_predictions

PROMPT = lenses.PROMPT


@pytest.fixture
def model():
    return lenses.tiny_gpt2()


def hooked(module, ids, k):
    """The same by torch's own hooks: each block's output through the final norm and the head."""
    hidden = []

    def keep(_module, _args, output):
        hidden.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(keep) for block in module.transformer.h]
    with torch.no_grad():
        module(input_ids=ids)
        for hook in hooks:
            hook.remove()
        logits = [module.lm_head(module.transformer.ln_f(state))[0] for state in hidden]
    return torch.stack(logits).float().softmax(dim=-1).topk(k)


def test_the_numbers_are_those_of_plain_hooks_bit_for_bit(model):
    lens = logit_lens(model, PROMPT, top_k=7)
    values, ids = hooked(model._module, model.tokenizer(PROMPT, return_tensors="pt")["input_ids"], 7)
    torch.testing.assert_close(lens.values, values, rtol=0, atol=0)
    torch.testing.assert_close(lens.ids, ids, rtol=0, atol=0)


def test_the_last_row_is_the_models_own_prediction_bit_for_bit(model):
    vocabulary = model.config.vocab_size
    lens = logit_lens(model, PROMPT, top_k=vocabulary)
    with model.trace(PROMPT) as tracer:
        logits = tracer.result.logits[0]
    by_id = torch.empty(len(lens.tokens), vocabulary).scatter(-1, lens.ids[-1], lens.values[-1])
    torch.testing.assert_close(by_id, logits.softmax(dim=-1), rtol=0, atol=0)


def test_the_axes_label_the_values(model):
    lens = logit_lens(model, PROMPT, top_k=3)
    assert {name: len(labels) for name, labels in lens.axes.items()} == {"layer": 2, "token": 8, "rank": 3}
    assert tuple(map(len, lens.axes.values())) == lens.values.shape == lens.ids.shape
    assert lens.axes["layer"] == ("0", "1")
    assert "".join(lens.axes["token"]) == lens.prompt == PROMPT
    assert (lens.values.dtype, lens.ids.dtype) == (torch.float32, torch.int64)


def test_candidates_are_named_and_fall_in_probability(model):
    lens = logit_lens(model, PROMPT)
    top = lens.top(0, 2)
    assert [word for word, _ in top] == [model.tokenizer.decode([i]) for i in lens.ids[0, 2].tolist()]
    assert [p for _, p in top] == sorted(lens.values[0, 2].tolist(), reverse=True)
    assert lens.best(2) == [lens.top(layer, 2)[0][0] for layer in range(2)]


def test_it_is_printed_in_a_line(model):
    lens = logit_lens(model, PROMPT)
    answer, probability = lens.top(-1)[0]
    assert repr(lens) == (
        f"<Lens of GPT2LMHeadModel: 2 layers, 8 tokens, top 5; ends with {answer!r} at {probability:.2f}>"
    )


def test_the_model_runs_once_and_no_graph_is_kept(model):
    calls = []
    hook = model._module.transformer.h[1].register_forward_hook(lambda *_: calls.append(1))
    lens = logit_lens(model, PROMPT)
    hook.remove()
    assert calls == [1]
    assert not lens.values.requires_grad


@pytest.mark.parametrize("form", [lambda ids: ids, lambda ids: ids.tolist(), lambda ids: ids[0]])
def test_ids_are_a_prompt_too(model, form):
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    lens = logit_lens(model, form(ids))
    assert lens.prompt == PROMPT
    torch.testing.assert_close(lens.values, logit_lens(model, PROMPT).values, rtol=0, atol=0)


def test_without_a_tokenizer_tokens_are_numbers(model):
    bare = LanguageModel(model._module)
    lens = logit_lens(bare, [5, 6])
    assert (lens.tokens, lens.prompt) == (("5", "6"), "5 6")
    assert lens.words[0][0][0] == str(lens.ids[0, 0, 0].item())


def test_a_model_is_named_but_not_by_its_path(tmp_path, model):
    folder = tmp_path / "my-gpt2"
    model._module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    assert logit_lens(LanguageModel(folder), PROMPT).model == "my-gpt2"
    assert logit_lens(model, PROMPT).model == "GPT2LMHeadModel"


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(model, prompt):
    with pytest.raises(errors.InputError, match="empty"):
        logit_lens(model, prompt)


def test_several_prompts_are_refused_and_the_model_is_usable_afterwards(model):
    with pytest.raises(errors.InputError) as refused:
        logit_lens(model, [PROMPT, "The city"])
    assert str(refused.value) == ("The lens shows one prompt, and 2 were given.\n\n  instead   one call a prompt")
    assert logit_lens(model, PROMPT).n_layers == 2


@pytest.mark.parametrize("k", [0, -1, 321])
def test_a_top_k_that_the_vocabulary_does_not_have_is_refused(model, k):
    with pytest.raises(errors.InputError, match=f"^Top {k} of 320 tokens: it is 1 to 320"):
        logit_lens(model, PROMPT, top_k=k)
    assert len(logit_lens(model, PROMPT, top_k=320).top(0)) == 320


def test_a_misspelt_option_of_the_lens_is_told(model):
    with pytest.raises(errors.InputError, match=r"`topk` is no option of the lens.*\n.*\n.*nearest +`top_k`"):
        logit_lens(model, "Rome is", topk=3)


def test_a_layer_or_a_token_that_is_not_there_is_told(model):
    lens = logit_lens(model, "Rome is", top_k=1)
    n_layers, n_tokens = lens.values.shape[:2]
    with pytest.raises(
        errors.UnknownIndexError, match=rf"no layer {n_layers}\.[\s\S]*{n_layers} layers: 0 to {n_layers - 1}"
    ):
        lens.top(layer=n_layers)
    for ask in (lambda: lens.top(0, n_tokens), lambda: lens.best(n_tokens)):
        with pytest.raises(errors.UnknownIndexError, match=rf"no token {n_tokens}\."):
            ask()
    assert lens.top(-n_layers, -n_tokens)[0][0] == lens.best(0)[0]


def test_another_architecture_is_read_through_its_own_norm_and_unembedding():
    llama = LanguageModel(lenses.tiny.build("llama"), tokenizer=lenses.tiny.make_tokenizer())
    module, hidden = llama._module, []
    hooks = [layer.register_forward_hook(lambda _, __, out: hidden.append(out)) for layer in module.model.layers]
    with torch.no_grad():
        module(input_ids=llama.tokenizer(PROMPT, return_tensors="pt")["input_ids"])
        for hook in hooks:
            hook.remove()
        hidden = [one[0] if isinstance(one, tuple) else one for one in hidden]
        logits = [module.lm_head(module.model.norm(one))[0] for one in hidden]
    lens = logit_lens(llama, PROMPT, top_k=4)
    torch.testing.assert_close(lens.values, torch.stack(logits).softmax(dim=-1).topk(4).values, rtol=1e-5, atol=1e-6)


def test_a_model_without_layers_is_refused():
    with pytest.raises(errors.AnatomyError, match="has no config"):
        logit_lens(LanguageModel(torch.nn.Embedding(8, 8)), [1, 2])


def test_probabilities_are_taken_in_float32():
    logits = torch.randn(2, 3, 50).half()
    values, ids = top_predictions(logits, 4)
    assert values.dtype == torch.float32
    assert values.shape == ids.shape == (2, 3, 4)
    torch.testing.assert_close(values, logits.double().softmax(-1).topk(4).values.float(), rtol=1e-5, atol=1e-7)


def test_the_bundled_model_comes_to_paris_over_its_layers():
    lens = logit_lens(LanguageModel("nnsight/demo"), PROMPT)
    best = lens.best()
    assert lens.model == "nnsight/demo"
    assert len(best) == 12
    assert best[0] != " Paris"
    assert best[-1] == " Paris"
    assert lens.top(-1)[0][1] > 0.9
