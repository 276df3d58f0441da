"""Prompts that come with `tracer.invoke`: each has what it has alone, whatever their number, form and padding."""

import functools
import warnings

import pytest
import tiny
import torch
import transformers

from comparing import near
from nnsight import LanguageModel, errors

P, Q = tiny.PROMPT, "The Colosseum is"  # of different lengths in tokens
PROMPTS = [P, Q, "Madison Square Garden"]
GREEDY = {"do_sample": False, "max_new_tokens": 3}


@functools.cache
def built(name):
    return LanguageModel(tiny.build(name), tokenizer=tiny.make_tokenizer())


@pytest.fixture
def model():
    return built("gpt2")


def alone(model, prompt, path="transformer.h.1.mlp", **options):
    with model.trace(prompt, **options) as tracer:
        return tracer.model.get(path).output


def ids(model, *prompts):
    return [model.tokenizer(prompt)["input_ids"] for prompt in prompts]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "bloom"])
def test_each_prompt_has_what_it_has_alone(name, side):
    model = built(name)
    path = "transformer.h.1.mlp" if name in ("gpt2", "bloom") else "model.layers.1.self_attn"
    with torch.no_grad():
        with model.trace(padding_side=side) as tracer:
            values, logits = [], []
            for prompt in PROMPTS:
                with tracer.invoke(prompt):
                    values.append(model.get(path).output)
                    logits.append(tracer.result.logits)
        for prompt, value, own in zip(PROMPTS, values, logits, strict=True):
            with model.trace(prompt) as tracer:
                expected = model.get(path).output
                result = tracer.result.logits
            first = expected[0] if isinstance(expected, tuple) else expected
            near(value[0] if isinstance(value, tuple) else value, first)
            near(own, result)


def test_prompts_of_every_form_stand_in_one_batch(model):
    (p,), (q, r) = ids(model, P), ids(model, Q, PROMPTS[2])
    with model.trace() as tracer:
        with tracer.invoke(P):
            text = model.transformer.h[1].mlp.output
        with tracer.invoke([Q, PROMPTS[2]]):
            several = model.transformer.h[1].mlp.output
        with tracer.invoke(torch.tensor([q])):
            tensor = model.transformer.h[1].mlp.output
        with tracer.invoke({"input_ids": [r]}):
            mapping = model.transformer.h[1].mlp.output
        with tracer.invoke(input_ids=torch.tensor([p])):
            keyword = model.transformer.h[1].mlp.output
        with tracer.invoke():
            whole = model.transformer.h[1].mlp.output
    near(text, alone(model, P))
    near(keyword, text)
    near(several, alone(model, [Q, PROMPTS[2]]))
    near(tensor, alone(model, Q))
    near(mapping, alone(model, PROMPTS[2]))
    assert whole.shape[:2] == (6, len(p))


def test_what_as_binds_is_the_model_s_tree_for_this_invoke(model):
    with model.trace() as tracer:
        with tracer.invoke(P) as one:
            first = one.model.transformer.h[0].mlp.output
            also = one.transformer.h[0].mlp.output
            tokens = one.model.tokens
        with tracer.invoke([Q, P]) as one:
            second = one.transformer.h[0].mlp.output
            several = one.model.tokens
    assert first is also
    assert first.shape[1] == len(ids(model, P)[0])
    assert second.shape[0] == 2
    assert "".join(tokens) == P
    assert ["".join(own) for own in several] == [Q, P]


def test_a_prompt_is_patched_from_another_in_both_orders(model):
    expected = []
    hidden = alone(model, P, "transformer.h.0.mlp")[:, -1]
    with model.trace(Q) as tracer:
        out = model.transformer.h[0].mlp.output
        out[:, -1] = hidden
        expected = tracer.result.logits
    with model.trace() as tracer:
        with tracer.invoke(P):
            a = model.transformer.h[0].mlp.output[:, -1]
        with tracer.invoke(Q):
            model.transformer.h[0].mlp.output[:, -1] = a
            later = tracer.result.logits
    with model.trace() as tracer:
        with tracer.invoke(Q):
            model.transformer.h[0].mlp.output[:, -1] = b  # noqa: F821
            earlier = tracer.result.logits
        with tracer.invoke(P):
            b = model.transformer.h[0].mlp.output[:, -1]  # noqa: F841
    near(later, expected)
    near(earlier, expected)


def test_options_of_the_trace_hold_for_all(model):
    with model.trace(output_hidden_states=True) as tracer:
        with tracer.invoke(P):
            states = tracer.result.hidden_states
        with tracer.invoke(Q):
            other = tracer.result.hidden_states
    assert len(states) == len(other) == 3
    near(states[-1], alone(model, P, "transformer.ln_f"))
    near(other[-1], alone(model, Q, "transformer.ln_f"))


