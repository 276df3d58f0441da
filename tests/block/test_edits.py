"""Edits that stay: what they change, where, in which order, and what they leave alone."""

import copy
import gc
import pathlib
import pickle
import subprocess
import sys
import threading
import traceback
import warnings
import weakref

import pytest
import snapshots
import torch
from torch import nn

import nnsight
import toys
from nnsight import LanguageModel, NNsight
from nnsight.errors import (
    AlreadyPastError,
    BlockError,
    ModelError,
    NeverCalledError,
    OtherThreadError,
    OutsideTraceError,
    RunOrderError,
)

PROMPT = "The Eiffel Tower is in the city of"


def same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def hooked(module, at, change, *args, **kwargs):
    """What `module` returns with a plain torch hook on the output of `at`."""
    handle = at.register_forward_hook(lambda _, __, output: change(output))
    try:
        return module(*args, **kwargs)
    finally:
        handle.remove()


def doubled(mlp):
    with mlp.edit() as edited:
        edited.layers[1].output = edited.layers[1].output * 2
    return edited


@pytest.fixture(scope="module")
def language_model():
    return LanguageModel("nnsight/demo", dispatch=True)


# What an edit changes.


def test_an_edit_equals_a_plain_hook_in_a_trace_and_in_a_plain_call(switch, mlp, x):
    module = mlp._module
    untouched = module(x)
    wanted = hooked(module, module.layers[1], lambda out: out * 2, x)
    edited = doubled(mlp)
    with edited.trace(x) as tracer:
        inner = edited.layers[2].output
        out = edited.output
    same(out, wanted)
    same(tracer.result, wanted)
    same(edited(x), wanted)
    same(edited.trace(x, trace=False), wanted)
    assert not torch.equal(inner, untouched)
    same(mlp(x), untouched)
    with mlp.trace(x):
        out = mlp.output
    same(out, untouched)


@pytest.mark.parametrize("name", sorted(toys.everything()))
def test_in_every_shape_of_tree_an_edit_of_each_module_equals_its_hook(switch, name, x):
    model = NNsight(toys.everything()[name])
    for path, part in model._module.named_modules():
        if part is model._module or isinstance(part, nn.ModuleList):
            continue
        calls = []

        def first(output, calls=calls):
            calls.append(None)
            if len(calls) > 1:
                return None
            return output * 0.5 if isinstance(output, torch.Tensor) else None

        def edit(model, path=path):
            value = model.get(path).output
            if isinstance(value, torch.Tensor):
                model.get(path).output = value * 0.5

        wanted = hooked(model._module, part, first, x)
        if not calls:
            continue
        same(model.edit(edit)(x), wanted)


def test_inputs_are_written_and_modules_left_out(switch, mlp, x):
    module = mlp._module

    def edit(model):
        model.layers[0].input = model.layers[0].input + 1
        model.layers[1].skip(model.layers[1].input)
        model.output = model.output * 3

    edited = mlp.edit(edit)
    h = module.layers[2](module.layers[0](module.embed(x) + 1))
    same(edited(x), module.head(h) * 3)


def test_the_edited_module_s_own_input_is_read_and_written(switch, mlp, x):
    with mlp.edit() as edited:
        edited.input = edited.input + 1
    same(edited(x), mlp._module(x + 1))
    with edited.trace(x):
        seen = edited.input
    same(seen, x + 1)


def test_a_block_has_the_last_word_over_an_edit_that_skips(switch, mlp, x):
    edited = mlp.edit(lambda model: model.layers[1].skip(torch.zeros(3, 4)))
    with edited.trace(x):
        skipped = edited.layers[1].output
    same(skipped, torch.zeros(3, 4))
    with edited.trace(x):
        edited.layers[1].skip(torch.ones(3, 4))
        skipped = edited.layers[1].output
    same(skipped, torch.ones(3, 4))


# The forms in which it is written.


def test_a_skip_is_of_calls_and_not_of_a_forward_that_is_called_by_itself(switch):
    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(self.inner.forward(self.inner(x)))

    model = NNsight(Thrice())
    inner, x = model._module.inner, torch.randn(3, 4)
    model.inner.edit(lambda inner: inner.skip(inner.input * 2), inplace=True)
    same(model(x), inner(x * 2) * 2)
    with model.trace(x) as tracer:
        same(tracer.result, inner(x * 2) * 2)


def test_an_edit_of_a_module_skips_that_module(switch, mlp, x):
    module, n_calls = mlp._module, []
    handle = module.layers[1].up.register_forward_hook(lambda *_: n_calls.append(1))
    mlp.layers[1].edit(lambda layer: layer.skip(layer.input * 2), inplace=True)
    wanted = module.head(module.layers[2](module.layers[0](module.embed(x)) * 2))
    n_calls.clear()
    with mlp.trace(x) as outer:
        mlp.input
        with mlp.trace(x) as nested:
            same(nested.result, wanted)
        with mlp.trace(x) as nested:
            same(nested.result, wanted)
        same(outer.result, wanted)
    with mlp.layers[1].trace(x) as tracer:
        same(tracer.result, x * 2)
    with mlp.trace() as tracer:
        with tracer.invoke(x[:1]):
            first = mlp.output
        with tracer.invoke(x[1:]):
            rest = mlp.output
    torch.testing.assert_close(torch.cat([first, rest]), wanted)
    with mlp.trace(x):
        mlp.layers[1].skip(x)
        same(mlp.layers[1].output, x)
    assert n_calls == []
    handle.remove()
    with pytest.raises(NeverCalledError, match=r"`layers.1` above it was skipped"), mlp.trace(x):
        mlp.layers[1].up.output
    mlp.clear_edits()
    some = mlp.edit(lambda model: model.skip(model.input * 0) if model.input[0, 0] > 0 else None)
    same(some(x.abs()), x * 0)
    same(some(-x.abs()), module(-x.abs()))
    again = mlp.layers[0].edit(lambda layer: layer.skip(layer.input * 5)).edit(lambda layer: layer.skip(x))
    same(again(x), x)
    assert not any("forward" in vars(one) or one._forward_pre_hooks for one in module.modules())


