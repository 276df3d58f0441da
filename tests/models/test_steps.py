"""Generation, step by step: the numbers of plain hooks that count, and a loop that ends where the generation ends."""

import random
import threading

import pytest
import tiny
import torch
from transformers import TextIteratorStreamer

import nnsight
from nnsight import LanguageModel, NNsight
from nnsight.block.leave_out import SEES_OPCODES

PROMPT = "The Eiffel Tower is in the city of"
N_TOKENS = 5


def generate(model, **options):
    return model.generate(PROMPT, **{"max_new_tokens": N_TOKENS, "min_new_tokens": N_TOKENS, **options})


def steps_of(model, **options):
    return generate(model, trace=True, **options)


def by_hooks(module, program, call):
    """Runs `call` with a plain hook on each module of `program`, {(step, path): write or None}; the reads, in order."""
    step, reads, handles = [-1], [], []

    def count(*_):
        step[0] += 1

    def watch(path):
        def hook(_module, _args, output):
            value = output[0] if isinstance(output, tuple) else output
            if (step[0], path) not in program:
                return None
            reads.append((step[0], path, value.clone()))
            write = program[step[0], path]
            if write is None:
                return None
            return (value + write, *output[1:]) if isinstance(output, tuple) else value + write

        return hook

    handles.append(module.register_forward_pre_hook(count))
    paths = {path for _, path in program}
    handles.extend(module.get_submodule(path).register_forward_hook(watch(path)) for path in paths)
    try:
        return call(), reads
    finally:
        for handle in handles:
            handle.remove()


PATHS = ["transformer.wte", "transformer.h.0.attn", "transformer.h.0.mlp", "transformer.h.0", "transformer.h.1.mlp"]
PATHS += ["transformer.h.1", "transformer.ln_f"]


@pytest.mark.parametrize("seed", range(60))
def test_random_programs_over_steps_equal_plain_hooks(model, seed, switch):
    rng = random.Random(seed)
    width = model.config.n_embd
    steps = sorted(rng.sample(range(N_TOKENS), rng.randint(1, N_TOKENS)))
    program = {
        (step, path): torch.randn(width) if rng.random() < 0.4 else None
        for step in steps
        for path in PATHS
        if rng.random() < 0.4
    }
    options = {
        "max_new_tokens": N_TOKENS,
        "min_new_tokens": N_TOKENS,
        "use_cache": rng.random() < 0.7,
        "num_beams": rng.choice([1, 1, 3]),
    }
    if rng.random() < 0.3:
        options |= {"do_sample": True, "num_return_sequences": rng.choice([1, 2])}
    ids = model.tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(seed)
    expected, wanted = by_hooks(
        model._module, program, lambda: model._module.generate(**ids, pad_token_id=0, **options)
    )

    torch.manual_seed(seed)
    seen = []
    with model.generate(ids, pad_token_id=0, **options) as tracer:
        for step in tracer.iter[steps] if rng.random() < 0.5 else tracer.iter[:]:
            for path in PATHS:
                if (step, path) in program:
                    envoy = model.get(path)
                    output = envoy.output
                    value = output[0] if isinstance(output, tuple) else output
                    seen.append((step, path, value.clone()))
                    if (write := program[step, path]) is not None:
                        envoy.output = (value + write, *output[1:]) if isinstance(output, tuple) else value + write
        result = tracer.result
    assert torch.equal(result, expected)
    assert [place[:2] for place in seen] == [place[:2] for place in wanted]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(seen, wanted, strict=True))


# Which steps


@pytest.mark.parametrize(
    ("key", "steps"),
    [
        (slice(None), [0, 1, 2, 3, 4]),
        (slice(2, None), [2, 3, 4]),
        (slice(1, 3), [1, 2]),
        (slice(0, 5, 2), [0, 2, 4]),
        (slice(None, None, 3), [0, 3]),
        (slice(1, 99), [1, 2, 3, 4]),
        (slice(3, 3), []),
        (3, [3]),
        (0, [0]),
        ([0, 4], [0, 4]),
        ((1, 2), [1, 2]),
        (range(0, 5, 4), [0, 4]),
        (-1, [4]),
        (slice(None, -1), [0, 1, 2, 3]),
        (slice(-2, None), [3, 4]),
        ([0, -1], [0, 4]),
    ],
)
def test_the_loop_goes_through_the_steps_it_is_asked_for(demo, key, steps, switch):
    seen, widths = [], []
    with steps_of(demo) as tracer:
        for step in tracer.iter[key]:
            seen.append(step)
            widths.append(demo.transformer.h[1].mlp.output.shape[1])
        after = tracer.result
    assert seen == steps
    assert widths == [12 if step == 0 else 1 for step in steps]
    assert torch.equal(after, generate(demo))


