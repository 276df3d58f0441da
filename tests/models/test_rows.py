"""Rows of a language model: each prompt of a batch is read and changed as if it ran alone (law 4, and its writes)."""

import copy
import functools

import pytest
import tiny
import torch
import transformers

from comparing import near
from nnsight import LanguageModel, errors

P, Q = tiny.PROMPT, "The Colosseum is"  # of different lengths in tokens, so that one is padded
CONFIGS = {
    **tiny.CONFIGS,
    "one expert": lambda: transformers.MixtralConfig(
        **tiny._TINY, intermediate_size=32, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1
    ),
    "gemma2": lambda: transformers.Gemma2Config(**tiny._TINY, intermediate_size=32, num_key_value_heads=1, head_dim=8),
}
ARCHITECTURES = ["gpt2", "llama", "gemma2", "mixtral", "opt", "bloom", "bart"]


@functools.cache
def built(name):
    if name not in tiny.CONFIGS:
        tiny.CONFIGS[name] = CONFIGS[name]
    module = tiny.build(name)
    return LanguageModel(module, tokenizer=tiny.make_tokenizer())


@pytest.fixture(params=ARCHITECTURES)
def any_model(request):
    return built(request.param)


@pytest.fixture
def model():
    return built("gpt2")


def blocks(model):
    """The paths of the model's layers, and the module that ends it."""
    paths = [name for name, module in model._module.named_modules() if isinstance(module, torch.nn.ModuleList)]
    holder = min(paths, key=len)
    count = len(model.get(holder))
    return [f"{holder}.{index}" for index in range(count)]


def first_of(value):
    return value[0] if isinstance(value, tuple) else value