can_leave_out_all = pytest.mark.skipif(
    sys.version_info[:2] == (3, 12), reason="Python 3.12 can't leave out such a body, and says so"
)


@can_leave_out_all
def test_on_one_line_with_a_try_first_and_with_more_items_than_one(switch, mlp, x):
    wanted = doubled(mlp)(x)
    with mlp.edit() as short: short.layers[1].output *= 2  # fmt: skip  # noqa: E701

    with mlp.edit() as tried:
        try:
            tried.layers[1].output *= 2
        finally:
            pass

    with mlp.edit() as under, torch.no_grad():
        under.layers[1].output *= 2
        assert not torch.is_grad_enabled()

    for edited in (short, tried, under):
        same(edited(x), wanted)


def test_the_three_forms_are_one(switch, mlp, x):
    wanted = doubled(mlp)(x)

    @mlp.edit
    def decorated(model):
        model.layers[1].output = model.layers[1].output * 2

    with mlp.edit() as (tracer, unpacked):
        unpacked.layers[1].output = unpacked.layers[1].output * 2

    with mlp.edit() as by_its_first_name:
        mlp.layers[1].output *= 2

    forms = [
        decorated,
        unpacked,
        by_its_first_name,
        mlp.edit(lambda m: setattr(m.layers[1], "output", m.layers[1].output * 2)),
    ]
    for edited in forms:
        assert type(edited) is NNsight
        assert edited is not mlp
        same(edited(x), wanted)
    assert tracer.model is unpacked


def test_a_model_with_two_children_still_iterates_over_them(x):
    pair = NNsight(toys.seeded(toys.Pair()))
    with pair.edit() as edited:
        edited.first.output = edited.first.output * 2
    with pair.edit() as (_, unpacked):
        unpacked.first.output = unpacked.first.output * 2
    assert [child.path for child in edited] == ["model.first", "model.second"]
    same(edited(x), unpacked(x))


def test_names_are_those_at_the_time_of_writing_and_stay_in_the_block(mlp, x):
    factor, n = 2, 0
    with mlp.edit() as edited:
        n += 1
        inside = edited.layers[1].output * factor
        edited.layers[1].output = inside
    factor = 100
    wanted = doubled(mlp)(x)
    same(edited(x), wanted)
    same(edited(x), wanted)
    assert n == 0
    assert "inside" not in locals()
    assert factor == 100


def test_a_list_outside_takes_what_an_edit_finds(mlp, x):
    found = []
    with mlp.edit() as edited:
        found.append(nnsight.save(edited.layers[0].output).save())
    edited(x)
    with edited.trace(x):
        pass
    assert len(found) == 2
    same(found[0], found[1])


def test_in_a_method_and_in_a_closure(mlp, x):
    class Steerer:
        __strength = 2

        def __init__(self, model):
            self.model = model

        def steer(self):
            with self.model.edit() as edited:
                edited.layers[1].output = edited.layers[1].output * self.__strength
            return edited

    def outer(strength):
        def inner():
            with mlp.edit() as edited:
                edited.layers[1].output = edited.layers[1].output * strength
            return edited

        return inner()

    wanted = doubled(mlp)(x)
    same(Steerer(mlp).steer()(x), wanted)
    same(outer(2)(x), wanted)


# Stacking, in place, and taken away.


def test_edits_stack_in_the_order_of_their_writing(switch, mlp, x):
    order = []

    def note(name, *, after=None):
        def edit(model):
            if after is not None:
                model.layers[after].output
            model.layers[1].output = model.layers[1].output * 2
            order.append(name)

        return edit

    edited = mlp.edit(note("first", after=0)).edit(note("second")).edit(note("third", after=0))
    module = mlp._module
    handle = module.layers[1].register_forward_hook(lambda *_: order.append("torch's"))
    with edited.trace(x):
        inner = edited.layers[1].output
        order.append("the block")
    handle.remove()
    assert order == ["torch's", "first", "second", "third", "the block"]
    same(inner, module.layers[1](module.layers[0](module.embed(x))) * 8)


def test_edits_of_two_modules_take_turns_in_the_order_of_their_writing(switch, x):
    """An edit of a module, one of the model at that module, and another of the module."""
    model, found = NNsight(toys.Pair()), []

    def plus_one(edited):
        edited.first.input = edited.first.input + 1
        edited.first.output = edited.first.output * 3

    def times_ten(first):
        first.input = first.input * 10
        first.output = first.output + 2

    model.first.edit(lambda first: found.append(first.input), inplace=True)
    model.edit(plus_one, inplace=True)
    model.first.edit(times_ten, inplace=True)
    model.edit(lambda edited: found.append(edited.first.input), inplace=True)
    with model.trace(x):
        read, out = model.first.input, model.first.output
    same(read, (x + 1) * 10)
    same(out, model._module.first((x + 1) * 10) * 3 + 2)
    assert found[0] is x
    assert found[1] is read


def test_each_edit_of_a_module_counts_its_calls(switch, x):
    """Also where a call fails before the second edit of the module has begun."""
    model, steps = NNsight(toys.RNN()), []

    def once(tracer, cell):
        steps.append(("one", tracer.step))
        if tracer.step == 0:
            raise ValueError("once")

    model.cell.edit(once, inplace=True)
    model.edit(lambda edited: edited.cell.input, inplace=True)
    model.cell.edit(lambda tracer, cell: steps.append(("two", tracer.step)), inplace=True)
    module, called = model._module, []

    def forgiving(given):
        for _ in range(3):
            try:
                called.append(module.cell(given, given))
            except ValueError:
                called.append(None)
        return given

    module.forward = forgiving
    with pytest.raises(ValueError, match="once"):  # behind the end of the model, which has caught it
        model(x)
    assert [value is None for value in called] == [True, False, False]
    assert steps == [("one", 0), ("one", 1), ("two", 1), ("one", 2), ("two", 2)]