def test_all_and_a_bare_iter_are_all_steps(demo):
    with steps_of(demo) as tracer:
        assert list(tracer.all()) == [0, 1, 2, 3, 4]
    with steps_of(demo) as tracer:
        assert list(tracer.iter) == [0, 1, 2, 3, 4]


def test_the_loop_ends_where_the_end_of_text_comes_and_what_follows_runs(demo):
    answer = demo.tokenizer.encode(" Paris")[0]
    with demo.generate(PROMPT, max_new_tokens=9, eos_token_id=answer) as tracer:
        seen = list(tracer.iter[:])
        after = tracer.result
    assert seen == [0]
    assert after[0, -1] == answer


def test_steps_in_which_nothing_is_asked(demo):
    with steps_of(demo) as tracer:
        for step in tracer.iter[:]:
            if step == 3:
                value = demo.transformer.h[2].mlp.output
    assert value.shape == (1, 1, 128)
    with steps_of(demo) as tracer:
        for _step in tracer.iter[:]:
            pass
        assert tracer.result.shape == (1, 17)


def test_a_plain_trace_has_one_step(demo):
    with demo.trace(PROMPT) as tracer:
        for step in tracer.iter[:]:
            assert step == 0
            first = demo.transformer.h[1].mlp.output
        second = demo.transformer.h[2].mlp.output  # the loop leaves the model where it stands
        with pytest.raises(nnsight.errors.BlockError, match="no step 1"):
            tracer.iter[1]
    assert first.shape == second.shape


def test_break_and_stop_in_the_middle(demo):
    with steps_of(demo) as tracer:
        for step in tracer.iter[:]:
            if step == 2:
                break
        value = demo.transformer.h[0].mlp.output
        result = tracer.result
    assert value.shape == (1, 1, 128)
    assert result.shape == (1, 17)
    reached = []
    with steps_of(demo) as tracer:
        for step in tracer.iter[:]:
            reached.append(demo.lm_head.output)
            if step == 2:
                tracer.stop()
        reached.append("never")
    assert len(reached) == 3


def test_a_second_loop_goes_on_where_the_first_one_stopped(demo):
    with steps_of(demo) as tracer:
        first = [(step, demo.transformer.h[3].mlp.output) for step in tracer.iter[:2]]
        second = [(step, demo.transformer.h[3].mlp.output) for step in tracer.iter[2:]]
    assert [step for step, _ in [*first, *second]] == [0, 1, 2, 3, 4]


def test_a_loop_may_begin_in_the_middle_of_a_step(demo):
    with steps_of(demo) as tracer:
        early = demo.transformer.h[1].mlp.output
        for step in tracer.iter[:]:
            late = demo.transformer.h[2].mlp.output
            if step == 0:
                assert early.shape == late.shape


def test_beams_sequences_and_sampling_are_as_without_a_trace(demo):
    for options in (
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 4, "do_sample": True},
    ):
        torch.manual_seed(1)
        plain = generate(demo, **options)
        torch.manual_seed(1)
        with steps_of(demo, **options) as tracer:
            widths = {demo.transformer.h[5].mlp.output.shape[0] for _ in tracer.iter[:]}
            result = tracer.result
        assert torch.equal(plain, result)
        assert widths == {options.get("num_beams", options.get("num_return_sequences"))}


def test_two_generations_in_lockstep(demo):
    with steps_of(demo) as a, demo.generate("The Colosseum is in the city of", max_new_tokens=5, min_new_tokens=5) as b:
        for step, other in zip(a.iter[:], b.iter[:], strict=True):
            assert step == other
            b.transformer.h[8].mlp.output = (
                a.transformer.h[8].mlp.output[:, -1:].expand_as(b.transformer.h[8].mlp.output)
            )
        patched = b.result
    assert not torch.equal(patched[:, -5:], demo.generate("The Colosseum is in the city of", max_new_tokens=5)[:, -5:])


