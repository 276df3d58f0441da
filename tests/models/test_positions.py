"""`tracer.positions` and `tracer.lengths`: one edit at a token, the same in every kind of block, cache and padding."""

import itertools

import pytest
import torch
from transformers import DynamicCache

import nnsight
from nnsight.models.positions import Seen

LONG = "The Eiffel Tower is in the city of"
SHORT = "Water is made of"
N_TOKENS = 4
OPTIONS = {"max_new_tokens": N_TOKENS, "min_new_tokens": N_TOKENS}

PLACES = {
    "the last token of the prompt": lambda tracer: tracer.positions == tracer.lengths - 1,
    "every generated token": lambda tracer: tracer.positions >= tracer.lengths,
    "token 2 of the prompt": lambda tracer: tracer.positions == 2,
}


@pytest.fixture(scope="module")
def vector(demo):
    return 5 * torch.randn(demo.config.n_embd, generator=torch.Generator().manual_seed(0))


def add_at(where, layer, vector):
    hidden = layer.output
    hidden[where] += vector


def by_hand(model, place, vector):
    """The logits behind each token, of one prompt alone, with hooks and without a cache; [step, vocab]."""
    ids, logits = model.tokenizer(LONG, return_tensors="pt").input_ids, []
    n_own = ids.shape[1]
    spans = {
        "the last token of the prompt": lambda _: slice(n_own - 1, n_own),
        "every generated token": lambda _: slice(n_own, None),
        "token 2 of the prompt": lambda _: slice(2, 3),
    }

    def hook(_module, _args, output):
        output[:, spans[place](output)] += vector

    handle = model.transformer.h[4].mlp._module.register_forward_hook(hook)
    try:
        for _ in range(N_TOKENS):
            with torch.no_grad():
                last = model._module(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
            logits.append(last[0].clone())
            last[:, model.tokenizer.eos_token_id] = -torch.inf  # as `min_new_tokens` has it
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)
    finally:
        handle.remove()
    return torch.stack(logits)


def last_logits(model, run):
    """The same of a `run`, which is called while a hook collects what the head gives for the first prompt."""
    found = []
    handle = model.lm_head._module.register_forward_hook(lambda _m, _a, out: found.append(out[0, -1].clone()))
    try:
        run()
    finally:
        handle.remove()
    return torch.stack(found)


def in_generate(model, prompts, where, vector, **options):
    with model.generate(prompts, **OPTIONS, **options) as tracer:
        for _step in tracer.iter[:]:
            add_at(where(tracer), model.transformer.h[4].mlp, vector)


def in_a_row(model, prompts, where, vector, **options):
    with model.generate(prompts, **OPTIONS, **options) as tracer:
        row = tracer.rows[0]
        for _step in row.iter[:]:
            row.transformer.h[4].mlp.output[where(row)] += vector


def in_an_invoke(model, prompts, where, vector, **options):
    with model.generate(**OPTIONS, **options) as tracer:
        with tracer.invoke(prompts[0]):
            for _step in tracer.iter[:]:
                add_at(where(tracer), model.transformer.h[4].mlp, vector)
        for other in prompts[1:]:
            with tracer.invoke(other):
                pass


def in_an_edit(model, prompts, where, vector, **options):
    with model.edit() as (tracer, edited):
        add_at(where(tracer), edited.transformer.h[4].mlp, vector)
    edited.generate(prompts, **OPTIONS, **options)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("block", [in_generate, in_a_row, in_an_invoke, in_an_edit])
def test_an_edit_at_a_token_is_the_same_in_every_block_with_and_without_cache_and_padding(demo, vector, place, block):
    expected = by_hand(demo, place, vector)
    for prompts in ([LONG], [LONG, SHORT], [LONG, LONG + " Paris, which is the capital of"]):
        for use_cache in (True, False):
            found = last_logits(demo, lambda: block(demo, prompts, PLACES[place], vector, use_cache=use_cache))  # noqa: B023
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("place", PLACES)
def test_an_edit_at_a_token_is_the_same_in_a_trace(demo, vector, place):
    expected = by_hand(demo, place, vector)[0]
    for prompts in (LONG, [LONG, SHORT], [LONG, LONG + " Paris, which is the capital of"]):
        with demo.trace(prompts) as tracer:
            add_at(PLACES[place](tracer), demo.transformer.h[4].mlp, vector)
            at = int(tracer.lengths[0] - 1)
            column = (tracer.positions[0] == at).nonzero().item()
            logits = demo.lm_head.output[0, column]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-2)