def test_an_edit_in_place_stays_on_the_model_until_it_is_cleared(switch, mlp, x):
    untouched = mlp(x)
    with mlp.edit(inplace=True) as tracer:
        tracer.layers[1].output = tracer.layers[1].output * 2
    wanted = hooked(mlp._module, mlp._module.layers[1], lambda out: out * 2, x)
    same(mlp(x), wanted)
    with mlp.trace(x):
        same(mlp.output, wanted)
    same(mlp._module(x), untouched)  # torch's module knows nothing of it
    assert mlp.edit(lambda model: None, inplace=True) is mlp
    mlp.clear_edits()
    same(mlp(x), untouched)


def test_an_edit_of_a_sub_module_takes_part_in_a_trace_of_its_parent(switch, mlp, x):
    untouched = mlp(x)
    with mlp.layers[1].edit(inplace=True) as layer:
        layer.output = layer.output * 2
    wanted = hooked(mlp._module, mlp._module.layers[1], lambda out: out * 2, x)
    same(mlp(x), wanted)
    with mlp.trace(x):
        out = mlp.output
    same(out, wanted)
    with mlp.layers[1].trace(x):
        same(mlp.layers[1].output, mlp._module.layers[1](x) * 2)
    mlp.layers[0].clear_edits()
    same(mlp(x), wanted)
    mlp.layers.clear_edits()
    same(mlp(x), untouched)


def test_a_view_of_a_sub_module_is_edited_alone(switch, mlp, x):
    edited = mlp.layers[1].edit(lambda layer: setattr(layer, "output", layer.output * 2))
    plain = mlp._module.layers[1](x)
    same(edited(x), plain * 2)
    with edited.trace(x):
        inner, out = edited.up.output, edited.output
    same(out, plain * 2)
    same(inner, mlp._module.layers[1].up(mlp._module.layers[1].norm(x)))
    same(mlp.layers[1](x), plain)
    same(mlp(x), mlp._module(x))


def test_modules_called_in_a_block_are_edited_only_with_hook(switch, mlp, x):
    mlp.layers[1].edit(lambda layer: setattr(layer.down, "output", layer.down.output * 0), inplace=True)
    plain = mlp._module.layers[1](x)
    with mlp.trace(x) as tracer:
        called = mlp.layers[1](x)
        hooked_ = mlp.layers[1](x, hook=True)
        inner = mlp.layers[1].down.output
        scoped = tracer.model.layers[1](x, hook=True)
    same(called, plain)
    same(hooked_, x)
    same(scoped, x)
    same(inner, torch.zeros(3, 4))