def test_options_of_invokes_that_differ_are_told(model):
    with pytest.raises(errors.InputError, match="holds for the whole batch"):
        with model.trace() as tracer:
            with tracer.invoke(P, output_hidden_states=True):
                model.transformer.h[0].mlp.output
            with tracer.invoke(Q, output_hidden_states=False):
                model.transformer.h[0].mlp.output


def test_a_loss_is_one_number_that_all_share(model):
    (p,), (q,) = ids(model, P), ids(model, Q)
    with model.trace() as tracer:
        with tracer.invoke(torch.tensor([p]), labels=torch.tensor([p])):
            one, logits = tracer.result.loss, tracer.result.logits
        with tracer.invoke(torch.tensor([q]), labels=torch.tensor([q])):
            other = tracer.result.loss
    assert one.shape == ()
    assert torch.equal(one, other)
    assert logits.shape == (1, len(p), 320)


def test_values_that_a_mixture_of_experts_flattens_are_each_prompts_own():
    model = built("mixtral")
    with torch.no_grad():
        expected = [alone(model, prompt, "model.layers.0.mlp.gate") for prompt in (P, Q)]
        with model.trace() as tracer:
            with tracer.invoke(P):
                one = model.model.layers[0].mlp.gate.output
            with tracer.invoke(Q):
                other = model.model.layers[0].mlp.gate.output
    for got, wanted in zip((one, other), expected, strict=True):
        first, second = (v[0] if isinstance(v, tuple) else v for v in (got, wanted))
        near(first, second)


def test_a_generation_of_each_prompt_is_what_it_is_alone(model, switch):
    with model.generate(**GREEDY) as tracer:
        found = {}
        for prompt in (P, Q):
            with tracer.invoke(prompt):
                steps = []
                for step in tracer.iter[:]:
                    steps.append((step, model.lm_head.output[:, -1]))  # noqa: PERF401
                found[prompt] = steps, tracer.result
    for prompt in (P, Q):
        with model.generate(prompt, **GREEDY) as tracer:
            expected = [(step, model.lm_head.output[:, -1]) for step in tracer.iter[:]]
            result = tracer.result
        steps, own = found[prompt]
        assert [step for step, _ in steps] == [step for step, _ in expected]
        for (_, one), (_, other) in zip(steps, expected, strict=True):
            near(one, other)
        assert own.tolist() == result.tolist()


def test_invokes_ask_for_different_steps(model):
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(P):
            for _ in tracer.iter[2]:
                last = model.transformer.h[0].mlp.output
        with tracer.invoke(Q):
            first = model.transformer.h[1].mlp.output
            tracer.stop()
        with tracer.invoke():
            shapes = [model.lm_head.output.shape[0] for _ in tracer.all()]
    assert last.shape[:2] == (1, 1)
    near(first, alone(model, Q, "transformer.h.1.mlp"))
    assert shapes == [2, 2, 2]


def test_a_write_in_each_step_stays_in_its_invoke(model):
    untouched = model.generate(P, **GREEDY)
    with model.generate(Q, **GREEDY) as tracer:
        for _ in tracer.iter[:]:
            model.transformer.h[0].mlp.output = model.transformer.h[0].mlp.output * -3
        expected = tracer.result
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(P):
            one = tracer.result
        with tracer.invoke(Q):
            for _ in tracer.iter[:]:
                model.transformer.h[0].mlp.output = model.transformer.h[0].mlp.output * -3
            other = tracer.result
    assert one.tolist() == untouched.tolist()
    assert other.tolist() == expected.tolist()


STEPS = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}


def patched_in_lockstep(model, giving, taking):
    """What Q generates where P's last token is put into layer 1 in the steps that are both given and taken."""
    with model.generate(P, **STEPS) as a, model.generate(Q, **STEPS) as b:
        for step, _ in zip(a.iter[:], b.iter[:], strict=True):
            if step in giving:
                hidden = a.layers[1].output[:, -1].clone()
            if step in taking:
                b.layers[1].output[:, -1] = hidden * 3
        return b.result


def test_what_an_invoke_binds_in_each_step_is_that_step_s(model, switch):
    with model.generate(**STEPS) as tracer:
        with tracer.invoke(P):
            for _ in tracer.iter[:]:
                with torch.no_grad():
                    hidden = model.layers[1].output[:, -1]
        with tracer.invoke(Q):
            for _ in tracer.iter[:]:
                model.layers[1].output[:, -1] = hidden * 3
            ids = tracer.result
    assert ids.tolist() == patched_in_lockstep(model, range(4), range(4)).tolist()