def test_a_streamer_that_another_thread_reads(demo):
    streamer = TextIteratorStreamer(demo.tokenizer, skip_prompt=True, timeout=20)
    heard = []
    listener = threading.Thread(target=lambda: heard.extend(streamer))
    listener.start()
    with steps_of(demo, streamer=streamer) as tracer:
        for _step in tracer.iter[:]:
            demo.lm_head.output
        result = tracer.result
    listener.join()
    assert "".join(heard) == demo.tokenizer.decode(result[0, 12:])


def test_gradients_are_off_in_the_model_and_on_in_the_block(demo):
    with steps_of(demo) as tracer:
        for _step in tracer.iter[:]:
            assert not demo.transformer.h[0].mlp.output.requires_grad
            assert torch.is_grad_enabled()


# Mistakes


def test_an_earlier_module_is_an_error_at_its_line_and_never_the_next_steps_value(demo):
    with pytest.raises(nnsight.errors.AlreadyPastError, match=r"step +1\n"), steps_of(demo) as tracer:
        for step in tracer.iter[:]:
            demo.transformer.h[5].mlp.output
            if step == 1:
                demo.transformer.h[3].mlp.output
    assert generate(demo).shape == (1, 17)


def test_after_such_an_error_the_next_step_can_be_had(demo):
    with steps_of(demo) as tracer:
        for step in tracer.iter[:]:
            late = demo.transformer.h[5].mlp.output
            if step == 1:
                for _again in range(2):
                    with pytest.raises(nnsight.errors.AlreadyPastError):
                        demo.transformer.h[3].mlp.output
            assert late.shape[1] == (12 if step == 0 else 1)
    assert step == 4


def test_a_value_after_the_generation_says_that_it_is_over(demo):
    with pytest.raises(nnsight.errors.AlreadyPastError, match="over, after 5 steps"), steps_of(demo) as tracer:
        for _step in tracer.iter[:]:
            pass
        demo.transformer.h[3].mlp.output


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (7, "There is no step 7: this run has 5 steps"),
        (-6, "There is no step -6"),
        ([4, 0], r"tracer.iter\[\[0, 4\]\]"),
        ([1, 1], "each once"),
        (slice(None, None, -1), "forward"),
        (slice(None, None, 0), "forward"),
        ("all", "takes a step, a slice"),
        (True, "takes a step, a slice"),
        (1.5, "takes a step, a slice"),
        (None, "takes a step, a slice"),
    ],
)
def test_a_key_that_means_no_steps(demo, key, says):
    with pytest.raises(nnsight.errors.BlockError, match=says), steps_of(demo) as tracer:
        for _step in tracer.iter[key]:
            pass


def test_a_negative_step_where_the_generation_may_end_sooner(demo):
    with (
        pytest.raises(nnsight.errors.BlockError, match="end-of-text"),
        demo.generate(PROMPT, max_new_tokens=3) as tracer,
    ):
        tracer.iter[-1]
    with (
        pytest.raises(nnsight.errors.BlockError, match="stop_strings"),
        steps_of(demo, stop_strings=["Rome"]) as tracer,
    ):
        tracer.iter[:-1]


def test_a_step_that_is_past(demo):
    with pytest.raises(nnsight.errors.AlreadyPastError, match="stands in step 2"), steps_of(demo) as tracer:
        for _step in tracer.iter[2]:
            pass
        for _step in tracer.iter[0]:
            pass


def test_a_with_where_a_loop_belongs(demo):
    with pytest.raises(nnsight.errors.BlockError, match="for step in"), steps_of(demo) as tracer:
        with tracer.iter:
            pass


once_a_step = pytest.mark.filterwarnings("ignore:`with tracer.iter:FutureWarning")


def test_a_with_over_steps_says_that_it_is_a_loop(demo):
    with pytest.warns(FutureWarning, match="for step in tracer.iter"), steps_of(demo) as tracer:
        with tracer.iter[:]:
            demo.lm_head.output