def test_an_edit_of_the_whole_model_takes_part_in_calls_of_its_modules_with_hook(switch, mlp, x):
    with mlp.edit() as edited:
        edited.layers[1].down.output = edited.layers[1].down.output * 3
        edited.layers[2].output = edited.layers[2].output * 2
    module, layer = mlp._module, mlp._module.layers[1]
    wanted = hooked(layer, layer.down, lambda output: output * 3, x)
    whole = edited(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with edited.trace(x) as tracer:
            early = edited.layers[1](x, hook=True)
            edited.layers[0].output
            again = tracer.model.layers[1](x, hook=True)
            down = tracer.model.layers[1].down(x.new_ones(3, 4), hook=True)
            plain, other = edited.layers[1](x), edited.layers[0](x, hook=True)
            out = edited.output
            late = edited.layers[1](x, hook=True)
    for called in (early, again, late):
        same(called, wanted)
    same(down, layer.down(x.new_ones(3, 4)) * 3)
    same(plain, layer(x))
    same(other, module.layers[0](x))
    same(out, whole)


def test_an_edit_of_the_whole_model_takes_part_in_traces_of_its_modules_and_calls_with_hook_outside(switch, mlp, x):
    def edit(model):
        model.layers[1].down.output = model.layers[1].down.output * 3
        model.layers[2].output = model.layers[2].output * 2

    edited, layer = mlp.edit(edit), mlp._module.layers[1]
    wanted = hooked(layer, layer.down, lambda output: output * 3, x)
    with edited.layers[1].trace(x):
        inside, out = edited.layers[1].down.output, edited.layers[1].output
    same(inside, layer.down(layer.act(layer.up(layer.norm(x)))) * 3)
    same(out, wanted)
    same(edited.layers[1](x, hook=True), wanted)
    same(edited.layers[1].trace(x, trace=False), wanted)
    with edited.layers[1].scan(x):
        assert edited.layers[1].down.output.shape == x.shape
    same(edited.layers[1](x), layer(x))
    with mlp.layers[1].trace(x):
        same(mlp.layers[1].output, layer(x))
    mlp.edit(edit, inplace=True)
    with mlp.layers[1].trace(x):
        same(mlp.layers[1].output, wanted)


def test_an_edit_that_traces_a_part_of_its_own_model_means_it_without_itself(switch, mlp, x):
    layer, found = mlp._module.layers[1], []

    def edit(model):
        with edited.layers[1].trace(x) as tracer:
            found.append(tracer.result)
        model.layers[1].output = model.layers[1].output * 2

    edited = mlp.edit(edit)
    with edited.layers[1].trace(x):
        same(edited.layers[1].output, layer(x) * 2)
    same(found[0], layer(x))


def test_an_edit_says_once_what_it_did_not_come_to_in_a_call_of_a_part(mlp, x):
    def edit(model):
        model.layers[1].output = model.layers[0].output * 2

    edited = mlp.edit(edit)
    with pytest.warns(
        UserWarning, match=r"(?s)call of `layers\.1` alone, `layers\.0` isn't called.*come to `layers\.1`"
    ):
        with edited.trace(x):
            same(edited.layers[1](x, hook=True), mlp._module.layers[1](x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with edited.trace(x):
            edited.layers[1](x, hook=True)
    once = mlp.edit(edit)
    once(x)
    with once.trace(x):
        once.output
        with pytest.warns(UserWarning, match="did not come to"):
            once.layers[1](x, hook=True)


@pytest.mark.parametrize("how", ["trace", "generate", "scan"])
def test_an_edit_in_a_call_of_a_part_knows_the_positions_of_the_block(language_model, how):
    model, vector = language_model, torch.randn(128)

    def steer(tracer, model):
        at, hidden = tracer.positions == tracer.lengths - 1, model.transformer.h[3].mlp.output
        model.transformer.h[3].mlp.output = torch.where(at[..., None], hidden + vector, hidden)

    edited = model.edit(steer)
    prompts = [PROMPT, "Water is made of"]
    options = {"max_new_tokens": 2, "min_new_tokens": 2} if how == "generate" else {}
    with getattr(edited, how)(prompts, **options):
        hidden = torch.randn(2, 12, 128)
        early = edited.transformer.h[3].mlp(hidden, hook=True)
        plain = edited.transformer.h[3].mlp(hidden)
        other = edited.transformer.h[4].mlp(hidden, hook=True)
        inside = edited.transformer.h[3].mlp.output
    assert early.shape == plain.shape == other.shape == inside.shape
    if how != "scan":
        changed = (early != plain).any(-1)
        assert changed.nonzero().tolist() == [[0, 11], [1, 11]]
        torch.testing.assert_close(early[:, -1], plain[:, -1] + vector)


def test_an_edit_in_a_call_of_a_part_knows_the_step_of_the_block(language_model):
    steps, model = [], language_model
    edited = model.edit(lambda tracer, model: steps.append((tracer.step, model.transformer.h[3].mlp.output.shape[1])))
    with edited.generate(PROMPT, max_new_tokens=3, min_new_tokens=3) as tracer:
        for _step in tracer.iter[:]:
            edited.transformer.h[3](torch.zeros(1, 7, 128), hook=True)
    assert [step for step, width in steps if width == 7] == [0, 1, 2]
    assert [step for step, width in steps if width != 7] == [0, 1, 2]


def test_an_edit_calls_modules_unedited(switch, mlp, x):
    with mlp.edit() as edited:
        edited.layers[1].output = edited.layers[1](edited.layers[1].output)
    module = mlp._module
    wanted = hooked(module, module.layers[1], module.layers[1].forward, x)
    same(edited(x), wanted)


# Beside other runs.


def test_lockstep_with_the_model_that_is_not_edited(switch, mlp, x):
    edited = doubled(mlp)
    wanted, untouched = edited(x), mlp(x)
    for first, second in ((mlp, edited), (edited, mlp)):
        with first.trace(x) as one, second.trace(x) as other:
            h = {one.model.path: None}
            for layer in range(3):
                h[layer] = (mlp.layers[layer].output, edited.layers[layer].output)
            outs = mlp.output, edited.output
            del other
        same(h[1][0] * 2, h[1][1])
        same(outs[0], untouched)
        same(outs[1], wanted)


def test_the_first_name_of_the_model_works_in_a_trace_of_its_edited_view(switch, mlp, x):
    edited = doubled(mlp).edit(lambda model: None)
    with edited.trace(x):
        out = mlp.output
    same(out, edited(x))
    with mlp.trace(x), pytest.raises(OutsideTraceError):
        edited.output


def test_nested_runs_of_the_edited_model(switch, mlp, x):
    edited = doubled(mlp)
    wanted = edited(x)
    with edited.trace(x):
        first = edited.layers[0].output
        with edited.trace(first * 0 + x):
            inner = edited.output
        plain = mlp._module(x)
        out = edited.output
    same(inner, wanted)
    same(out, wanted)
    same(plain, mlp(x))


def test_an_edit_opens_a_trace_of_its_own(switch, mlp, x):
    def edit(model):
        with mlp.trace(x):
            donor = mlp.layers[1].output
        model.layers[1].output = donor

    wanted = mlp(x)
    same(mlp.edit(edit)(x + 5), wanted)
    with mlp.edit(edit).trace(x + 5) as tracer:
        pass
    same(tracer.result, wanted)


def test_threads_of_one_edited_model_do_not_see_each_other(switch, mlp):
    edited = doubled(mlp).edit(lambda model: setattr(model.layers[0], "output", model.layers[0].output + 1))
    inputs = [torch.randn(3, 4) for _ in range(4)]
    wanted = [edited(one) for one in inputs]
    wrong = []

    def work(i):
        for _ in range(15):
            with edited.trace(inputs[i]):
                inner = edited.layers[1].output
                out = edited.output
            if not (torch.equal(out, wanted[i]) and torch.equal(edited(inputs[i]), wanted[i]) and inner is not None):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Generation.


def test_an_edit_runs_for_every_token(switch, language_model):
    model = language_model
    direction = torch.randn(model.config.n_embd, generator=torch.Generator().manual_seed(3)) * 20
    module = model._module
    untouched = model.generate(PROMPT, max_new_tokens=4)
    handle = module.transformer.h[6].mlp.register_forward_hook(lambda _, __, out: out + direction)
    wanted = model.generate(PROMPT, max_new_tokens=4)
    handle.remove()

    with model.edit() as steered:
        steered.transformer.h[6].mlp.output += direction

    same(steered.generate(PROMPT, max_new_tokens=4), wanted)
    with steered.generate(PROMPT, max_new_tokens=4) as tracer:
        first = steered.transformer.h[0].mlp.output
    same(tracer.result, wanted)
    assert first.shape[1] > 1
    assert wanted.tolist() != untouched.tolist()
    same(model.generate(PROMPT, max_new_tokens=4), untouched)


@pytest.mark.parametrize("asked", [slice(1, 3), slice(0, None, 2), 2, [0, 3], slice(None)], ids=str)
def test_steps_are_chosen(language_model, asked):
    model, seen = language_model, []
    every = list(range(4))
    wanted = every[asked] if isinstance(asked, slice) else asked if isinstance(asked, list) else [asked]
    with model.edit() as (tracer, edited):
        for step in tracer.iter[asked]:
            seen.append((step, tracer.step, edited.transformer.h[0].mlp.output.shape[1]))  # noqa: PERF401
    edited.generate(PROMPT, max_new_tokens=4, min_new_tokens=4)
    assert [step for step, _, _ in seen] == [step for _, step, _ in seen] == wanted
    assert [length > 1 for _, _, length in seen] == [step == 0 for step in wanted]


def test_a_function_may_take_the_tracer_too(mlp, x):
    steps = []
    edited = mlp.layers[1].edit(lambda tracer, layer: steps.append((tracer.step, list(tracer.all()))))
    edited(x)
    assert steps == [(0, [0])]


def test_an_edit_of_a_shared_module_runs_at_each_of_its_calls(switch, x):
    rnn = NNsight(toys.RNN(steps=3))
    seen = []
    with rnn.cell.edit(inplace=True) as (tracer, cell):
        seen.append(tracer.step)
        cell.output = cell.output * 0.5
    wanted = hooked(rnn._module, rnn._module.cell, lambda out: out * 0.5, x)
    same(rnn(x), wanted)
    with rnn.trace(x):
        same(rnn.cell.output.clone(), rnn.cell.output)
        out = rnn.output
    same(out, wanted)
    assert seen == [0, 1, 2] * 2


def test_next_is_the_next_call_within_the_edited_one(switch, x):
    rnn = NNsight(toys.RNN(steps=3))
    edited = rnn.edit(lambda model: setattr(model.cell.next(), "output", torch.zeros(3, 4)))
    calls = []

    def second(output):
        calls.append(None)
        return torch.zeros(3, 4) if len(calls) == 2 else None

    same(edited(x), hooked(rnn._module, rnn._module.cell, second, x))


# Gradients and modes.


def test_gradients_flow_through_an_edit(switch, mlp, x):
    bias = torch.zeros(4, requires_grad=True)
    with mlp.edit() as edited:
        edited.layers[1].output = edited.layers[1].output + bias
    edited(x).sum().backward()
    by_edit = bias.grad.clone()
    other = torch.zeros(4, requires_grad=True)
    hooked(mlp._module, mlp._module.layers[1], lambda out: out + other, x).sum().backward()
    same(by_edit, other.grad)


def test_modes_of_an_edit_stay_in_it(switch, mlp, x):
    def edit(model):
        with torch.no_grad():
            model.layers[0].output
            assert not torch.is_grad_enabled()
            model.layers[1].output = model.layers[1].output * 1

    before = snapshots.of_modes()
    with mlp.edit(edit).trace(x):
        out = mlp.output
    assert snapshots.of_modes() == before
    assert out.requires_grad


# What goes wrong.


def test_an_error_in_an_edit_is_raised_at_the_trace_s_line(switch, mlp, x):
    with mlp.edit() as edited:
        edited.layers[1].output = edited.layers[1].output @ torch.zeros(9, 9)
    before = snapshots.of_model(mlp._module)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as raised, edited.trace(x):
        edited.layers[2].output
    assert any("edited.layers[1].output @ torch.zeros(9, 9)" in note for note in raised.value.__notes__)
    lines = [frame.line for frame in traceback.extract_tb(raised.value.__traceback__) if frame.filename == __file__]
    assert lines[-2].startswith("edited.layers[2].output")
    assert "torch.zeros(9, 9)" in lines[-1]
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        edited(x)
    assert not snapshots.differences(before, snapshots.of_model(mlp._module))
    same(mlp(x), mlp._module(x))


def test_a_write_of_the_wrong_shape_names_the_edit_s_line(switch, mlp, x):
    with mlp.edit() as edited:
        edited.layers[1].output = torch.zeros(3, 7)
    for run in (lambda: edited(x), lambda: edited.trace(x, trace=False)):
        with pytest.raises(RuntimeError) as raised:
            run()
        (note,) = [note for note in raised.value.__notes__ if "an edit changed" in note]
        assert "edited.layers[1].output = torch.zeros(3, 7)" in note
        assert "[3, 4] float32" in note


def test_a_module_that_never_runs_is_named_once_and_breaks_nothing(switch, x):
    wide = NNsight(toys.Wide(5))
    after = []
    with wide.edit() as edited:
        edited.layers[0].output = edited.layers[0].output * 2
        edited.layers[4].output = edited.layers[4].output * 2
        after.append(1)
    wanted = hooked(wide._module, wide._module.layers[0], lambda out: out * 2, x)
    with pytest.warns(
        UserWarning, match=r"`layers\.4\.output` has no value: this forward pass never called it"
    ) as told:
        with edited.trace(x):
            out = edited.output
    same(out, wanted)
    assert told[0].filename == __file__
    assert not after
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(edited(x), wanted)


def test_an_edit_of_a_module_that_is_never_called_says_so(x):
    wide = NNsight(toys.Wide(5))
    wide.layers[4].edit(lambda layer: None, inplace=True)
    with pytest.warns(UserWarning, match=r"`layers\.4` was never called"):
        wide(x)
    wide(x)


@pytest.mark.parametrize("path", ["layers.0", ""])
def test_an_edit_waits_in_vain_for_what_a_block_skips(switch, mlp, x, path):
    mlp.edit(lambda edited: edited.layers[0].act.output, inplace=True)
    mlp.layers[0].edit(lambda layer: layer.up.output, inplace=True)
    skipped = mlp.get(path) if path else mlp
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with mlp.trace(x) as tracer:
                skipped.skip(x)
                out = tracer.result
    same(out, x if not path else mlp._module.head(mlp._module.layers[2](mlp._module.layers[1](x))))
    start = "An edit was left waiting, and what follows there in it did nothing. "
    inner = "`layers.0.up.output` has no value: `layers.0` above it was skipped, so it never ran."
    assert {str(warning.message) for warning in caught} == {
        f"{start}`layers.0.act.output` has no value: `{path or 'model'}` above it was skipped, so it never ran.",
        start + (inner if path else "`layers.0` was never called."),
    }
    assert len(caught) == 2  # said once each
    assert not mlp._module._forward_pre_hooks


def test_a_block_waits_in_vain_for_what_an_edit_skips(switch, mlp, x):
    mlp.edit(lambda edited: edited.layers[0].skip(edited.layers[0].input), inplace=True)
    with mlp.trace(x), pytest.raises(NeverCalledError, match=r"`layers.0` above it was skipped, so it never ran"):
        mlp.layers[0].act.output


def test_an_edit_waits_in_vain_for_what_another_edit_skips(switch, mlp, x):
    mlp.edit(lambda edited: edited.layers[0].act.output, inplace=True)
    mlp.edit(lambda edited: edited.layers[0].skip(edited.layers[0].input), inplace=True)
    with pytest.warns(UserWarning, match="left waiting.*`layers.0` above it was skipped"):
        mlp(x)


def with_operation_skipped(mlp, x):
    with mlp.trace(x) as tracer:
        mlp.layers[0].source.self_act_0.skip(x)
        return tracer.result


def test_an_edit_waits_in_vain_for_what_a_skipped_operation_calls(switch, mlp, x):
    mlp.layers[0].edit(lambda layer: layer.act.output, inplace=True)
    mlp.layers[0].edit(lambda layer: layer.source.self_norm_0.output, inplace=True)
    with pytest.warns(UserWarning, match="past, or was left out with") as told:
        out = with_operation_skipped(mlp, x)
    said = "`layers.0.act.output` is past, or was left out with `layers.0.source.self_act_0`, which was skipped."
    assert said in str(told[0].message)
    assert len(told) == 1
    layers = mlp._module.layers
    same(out, mlp._module.head(layers[2](layers[1](mlp._module.embed(x) + layers[0].down(x)))))


def test_a_sibling_s_skip_is_named(switch, mlp, x):
    with pytest.raises(NeverCalledError, match=r"`layers\.0` above it was skipped"), mlp.trace() as tracer:
        with tracer.invoke(x):
            mlp.layers[0].skip(x)
        with tracer.invoke():
            mlp.layers[0].act.output


def test_an_edit_of_a_later_call_waits_in_vain_where_an_earlier_one_was_skipped(switch, x):
    model = NNsight(toys.RNN(steps=2))
    seen = []

    def twice(edited):
        seen.append(edited.cell.act.output)
        edited.cell.output
        seen.append(edited.cell.act.output)

    model.edit(twice, inplace=True)
    model(x)
    assert len(seen) == 2
    text = r"left waiting.*`cell\.act\.output` has no such call: `cell` above it was skipped once"
    with pytest.warns(UserWarning, match=text), model.trace(x):
        model.cell.skip(x)
    assert len(seen) == 3


def test_an_edit_that_comes_too_late_since_a_block_skips_is_told(switch, x):
    """The first call of a shared module was skipped with what is around it: the second one serves the edit."""
    shared = nn.Tanh()
    model, seen = NNsight(toys.Pair(nn.Sequential(shared), shared)), []

    def both(edited):
        seen.append(edited.first[0].output)
        edited.first.output = edited.first.output * 2
        seen.append(edited.first.output)

    model.edit(both, inplace=True)
    model(x)
    assert len(seen) == 2
    with pytest.warns(UserWarning, match=r"left waiting.*`first\.output`.*Before that, `first` was skipped"):
        with model.trace(x):
            model.first.skip(x)
    assert len(seen) == 3


def test_what_an_edit_asks_too_late_stays_an_error_where_a_block_skips_it(switch, mlp, x):
    mlp.edit(lambda edited: [edited.layers[1].output, edited.layers[0].act.output], inplace=True)
    with pytest.raises(AlreadyPastError, match=r"`layers\.0\.act\.output` is past"), mlp.trace(x):
        mlp.layers[0].skip(x)


def test_an_edit_that_asks_in_the_wrong_order_is_an_error_at_its_line(switch, mlp, x):
    with mlp.edit() as edited:
        late = edited.layers[2].output
        edited.layers[0].output = late
    with pytest.raises(AlreadyPastError, match=r"edited\.layers\[0\]\.output = late"):
        edited(x)
    with pytest.raises(AlreadyPastError) as raised, edited.trace(x):
        edited.output
    assert "edited.layers[0].output = late" in raised.value.__notes__[0]
    same(mlp(x), mlp._module(x))


@can_leave_out_all
def test_an_edit_catches_what_it_waits_for_in_vain(switch, x):
    wide, caught = NNsight(toys.Wide(5)), []
    with wide.edit() as edited:
        try:
            edited.layers[4].output
        except NeverCalledError as error:
            caught.append(error)
    same(edited(x), wide(x))
    assert len(caught) == 1


class Catches(nn.Module):
    """A model that goes on where what it calls fails, as one does that has a slower way."""

    def __init__(self):
        super().__init__()
        self.fast, self.slow = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        try:
            return self.fast(x)
        except ZeroDivisionError:
            return self.slow(x)

    def generate(self, x, steps):
        for _ in range(steps):
            x = self(x)
        return x


def fails_before(edited):
    raise ZeroDivisionError if edited.fast.input.shape else None


def fails_behind(edited):
    raise ZeroDivisionError if edited.fast.output.shape else None


@pytest.mark.parametrize("edit", [fails_before, fails_behind])
def test_an_error_of_an_edit_that_the_model_catches_is_raised_behind_it(switch, x, edit):
    model = NNsight(Catches())
    edited = model.edit(edit)
    with pytest.raises(ZeroDivisionError) as raised:
        edited(x)
    assert "The model caught this error of an edit" in raised.value.__notes__[-1]
    with pytest.raises(ZeroDivisionError), edited.trace(x):
        pass
    with pytest.raises(ZeroDivisionError):
        edited.trace(x, 3, fn="generate", trace=False)
    same(model(x), model._module.fast(x))


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (lambda model: model.edit("a"), "takes a function, not a str"),
        (lambda model: model.edit(nn.Linear(2, 2)), "takes a function, not a Linear"),
        (lambda model: model.edit(lambda: None), "called with the model alone"),
        (lambda model: model.edit(lambda a, b, c: None), "called with the model alone"),
        (lambda model: model.edit(lambda: (yield)), "generator or a coroutine"),
    ],
)
def test_what_is_no_edit_is_refused(mlp, mistake, text):
    with pytest.raises(BlockError, match=text):
        mistake(mlp)
    assert mlp._tree.edits == ()


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (lambda tracer: tracer.result, "has no result"),
        (lambda tracer: tracer.stop(), "has no `stop`"),
        (lambda tracer: tracer.invoke("a"), "has no `invoke`"),
        (lambda tracer: tracer.cache(), "has no `cache`"),
        (lambda tracer: list(tracer.iter[-1]), "counted from the end"),
    ],
)
def test_what_an_edit_has_not_is_refused_at_its_line(switch, mlp, x, asked, text):
    edited = mlp.edit(lambda tracer, model: asked(tracer))
    with pytest.raises(BlockError, match=text):
        edited(x)
    same(mlp(x), mlp._module(x))