def alone(model, prompt, ask, **kwargs):
    with model.trace(prompt, **kwargs) as tracer:
        return ask(tracer.model, tracer)


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_reads_what_its_prompt_has_alone(any_model, side):
    if side == "left" and "Bart" in type(any_model._module).__name__:
        pytest.skip("it would count padding on the left")
    paths = blocks(any_model)

    def ask(scope, tracer):
        return [first_of(scope.get(path).output) for path in paths], tracer.result.logits

    with torch.no_grad():
        expected = [alone(any_model, prompt, ask) for prompt in (P, Q)]
        with any_model.trace([P, Q], padding_side=side) as (a, b):
            layers = [[first_of(row.get(path).output) for row in (a, b)] for path in paths]
            logits = [row.result.logits for row in (a, b)]
    for row in range(2):
        for layer, values in enumerate(layers):
            near(values[row], expected[row][0][layer])
        near(logits[row], expected[row][1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_write_through_a_row_does_what_it_does_alone(any_model, side):
    if side == "left" and "Bart" in type(any_model._module).__name__:
        pytest.skip("it would count padding on the left")
    first, *_, last = blocks(any_model)

    def change(scope, _=None):
        out = scope.get(first).output
        if isinstance(out, tuple):
            scope.get(first).output = (out[0] * 2, *out[1:])
        else:
            scope.get(first).output = out * 2
        return first_of(scope.get(last).output)

    def read(scope, _=None):
        return first_of(scope.get(last).output)

    with torch.no_grad():
        untouched, changed = alone(any_model, P, read), alone(any_model, Q, change)
        with any_model.trace([P, Q], padding_side=side) as (a, b):
            got_b = change(b)
            got_a = read(a)
    near(got_a, untouched)
    near(got_b, changed)


def test_row_one_is_patched_from_row_zero_in_one_forward(model, switch):
    def clean(scope, tracer):
        return scope.transformer.h[0].mlp.output

    p, q = "The Colosseum is", "The Tower is"
    length = len(model.tokenizer(p)["input_ids"])
    assert length != len(model.tokenizer(q)["input_ids"])
    with torch.no_grad():
        hidden = alone(model, p, clean)

        def patched(scope, tracer):
            scope.transformer.h[0].mlp.output[:, -1] = hidden[:, -1]
            return tracer.result.logits

        expected = alone(model, q, patched)
        with model.trace([p, q]) as (a, b):
            b.transformer.h[0].mlp.output[:, -1] = a.transformer.h[0].mlp.output[:, -1]
            got = b.result.logits
    near(got, expected)


def test_a_whole_row_equals_hooks_that_slice_bit_for_bit(model):
    ids = model.tokenizer([P, P + " Rome"])["input_ids"]
    prompts = [ids[0], ids[1][: len(ids[0])]]
    prompts[1] = [*prompts[1][:-1], 7]
    batch = torch.tensor(prompts)
    layer = model._module.transformer.h[0].mlp

    def hook(module, args, output):
        output = output.clone()
        output[1] = output[0]
        return output

    handle = layer.register_forward_hook(hook)
    expected = model._module(batch, attention_mask=torch.ones_like(batch)).logits
    handle.remove()
    with model.trace(batch) as (a, b):
        b.transformer.h[0].mlp.output = a.transformer.h[0].mlp.output
        logits = [a.result.logits, b.result.logits]
    torch.testing.assert_close(torch.cat(logits), expected, rtol=0, atol=0)


def test_an_attention_pattern_has_the_rows_own_positions(gpt2, tokenizer):
    config = copy.deepcopy(gpt2.config)  # older transformers writes into it
    module = type(gpt2)._from_config(config, attn_implementation="eager").eval()
    module.load_state_dict(gpt2.state_dict())
    model = LanguageModel(module, tokenizer=tokenizer)

    def pattern(scope, tracer):
        return scope.transformer.h[1].attn.output[1]

    expected = [alone(model, prompt, pattern) for prompt in (P, Q)]
    with model.trace([P, Q]) as (a, b):
        got = [pattern(row, None) for row in (a, b)]
    for one, other in zip(got, expected, strict=True):
        near(one, other)
    assert got[1].shape[2:] == (len(b.tokens), len(b.tokens))


def test_a_row_knows_its_tokens_its_trace_and_its_model(model):
    with model.trace([P, Q]) as tracer:
        a, b = tracer.rows
        assert a.tracer is tracer
        assert a.model.transformer.h[0].path == "model.transformer.h.0"
        assert "".join(a.tokens) == P
        assert "".join(b.tokens) == Q
        same = [
            a.model.transformer.h[0].mlp.output,
            a.transformer.h[0].mlp.output,
            a.tracer.rows[0].transformer.h[0].mlp.output,
        ]
    assert same[0] is same[1] is same[2]


def test_a_with_that_binds_one_name_still_gives_the_tracer(model):
    with model.trace([P, Q]) as tracer:
        assert len(tracer.rows) == 2
        whole = tracer.transformer.h[0].mlp.output
    assert whole.shape[0] == 2


def test_what_a_row_changes_in_place_reaches_the_model(any_model):
    first, *_, last = blocks(any_model)

    def zero(scope, _=None):
        first_of(scope.get(first).output)[:, 1:3] = 0
        return first_of(scope.get(last).output)

    with torch.no_grad():
        expected = alone(any_model, Q, zero)
        with any_model.trace([P, Q]) as (_, b):
            got = zero(b)
    near(got, expected)


def test_a_router_of_experts_is_cut_though_rows_and_tokens_are_one_axis():
    model = built("mixtral")
    router = "model.layers.0.mlp.gate"

    def ask(scope, _=None):
        return scope.get(router).input

    with torch.no_grad():
        expected = [alone(model, prompt, ask) for prompt in (P, Q)]
        with model.trace([P, Q]) as _rows_of:
            got = [ask(row) for row in _rows_of]
            whole = model.get(router).input
    assert whole.ndim == 2
    for one, other in zip(got, expected, strict=True):
        assert one.ndim == 2
        near(one, other)


def test_a_write_to_a_router_stays_in_its_row():
    model = built("mixtral")

    def zero(scope, _=None):
        scope.model.layers[0].mlp.gate.input = torch.zeros_like(scope.model.layers[0].mlp.gate.input)
        return scope.model.layers[1].output

    def read(scope, _=None):
        return scope.model.layers[1].output

    with torch.no_grad():
        expected = [alone(model, P, read), alone(model, Q, zero)]
        with model.trace([P, Q]) as (a, b):
            got = [zero(b), read(a)][::-1]
    for one, other in zip(got, expected, strict=True):
        near(one, other)


def test_a_loss_is_shared_and_read_whole(model):
    ids = torch.randint(0, 300, (2, 5), generator=torch.Generator().manual_seed(0))
    with model.trace(ids, labels=ids) as (a, b):
        losses = a.result.loss, b.result.loss
        logits = a.result.logits
    assert losses[0] is losses[1]
    assert losses[0].ndim == 0
    assert logits.shape[0] == 1


def test_a_shared_value_is_not_changed_by_one_row(model):
    ids = torch.randint(0, 300, (2, 5), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5)[None]  # [1, token]: the same for both rows
    with model.trace(ids, position_ids=positions) as (a, _):
        shared = a.transformer.wpe.output
        assert shared.shape == (1, 5, 16)
        with pytest.raises(errors.WriteError, match="shared by all 2 rows"):
            a.transformer.wpe.output = shared * 2
    with pytest.raises(errors.WriteError, match="shared by all 2 rows"), torch.no_grad():
        with model.trace(ids, position_ids=positions) as (a, _):
            a.transformer.wpe.output[:] = 0
            a.transformer.h[0].mlp.output


def test_a_write_of_another_length_shows_both_prompts(model):
    with model.trace([P, Q]) as (a, b):
        hidden = a.transformer.h[0].mlp.output
        with pytest.raises(errors.WriteError) as raised:
            b.transformer.h[0].mlp.output = hidden
        b.transformer.h[1].mlp.output
    text = str(raised.value)
    assert "b.transformer.h[0].mlp.output = hidden" in text
    assert "|".join(a.tokens) in text
    assert "|".join(b.tokens) in text


def test_nothing_is_broadcast(model):
    with model.trace([P, Q]) as (_, b):
        out = b.transformer.h[0].mlp.output
        for wrong in (out[:, :1], out[0], torch.zeros(16), 0.0):
            with pytest.raises(errors.WriteError):
                b.transformer.h[0].mlp.output = wrong


def test_two_loops_are_answered_with_one(model):
    with pytest.raises(errors.AlreadyPastError, match=r"one loop for both rows"):
        with model.trace([P, Q]) as (a, b):
            for layer in a.transformer.h:
                layer.output
            for layer in b.transformer.h:
                layer.output
    with model.trace([P, Q]) as (a, b):
        for one, other in zip(a.transformer.h, b.transformer.h, strict=True):
            one.output, other.output


@pytest.mark.parametrize("how", ["retain_grad", "autograd.grad", "backward"])
def test_gradients_go_through_a_rows_view(model, how):
    def ask(scope, _=None):
        hidden = scope.transformer.h[0].mlp.output
        if how == "retain_grad":
            hidden.retain_grad()
        return hidden, scope.lm_head.output[:, -1].logsumexp(-1).sum()

    def gradient(hidden, loss):
        if how == "autograd.grad":
            return torch.autograd.grad(loss, hidden)[0]
        hidden.retain_grad()
        loss.backward()
        return hidden.grad

    expected = [gradient(*alone(model, prompt, ask)) for prompt in (P, Q)]
    with model.trace([P, Q]) as (a, b):
        hiddens = [row.transformer.h[0].mlp.output for row in (a, b)]
        if how == "retain_grad":
            hiddens[0].retain_grad()
            hiddens[1].retain_grad()
        losses = [row.lm_head.output[:, -1].logsumexp(-1).sum() for row in (a, b)]
    if how == "autograd.grad":
        got = torch.autograd.grad(sum(losses), hiddens)
    else:
        if how == "backward":
            for hidden in hiddens:
                hidden.retain_grad()
        sum(losses).backward()
        got = [hidden.grad for hidden in hiddens]
    model._module.zero_grad()
    for one, other in zip(got, expected, strict=True):
        near(one, other)


def test_gradients_flow_from_a_patched_row_into_the_other(model):
    prompts = torch.randint(0, 300, (2, 5), generator=torch.Generator().manual_seed(0))
    with model.trace(prompts) as (a, b):
        source, target = a.transformer.drop.output, b.transformer.drop.output
        b.transformer.drop.output = source
        loss = b.lm_head.output[:, -1].sum()
    grads = torch.autograd.grad(loss, [source, target], allow_unused=True)
    with model.trace(prompts[:1]):
        hidden = model.transformer.drop.output
        loss = model.lm_head.output[:, -1].sum()
    near(grads[0], torch.autograd.grad(loss, hidden)[0])
    assert grads[1] is None or not grads[1].any()


def test_a_frozen_model_gives_gradients_of_what_a_row_asks_for(model):
    frozen = LanguageModel(tiny.build("gpt2").requires_grad_(False), tokenizer=model.tokenizer)
    with frozen.trace([P, Q]) as (a, b):
        hidden = b.transformer.h[0].mlp.output.requires_grad_()
        loss = b.lm_head.output.sum() + a.lm_head.output.sum()
    (grad,) = torch.autograd.grad(loss, hidden)
    assert grad.shape == hidden.shape
    assert grad.any()


def test_each_row_of_a_generation_returns_what_its_prompt_returns_alone(model, switch):
    expected = [model.generate(prompt, max_new_tokens=3, do_sample=False) for prompt in (P, Q)]
    with model.generate([P, Q], max_new_tokens=3, do_sample=False) as (a, b):
        first = [row.transformer.h[0].mlp.output for row in (a, b)]
        head = [row.lm_head.output for row in (a, b)]
        got = [row.result for row in (a, b)]
    for row, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert one.tolist() == other.tolist()
        assert first[row].shape[1] == len((a, b)[row].tokens)
        near(head[row][:, -1:], alone(model, (P, Q)[row], lambda scope, _: scope.lm_head.output)[:, -1:])


def test_beams_and_several_sequences_stay_with_their_prompt(model):
    options = {"max_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    expected = [model.generate(prompt, **options) for prompt in (P, Q)]
    with model.generate([P, Q], **options) as (a, b):
        hidden = [row.transformer.h[0].mlp.output for row in (a, b)]
        got = [row.result for row in (a, b)]
    for row, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert hidden[row].shape[:2] == (3, len((a, b)[row].tokens))
        assert one.tolist() == other.tolist()


def test_a_row_of_a_bert_with_padding_reads_what_it_has_alone(tokenizer):
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**tiny._TINY, "intermediate_size": 32}, pad_token_id=1)
    model = LanguageModel(transformers.BertModel(config).eval(), tokenizer=tokenizer)

    def ask(scope, _=None):
        return scope.encoder.layer[1].attention.output, scope.pooler.output

    expected = [alone(model, prompt, ask) for prompt in (P, Q)]
    with model.trace([P, Q]) as (a, b):
        first = [row.encoder.layer[1].attention["output"].output for row in (a, b)]
        pooled = [row.pooler.output for row in (a, b)]
    del expected
    for row, prompt in enumerate((P, Q)):
        with model.trace(prompt) as tracer:
            near(first[row], tracer.encoder.layer[1].attention["output"].output)
            near(pooled[row], tracer.pooler.output)


def test_a_row_of_a_t5_has_its_own_tokens_in_the_encoder(tokenizer):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=320, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=1
    )
    model = LanguageModel(transformers.T5ForConditionalGeneration(config).eval(), tokenizer=tokenizer)
    started = torch.zeros(2, 3, dtype=torch.int64)
    with model.trace([P, Q], decoder_input_ids=started) as (a, b):
        inner = [row.encoder.block[1].layer[0].output for row in (a, b)]
        logits = [row.result.logits for row in (a, b)]
    for row, prompt in enumerate((P, Q)):
        with model.trace(prompt, decoder_input_ids=started[:1]) as tracer:
            near(first_of(inner[row]), first_of(tracer.encoder.block[1].layer[0].output))
            near(logits[row], tracer.result.logits)