# A cache that was there before


def cached(model, n_tokens):
    ids = model.tokenizer(LONG, return_tensors="pt").input_ids
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model._module(ids[:, :n_tokens], past_key_values=cache)
    return ids, cache


def test_positions_go_on_from_a_cache(demo):
    ids, cache = cached(demo, 9)
    with demo.trace(ids[:, 9:], past_key_values=cache) as tracer:
        assert tracer.positions.tolist() == [[9, 10, 11]]
        assert tracer.lengths.tolist() == [[12]]
    ids, cache = cached(demo, 9)
    with demo.generate(ids, past_key_values=cache, **OPTIONS) as tracer:
        found = [(tracer.positions.tolist(), tracer.lengths.tolist()) for _step in tracer.iter[:]]
    assert found == [([[9, 10, 11]], [[12]]), ([[12]], [[12]]), ([[13]], [[12]]), ([[14]], [[12]])]


def test_positions_of_candidates_that_were_taken_back_come_again(demo):
    tokens, seen, given = Seen(), [], []

    def watch(_module, args, kwargs):
        tokens.saw(args, kwargs)
        seen.append(tokens.positions.tolist())
        given.append(kwargs["position_ids"].tolist())

    handle = demo._module.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        demo.generate("one two three four one two three", max_new_tokens=9, prompt_lookup_num_tokens=3)
    finally:
        handle.remove()
    assert seen == given
    assert any(later[0][0] <= one[0][-1] for one, later in itertools.pairwise(seen))  # some were taken back


# When they can be had


def test_positions_are_there_in_the_first_line_of_a_step(demo):
    with demo.generate(LONG, **OPTIONS) as tracer:
        assert tracer.positions.shape == (1, 12)
        early = demo.transformer.h[0].mlp.output
        first = [tracer.positions.shape[1] for _step in tracer.iter[:]]
    assert early.shape[1] == 12
    assert first == [12, 1, 1, 1]


def test_positions_asked_first_leave_the_models_own_operations_to_be_had(demo):
    with demo.generate(LONG, **OPTIONS) as tracer:
        assert tracer.positions.shape == (1, 12)
        logits = demo.source.self_lm_head_0.output
    assert logits.shape[-1] == demo.config.vocab_size


def test_positions_are_refused_in_an_edit_of_a_part(demo):
    with demo.transformer.h[4].edit() as (tracer, edited):
        edited.output[tracer.positions == 0] += 1
    with pytest.raises(nnsight.errors.BlockError, match="edits of a language model as a whole"):
        edited.trace(torch.zeros(1, 3, demo.config.n_embd), trace=False)


def test_positions_and_steps_are_refused_in_an_edit_where_a_call_is_no_step(demo):
    for ask in (lambda tracer: tracer.positions, lambda tracer: tracer.lengths, lambda tracer: tracer.step):
        edited = demo.edit(lambda tracer, model: ask(tracer))  # noqa: B023
        with pytest.raises(nnsight.errors.BlockError, match="`custom_generate`"):
            edited.generate(
                LONG, custom_generate=lambda model, input_ids, **_: model(input_ids).logits, max_new_tokens=2
            )


def test_positions_behind_padding_are_the_same_with_a_static_cache(demo):
    def of(**options):
        with demo.generate([LONG, SHORT], **OPTIONS, **options) as tracer:
            return [(tracer.positions.clone(), tracer.lengths.clone()) for _ in tracer.iter[:]]

    for own, other in zip(of(), of(cache_implementation="static"), strict=True):
        assert torch.equal(own[0], other[0])
        assert torch.equal(own[1], other[1])