def test_a_body_that_belongs_to_what_is_around_it_is_refused(mlp):
    count = 0
    for _ in range(2):
        with pytest.raises(BlockError, match="`break` in it"):
            with mlp.edit():
                break

    def bind():
        nonlocal count
        with mlp.edit(inplace=True):
            count += 1

    with pytest.raises(BlockError, match="can't bind `count`"):
        bind()
    assert count == 0
    assert mlp._tree.edits == ()


def test_without_source_the_function_form_is_named(mlp):
    code = "with mlp.edit() as edited:\n    edited.output = 0\n"
    with pytest.raises(BlockError, match="source can't be had") as raised:
        exec(code, {"mlp": mlp})
    assert "@model.edit" in str(raised.value)


# What it leaves behind.


@pytest.mark.parametrize("end", ["finish", "stop", "error", "model fails", "drop"])
def test_nothing_is_left_on_the_model(switch, x, end):
    module = toys.Fails()
    model = NNsight(module)
    ended = []

    def edit(model):
        try:
            model.first.input = model.first.input * 1
            model.first.output = model.first.output + 1
            model.second.output = model.second.output * 2
        finally:
            ended.append(1)

    edited = model.edit(edit)
    before, modes = snapshots.of_model(module), snapshots.of_process()
    tracer = edited.trace(x)
    try:
        if end == "model fails":
            module.error = ValueError("the model's")
        if end == "drop":

            def holds():
                with edited.trace(x):
                    yield edited.first.output

            held = holds()
            next(held)
            del held
        else:
            with tracer:
                edited.first.output
                if end == "stop":
                    tracer.stop()
                if end == "error":
                    raise KeyError("the block's")
    except (KeyError, ValueError):
        pass
    module.error = None
    assert ended == [1]
    assert not snapshots.differences(before, snapshots.of_model(module))
    now = snapshots.of_process()
    now["threads"] = modes["threads"]
    assert not snapshots.differences(modes, now)