def test_too_few_or_too_many_names_are_pythons_own_error_with_the_number_of_rows(model):
    with pytest.raises(ValueError, match="unpack") as caught:
        with model.trace([P, Q]) as (_a, _b, _c):
            pass
    assert caught.value.__notes__ == ["This batch has 2 rows. For any number: `as tracer`, and then tracer.rows."]
    with pytest.raises(ValueError, match="unpack") as caught:
        with model.trace([P, Q]) as (_a, _b):
            _one, _two, _three = [1, 2]
    assert not getattr(caught.value, "__notes__", [])
    with model.trace([P, Q]) as (a, _b):
        a.transformer.h[0].mlp.output


def test_a_row_can_neither_skip_nor_go_on_alone(model):
    with (
        pytest.raises(errors.RowError, match=r"(?s)was not skipped for row 1.*mlp.skip"),
        model.trace([P, Q]) as (a, b),
    ):
        with pytest.raises(errors.RowError, match="share one forward pass"):
            b.transformer.h[0].next()
        a.transformer.h[0].mlp.skip(a.transformer.h[0].mlp.input)
    with model.trace([P, Q]) as (a, b):
        a.transformer.h[0].mlp.skip(a.transformer.h[0].mlp.input)
        with pytest.raises(errors.RowError, match="was not skipped for row 1"):
            a.transformer.h[1].output