def test_a_later_invoke_may_be_the_one_that_binds_in_each_step(model):
    with model.generate(**STEPS) as tracer:
        with tracer.invoke(Q):
            for _ in tracer.iter[1:]:
                model.layers[1].output[:, -1] = late * 3  # noqa: F821
            ids = tracer.result
        with tracer.invoke(P):
            for _ in tracer.iter[:]:
                late = model.layers[1].output[:, -1]  # noqa: F841
    assert ids.tolist() == patched_in_lockstep(model, range(4), range(1, 4)).tolist()


def test_what_a_step_does_not_bind_is_what_one_before_has_bound(model):
    with model.generate(**STEPS) as tracer:
        with tracer.invoke(P):
            for _ in tracer.iter[::2]:
                every_other = model.layers[1].output[:, -1].clone()
        with tracer.invoke(Q):
            for _ in tracer.iter[:]:
                model.layers[1].output[:, -1] = every_other * 3
            ids = tracer.result
    assert ids.tolist() == patched_in_lockstep(model, (0, 2), range(4)).tolist()

    with model.generate(**STEPS) as tracer:
        with tracer.invoke(P):
            for step in tracer.iter[:]:
                if step < 2:
                    first_two = model.layers[1].output[:, -1].clone()
        with tracer.invoke(P):
            for step in tracer.iter[:]:
                until_left = model.layers[1].output[:, -1].clone()
                if step == 1:
                    break
        with tracer.invoke(Q):
            for step in tracer.iter[:]:
                model.layers[1].output[:, -1] = until_left * 3
                if step > 1:
                    assert torch.equal(first_two, until_left)
            ids = tracer.result
    assert ids.tolist() == patched_in_lockstep(model, (0, 1), range(4)).tolist()


def test_two_invokes_give_each_other_what_each_binds_in_a_step(model):
    with model.generate(P, **STEPS) as a, model.generate(Q, **STEPS) as b:
        for _ in zip(a.iter[:], b.iter[:], strict=True):
            here, there = (one.layers[0].output[:, -1].clone() for one in (a, b))
            a.layers[1].output[:, -1] = there * 3
            b.layers[1].output[:, -1] = here * 3
        expected = a.result, b.result
    with model.generate(**STEPS) as tracer:
        with tracer.invoke(P):
            for _ in tracer.iter[:]:
                of_p = model.layers[0].output[:, -1].clone()
                model.layers[1].output[:, -1] = of_q * 3  # noqa: F821
            p_ids = tracer.result
        with tracer.invoke(Q):
            for _ in tracer.iter[:]:
                of_q = model.layers[0].output[:, -1].clone()  # noqa: F841
                model.layers[1].output[:, -1] = of_p * 3
            q_ids = tracer.result
    assert [p_ids.tolist(), q_ids.tolist()] == [ids.tolist() for ids in expected]


def test_what_comes_later_in_a_step_than_it_is_used_is_told(model):
    with pytest.raises(errors.AlreadyPastError) as caught, model.generate(**STEPS) as tracer:
        with tracer.invoke(P):
            for _ in tracer.iter[:]:
                behind = model.layers[1].output[:, -1]
        with tracer.invoke(Q):
            for _ in tracer.iter[1:]:
                model.layers[0].output[:, -1] = behind
    assert any("waited for `behind` of invoke 0" in note for note in caught.value.__notes__)


