"""Generations that call the model several times in a step, or read several tokens in one: guidance, chunks, guesses."""

import random

import pytest
import tiny
import torch
import transformers

import nnsight
from nnsight import LanguageModel

PROMPT = "The Eiffel Tower is in the city of"
SHORT = "Water is made of"
N_TOKENS = 4
OPTIONS = {"max_new_tokens": N_TOKENS, "eos_token_id": 1555}  # that no text ends with
MODES = {
    "guidance": {"guidance_scale": 1.7},
    "negative prompt": {"guidance_scale": 1.7, "negative_prompt_ids": torch.tensor([[5, 9, 13]])},
    "chunks": {"prefill_chunk_size": 3},
    "chunks and guidance": {"prefill_chunk_size": 3, "guidance_scale": 1.7},
    "guidance without a cache": {"guidance_scale": 1.7, "use_cache": False},
    "guidance in beams": {"guidance_scale": 1.7, "num_beams": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture(scope="module")
def assistant():
    """Guesses like the demo model: its first layers."""
    whole = LanguageModel("nnsight/demo", dispatch=True)
    whole._module.transformer.h = whole._module.transformer.h[:9]
    whole._module.config.n_layer = 9
    return whole._module


@pytest.fixture
def chunks_are_right(demo):
    """transformers 5.2.0 counts the positions in chunks wrongly, so that there they are not the whole prompt."""
    enc = demo.tokenizer(PROMPT, return_tensors="pt")
    first = [
        demo._module.generate(
            **enc, **given, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
        ).logits[0]
        for given in ({}, MODES["chunks"])
    ]
    if not torch.allclose(*first, atol=1e-3):
        pytest.skip("this transformers reads a prompt in chunks otherwise than as a whole")


def hidden_of(output):
    return output[0] if isinstance(output, tuple) else output


def place_of(call, mode, n_prompt):
    """In which step a call of the model is, and its number there."""
    size = mode.get("prefill_chunk_size", n_prompt)
    first = -(-n_prompt // size)
    guided = 1 + ("guidance_scale" in mode)
    if call < first + guided - 1:
        return 0, call
    call -= first + guided - 1
    return 1 + call // guided, call % guided


def by_hooks(module, program, mode, n_prompt, call):
    """Runs `call` with a plain hook on each module of `program`, {(step, call, path): write or None}."""
    count, reads, handles = [-1], [], []

    def counted(*_):
        count[0] += 1

    def watch(path):
        def hook(_module, _args, output):
            key = (*place_of(count[0], mode, n_prompt), path)
            if key not in program:
                return None
            reads.append((*key, hidden_of(output).clone()))
            write = program[key]
            if write is None:
                return None
            return (output[0] + write, *output[1:]) if isinstance(output, tuple) else output + write

        return hook

    handles.append(module.register_forward_pre_hook(counted))
    handles.extend(module.get_submodule(p).register_forward_hook(watch(p)) for p in {key[2] for key in program})
    try:
        return call(), reads
    finally:
        for handle in handles:
            handle.remove()


LAYERS = {"gpt2": ("transformer.h.0", "mlp"), "llama": ("model.layers.0", "mlp"), "mixtral": ("model.layers.1", "mlp")}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_random_programs_over_the_calls_of_steps_equal_plain_hooks(name, mode, seed, tokenizer, switch):
    rng = random.Random(f"{name} {mode} {seed}")
    model, options = LanguageModel(tiny.build(name), tokenizer=tokenizer), MODES[mode]
    layer, part = LAYERS[name]
    paths = [f"{layer}.{part}", layer, "lm_head"]
    n_prompt = model.tokenizer(PROMPT, return_tensors="pt").input_ids.shape[1]
    seen = []
    watch = model._module.register_forward_pre_hook(lambda *_: seen.append(place_of(len(seen), options, n_prompt)))
    untouched = model.generate(PROMPT, **OPTIONS, **options)
    watch.remove()
    assert mode == "lookup" or len({step for step, _ in seen}) == N_TOKENS
    program = {}
    for step, call in seen:
        for path in paths:
            if rng.random() < 0.4:
                size = model.config.vocab_size if path == "lm_head" else 16
                program[step, call, path] = torch.randn(size) if rng.random() < 0.4 and mode != "lookup" else None
    expected, reads = by_hooks(
        model._module, program, options, n_prompt, lambda: model.generate(PROMPT, **OPTIONS, **options)
    )
    found = []
    with model.generate(PROMPT, **OPTIONS, **options) as tracer:
        for step in tracer.iter[:]:
            at = 0
            for key in (key for key in program if key[0] == step):
                if key[1] > at:
                    ahead, at = key[1] - at, key[1]
                    rng.choice([model, model.get(key[2].partition(".")[0]), model.get(key[2])]).next(ahead)
                envoy = model.get(key[2])
                output = envoy.output
                found.append((*key, hidden_of(output).clone()))
                if program[key] is not None:
                    new = hidden_of(output) + program[key]
                    envoy.output = (new, *output[1:]) if isinstance(output, tuple) else new
        result = tracer.result
    assert torch.equal(result, expected)
    assert [one[:3] for one in found] == [one[:3] for one in reads]
    assert all(torch.equal(one[3], other[3]) for one, other in zip(found, reads, strict=True))
    assert any(write is not None for write in program.values()) or torch.equal(result, untouched)


def test_with_an_assistant_a_step_is_a_call_of_the_model_that_may_bring_several_tokens(demo, assistant):
    options = {**OPTIONS, "max_new_tokens": 9, "assistant_model": assistant}
    calls, written = [], []

    def hook(_module, _args, output):
        calls.append(hidden_of(output).clone())

    handle = demo._module.transformer.h[5].register_forward_hook(hook)
    expected = demo.generate(PROMPT, **options)
    handle.remove()
    with demo.generate(PROMPT, **options) as tracer:
        for _step in tracer.iter[:]:
            written.append((hidden_of(demo.transformer.h[5].output).clone(), tracer.positions[0].tolist()))
            assert tracer.lengths.tolist() == [[12]]
        result = tracer.result
    assert torch.equal(result, expected)
    assert len(written) < 9  # or no guess held
    assert all(torch.equal(one, other) for (one, _), other in zip(written, calls, strict=True))
    assert all(len(positions) == hidden.shape[1] for hidden, positions in written)
    assert written[0][1][:12] == list(range(12))
    ends = [positions[0] for _, positions in written[1:]]
    assert ends == sorted(ends)


def test_an_assistant_may_come_wrapped_and_not_edited(demo, assistant):
    wrapped = LanguageModel(assistant, tokenizer=demo.tokenizer)
    expected = demo.generate(PROMPT, **OPTIONS, assistant_model=assistant)
    assert torch.equal(demo.generate(PROMPT, **OPTIONS, assistant_model=wrapped), expected)
    edited = wrapped.edit(lambda model: model.transformer.h[0].output)
    with pytest.raises(nnsight.errors.InputError, match="edits of an `assistant_model`"):
        demo.generate(PROMPT, **OPTIONS, assistant_model=edited)
    with pytest.raises(nnsight.errors.InputError, match=r"takes a model, not a name(?s:.)*LanguageModel\('gpt2'\)"):
        demo.generate(PROMPT, **OPTIONS, assistant_model="gpt2")


@pytest.mark.parametrize("where", ["logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"])
def test_calls_of_a_users_own_function_within_generate_are_no_steps(demo, where):
    other = torch.tensor([[5, 9, 13]])

    def call():
        demo._module(other)

    class Processor(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            call()
            return scores

    class Criterion(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            call()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def every_token(_row, _ids):
        call()
        return list(range(demo.config.vocab_size))

    own = {
        "logits_processor": transformers.LogitsProcessorList([Processor()]),
        "stopping_criteria": transformers.StoppingCriteriaList([Criterion()]),
        "prefix_allowed_tokens_fn": every_token,
    }
    with demo.generate([PROMPT, SHORT], **OPTIONS, **{where: own[where]}) as tracer:
        found = []
        for step in tracer.iter[:]:
            first, second = tracer.rows
            found.append((step, first.transformer.h[0].mlp.output.shape[1], second.lengths.item()))
            found[-1] += (second.transformer.h[0].mlp.output.shape[1],)
        result = tracer.result
    assert found == [(0, 12, 5, 5), (1, 1, 5, 1), (2, 1, 5, 1), (3, 1, 5, 1)]
    assert torch.equal(result, demo.generate([PROMPT, SHORT], **OPTIONS))


# What belongs to which call


@pytest.mark.parametrize("mode", ["guidance", "chunks"])
def test_what_is_asked_late_is_never_the_further_calls(demo, mode, switch):
    wrong = [
        (lambda: demo.transformer.h[2].output, r"read it before that line; or transformer\.h\.2\.next\(\)\.output"),
        (
            lambda: (demo.lm_head.output, demo.transformer.h[4].output),
            r"keep the value from there in a variable; or transformer\.h\.4\.next\(\)\.output",
        ),
        (lambda: demo.transformer.h[3].input, r"read it before that line; or transformer\.h\.3\.next\(\)\.input"),
    ]
    for ask, instead in wrong:
        with (
            pytest.raises(nnsight.errors.AlreadyPastError, match=rf"(?s)is past.*step +0.*instead +{instead} "),
            demo.generate(PROMPT, **OPTIONS, **MODES[mode]),
        ):
            demo.transformer.h[4].output
            ask()
    with pytest.raises(nnsight.errors.NeverCalledError), demo.generate(PROMPT, **OPTIONS, **MODES[mode]):
        demo.transformer.h.output


def test_next_stays_in_its_step_however_many_calls_it_has(demo):
    for calls, options in [(2, MODES["guidance"]), (4, MODES["chunks"]), (1, MODES["lookup"])]:
        with demo.generate(PROMPT, **OPTIONS, **options):
            for _call in range(calls - 1):
                demo.next().transformer.h[0].output
            with pytest.raises(nnsight.errors.CalledFewerTimesError, match="no such call"):
                demo.transformer.h[0].next().output


def test_what_was_asked_in_a_step_is_over_when_the_loop_goes_on(demo):
    with demo.generate(PROMPT, **OPTIONS, **MODES["guidance"]) as tracer:
        for step in tracer.iter[:]:
            with pytest.raises(nnsight.errors.AlreadyPastError):
                (demo.transformer.h[4].output, demo.transformer.h[2].output)
            assert step == tracer._run.state.block_step
        assert tracer.result.shape == (1, 12 + N_TOKENS)


# Prompts


@pytest.mark.parametrize("batch", ["rows", "invokes"])
@pytest.mark.parametrize("mode", ["chunks", "guidance", "chunks and guidance"])
def test_a_batch_has_in_each_call_what_each_prompt_has_alone(demo, mode, batch, chunks_are_right):
    options = {**OPTIONS, **MODES[mode], "prefill_chunk_size": None}
    chunked, guided = {**OPTIONS, **MODES[mode]}, "guidance" in mode

    def alone(prompt):
        found = []
        with demo.generate(prompt, **options) as tracer:
            for _step in tracer.iter[:]:
                found.append(hidden_of(demo.transformer.h[3].output).clone())
                if guided:
                    found.append(hidden_of(demo.transformer.h[3].next().output).clone())
            found.append(tracer.result[:, -N_TOKENS:])
        return found

    def in_chunks(tracer, layer, go_on, found):
        for step in tracer.iter[:]:
            parts = [hidden_of(layer.output).clone()]
            while not step and "chunks" in mode and len(parts) < 4:
                go_on()
                parts.append(hidden_of(layer.output).clone())
            found.append(torch.cat(parts, dim=1))
            if guided:
                go_on()
                found.append(hidden_of(layer.output).clone())

    prompts, found = [PROMPT, SHORT], [[], []]
    if batch == "invokes":
        with demo.generate(**chunked) as tracer:
            for at, prompt in enumerate(prompts):
                with tracer.invoke(prompt):
                    in_chunks(tracer, demo.transformer.h[3], demo.transformer.h[3].next, found[at])
                    found[at].append(tracer.result[:, -N_TOKENS:])
    else:
        for at in range(2):
            with demo.generate(prompts, **chunked) as tracer:
                row = tracer.rows[at]
                in_chunks(tracer, row.transformer.h[3], tracer.model.transformer.h[3].next, found[at])
                found[at].append(row.result[:, -N_TOKENS:])
    for one, prompt in zip(found, prompts, strict=True):
        for now, then in zip(one, alone(prompt), strict=True):
            torch.testing.assert_close(now, then, atol=1e-4, rtol=1e-3)


PLACES = {
    "the last token of the prompt": lambda tracer: tracer.positions == tracer.lengths - 1,
    "every generated token": lambda tracer: tracer.positions >= tracer.lengths,
    "token 2 of the prompt": lambda tracer: tracer.positions == 2,
}


@pytest.mark.parametrize("mode", ["chunks", "lookup", "assistant"])
@pytest.mark.parametrize("place", PLACES)
def test_an_edit_at_a_token_is_the_same_in_chunks_and_with_guesses(demo, assistant, place, mode, request):
    if mode == "chunks":
        request.getfixturevalue("chunks_are_right")
    prompts = [PROMPT, SHORT] if mode == "chunks" else [PROMPT]
    options = {"assistant_model": assistant} if mode == "assistant" else MODES[mode]
    vector = 400 * torch.randn(demo.config.n_embd, generator=torch.Generator().manual_seed(0))
    where, runs = PLACES[place], {}

    def steer(tracer, model):
        model.transformer.h[0].mlp.output[where(tracer)] += vector

    steered = demo.edit(steer)
    for name, given in {"whole": {}, mode: options}.items():
        with demo.generate(prompts, **OPTIONS, **given) as tracer:
            for step in tracer.iter[:]:
                demo.transformer.h[0].mlp.output[where(tracer)] += vector
                for _chunk in range(3 if name == "chunks" and not step else 0):
                    later = demo.transformer.h[0].mlp.next().output
                    later[where(tracer)] += vector
            runs[name] = tracer.result
        runs[f"{name}, edited"] = steered.generate(prompts, **OPTIONS, **given)
    assert not torch.equal(runs["whole"], demo.generate(prompts, **OPTIONS))
    assert all(torch.equal(run, runs["whole"]) for run in runs.values())


def test_beside_the_prompt_positions_and_lengths_are_those_of_what_is_read_there(demo):
    negative = demo.tokenizer([SHORT, SHORT], return_tensors="pt").input_ids
    with demo.generate([PROMPT, SHORT], **OPTIONS, guidance_scale=1.5, negative_prompt_ids=negative) as tracer:
        for step in tracer.iter[:]:
            own = tracer.positions, tracer.lengths.tolist()
            demo.transformer.h[0].next().output
            beside = tracer.positions.tolist(), tracer.lengths.tolist()
            assert own[0].shape == ((2, 12) if not step else (2, 1))
            assert own[1] == [[12], [5]]
            assert beside == ([[0, 1, 2, 3, 4] if not step else [4 + step]] * 2, [[5], [5]])


def test_an_edit_counts_steps_and_not_calls(demo):
    for options, calls in [(MODES["guidance"], [0, 0, 1, 1, 2, 2, 3, 3]), (MODES["chunks"], [0, 0, 0, 0, 1, 2, 3])]:
        whole, layer = [], []
        edited = demo.edit(lambda tracer, _: whole.append(tracer.step))  # noqa: B023
        edited.transformer.h[3].edit(lambda tracer, _: layer.append(tracer.step), inplace=True)  # noqa: B023
        edited.generate(PROMPT, **OPTIONS, **options)
        assert whole == layer == calls


def test_caches_keep_each_call_with_its_step(demo):
    with demo.generate(PROMPT, **OPTIONS, **MODES["chunks and guidance"]) as tracer:
        cache = tracer.cache("transformer.h.3")
    calls = cache["transformer.h.3"].visits
    assert [call.step for call in calls] == [0] * 5 + [1, 1, 2, 2, 3, 3]
    assert [hidden_of(call.output).shape[1] for call in calls] == [3, 3, 3, 3, 1] + [1] * 6


def test_operations_of_a_further_call_can_be_had(demo):
    with demo.generate(PROMPT, **OPTIONS, **MODES["guidance"]) as tracer:
        for step in tracer.iter[:]:
            own = demo.transformer.h[0].mlp.source.self_act_0.output
            beside = demo.transformer.h[0].mlp.next().source.self_act_0.output
            assert own.shape[1] == (1 if step else 12)
            assert beside.shape[1] == 1
        logits = demo.generate(PROMPT, **OPTIONS, **MODES["guidance"])
    assert logits.shape == (1, 16)


@pytest.mark.parametrize("mode", ["guidance", "chunks"])
def test_rows_of_an_encoder_decoder_equal_hooks_that_slice(mode, tokenizer):
    model, calls = LanguageModel(tiny.build_other("bart"), tokenizer=tokenizer), []
    layer = model._module.model.decoder.layers[0]
    handle = layer.register_forward_hook(lambda _module, _args, output: calls.append(hidden_of(output).clone()))
    model.generate([PROMPT, SHORT], **OPTIONS, **MODES[mode])
    handle.remove()
    for at in range(2):
        found = []
        with model.generate([PROMPT, SHORT], **OPTIONS, **MODES[mode]) as tracer:
            row = tracer.rows[at]
            for _step in tracer.iter[:]:
                found.append(hidden_of(row.model.decoder.layers[0].output).clone())
                assert row.lengths.tolist() == [[1]]
                if mode == "guidance":
                    tracer.model.model.decoder.layers[0].next()
                    found.append(hidden_of(row.model.decoder.layers[0].output).clone())
        assert all(torch.equal(own, whole[at : at + 1]) for own, whole in zip(found, calls, strict=True))


@pytest.mark.parametrize("mode", ["guidance", "assistant"])
def test_an_encoder_decoder_has_steps_under_guidance_and_with_an_assistant(mode, tokenizer):
    model = LanguageModel(tiny.build_other("bart"), tokenizer=tokenizer)
    options = {"assistant_model": tiny.build_other("bart")} if mode == "assistant" else MODES[mode]
    positions = []
    with model.generate(PROMPT, **OPTIONS, **options) as tracer:
        for _step in tracer.iter[:]:
            hidden = hidden_of(model.model.decoder.layers[1].output)
            positions.append(tracer.positions[0].tolist())
            assert hidden.shape[1] == len(positions[-1])
            if mode == "assistant":
                with pytest.raises(nnsight.errors.BlockError, match="decoder's beginning is can't be told"):
                    tracer.lengths
        result = tracer.result
    assert torch.equal(result, model.generate(PROMPT, **OPTIONS, **options))
    assert mode == "assistant" or positions == [[0], [1], [2], [3]]
    assert positions[0][0] == 0


# What is refused


def test_steps_are_refused_where_the_same_modules_make_the_guesses(demo):
    guided = {"guidance_scale": 1.5, "prompt_lookup_num_tokens": 3}
    for options, why in [
        (guided, "With guidance and `prompt_lookup_num_tokens`, .* the same modules make the guesses"),
        ({"assistant_model": demo._module}, "With this `assistant_model`, .* the same modules make the guesses"),
        ({"assistant_early_exit": 2}, "`assistant_early_exit`, .* the same modules make the guesses"),
        ({"assistant_model": demo._module, **guided}, "With guidance and `assistant_model`"),
        ({"custom_generate": lambda model, input_ids, **_: input_ids}, "`custom_generate`, .* nothing says how often"),
    ]:
        with (
            pytest.raises(nnsight.errors.BlockError, match=f"(?s){why}"),
            demo.generate(PROMPT, **OPTIONS, **options) as tracer,
        ):
            tracer.iter[:]


def test_rows_are_refused_where_a_model_guides_itself(gpt2, tokenizer):
    class Guides(type(gpt2)):
        def generate(self, input_ids, guidance_scale=None, **options):
            return super().generate(torch.cat([input_ids, input_ids]), max_new_tokens=1)[: len(input_ids)]

    module = Guides(gpt2.config).eval()
    model = LanguageModel(module, tokenizer=tokenizer)
    with model.generate([PROMPT, PROMPT], guidance_scale=2.0) as tracer:
        assert len(hidden_of(tracer.model.transformer.h[0].output)) == 4
        with pytest.raises(nnsight.errors.RowError, match="has guidance of its own"):
            tracer.rows


def test_a_step_is_not_counted_from_the_end_where_guesses_may_hold(demo):
    with (
        pytest.raises(nnsight.errors.BlockError, match=r"`prompt_lookup_num_tokens` a step may bring several tokens"),
        demo.generate(PROMPT, **OPTIONS, prompt_lookup_num_tokens=3) as tracer,
    ):
        tracer.iter[-1]