@once_a_step
def test_a_with_over_steps_runs_its_body_in_each_as_a_loop_does(demo):
    looped, steps, count = [], [], 0
    with steps_of(demo) as tracer:
        for _step in tracer.iter[1:]:
            demo.transformer.h[4].mlp.output[:, -1] += 2
            looped.append(demo.lm_head.output)
    with steps_of(demo) as tracer:
        kept = []
        with tracer.iter[1:] as step:
            demo.transformer.h[4].mlp.output[:, -1] += 2
            kept.append(demo.lm_head.output)
            count += 1
            steps.append(step)
        behind = tracer.result.shape
    assert len(kept) == count == len(looped) == 4
    assert all(map(torch.equal, kept, looped))
    assert steps == [1, 2, 3, 4]
    assert step == 4
    assert behind == (1, 17)


@once_a_step
def test_a_with_over_steps_stands_in_invokes_and_edits(demo):
    with demo.generate(max_new_tokens=5, min_new_tokens=5) as tracer:
        with tracer.invoke(PROMPT):
            first = []
            with tracer.all():
                first.append(demo.lm_head.output)
        with tracer.invoke("The"):
            second = []
            with tracer.iter[[0, 3]]:
                second.append(demo.lm_head.output)
    assert [len(first), len(second)] == [5, 2]
    with demo.edit() as (tracer, edited):
        with tracer.iter[2]:
            edited.transformer.h[4].mlp.output[:] = 0
    with edited.generate(PROMPT, max_new_tokens=5, min_new_tokens=5) as tracer:
        seen = [edited.transformer.h[4].mlp.output.abs().max() for _ in tracer.iter[:]]
    assert [bool(one == 0) for one in seen] == [False, False, True, False, False]


@once_a_step
@pytest.mark.skipif(not SEES_OPCODES, reason="Python 3.12 can't leave out a body on the line of its `with`")
def test_a_with_over_steps_on_one_line(demo):
    kept = []
    with steps_of(demo) as tracer:
        with tracer.iter[1:3]: kept.append(demo.lm_head.output)  # fmt: skip  # noqa: E701
    assert len(kept) == 2


@once_a_step
def test_an_error_and_a_stop_in_a_with_over_steps(demo):
    seen = []
    with pytest.raises(nnsight.errors.AlreadyPastError, match=r"you wrote   demo\.transformer\.h\[0\]\.output"):
        with steps_of(demo) as tracer:
            with tracer.all():
                seen.append(demo.lm_head.output)
                demo.transformer.h[0].output
    with steps_of(demo) as tracer:
        with tracer.all():
            seen.append(demo.lm_head.output)
            if len(seen) == 3:
                tracer.stop()
        raise AssertionError("a stopped trace runs nothing behind it")
    assert len(seen) == 3
    assert generate(demo).shape == (1, 17)


@once_a_step
def test_a_with_over_steps_needs_the_source_of_its_body(demo):
    code = "with tracer.iter[:]:\n    demo.lm_head.output"
    with pytest.raises(nnsight.errors.BlockError, match="for step in"), steps_of(demo) as tracer:
        exec(code, {"tracer": tracer, "demo": demo})


def test_an_error_in_a_later_step_leaves_the_model_usable(demo):
    with pytest.raises(RuntimeError), steps_of(demo) as tracer:
        for step in tracer.iter[:]:
            if step == 2:
                demo.transformer.h[4].mlp.output = torch.zeros(1, 1, 7)
    assert generate(demo).shape == (1, 17)


# Positions