def test_memory_is_flat_and_a_dropped_model_is_freed(switch, x):
    class Big(torch.Tensor):
        pass

    def once():
        module = toys.MLP()
        model = NNsight(module)
        edited = doubled(model)
        model.layers[0].edit(lambda layer: setattr(layer, "output", layer.output + 1), inplace=True)
        with model.edit(inplace=True) as tracer:
            tracer.layers[0].output = tracer.layers[0].output + 1
        edited(x)
        with edited.trace(x) as t, model.trace(x):
            model.output
            t.output
        return weakref.ref(module)

    once()
    gc.collect()
    gc.disable()
    try:
        alive = [once()() for _ in range(3)]
    finally:
        gc.enable()
    assert alive == [None] * 3


# Copies.


def halved(model):
    model.layers[1].output = model.layers[1].output * 0.5


def test_a_deep_copy_is_edited_and_stands_alone(switch, mlp, x):
    for edited in (doubled(mlp), mlp.edit(halved)):
        wanted = edited(x)
        copied = copy.deepcopy(edited)
        same(copied(x), wanted)
        with torch.no_grad():
            copied._module.embed.weight.zero_()
        same(edited(x), wanted)
        assert not torch.equal(copied(x), wanted)


def test_a_pickled_function_form_is_edited_and_a_block_is_refused(mlp, x):
    edited = mlp.edit(halved)
    same(pickle.loads(pickle.dumps(edited))(x), edited(x))
    with pytest.raises(ModelError, match="can't be pickled"):
        pickle.dumps(doubled(mlp))


