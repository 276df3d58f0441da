"""Edits that stay: what they change, where, in which order, and what they leave alone."""

import warnings

import pytest
import torch
from torch import nn

import toys
from comparing import same
from edited import doubled, hooked
from nnsight import NNsight

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
def test_an_edit_in_a_call_of_a_part_knows_the_positions_of_the_block(demo, how):
    model, vector = demo, torch.randn(128)

    def steer(tracer, model):
        at, hidden = tracer.positions == tracer.lengths - 1, model.transformer.h[3].mlp.output
        model.transformer.h[3].mlp.output = torch.where(at[..., None], hidden + vector, hidden)

    edited = model.edit(steer)
    prompts = ["The Eiffel Tower is in the city of", "Water is made of"]
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


def test_an_edit_in_a_call_of_a_part_knows_the_step_of_the_block(demo):
    steps, model = [], demo
    edited = model.edit(lambda tracer, model: steps.append((tracer.step, model.transformer.h[3].mlp.output.shape[1])))
    with edited.generate("The Eiffel Tower is in the city of", max_new_tokens=3, min_new_tokens=3) as tracer:
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


def test_an_edited_model_is_called_with_keywords_of_any_name(x):
    class Named(nn.Module):
        def forward(self, x, call=0, fn=0):
            return x + call + fn

    model = NNsight(Named())
    edited = model.edit(lambda edited: setattr(edited, "output", edited.output * 2))
    same(edited(x, call=1, fn=3), (x + 1 + 3) * 2)