@pytest.mark.parametrize("where", ["last of the prompt", "generated", "token 3"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_an_edit_at_a_position_is_the_same_with_and_without_cache_and_padding(name, where, tokenizer):
    model = LanguageModel(tiny.build(name), tokenizer=tokenizer)
    layers = {"gpt2": "transformer.h", "llama": "model.layers", "gpt_neox": "gpt_neox.layers"}[name]
    prompts = ["The Eiffel Tower is in", "The Colosseum is in the city of", "Madison Square Garden"]
    vector = torch.randn(16)

    def logits(given, **options):
        found = []
        with model.generate(given, max_new_tokens=4, min_new_tokens=4, **options) as tracer:
            for _step in tracer.iter[:]:
                output = model.get(layers)[0].output
                hidden = output[0] if isinstance(output, tuple) else output
                at, n = tracer.positions, tracer.lengths
                assert at.shape == hidden.shape[:2]
                hidden[{"last of the prompt": at == n - 1, "generated": at >= n, "token 3": at == 3}[where]] += vector
                found.append(model.output.logits[:, -1])
        return torch.stack(found)

    cached, whole = logits(prompts), logits(prompts, use_cache=False)
    alone = torch.cat([logits(prompt) for prompt in prompts], dim=1)
    torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(cached, alone, atol=1e-4, rtol=1e-3)


def test_positions_of_a_plain_trace_and_before_any_step(demo):
    with demo.trace(["Paris is", "The Eiffel Tower is in the city of"]) as tracer:
        assert tracer.lengths.tolist() == [[4], [12]]
        assert tracer.positions[0].tolist() == [-1] * 8 + [0, 1, 2, 3]
    with steps_of(demo) as tracer:
        assert tracer.positions.tolist() == [list(range(12))]


# `.next()`


def test_next_stays_in_its_step_and_says_how_to_go_to_the_next_one(demo):
    with pytest.raises(nnsight.errors.CalledFewerTimesError, match=r"for step in tracer\.iter\[:\]"), steps_of(demo):
        demo.transformer.h[0].next().output
    with pytest.raises(nnsight.errors.BlockError, match=r"for step in tracer\.iter\[:\]"), steps_of(demo):
        demo.next()
    with pytest.raises(nnsight.errors.BlockError, match="was not used"), steps_of(demo) as tracer:
        for _step in tracer.iter[:]:
            demo.transformer.h[0].next()


# Guidance (test_several_calls.py has more)


def test_guidance_of_one_is_none_and_leaves_the_steps(demo):
    with steps_of(demo, guidance_scale=1) as tracer:
        assert list(tracer.iter[:]) == [0, 1, 2, 3, 4]


def test_a_logits_processor_that_calls_the_model_does_so_within_a_step(demo):
    from transformers import LogitsProcessorList, UnbatchedClassifierFreeGuidanceLogitsProcessor

    def guided():
        return LogitsProcessorList([UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, demo._module)])

    with steps_of(demo, logits_processor=guided()) as tracer:
        widths = [demo.transformer.h[0].mlp.next().output.shape[1] for _step in tracer.iter[:]]
        result = tracer.result
    assert widths == [1] * N_TOKENS
    assert torch.equal(result, generate(demo, logits_processor=guided()))


def test_a_run_that_was_stopped_has_no_result_and_says_so(demo):
    with steps_of(demo) as tracer:
        for step in tracer.iter[:]:
            if step == 2:
                tracer.stop()
    for _again in range(2):
        with pytest.raises(nnsight.errors.AlreadyPastError, match=r"no result: this run has been stopped\.\n"):
            tracer.result
    with demo.trace([PROMPT, PROMPT]) as (a, b):
        a.transformer.h[0].output
        b.stop()
    for ask in (lambda: a.tracer.result, lambda: a.result):
        with pytest.raises(nnsight.errors.AlreadyPastError, match="been stopped"):
            ask()


def test_a_run_that_failed_has_no_result_and_says_so(demo):
    with pytest.raises(ZeroDivisionError), demo.trace(PROMPT) as tracer:
        1 / 0
    with pytest.raises(nnsight.errors.AlreadyPastError, match="ended when its block failed"):
        tracer.result
    with demo.trace(PROMPT) as tracer:
        demo.transformer.h[0].output = torch.ones(1, 12, 3)
        with pytest.raises(RuntimeError, match="normalized_shape"):
            demo.lm_head.output
        with pytest.raises(nnsight.errors.AlreadyPastError, match="ended when the model failed"):
            tracer.result


# What is asked of a generation that is over


@pytest.mark.parametrize("ask", ["result in the loop", "a loop in a loop", "a loop behind the result"])
def test_steps_after_the_end_say_that_the_generation_is_over(demo, ask):
    says = r"can't be had any more: the generation is over, after 5 steps\.\n(.|\n)*tracer\.result behind the loop"
    with pytest.raises(nnsight.errors.AlreadyPastError, match=says), steps_of(demo) as tracer:
        if ask == "a loop behind the result":
            tracer.result
        for _step in tracer.iter[:]:
            if ask == "result in the loop":
                tracer.result
            else:
                list(tracer.iter[:])


def test_iter_is_no_call(demo):
    with pytest.raises(nnsight.errors.BlockError, match=r"for step in tracer\.iter\[:\]"), steps_of(demo) as tracer:
        tracer.iter()


def test_a_negative_step_where_lengths_say_how_many_there_are(demo):
    with demo.generate(PROMPT, max_length=16, min_length=16) as tracer:
        assert list(tracer.iter[-1]) == [3]
        assert tracer.result.shape == (1, 16)


def test_a_row_has_the_loop_the_cache_and_the_rest_of_its_trace(demo):
    prompts = [PROMPT, "Water is made of"]
    with demo.generate(prompts, max_new_tokens=3, min_new_tokens=3) as (a, b):
        kept = b.cache("transformer.h.0.mlp")
        assert b.positions.tolist() == [list(range(len(b.tokens)))]
        assert int(b.lengths) == len(b.tokens)
        steps = [(step, b.transformer.h[0].mlp.output.shape[1]) for step in a.iter[:]]
    assert steps == [(0, len(b.tokens)), (1, 1), (2, 1)]
    assert kept["transformer.h.0.mlp"].output.shape[:2] == (1, len(b.tokens))
    with demo.trace(prompts) as (a, b):
        a.transformer.h[0].output
        b.stop()
        raise AssertionError("never")
    with demo.trace(prompts) as (a, b):
        assert list(a.all()) == [0]


def test_a_row_that_is_not_there(demo):
    with demo.trace([PROMPT, PROMPT]) as tracer:
        assert len(tracer.rows) == 2
        with pytest.raises(nnsight.errors.UnknownIndexError, match="no row 5: this batch has 2 rows, from 0 to 1"):
            tracer.rows[5]


def test_the_streamer_points_to_the_trace(demo):
    with pytest.raises(nnsight.errors.UnknownNameError, match=r"tracer\.result"), steps_of(demo):
        demo.generator.streamer.output


def test_a_number_behind_the_prompt_is_told_its_name(demo):
    with pytest.raises(nnsight.errors.InputError, match="'The', max_new_tokens=3"):
        demo.generate("The", 3)


@pytest.mark.parametrize(
    ("verb", "do"),
    [
        ("write", lambda layer: setattr(layer, "output", torch.zeros(1))),
        ("write", lambda layer: setattr(layer, "input", torch.zeros(1))),
        ("skip", lambda layer: layer.skip(torch.zeros(1))),
        ("read", lambda layer: layer.output),
    ],
)
def test_a_late_access_says_what_to_do_before(demo, verb, do):
    with pytest.raises(nnsight.errors.AlreadyPastError, match=rf"instead +{verb} `transformer.h.3"), demo.trace(PROMPT):
        demo.transformer.h[5].output
        do(demo.transformer.h[3])


def test_a_wait_in_vain_for_the_models_own_input_that_is_caught_leaves_the_next_steps_alone(demo):
    with steps_of(demo) as tracer:
        demo.transformer.ln_f.output
        with pytest.raises(nnsight.errors.AlreadyPastError):
            demo.inputs
        found = [demo.transformer.ln_f.output.shape[1] for _ in tracer.iter[1:]]
    assert found == [1] * (N_TOKENS - 1)


def test_generate_of_any_module_is_a_trace_in_a_with_and_a_call_elsewhere():
    module = tiny.build("gpt2")
    model, ids = NNsight(module), torch.tensor([[5, 6, 7], [8, 9, 10]])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected = module.generate(ids, **options)
    with model.generate(ids, **options) as tracer:
        lengths = [model.transformer.wte.output.shape[1] for _ in tracer.iter[:]]
        assert torch.equal(tracer.result, expected)
    assert lengths == [3, 1, 1]
    assert torch.equal(model.generate(ids, **options), expected)
    with model.trace(ids), torch.no_grad():  # a call of the block's own
        assert torch.equal(model.generate(ids, **options), expected)
        with model.generate(ids, **options) as nested:
            assert torch.equal(nested.result, expected)
    with model.edit() as edited:
        edited.transformer.ln_f.output = edited.transformer.ln_f.output * 0
    with edited.generate(ids, **options) as tracer:
        other = tracer.result
    assert torch.equal(edited.generate(ids, **options), other)
    assert not torch.equal(other, expected)