def test_an_edit_written_before_the_weights_are_there():
    model = LanguageModel("nnsight/demo")
    with model.edit() as edited:
        edited.transformer.h[3].mlp.output *= 0
    inner = model.transformer.h[3].mlp.edit(lambda layer: setattr(layer, "output", layer.output * 0))
    with edited.trace(PROMPT):
        out = edited.transformer.h[3].mlp.output
    assert not out.any()
    assert model.dispatched
    assert edited._module is model._module
    assert inner._module is model._module.transformer.h[3].mlp
    with model.trace(PROMPT):
        assert model.transformer.h[3].mlp.output.any()


# Beside a debugger.


def test_tracing_goes_on_as_before(mlp, x):
    seen = []

    def tracing(frame, event, _):
        if frame.f_code.co_filename == __file__:
            seen.append((frame.f_code.co_name, frame.f_lineno, event))
        return tracing

    def traced():
        a = 1
        with mlp.edit() as edited:
            edited.layers[1].output = edited.layers[1].output * 2
        b = 2
        return edited, a + b

    old = sys.gettrace()
    sys.settrace(tracing)
    try:
        edited, _ = traced()
        assert sys.gettrace() is tracing
        edited(x)
    finally:
        sys.settrace(old)
    first = traced.__code__.co_firstlineno
    lines = [line - first for name, line, event in seen if name == "traced" and event == "line"]
    assert {1, 2, 4, 5} <= set(lines)


