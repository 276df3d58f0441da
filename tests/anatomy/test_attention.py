"""What is inside attention: read and written without touching how it is computed, and put back."""

import threading
import warnings
import weakref

import families
import pytest
import tiny
import torch
from architectures import quietly
from torch import nn
from transformers import AutoModelForCausalLM, BigBirdConfig, BigBirdModel, ModernBertDecoderConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.diffllama import modeling_diffllama

import nnsight
from comparing import near, same
from nnsight import LanguageModel, NNsight
from nnsight.anatomy.attention import NAMES, read, write
from nnsight.anatomy.interface import eager_mask
from nnsight.anatomy.interior import Interior
from nnsight.anatomy.tiny import tiny_ids
from nnsight.errors import AlreadyPastError, NotOnThisLayerError, OutsideTraceError, UnknownNameError, WriteError

IDS = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0  # row 1 is padded on the left
REAL = MASK.bool()
GIVEN = {"attention_mask": MASK, "use_cache": False}


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping), dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    yield
    assert vars(ALL_ATTENTION_FUNCTIONS).keys() == {"_local_mapping"}
    assert (ALL_ATTENTION_FUNCTIONS._local_mapping, ALL_ATTENTION_FUNCTIONS._global_mapping) == before
    assert not Interior.asked


def bare(module, **more):
    with torch.no_grad():
        return module(IDS, **GIVEN, **more)


def read_all(module, where, names, *more):
    """The values of these names in one trace, and the logits of that."""
    model = NNsight(module)
    with torch.no_grad(), model.trace(IDS, **GIVEN):
        values = {name: read(model.get(where), name) for name in names}
        logits = model.output.logits
    return values, logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", families.WITH_SDPA)
def test_q_k_v_z_are_what_a_registered_function_is_given_and_nothing_changes(name, implementation):
    module = families.build(name, implementation)
    where = families.path(name, 1)
    values, logits = read_all(module, where, "qkvz")
    same(logits, bare(module).logits)
    if implementation == "eager":  # which no registered function stands for
        return
    with families.Spy(module.get_submodule(where), implementation) as spy:
        bare(module)
    for one in "qkvz":
        same(values[one], spy.seen[one])


@pytest.mark.parametrize("name", families.INTERFACED)
def test_the_pattern_of_an_eager_model_is_its_own_bit_for_bit(name):
    module = families.build(name, "eager")
    expected = bare(module, output_attentions=True)
    for layer in (0, 1):
        values, logits = read_all(module, families.path(name, layer), ["pattern"])
        same(values["pattern"], expected.attentions[layer])
        same(logits, expected.logits)