def test_beams_and_several_sequences_stay_with_their_prompt(model):
    options = {"max_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with model.generate(**options) as tracer:
        with tracer.invoke(P):
            hidden, one = model.transformer.h[0].mlp.output, tracer.result
        with tracer.invoke(Q):
            short, other = model.transformer.h[0].mlp.output, tracer.result
    assert one.tolist() == model.generate(P, **options).tolist()
    assert other.tolist() == model.generate(Q, **options).tolist()
    lengths = [len(own) for own in ids(model, P, Q)]
    assert [hidden.shape[:2], short.shape[:2]] == [(3, lengths[0]), (3, lengths[1])]


def test_sampling_without_source_is_refused(model):
    lines = """
with model.generate(max_new_tokens=2, do_sample=True) as tracer:
    with tracer.invoke(P):
        model.lm_head.output
"""
    with pytest.raises(errors.BlockError, match="share one random generator"):
        exec(lines, {"model": model, "P": P})
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        names = {"model": model, "P": P}
        exec(lines.replace("do_sample=True", "do_sample=False"), names)


def test_a_cache_in_an_invoke_has_its_own_tokens(model):
    with model.trace() as tracer:
        with tracer.invoke(P):
            pass
        with tracer.invoke(Q):
            cache = tracer.cache("transformer.h.*.mlp", include_inputs=True)
    near(cache["transformer.h.1.mlp"].output, alone(model, Q))
    near(cache["transformer.h.1.mlp"].input, alone(model, Q, "transformer.h.1.ln_2"))


def test_a_write_of_another_length_shows_the_prompts(model):
    with pytest.raises(errors.WriteError, match="nothing is broadcast") as raised:
        with model.trace() as tracer:
            with tracer.invoke(P):
                hidden = model.transformer.h[0].mlp.output
            with tracer.invoke(Q):
                model.transformer.h[0].mlp.output = hidden
    assert "invoke 1" in str(raised.value)
    assert hidden.shape[1] == len(ids(model, P)[0])


def test_what_can_t_be_one_batch_is_told(model):
    embeds = model.transformer.wte(torch.tensor(ids(model, P)))
    with pytest.raises(errors.InputError, match="ids and others embeddings"):
        with model.trace() as tracer:
            with tracer.invoke(P):
                model.transformer.h[0].mlp.output
            with tracer.invoke(inputs_embeds=embeds.detach()):
                model.transformer.h[0].mlp.output
    with pytest.raises(errors.InputError, match=r"empty|no token"):
        with model.trace() as tracer:
            with tracer.invoke(""):
                pass


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ((1, 2), None, "1 of 2 invokes have `encoder_hidden_states`, and in one batch all rows need it"),
        ((1, 2), (2, 2), "`encoder_hidden_states` doesn't have a row for each prompt"),
        ((1, 2), (1, 3), r"`encoder_hidden_states` .* the shapes are \[1, 2, 16\], \[1, 3, 16\]"),
    ],
)
def test_an_input_that_the_invokes_do_not_have_alike_is_told(model, first, second, says):
    given = [{} if shape is None else {"encoder_hidden_states": torch.zeros(*shape, 16)} for shape in (first, second)]
    with pytest.raises(errors.InputError, match=says):
        with model.trace() as tracer:
            with tracer.invoke(P, **given[0]):
                pass
            with tracer.invoke(P, **given[1]):
                pass


def test_a_cache_is_of_one_prompt_and_not_of_a_batch(model):
    with pytest.raises(errors.InputError, match="`past_key_values` is of one prompt's run"):
        with model.trace() as tracer:
            with tracer.invoke(P, past_key_values=transformers.DynamicCache()):
                pass
            with tracer.invoke(Q):
                pass


def test_an_edit_takes_part_in_invokes(model):
    with model.edit() as edited:
        edited.transformer.h[0].mlp.output = edited.transformer.h[0].mlp.output * 0
    with edited.trace() as tracer:
        with tracer.invoke(P):
            one = edited.transformer.h[0].mlp.output
        with tracer.invoke(Q):
            other = edited.transformer.h[1].mlp.output
    assert not one.any()
    near(other, alone(edited, Q, "transformer.h.1.mlp"))


def test_a_model_that_isn_t_loaded_yet_is_loaded_by_its_invokes(folder):
    model = LanguageModel(str(folder))
    assert model.device == torch.device("meta")
    with model.trace() as tracer:
        with tracer.invoke(P):
            one = model.transformer.h[0].mlp.output
        with tracer.invoke(Q):
            other = model.transformer.h[0].mlp.output
    assert model.dispatched
    assert (one.shape[1], other.shape[1]) == tuple(len(own) for own in ids(model, P, Q))


@pytest.mark.parametrize("generates", [False, True])
def test_an_invoke_knows_its_tokens(model, generates):
    with model.generate(trace=True, **GREEDY) if generates else model.trace() as tracer:
        with tracer.invoke(P) as one:
            first = one.tokens
        with tracer.invoke([P, Q]) as several:
            each = several.tokens
        with tracer.invoke() as everything:
            whole = everything.tokens
    own, other = ([model.tokenizer.decode([token]) for token in row] for row in ids(model, P, Q))
    assert first == own
    assert each == [own, other]
    assert whole == [own, own, other]
    with pytest.raises(errors.OutsideTraceError, match="The tokens of an invoke"):
        one.tokens


def test_an_invoke_that_runs_where_it_stands_knows_its_tokens_and_result(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with model.trace() as tracer:
            for _ in range(1):
                with tracer.invoke(Q) as one:
                    tokens, result = one.tokens, one.result.logits
                    break
    assert "".join(tokens) == Q
    near(result, model.trace(Q, trace=False).logits)


def test_a_generation_without_a_prompt_is_told_to_generate(model):
    with pytest.raises(errors.InputError, match=r"instead +with model.generate\(prompt, ...\):"):
        with model.generate(**GREEDY):
            model.lm_head.output