@pytest.mark.parametrize("invokes", [False, True])
def test_a_module_that_all_rows_skip_is_left_out(any_model, invokes):
    path = blocks(any_model)[1]
    with any_model.trace(P):
        usual = any_model.get(path).output

    def skip(scope):
        layer = scope.get(path)
        value = layer.input * 2
        layer.skip((value, *[None for _ in usual[1:]]) if isinstance(usual, tuple) else value)

    if invokes:
        with any_model.trace() as tracer:
            with tracer.invoke(P):
                skip(any_model)
                first = tracer.result.logits
            with tracer.invoke(Q):
                skip(any_model)
                second = tracer.result.logits
    else:
        with any_model.trace([P, Q]) as rows:
            for row in rows:
                skip(row)
            first, second = (row.result.logits for row in rows)
    for prompt, logits in ((P, first), (Q, second)):
        with any_model.trace(prompt) as tracer:
            skip(any_model)
            near(logits, tracer.result.logits)


def test_a_row_after_its_block_is_outside_the_trace(model):
    with model.trace([P, Q]) as (a, _b):
        tracer = a.tracer
    with pytest.raises(errors.OutsideTraceError, match=r"instead +this line in the block"):
        a.transformer.h[0].mlp.output
    fresh = model.trace([P, Q])
    with fresh:
        pass
    with pytest.raises(errors.BlockError, match="after its block"):
        fresh.rows
    assert len(tracer.rows) == 2