# Beside caches and loops over steps.


def test_a_cache_keeps_what_edits_and_block_left(switch, mlp, x):
    edited = doubled(mlp)
    with edited.trace(x) as tracer:
        cache = tracer.cache()
        edited.layers[1].output = edited.layers[1].output + 1
    layer = mlp._module.layers[1](mlp._module.layers[0](mlp._module.embed(x)))
    same(cache["model.layers.1"].output, layer * 2 + 1)


def test_a_loop_over_steps_sees_the_edited_model(switch, language_model):
    model, seen, read = language_model, [], []
    with model.edit() as (tracer, edited):
        edited.transformer.h[4].mlp.output = edited.transformer.h[4].mlp.output * 0 + tracer.step
        seen.append(tracer.step)
    with edited.generate(PROMPT, max_new_tokens=3, min_new_tokens=3) as generation:
        for step in generation.iter[:]:
            read.append((step, edited.transformer.h[4].mlp.output.unique().tolist()))  # noqa: PERF401
    assert seen == [0, 1, 2]
    assert read == [(0, [0.0]), (1, [1.0]), (2, [2.0])]


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_compiled_module_is_edited_and_compiled_afterwards(x):
    torch.compiler.reset()
    module = toys.MLP()
    wanted = hooked(module, module.layers[1], lambda out: out * 2, x)
    untouched = module(x)
    compiled = NNsight(torch.compile(module, backend="eager"))
    before = snapshots.stance()
    edited = compiled.edit(lambda model: setattr(model.layers[1], "output", model.layers[1].output * 2))
    same(edited(x), wanted)
    with edited.trace(x):
        out = edited.output
    same(out, wanted)
    same(compiled(x), untouched)
    assert snapshots.stance() == before


def test_the_model_s_own_errors_stay_its_own(switch, x):
    module = toys.Catches(child=toys.Fails(RuntimeError("the child's")))
    model = NNsight(module)
    seen = []
    with model.child.edit(inplace=True) as child:
        seen.append(1)
        child.second.output = child.second.output * 2
        seen.append(2)
    wanted = module(x)
    same(model(x), wanted)  # the model catches what its child raises, and the edit ends there
    same(model(x), wanted)
    assert seen == [1, 1]
    assert module.log == ["RuntimeError"] * 3


@pytest.mark.parametrize("catches", [False, True])
def test_a_module_fails_while_several_edits_wait_for_it(switch, x, catches):
    """torch goes through the module's hooks then, which must not change meanwhile."""
    child = toys.Fails(RuntimeError("the child's"))
    model, ends = NNsight(toys.Catches(child=child) if catches else toys.Pair(second=child)), []

    def waiting(part):
        try:
            part.output = part.output * 2
        finally:
            ends.append(1)

    for envoy in [model.get("child" if catches else "second")] * 3 + [model]:
        envoy.edit(waiting, inplace=True)
    for _ in range(2):
        if catches:
            same(model(x), model._module(x) * 2)
        else:
            with pytest.raises(RuntimeError, match="the child's"), model.trace(x):
                model.output
    assert len(ends) == 8


def test_an_interrupt_in_an_edit_comes_out(switch, mlp, x):
    def interrupted(model):
        model.layers[1].output
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), mlp.edit(interrupted).trace(x):
        mlp.output
    same(mlp(x), mlp._module(x))


def test_an_edit_may_come_when_a_value_is_changed_in_place(switch, mlp, x):
    with mlp.edit() as edited:
        edited.layers[0].output[:] = 0
        edited.layers[1].output[:, 1] += 1
    module = mlp._module
    h = module.layers[1](torch.zeros(3, 4))
    h = h + torch.tensor([0.0, 1, 0, 0])
    same(edited(x), module.head(module.layers[2](h)))


def test_an_edit_that_asks_the_run_around_it_is_refused_and_may_go_on(switch, mlp, x):
    around, caught = [], []
    with mlp.edit() as edited:
        edited.layers[0].output
        try:
            around[0].layers[2].output
        except (RunOrderError, OtherThreadError) as error:
            caught.append(error)
        edited.layers[1].output = edited.layers[1].output * 2
    wanted = hooked(mlp._module, mlp._module.layers[1], lambda out: out * 2, x)
    with edited.trace(x) as tracer:
        around.append(tracer)
        edited.layers[1].output
        out = edited.output
    same(out, wanted)
    assert len(caught) == 1


def test_a_call_that_was_passed_over_does_not_keep_the_next_from_being_left_out(switch, x):
    rnn = NNsight(toys.RNN(steps=3))
    with rnn.trace(x):
        rnn.cell.next().skip(torch.zeros(3, 4))
        out = rnn.output
    same(out, rnn._module.head(rnn._module.cell(x, torch.zeros(3, 4))))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_errors_in_edits_at_any_depth_end_no_process(switch, seed):
    fuzz = pathlib.Path(__file__).parent.parent / "laws" / "fuzz_edits.py"
    command = [sys.executable, "-W", "ignore", str(fuzz), str(seed), switch]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) > 30


def test_an_edit_changes_an_operation_inside_a_forward(switch, mlp, x):
    with mlp.edit() as edited:
        edited.layers[1].source.self_up_0.output = edited.layers[1].source.self_up_0.output * 0
    wanted = hooked(mlp._module, mlp._module.layers[1].up, lambda out: out * 0, x)
    same(edited(x), wanted)
    with edited.trace(x):
        out = edited.output
    same(out, wanted)
    assert "forward" not in vars(mlp._module.layers[1])