@pytest.mark.parametrize("name", families.WITH_SDPA)
def test_under_sdpa_the_pattern_is_the_eager_models(name):
    expected = bare(families.build(name, "eager"), output_attentions=True)
    module = families.build(name, "sdpa")
    for layer in (0, 1):
        values, logits = read_all(module, families.path(name, layer), ["pattern"])
        torch.testing.assert_close(values["pattern"], expected.attentions[layer], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[REAL], bare(module).logits[REAL], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", families.WITH_SDPA)
def test_where_nothing_is_padded_and_sdpa_has_no_mask_the_pattern_is_causal_all_the_same(name):
    module, eager = (NNsight(families.build(name, one)) for one in ("sdpa", "eager"))
    where = families.path(name, 0)
    with torch.no_grad(), module.trace(IDS, use_cache=False):
        pattern = read(module.get(where), "pattern")
    with torch.no_grad(), eager.trace(IDS, use_cache=False):
        expected = read(eager.get(where), "pattern")
    same(pattern, expected)  # of the first layer, which is given the same
    assert name == "bert" or not pattern.triu(1).any()


@pytest.mark.parametrize("name", families.INTERFACED)
def test_the_six_values_are_those_of_attention(name):
    module = families.build(name, "eager" if name == "gemma2" else None)  # older transformers' sdpa has no soft cap
    values, _ = read_all(module, families.path(name, 1), NAMES)
    q, k, v, scores, pattern, z = (values[one] for one in ("q", "k", "v", "scores", "pattern", "z"))
    groups = q.shape[2] // k.shape[2]
    k, v = (one.transpose(1, 2).repeat_interleave(groups, 1) for one in (k, v))
    torch.testing.assert_close(pattern @ v, z.transpose(1, 2))
    plain = q.transpose(1, 2) @ k.transpose(2, 3)
    if name != "opt":  # which scales q beforehand
        plain = plain * q.shape[-1] ** -0.5
    if name == "gemma2":
        plain = torch.tanh(plain / 0.5) * 0.5
    if name == "gpt_oss":  # which takes the highest of a query's scores and its sink from all of them
        plain = plain + (scores - plain)[..., :1].where(scores[..., :1] > -1e4, (scores - plain)[..., 3:4])
    seen = scores > -1e4
    seen[1, :, :3] = False  # queries that are padding
    torch.testing.assert_close(scores[seen], plain[seen])
    sums = pattern.sum(-1)
    if name == "gpt_oss":  # a part of it goes to the sinks
        assert 0 < sums[0].min() < sums.max() < 1
    else:
        torch.testing.assert_close(sums, torch.ones_like(sums))
        torch.testing.assert_close(pattern, scores.softmax(-1))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_oss"])
@pytest.mark.parametrize("what", NAMES)
def test_writing_back_what_was_read_changes_nothing(name, what):
    module = families.build(name, "eager")
    model = NNsight(module)
    attention = model.get(families.path(name, 1))
    with torch.no_grad(), model.trace(IDS, **GIVEN):
        write(attention, what, read(attention, what).clone())
        logits = model.output.logits
    same(logits, bare(module).logits)


@pytest.mark.parametrize("what", "qkvz")
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_a_write_reaches_the_logits_as_a_registered_function_does_it(name, what):
    module = families.build(name, "sdpa")
    where = families.path(name, 0)

    def halved(one, array):
        return array * 0.5 if one == what else array

    with families.Spy(module.get_submodule(where), "sdpa", halved):
        expected = bare(module).logits
    model = NNsight(module)
    with torch.no_grad(), model.trace(IDS, **GIVEN):
        write(model.get(where), what, read(model.get(where), what) * 0.5)
        logits = model.output.logits
    same(logits, expected)
    assert not torch.equal(logits, bare(module).logits)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_oss"])
def test_a_pattern_that_is_assigned_makes_z(name):
    model = NNsight(families.build(name))
    attention = model.get(families.path(name, 0))
    with torch.no_grad(), model.trace(IDS, **GIVEN):
        v = read(attention, "v")
        to_the_first = torch.zeros_like(read(attention, "pattern"))
        to_the_first[..., 0] = 1
        write(attention, "pattern", to_the_first)
        z = read(attention, "z")
    first = v[:, :1].repeat_interleave(z.shape[2] // v.shape[2], 2)
    torch.testing.assert_close(z, first.expand_as(z))


def test_scores_that_are_assigned_make_the_pattern():
    model = NNsight(families.build("llama"))
    attention = model.model.layers[0].self_attn
    with torch.no_grad(), model.trace(IDS, **GIVEN):
        scores = read(attention, "scores")
        write(attention, "scores", scores * 0)
        pattern = read(attention, "pattern")
    torch.testing.assert_close(pattern, torch.full_like(pattern, 1 / 9))


def test_changing_a_value_in_place_changes_what_the_model_goes_on_with():
    model = NNsight(families.build("gpt2"))
    attention = model.transformer.h[0].attn
    with torch.no_grad(), model.trace(IDS, **GIVEN):
        read(attention, "z")[:, :, 0] = 0
        changed = model.output.logits
    with torch.no_grad(), model.trace(IDS, **GIVEN):
        z = read(attention, "z").clone()
        z[:, :, 0] = 0
        write(attention, "z", z)
        written = model.output.logits
    same(changed, written)


def test_asking_for_one_pattern_leaves_the_other_modules_sdpa(monkeypatch):
    module = families.build("llama", "sdpa")
    called, sdpa = [], ALL_ATTENTION_FUNCTIONS["sdpa"]
    model = NNsight(module)

    def counting(module, *args, **kwargs):
        called.append(module)
        return sdpa(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", counting)
    with model.trace(IDS, **GIVEN):
        read(model.model.layers[0].self_attn, "pattern")
    assert called == [module.model.layers[1].self_attn]


def test_gradients_are_those_of_plain_autograd():
    module = families.build("llama", "sdpa")
    model = NNsight(module)
    attention = model.model.layers[0].self_attn
    names = ["q", "k", "v", "pattern", "z"]
    with model.trace(IDS, **GIVEN):
        values = [read(attention, name) for name in names]
        loss = model.output.logits[:, -1].sum()
    grads = nnsight.grad(loss, values)
    for value, grad in zip(values, grads, strict=True):
        assert grad.shape == value.shape
    z = values[-1]
    step = torch.randn_like(z) * 1e-3
    with torch.no_grad(), model.trace(IDS, **GIVEN):
        write(attention, "z", read(attention, "z") + step)
        moved = model.output.logits[:, -1].sum()
    torch.testing.assert_close(moved - loss, (grads[-1] * step).sum(), rtol=0.05, atol=1e-4)


def test_gradients_in_a_backward_block_reach_q():
    model = NNsight(families.build("gpt2"))
    attention = model.transformer.h[1].attn
    with model.trace(IDS, **GIVEN):
        q = read(attention, "q")
        loss = model.output.logits.sum()
        with loss.backward():
            grad = q.grad
    assert grad.shape == q.shape
    assert grad.abs().sum() > 0


# Order, and what there is not.


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("what", ["k", "scores"])
def test_a_gradient_that_is_past_is_told_by_the_name_it_has(what, rows):
    model = LanguageModel(families.build("llama"))
    with model.trace(IDS, **GIVEN) as tracer:
        scope = tracer.rows[1] if rows else model
        early = scope.uniform.layers[0].output
        late = getattr(scope.uniform.layers[1].attn, what)
        loss = scope.logits.sum()
        named = rf"of `model\.layers\.1\.self_attn\.{what}`{' of row 1' if rows else ''} is past"
        with pytest.raises(AlreadyPastError, match=named), loss.backward():
            early.grad
            late.grad


def test_q_k_v_come_in_any_order_and_z_still_knows_them():
    model = NNsight(families.build("gpt2"))
    attention = model.transformer.h[1].attn
    with model.trace(IDS, **GIVEN):
        v, q, k = (read(attention, name) for name in "vqk")
        z = read(attention, "z")
        assert read(attention, "q") is q
    assert q.shape == k.shape == v.shape == z.shape == (2, 9, 2, 8)


@pytest.mark.parametrize("what", NAMES)
@pytest.mark.parametrize("name", ["falcon", "bloom", "gptj"])
def test_where_attention_is_computed_by_hand_it_is_met_in_a_call_at_whose_input_the_run_stands(name, what):
    model = quietly(name)
    ids, others = tiny_ids(model._module)
    layer, where = model.layers[1], "transformer.h.1.attn" if name == "gptj" else "transformer.h.1.self_attention"

    with torch.no_grad(), model.trace(ids, **others):
        model.get(where).input[:] *= 2
        found = getattr(layer.attn, what)
        found *= 3
        logits = model.logits
    with torch.no_grad(), model.edit() as edited:
        edited.get(where).input[:] *= 2
    with torch.no_grad(), edited.trace(ids, **others):
        expected = getattr(edited.layers[1].attn, what)
        expected *= 3
        same(edited.logits, logits)
    same(found, expected)
    with torch.no_grad(), model.generate(ids, max_new_tokens=2, min_new_tokens=2) as tracer:
        for _ in tracer.iter[:]:
            model.get(where).input
            assert getattr(layer.attn, what).shape[0] == 2


def test_what_is_past_says_so_and_names_the_value():
    model = NNsight(families.build("gpt2"))
    attention = model.transformer.h[1].attn
    for first, then in (("z", "pattern"), ("pattern", "k"), ("z", "scores")):
        with (
            pytest.raises(AlreadyPastError, match=rf"`transformer\.h\.1\.attn\.{then}` is past") as caught,
            model.trace(IDS, **GIVEN),
        ):
            read(attention, first)
            read(attention, then)
        assert f"at `transformer.h.1.attn.{first}`" in str(caught.value)
    with pytest.raises(AlreadyPastError, match=r"`transformer\.h\.0\.attn\.q` is past"), model.trace(IDS, **GIVEN):
        read(attention, "z")
        read(model.transformer.h[0].attn, "q")
    with pytest.raises(AlreadyPastError, match=r"`transformer\.h\.1\.attn\.q` is past"), model.trace(IDS, **GIVEN):
        _ = attention.output
        read(attention, "q")
    same(bare(model._module).logits, bare(families.build("gpt2")).logits)


def test_v_that_is_read_behind_the_pattern_is_that_of_its_run_and_row_and_stays_as_it_is(model):
    prompts = [tiny.PROMPT, "The Colosseum is"]
    with torch.no_grad(), model.trace(prompts) as (a, b):
        before = [read(attention_of(row, 1), "v") for row in (a, b)]
    with torch.no_grad(), model.trace(prompts) as (a, b), model.trace(prompts[1]) as other:
        patterns = [read(attention_of(row, 1), "pattern") for row in (a, b, other.model)]
        behind = [read(attention_of(row, 1), "v") for row in (a, b, other.model)]
    assert len(patterns) == 3
    for one, known in zip(behind, [*before, before[1]], strict=True):
        near(one, known)
    assert "1.self_attn.v" in repr(other) or "1.attn.v" in repr(other)
    for row in (0, None):
        with torch.no_grad(), model.trace(prompts) as tracer:
            with pytest.raises(WriteError, match=r"v` was read behind the scores.*changed in place"):
                attention = attention_of(tracer.model if row is None else tracer.rows[row], 1)
                read(attention, "pattern")
                read(attention, "v").zero_()
                read(attention, "z")
    with pytest.raises(AlreadyPastError, match="v` is past"), model.trace(prompts[0]):
        write(attention_of(model, 1), "v", read(attention_of(model, 1), "pattern").new_zeros(()))


def test_a_wrong_shape_is_refused_with_both_shapes():
    model = NNsight(families.build("llama"))
    attention = model.model.layers[0].self_attn
    for name in NAMES:
        with pytest.raises(WriteError, match=rf"self_attn\.{name}` has another shape") as caught, model.trace(IDS):
            write(attention, name, torch.zeros(2, 3))
        assert "[2, 3] float32" in str(caught.value)
    assert "[2, 9, 4, 8] float32" in str(caught.value)
    with pytest.raises(WriteError, match="is a tensor, not an int"), model.trace(IDS):
        write(attention, "z", 3)
    with pytest.raises(WriteError, match="can't be written any more"), model.trace(IDS):
        z = read(attention, "z")
        write(attention, "q", z)


def test_other_names_and_other_places_are_refused():
    model = NNsight(families.build("gpt2"))
    with pytest.raises(UnknownNameError, match=r"has no `pat`"), model.trace(IDS):
        read(model.transformer.h[0].attn, "pat")
    with pytest.raises(OutsideTraceError, match=r"transformer\.h\.0\.attn\.q"):
        read(model.transformer.h[0].attn, "q")


def test_a_layer_without_attention_says_that_it_has_none():
    model = NNsight(families.build("mamba"))
    for name in NAMES:
        with pytest.raises(NotOnThisLayerError, match="on this layer, a MambaMixer"), model.trace(IDS):
            read(model.backbone.layers[0].mixer, name)


def test_the_receipt_names_the_values():
    model = NNsight(families.build("gpt2"))
    attention = model.transformer.h[1].attn
    with model.trace(IDS, **GIVEN) as tracer:
        q, k = read(attention, "q"), read(attention, "k")
        write(attention, "pattern", read(attention, "pattern"))
        write(attention, "z", q + k)
    said = [line.split()[:3] for line in str(tracer).splitlines()[1:6]]
    where = "transformer.h.1.attn"
    assert said == [
        ["read", f"{where}.q", "[2,"],
        ["read", f"{where}.k", "[2,"],
        ["read", f"{where}.pattern", "[2,"],
        ["wrote", f"{where}.pattern", "[2,"],
        ["wrote", f"{where}.z", "[2,"],
    ]


# Runs: steps, rows, edits, threads.


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture(params=["gpt2", "llama", "mixtral"])
def model(request, tokenizer):
    return LanguageModel(tiny.build(request.param), tokenizer=tokenizer)


def attention_of(scope, layer):
    inner = "transformer.h.{}.attn" if "gpt2" in type(scope._module).__name__.lower() else "model.layers.{}.self_attn"
    return scope.get(inner.format(layer))


def test_in_a_generation_each_step_has_its_own_with_all_keys_so_far(model):
    with model.generate(tiny.PROMPT, max_new_tokens=3, do_sample=False) as tracer:
        shapes = []
        for _ in tracer.iter[:]:
            k = read(attention_of(model, 1), "k")
            pattern = read(attention_of(model, 1), "pattern")
            shapes.append((k.shape[1], tuple(pattern.shape[2:])))
            torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))
    assert shapes == [(8, (8, 8)), (9, (1, 9)), (10, (1, 10))]


def test_a_step_s_one_query_has_a_pattern_where_eager_attention_can_not_do_without_a_mask():
    config = ModernBertDecoderConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        local_attention=8, global_attn_every_n_layers=2, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    ids, options = torch.arange(2, 9)[None], {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    found = {}
    for implementation in ("sdpa", "eager"):
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
        model = LanguageModel(module)
        with model.generate(ids, **options) as tracer:
            found[implementation] = [layer.attn.pattern for _ in tracer.iter[:] for layer in model.layers]
    assert [pattern.shape[-2] for pattern in found["sdpa"]] == [7, 7, 1, 1, 1, 1]
    for ours, theirs in zip(found["sdpa"], found["eager"], strict=True):
        near(ours, theirs)


def test_a_step_in_which_nothing_is_asked_keeps_sdpa(model):
    with model.generate(tiny.PROMPT, max_new_tokens=3, do_sample=False) as tracer:
        for step in tracer.iter[:]:
            if step == 1:
                write(attention_of(model, 0), "z", read(attention_of(model, 0), "z"))
        result = tracer.result
    with model.generate(tiny.PROMPT, max_new_tokens=3, do_sample=False) as tracer:
        untouched = tracer.result
    same(result, untouched)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_has_its_own_tokens_as_it_has_alone(model, side):
    prompts = [tiny.PROMPT, "The Colosseum is"]
    with torch.no_grad(), model.trace(prompts, padding_side=side) as rows:
        together = {name: [read(attention_of(row, 1), name) for row in rows] for name in NAMES}
    for at, prompt in enumerate(prompts):
        with torch.no_grad(), model.trace(prompt):
            alone = {name: read(attention_of(model, 1), name) for name in NAMES}
        for name in NAMES:
            found = together[name][at]
            if name == "scores":  # of what is masked, some get less than the rest
                found, alone[name] = found.clamp(min=-1e4), alone[name].clamp(min=-1e4)
            torch.testing.assert_close(found, alone[name], rtol=1e-4, atol=1e-5)


def test_one_row_is_written_and_the_other_is_not(model):
    prompts = [tiny.PROMPT, "The Colosseum is"]
    with torch.no_grad(), model.trace(prompts) as (a, b):
        untouched = a.output.logits
    with torch.no_grad(), model.trace(prompts) as (a, b):
        write(attention_of(b, 0), "z", read(attention_of(b, 0), "z") * 0)
        kept, changed = a.output.logits, b.output.logits
    torch.testing.assert_close(kept, untouched)
    with torch.no_grad(), model.trace(prompts[1]):
        write(attention_of(model, 0), "z", read(attention_of(model, 0), "z") * 0)
        alone = model.output.logits
    torch.testing.assert_close(changed, alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(nnsight.Error, match="shape"), model.trace(prompts) as (a, b):
        write(attention_of(b, 0), "z", read(attention_of(a, 0), "z"))


def test_gradients_through_a_row(model):
    with model.trace([tiny.PROMPT, "The Colosseum is"]) as (_, b):
        q = read(attention_of(b, 0), "q")
        loss = b.output.logits[:, -1].sum()
    (grad,) = nnsight.grad(loss, [q])
    assert grad.shape == q.shape
    assert grad.abs().sum() > 0


def test_invokes_have_their_own_rows(model):
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(tiny.PROMPT):
            first = read(attention_of(model, 1), "pattern")
        with tracer.invoke("The Colosseum is"):
            second = read(attention_of(model, 1), "pattern")
    with torch.no_grad(), model.trace("The Colosseum is"):
        alone = read(attention_of(model, 1), "pattern")
    assert first.shape[2:] == (8, 8)
    torch.testing.assert_close(second, alone, rtol=1e-4, atol=1e-5)


def test_an_edit_stays(model):
    with torch.no_grad(), model.trace(tiny.PROMPT):
        write(attention_of(model, 0), "z", read(attention_of(model, 0), "z") * 0)
        expected = model.output.logits

    def ablate(scope):
        write(attention_of(scope, 0), "z", read(attention_of(scope, 0), "z") * 0)

    edited = model.edit(ablate)
    with torch.no_grad(), edited.trace(tiny.PROMPT):
        logits = edited.output.logits
    same(logits, expected)


def test_a_scan_knows_the_shapes(model):
    with model.scan(tiny.PROMPT):
        shapes = {name: tuple(read(attention_of(model, 1), name).shape) for name in ("q", "pattern", "z")}
    assert shapes["pattern"][2:] == (8, 8)
    assert shapes["q"] == shapes["z"]


def test_two_models_and_two_runs_of_one_go_in_lockstep():
    one, two = (NNsight(families.build(name)) for name in ("gpt2", "llama"))
    with torch.no_grad(), one.trace(IDS) as a, one.trace(IDS[:1]) as b, two.trace(IDS):
        z = read(a.model.transformer.h[0].attn, "z")
        other = read(b.model.transformer.h[0].attn, "pattern")
        third = read(two.model.layers[0].self_attn, "q")
        write(a.model.transformer.h[0].attn, "z", z * 0)
        last = read(b.model.transformer.h[1].attn, "z")
    with torch.no_grad(), one.trace(IDS[:1]):
        alone = read(one.transformer.h[0].attn, "pattern"), read(one.transformer.h[1].attn, "z")
    assert third.shape == (2, 9, 4, 8)
    same(other, alone[0])
    torch.testing.assert_close(last, alone[1])


def test_another_thread_has_the_function_that_it_had():
    module = families.build("llama", "sdpa")
    expected, seen = bare(module), []

    def other():
        seen.append(ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None))
        seen.append(bare(module))

    model = NNsight(module)
    with torch.no_grad(), model.trace(IDS, **GIVEN):
        read(model.model.layers[0].self_attn, "q")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None) is ALL_ATTENTION_FUNCTIONS["sdpa"]
        write(model.model.layers[0].self_attn, "z", read(model.model.layers[0].self_attn, "z") * 0)
    assert seen[0] is ALL_ATTENTION_FUNCTIONS["sdpa"]
    same(seen[1].logits, expected.logits)


def test_threads_that_read_the_same_module_each_have_their_own():
    model = NNsight(families.build("gpt2"))
    attention, found = model.transformer.h[1].attn, {}

    def work(at):
        ids = IDS[at % 2 :][:1]
        for _ in range(10):
            with torch.no_grad(), model.trace(ids):
                found[at] = read(attention, "pattern" if at < 2 else "z")

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at in range(4):
        with torch.no_grad(), model.trace(IDS[at % 2 :][:1]):
            alone = read(attention, "pattern" if at < 2 else "z")
        torch.testing.assert_close(found[at], alone)


def test_both_switches(switch):
    model = NNsight(families.build("llama"))
    with torch.no_grad(), model.trace(IDS, **GIVEN):
        values = [read(model.model.layers[0].self_attn, name) for name in NAMES if name != "z"]
        logits = model.output.logits
    assert len(values) == 5
    torch.testing.assert_close(logits[REAL], bare(model._module).logits[REAL], rtol=1e-4, atol=1e-5)


def test_nothing_is_left_after_an_error_a_stop_and_a_dropped_run():
    model = NNsight(families.build("gpt2"))
    attention = model.transformer.h[0].attn
    with pytest.raises(ZeroDivisionError), model.trace(IDS):
        read(attention, "pattern")
        _ = 1 / 0
    assert vars(ALL_ATTENTION_FUNCTIONS).keys() == {"_local_mapping"}
    with model.trace(IDS) as tracer:
        read(attention, "scores")
        tracer.stop()
    assert not Interior.asked

    def never_resumed():
        with model.trace(IDS):
            yield read(attention, "pattern")

    generator = never_resumed()
    next(generator)
    del generator
    assert not Interior.asked
    with pytest.raises(RuntimeError), model.trace(IDS):
        write(attention, "q", read(attention, "q").double())
    assert not Interior.asked


def test_a_compiled_model_is_read_eagerly_and_stays_compiled():
    module = families.build("gpt2")
    expected, _ = read_all(module, "transformer.h.1.attn", ["z"])
    module.transformer.h[1].compile(backend="eager")
    found, _ = read_all(module, "transformer.h.1.attn", ["z"])
    same(found["z"], expected["z"])


@pytest.fixture
def deaf():
    """sdpa as transformers 5.2.0 has it: it is given a soft cap, and has none."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def without_cap(*args, softcap=None, **kwargs):
        return before(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = lambda *args, **kwargs: without_cap(*args, **kwargs)
    yield
    del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_what_sdpa_takes_no_notice_of_is_not_in_the_pattern_either_and_a_warning_says_so(deaf):
    eager, module = families.build("gemma2", "eager"), families.build("gemma2", "eager")
    module.config._attn_implementation = "sdpa"
    expected = bare(module).logits
    assert not torch.allclose(expected, bare(eager).logits)
    with pytest.warns(RuntimeWarning, match=r"'sdpa', which takes no notice of softcap=0.5 in a Gemma2Attention"):
        values, logits = read_all(module, families.path("gemma2", 1), NAMES)
    plain, _ = read_all(module, families.path("gemma2", 1), "qkvz")
    q, k, v, z = (plain[one].transpose(1, 2) for one in "qkvz")
    k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    seen = (values["scores"] > -1e4) & REAL[:, None, :, None]
    torch.testing.assert_close(values["scores"][seen], scores[seen])
    torch.testing.assert_close((values["pattern"] @ v)[1, :, 3:], z[1, :, 3:])
    torch.testing.assert_close(logits[REAL], expected[REAL])
    capped, _ = read_all(eager, families.path("gemma2", 1), ["scores"])  # and says nothing
    assert (capped["scores"][seen] - scores[seen]).abs().max() > 1e-3


def test_what_attention_takes_no_notice_of_is_told_once_for_a_line_of_each_file(deaf):
    module = families.build("gemma2", "eager")
    module.config._attn_implementation = "sdpa"
    given = {"model": NNsight(module), "ids": IDS, "path": families.path("gemma2", 1), "read": read}
    line = 'with model.trace(ids): read(model.get(path), "pattern")'
    files = {"one.py": dict(given), "other.py": dict(given)}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for file in ("one.py", "other.py", "one.py"):
            exec(compile(line, file, "exec"), files[file])
    assert [one.filename for one in told] == ["one.py", "other.py"]


@pytest.mark.parametrize("window", [None, 3])
def test_flash_attentions_mask_is_put_in_eagers_form(window):
    query, key = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 9, 8)  # of a cache with four keys before
    mask = eager_mask(MASK, query, key, True, "flash_attention_2", {"sliding_window": window})
    assert mask.shape == (2, 1, 5, 9)
    for row in range(2):
        for at in range(5):
            for seen in range(9):
                expected = MASK[row, seen] and seen <= at + 4 and (window is None or at + 4 - seen < window)
                assert (mask[row, 0, at, seen] == 0) == bool(expected)
    assert eager_mask(None, query[:, :, :1], key, True, "sdpa", {}) is None
    with pytest.raises(NotOnThisLayerError, match=r"'paged_attention'.*given as a dict"):
        eager_mask({}, query, key, True, "paged_attention", {})


def test_flex_attentions_mask_is_put_in_eagers_form():
    from torch.nn.attention.flex_attention import create_block_mask

    query, key = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 9, 8)  # of a cache with four keys before

    def seen(row, _, at, key):
        return MASK[row, key].bool() & (key <= at + 4)

    blocks = create_block_mask(seen, 2, None, 5, 9, device="cpu")
    mask = eager_mask(blocks, query, key, True, "flex_attention", {})
    torch.testing.assert_close(mask, eager_mask(MASK, query, key, True, "flash_attention_2", {}))


def test_a_model_that_attends_by_a_kernel_of_some_device_has_its_names_found_without_it():
    module = families.build("llama", "eager")
    module.set_attn_implementation("flex_attention")
    assert LanguageModel(module).layers[1].has("attn.pattern")


# Modules that call no interface.


def test_torch_attention_is_met_where_it_is_called():
    module = families.build("falcon", "sdpa")
    eager = families.build("falcon", "eager")
    where = families.path("falcon", 1)
    values, logits = read_all(module, where, "qkvz")
    same(logits, bare(module).logits)
    patterns, logits = read_all(module, where, ["scores", "pattern", "z"])
    torch.testing.assert_close(logits[REAL], bare(module).logits[REAL], rtol=1e-4, atol=1e-5)
    expected = bare(eager, output_attentions=True).attentions[1]
    torch.testing.assert_close(patterns["pattern"][0], expected[0], rtol=1e-4, atol=1e-5)
    v = values["v"].transpose(1, 2)
    torch.testing.assert_close((patterns["pattern"] @ v).transpose(1, 2), patterns["z"])


@pytest.mark.parametrize("what", NAMES)
def test_a_block_of_the_tokens_is_not_taken_for_all(what):
    """BigBird attends in blocks where a prompt is long, and to all of a short one."""
    kind = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 96}
    config = BigBirdConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **kind)
    long, short = torch.randint(5, 64, (2, 64)), torch.randint(5, 64, (2, 12))
    module = BigBirdModel(config, add_pooling_layer=False).eval()
    model = NNsight(module)
    with pytest.raises(NotOnThisLayerError, match=r"all tokens at\s+once"), model.trace(long):
        read(model.encoder.layer[1].attention.self, what)
    module.set_attention_type("original_full")
    model = NNsight(module)
    with model.trace(short):
        value = read(model.encoder.layer[1].attention.self, what)
    assert value.shape == ((2, 4, 12, 12) if what in ("scores", "pattern") else (2, 12, 4, 8))


BY_HAND = ["bloom", "gptj", "falcon", "xglm"]
ORDER = ["q", "k", "scores", "pattern", "v", "z"]


@pytest.mark.parametrize("name", [*families.INTERFACED, *BY_HAND])
def test_one_order_in_which_all_six_are_read_holds_for_every_model(name, switch):
    module = families.build(name, "eager")
    model, where = NNsight(module), families.path(name, 1)
    with model.trace(IDS, **GIVEN):
        values = {one: read(model.get(where), one) for one in ORDER}
    v, pattern = values["v"].transpose(1, 2), values["pattern"]
    v = v.repeat_interleave(pattern.shape[1] // v.shape[1], 1)
    torch.testing.assert_close(pattern @ v, values["z"].transpose(1, 2))
    (gradient,) = torch.autograd.grad(values["z"].sum(), values["v"], retain_graph=True)
    by_hand = torch.autograd.grad((pattern @ v).sum(), values["v"], retain_graph=True)[0]
    torch.testing.assert_close(gradient, by_hand)


@pytest.mark.parametrize("name", BY_HAND)
def test_attention_by_hand_is_met_at_its_products_and_its_softmax(name):
    module = families.build(name, "eager")
    expected = bare(module, output_attentions=True)
    where = families.path(name, 1)
    values, logits = read_all(module, where, ["q", "k", "scores", "pattern", "v", "z"])
    same(values["pattern"], expected.attentions[1])
    same(logits, expected.logits)
    v = values["v"].transpose(1, 2).expand(-1, values["pattern"].shape[1], -1, -1)
    torch.testing.assert_close(values["pattern"] @ v, values["z"].transpose(1, 2))
    q, k = values["q"].transpose(1, 2), values["k"].transpose(1, 2)
    if name in ("gptj", "falcon"):  # where nothing is added for a distance, or beforehand
        seen = values["scores"] > -1e4
        seen[1, :, :3] = False
        torch.testing.assert_close(values["scores"][seen], (q @ k.mT * q.shape[-1] ** -0.5)[seen])


@pytest.mark.parametrize("what", NAMES)
@pytest.mark.parametrize("name", BY_HAND)
def test_attention_by_hand_is_written(name, what):
    module = families.build(name, "eager")
    model = NNsight(module)
    attention = model.get(families.path(name, 0))
    with torch.no_grad(), model.trace(IDS, **GIVEN):
        write(attention, what, read(attention, what).clone())
        same_again = model.output.logits
    same(same_again, bare(module).logits)
    with torch.no_grad(), model.trace(IDS, **GIVEN):
        write(attention, what, read(attention, what) * 0.5)
        z = read(attention, "z")
        logits = model.output.logits
    assert not torch.equal(logits, bare(module).logits)
    values, _ = read_all(module, families.path(name, 0), ["q", "pattern", "v", "z"])
    if what in ("v", "z", "pattern"):
        torch.testing.assert_close(z, values["z"] * 0.5)


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_rows_of_attention_by_hand(name, tokenizer):
    config = families.CONFIGS[name]()
    config.vocab_size = 320
    module = type(families.build(name))(config).eval()
    model = LanguageModel(module, tokenizer=tokenizer)
    where, names = families.path(name, 1), ["q", "k", "pattern", "v", "z"]
    with torch.no_grad(), model.trace([tiny.PROMPT, "The Colosseum is"]) as rows:
        together = {one: [read(row.get(where), one) for row in rows] for one in names}
    with torch.no_grad(), model.trace("The Colosseum is"):
        alone = {one: read(model.get(where), one) for one in names}
    for one in names:
        torch.testing.assert_close(together[one][1], alone[one], rtol=1e-4, atol=1e-5)


def test_any_module_that_calls_torchs_attention_will_do():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return z.transpose(1, 2).flatten(2)

    module = nn.Sequential(Heads(), nn.Linear(8, 8))
    x = torch.randn(2, 5, 8)
    model = NNsight(module)
    with torch.no_grad(), model.trace(x):
        q = read(model[0], "q")
        pattern, z = read(model[0], "pattern"), read(model[0], "z")
        write(model[0], "z", z * 0)
        out = model.output
    assert q.shape == z.shape == (2, 5, 2, 4)
    assert pattern.shape == (2, 2, 5, 5)
    assert not pattern.triu(1).any()
    same(out, module[1](torch.zeros(2, 5, 8)).detach())
    assert not module[0]._forward_pre_hooks
    assert not module[0]._forward_hooks


@pytest.mark.parametrize("name", ["bloom", "falcon", "gpt2"])
def test_two_runs_paused_inside_attention_go_on_in_any_order(name):
    model = NNsight(families.build(name))
    where = families.path(name, 1)
    with torch.no_grad(), model.trace(IDS[:1]):
        expected = [read(model.get(where), one) for one in ("q", "pattern", "z")]
    with torch.no_grad(), model.trace(IDS[:1]) as a, model.trace(IDS[1:]) as b:
        first, second = a.model.get(where), b.model.get(where)
        found = [read(first, "q")]
        read(second, "q")
        found.append(read(first, "pattern"))  # the run that was paused first goes on first
        read(second, "pattern")
        found.append(read(first, "z"))
        other = read(second, "z")
        torch.ones(2, 2) @ torch.ones(2, 2)  # what the block does itself is met by neither
    for one, known in zip(found, expected, strict=True):
        torch.testing.assert_close(one, known)
    assert other.shape == expected[-1].shape
    assert torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["q", "pattern"])
def test_a_pattern_and_what_it_was_made_of_are_let_go_when_the_layer_has_run(name, implementation):
    module = families.build("llama", implementation)
    model = LanguageModel(module)
    for is_written in (False, True):
        with torch.no_grad(), model.trace(IDS, **GIVEN):
            query = weakref.ref(model.layers[0].attn.q)
            value = getattr(model.layers[0].attn, name)
            gone = [query, weakref.ref(value)]
            if is_written:
                value = value * 1
                setattr(model.layers[0].attn, name, value)
                gone.append(weakref.ref(value))
            pattern = model.layers[0].attn.pattern
            gone.append(weakref.ref(pattern))
            del value, pattern
            model.layers[1].output
            assert [reference() for reference in gone] == [None] * len(gone)


def diffllama(implementation):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = modeling_diffllama.DiffLlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    return modeling_diffllama.DiffLlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_queries_keys_and_a_pattern_are_those_of_both_halves_of_the_values(implementation):
    if not hasattr(modeling_diffllama, "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("older transformers has a class for each implementation")
    model, ids, by_hand = (
        LanguageModel(diffllama(implementation)),
        torch.tensor([[3, 14, 15, 9, 26]]),
        diffllama("sdpa"),
    )

    def turned(name, array):
        return array.flip(-1) * 2 if name == "q" else array

    with torch.no_grad():
        with families.Spy(by_hand.model.layers[1].self_attn, "sdpa", turned):
            wanted = by_hand(ids).logits
        with model.trace(ids):
            attn = model.layers[1].attn
            attn.q = attn.q.flip(-1) * 2
            torch.testing.assert_close(model.logits, wanted)
        with model.trace(ids):
            q = model.layers[1].attn.q
            q[:] = q.flip(-1) * 2
            torch.testing.assert_close(model.logits, wanted)
        with model.trace(ids):
            attn = model.layers[1].attn
            q, k = attn.q, attn.k
            attn.q, attn.k = q.flip(2), k.flip(2)
            of_other_heads = model.logits
        with model.trace(ids):
            model.layers[1].attn.pattern = model.layers[1].attn.pattern.flip(1)
            torch.testing.assert_close(model.logits, of_other_heads)
    assert not torch.allclose(wanted, of_other_heads, atol=1e-5)


@pytest.mark.parametrize("in_place", [True, False])
def test_keys_that_are_changed_in_place_stay_so_in_the_cache_and_assigned_ones_are_of_one_call(in_place):
    model, ids = LanguageModel(families.build("llama")), torch.tensor([[3, 14, 15, 9, 26]])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    seen = []
    with torch.no_grad(), model.generate(ids, **options) as tracer:
        for step in tracer.iter[:]:
            attn = model.layers[1].attn
            keys = attn.k
            seen.append(keys[:, :5].clone())
            if step == 1 and in_place:
                keys[:, :5] += 1
            elif step == 1:
                attn.k = keys + 1
    assert torch.equal(seen[1], seen[0])
    assert torch.equal(seen[2], seen[0] + 1 if in_place else seen[0])