def test_measuring_moves_neither_random_numbers_nor_the_model():
    module = tiny.build("gpt2").train()
    model = LanguageModel(module, tokenizer=tiny.make_tokenizer())
    torch.manual_seed(3)
    with model.trace([P, P + " Rome"]):
        expected = model.lm_head.output
    torch.manual_seed(3)
    with model.trace([P, P + " Rome"]) as (a, b):
        a.transformer.h[0].mlp.output, b.transformer.h[0].mlp.output
        whole = model.lm_head.output
    torch.testing.assert_close(whole, expected, rtol=0, atol=0)


def test_rows_without_a_tokenizer_have_positions_and_no_tokens():
    model = LanguageModel(tiny.build("gpt2"))
    with model.trace([[1, 2, 3], [4, 5]]) as (a, b):
        assert b.transformer.h[0].mlp.output.shape == (1, 2, 16)
        with pytest.raises(errors.RowError, match="tokens of these rows aren't known"):
            a.tokens


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_each_step_of_a_generation_is_the_rows_own(name, options):
    model = built(name)
    path = "transformer.ln_f" if name == "gpt2" else "model.norm"
    options = {"max_new_tokens": 3, "do_sample": False, **options}

    def steps_of(scopes, tracer):
        found = [[] for _ in scopes]
        for _ in tracer.iter[:]:
            for values, scope in zip(found, scopes, strict=True):
                values.append(scope.get(path).output)
        return found

    expected = []
    for prompt in (P, Q):
        with model.generate(prompt, **options) as tracer:
            expected += steps_of([tracer.model], tracer)
    with model.generate([P, Q], **options) as (a, b):
        got = steps_of([a, b], a.tracer)
    for row in range(2):
        assert len(got[row]) == len(expected[row])
        for one, other in zip(got[row], expected[row], strict=True):
            near(one, other)


def test_a_write_in_each_step_stays_in_its_row(model, switch):
    options = {"max_new_tokens": 3, "do_sample": False}

    def steer(tracer, scope):
        for _ in tracer.iter[:]:
            scope.transformer.h[0].mlp.output = scope.transformer.h[0].mlp.output * -3
        return scope.result

    with model.generate(Q, **options) as tracer:
        for _ in tracer.iter[:]:
            model.transformer.h[0].mlp.output = model.transformer.h[0].mlp.output * -3
        expected = tracer.result
    untouched = model.generate(P, **options)
    with model.generate([P, Q], **options) as (a, b):
        got = steer(a.tracer, b)
        other = a.result
    assert got.tolist() == expected.tolist()
    assert other.tolist() == untouched.tolist()
    assert expected.tolist() != model.generate(Q, **options).tolist()


def test_two_loops_over_steps_are_answered_with_one(model):
    with pytest.raises(errors.OutOfOrderError):
        with model.generate([P, Q], max_new_tokens=2, do_sample=False) as (a, b):
            for _ in a.tracer.iter[:]:
                a.lm_head.output
            b.lm_head.output


def test_a_key_value_cache_is_no_single_rows(model):
    with model.trace([P, Q]) as (a, b):
        layer = b.transformer.h[1].output
        b.transformer.h[1].output = layer  # the row's own part, bit for bit
        result = a.result
        with pytest.raises(errors.RowError, match=r"past_key_values'\]` can't be told: it is a DynamicCache"):
            result.past_key_values.layers[0].keys


def test_a_trace_that_goes_on_from_a_key_value_cache_is_refused_in_words(model):
    past = model.trace([P, P], trace=False, use_cache=True).past_key_values
    with pytest.raises(errors.RowError, match="an input is a DynamicCache"):
        with model.trace(torch.tensor([[1], [2]]), past_key_values=past) as (a, _b):
            a.transformer.h[0].mlp.output


def test_each_row_of_a_t5s_generation_is_what_its_prompt_gives_alone(tokenizer):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=320,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    model = LanguageModel(transformers.T5ForConditionalGeneration(config).eval(), tokenizer=tokenizer)
    options = {"max_new_tokens": 3, "do_sample": False}

    def said(scope, tracer):
        crosses = scope.decoder.block[1].layer[1].EncDecAttention
        return [(crosses.output[0], scope.lm_head.output) for _ in tracer.iter[:]], scope.result

    with model.generate([P, Q], **options) as (_a, b):
        steps, result = said(b, b.tracer)
    with model.generate(Q, **options) as tracer:
        expected, alone_result = said(tracer, tracer)
    for one, other in zip(steps, expected, strict=True):
        near(one[0], other[0])
        near(one[1], other[1])
    assert torch.equal(result, alone_result)


def test_a_state_that_ran_on_through_padding_is_refused():
    model = built("rwkv")
    with model.trace([P, Q]) as (a, b):
        result = b.result
        first = a.result
    assert result.logits.shape[:2] == (1, 4)
    with pytest.raises(errors.RowError, match="runs on through the padding"):
        result.state[0] + 0
    with model.trace(P) as tracer:
        near(first.state[0], tracer.result.state[0])


def test_a_row_of_what_a_mixture_sorts_by_expert_is_refused_though_its_size_is_that_of_the_tokens():
    model = built("one expert")
    act = next(path for path, module in model._module.named_modules() if path.endswith("experts.act_fn"))
    path = act.removesuffix(".act_fn")
    with model.trace([P, Q]) as (a, b):
        with pytest.raises(errors.RowError, match="sorted by expert"):
            a.get(act).output
        rows = [row.get(path).output.clone() for row in (a, b)]
    for prompt, row in zip((P, Q), rows, strict=True):
        near(row, alone(model, prompt, lambda one, _: one.get(path).output))
