"""`eproperty.transform`: what a block changes in place in a copy that an eproperty made reaches the model."""

import contextlib
import dataclasses
import gc
import itertools
import random
import weakref

import pytest
import torch

import nnsight
import toys
from nnsight import Envoy, eproperty, errors


class Heads(Envoy):
    """The output of a Linear, [row, 4], as a copy, [row, head, 2]."""

    calls = ()

    @eproperty
    def heads(self, value):
        return value.unflatten(-1, (2, 2)).clone()

    @heads.transform
    def heads(self, heads, value):
        Heads.calls += (type(self).__name__,)
        assert value.shape[-1] == 4
        return heads.flatten(-2)

    @heads.postprocess
    def heads(self, heads):
        return heads.flatten(-2)

    @eproperty(key="input")
    def halves(self, value):
        return [value[:, :2].clone(), value[:, 2:].clone()]

    @halves.transform
    def halves(self, halves, value):
        return torch.cat(halves, dim=-1)

    @eproperty(key="inputs")
    def called_with(self, inputs):
        args, kwargs = inputs
        return {"args": [*args], "kwargs": kwargs}

    @called_with.transform
    def called_with(self, view, inputs):
        return tuple(view["args"]), view["kwargs"]


@pytest.fixture
def model():
    Heads.calls = ()
    return nnsight.NNsight(toys.MLP(), envoys={torch.nn.Linear: Heads})


def test_a_change_in_place_is_written_back_before_the_model_goes_on(model, x, switch):
    with model.trace(x):
        model.layers[1].up.heads[:, 0] = 0
        changed = model.layers[1].act.input
    with model.trace(x):
        model.layers[1].up.output[:, :2] = 0
        expected = model.layers[1].act.input
    assert torch.equal(changed, expected)
    assert Heads.calls == ("Heads",)


def test_it_is_written_back_where_the_block_asks_again_and_where_it_ends(model, x):
    with model.trace(x) as tracer:
        up = model.layers[1].up
        up.heads[:, 0] = 0
        first = up.output.clone()
        up.heads[:, 1] = 0
        again = up.output
    assert not first[:, :2].any()
    assert first[:, 2:].any()
    assert not again.any()
    with model.trace(x) as tracer:
        cache = tracer.cache("head")
        model.head.heads[:, 0] = 0
    assert not tracer._run.state.result[:, :2].any()
    assert not cache["head"].output[:, :2].any()
    with model.trace(x) as tracer:
        cache = tracer.cache("layers.0.up")
        model.layers[0].up.heads[:, 0] = 0
        tracer.stop()
    assert not cache["layers.0.up"].output[:, :2].any()


def test_transform_does_not_fire_where_the_view_was_not_changed(model, x):
    """The existing package's fires all the same, and rewrites the value (PEER.md 3.2)."""
    with model.trace(x):
        up = model.layers[1].up
        heads, kept = up.heads, up.output
        heads.sum(), heads * 2, heads[0].clone().zero_()
        assert model.layers[1].act.input is kept
        assert model.layers[2].up.heads.shape == (3, 2, 2)
    assert Heads.calls == ()


def test_a_repeated_read_returns_the_same_view_until_the_value_is_changed_otherwise(model, x):
    with model.trace(x):
        up = model.layers[1].up
        heads = up.heads
        assert up.heads is heads
        heads[:, 0] = 0
        assert up.heads is heads
        assert up.heads is heads
        up.output = torch.ones(3, 4)
        assert up.heads is not heads
        heads = up.heads
        assert (heads == 1).all()
        up.output[:] = 2
        assert (up.heads == 2).all()
    assert Heads.calls == ("Heads",)


def test_what_is_assigned_behind_a_change_has_the_last_word(model, x):
    with model.trace(x):
        up = model.layers[1].up
        up.heads[:, 0] = 0
        up.heads = up.heads + 1
        inner = model.layers[1].act.input
        model.layers[2].up.heads[:] = 0
        model.layers[2].up.output = x
        other = model.layers[2].act.input
    assert (inner[:, :2] == 1).all()
    assert torch.equal(other, x)


def test_two_views_of_one_value_are_both_written_back_or_the_loss_of_one_is_told(model, x):
    with model.trace(x):
        up = model.layers[1].up
        up.halves[0].mul_(2)
        inputs = up.called_with
        inputs["args"][0] = inputs["args"][0] * 0
        outputs = up.output
    assert torch.equal(outputs, model.layers[1].up.bias.expand(3, 4))
    with pytest.raises(
        errors.WriteError,
        match=r"(?s)one of the two changes would be lost.*you wrote +heads = up.heads\n.*instead +ask for `heads`",
    ):
        with model.trace(x):
            up = model.layers[1].up
            heads = up.heads
            up.output.mul_(2)
            heads[:, 0] = 0
            model.layers[2].output


def test_a_view_of_the_value_s_own_memory_has_both_changes(x):
    class Kind(Envoy):
        @eproperty
        def heads(self, value):
            return value.unflatten(-1, (2, 2))

        @heads.transform
        def heads(self, heads, value):
            return heads.flatten(-2)

    model = nnsight.NNsight(toys.MLP(), envoys={"up": Kind})
    with model.trace(x):
        heads = model.layers[1].up.heads
        model.layers[1].up.output[:, 3] = 1
        heads[:, 0] = 0
        inner = model.layers[1].act.input
    assert not inner[:, :2].any()
    assert (inner[:, 3] == 1).all()


def test_a_change_is_found_in_containers_and_records_and_by_identity_where_something_was_put_in(x):
    @dataclasses.dataclass
    class Parts:
        first: torch.Tensor
        rest: dict

    seen = []

    class Kind(Envoy):
        @eproperty
        def parts(self, value):
            return Parts(value[:, :1].clone(), {"others": [value[:, 1:].clone()], "scale": 1.0, "note": "as it is"})

        @parts.transform
        def parts(self, parts, value):
            seen.append(True)
            return torch.cat([parts.first, *parts.rest["others"]], dim=-1) * parts.rest["scale"]

    model = nnsight.NNsight(toys.MLP(), envoys={"up": Kind})

    def of(change):
        seen.clear()
        with model.trace(x):
            change(model.layers[1].up.parts)
            inner = model.layers[1].act.input
        return inner, len(seen)

    untouched, count = of(lambda parts: None)
    assert count == 0
    for change, expected in [
        (lambda parts: parts.first.zero_(), lambda value: torch.cat([value[:, :1] * 0, value[:, 1:]], dim=-1)),
        (lambda parts: parts.rest["others"][0].zero_(), lambda value: torch.cat([value[:, :1], value[:, 1:] * 0], -1)),
        (lambda parts: parts.rest.update(scale=3.0), lambda value: value * 3),
        (lambda parts: setattr(parts, "first", parts.first * 2), lambda v: torch.cat([v[:, :1] * 2, v[:, 1:]], -1)),
        (lambda parts: parts.rest["others"].reverse(), lambda value: value),
    ]:
        inner, count = of(change)
        assert torch.equal(inner, expected(untouched))
        assert count == (0 if expected(x) is x else 1)


@pytest.mark.parametrize("made", [torch.no_grad, torch.inference_mode])
def test_a_change_is_found_in_inference_mode_and_one_that_is_none_is_not(model, x, made):
    with made(), model.trace(x):
        heads = model.layers[0].up.heads
        assert heads.is_inference() == (made is torch.inference_mode)
        heads *= 1
        heads[:, 0] = 0
        changed = model.layers[0].act.input
        model.layers[1].up.heads.sum()
        result = model.output
    assert not changed[:, :2].any()
    assert Heads.calls == ("Heads",)
    assert result.shape == (3, 4)


def test_an_object_that_can_t_be_looked_into_counts_as_changed(x):
    class Kind(Envoy):
        @eproperty
        def array(self, value):
            return value.detach().numpy().copy()

        @array.transform
        def array(self, array, value):
            return torch.from_numpy(array)

    model = nnsight.NNsight(toys.MLP(), envoys={"up": Kind})
    with model.trace(x):
        model.layers[1].up.array[:, 0] = 0
        inner = model.layers[1].act.input
    assert not inner[:, 0].any()
    assert inner[:, 1:].any()


def test_a_value_that_holds_such_an_object_has_views(x):
    class Counts(torch.nn.Module):
        def forward(self, x):
            return x * 2, itertools.count()

    class Kind(Envoy):
        @eproperty
        def hidden(self, value):
            return value[0].clone()

        @hidden.transform
        def hidden(self, hidden, value):
            return hidden, value[1]

    model = nnsight.NNsight(torch.nn.Sequential(Counts()), envoys={Counts: Kind})
    with model.trace(x):
        hidden = model[0].hidden
        assert model[0].hidden is hidden
        hidden[:] = 0
        result, _ = model.output
    assert not result.any()


def test_rows_and_scopes_and_invokes_write_back_their_own_part(model, x, switch):
    def inner_of(tracer):
        return tracer.model.layers[1].act.input

    with model.trace(x) as (a, b, _):
        a.layers[1].up.heads[:, 0] = 0
        heads = b.layers[1].up.heads
        b.layers[1].up.heads[:, 1] = 0
        assert b.layers[1].up.heads is heads
        a.layers[1].up.heads[:, 1] = 0
        rows = inner_of(a.tracer)
    assert not rows[0].any()
    assert rows[1, :2].all()
    assert not rows[1, 2:].any()
    assert rows[2].all()
    with model.trace(x) as tracer:
        tracer.layers[1].up.heads[:, 0] = 0
        with model.trace(x):
            inside = model.layers[1].act.input
        outside = inner_of(tracer)
    assert inside.all()
    assert not outside[:, :2].any()
    with model.trace() as tracer:
        with tracer.invoke(x[:1]) as first:
            first.layers[1].up.heads[:, 0] = 0
            one = model.layers[1].act.input
        with tracer.invoke(x[1:]):
            model.layers[1].up.heads[:, 1] = 0
            two = model.layers[1].act.input
        with tracer.invoke():
            before = model.layers[1].up.output.clone()
            model.layers[2].up.heads[:] = 0
            result = model.layers[2].act.input
    assert not one[:, :2].any()
    assert not two[:, 2:].any()
    assert two[:, :2].all()
    assert torch.equal(before, torch.cat([one, two]))
    assert not result.any()
    assert set(Heads.calls) == {"RowScope", "Scope", "Heads"}
    with model.trace() as tracer:
        with tracer.invoke(x[:1]):
            model.head.heads[:, 0] = 0
        with tracer.invoke(x[1:]):
            model.head.output
            result = tracer.result
        with tracer.invoke():
            whole = tracer.result
    assert not whole[0, :2].any()
    assert torch.equal(result, whole[1:])
    with model.trace() as tracer:
        with tracer.invoke(x[:1]):
            model.head.heads[:, 0] = 0
            tracer.stop()
        with tracer.invoke():
            whole = tracer.result
    assert not whole[0, :2].any()
    with model.trace(x) as (a, b, _):
        heads = a.layers[1].up.heads
        b.layers[1].up.output[:] = 0
        heads[:, 0] = 0
        rows = inner_of(a.tracer)
    assert not rows[0, :2].any()
    assert rows[0, 2:].all()
    assert not rows[1].any()


def test_a_view_that_another_invoke_changes_is_refused(model, x):
    with pytest.raises(errors.WriteError, match="changed in place by another invoke than the one that had it"):
        with model.trace() as tracer:
            with tracer.invoke(x[:1]):
                heads = model.layers[1].up.heads
            with tracer.invoke(x[1:]):
                model.layers[1].up.output
                heads[:, 0] = 0


def test_edits_scans_steps_and_gradients_write_back_too(model, x):
    with model.edit() as edited:
        edited.layers[1].up.heads[:, 0] = 0
    with edited.trace(x):
        inner = model.layers[1].act.input
    assert not inner[:, :2].any()

    @model.edit
    def twice(one):
        one.layers[1].up.heads[:, 0] = 0
        one.layers[2].up.heads[:, 0] = 0

    with twice.trace(x):
        assert not model.layers[1].act.input[:, :2].any()
        assert not model.layers[2].act.input[:, :2].any()
    last = model.edit(lambda one: one.head.heads.zero_())  # where the block ends
    assert not last(x).any()
    with model.scan(x):
        model.layers[1].up.heads[:, 0] = 0
        assert model.layers[1].act.input.shape == (3, 4)
    with model.trace(x):
        model.layers[0].up.heads[:, 0] *= 3
        model.output.sum().backward()
    grad = model.layers[0].up.weight.grad.clone()
    model.zero_grad()
    with model.trace(x):
        up = model.layers[0].up.output
        model.layers[0].up.output = torch.cat([up[:, :2] * 3, up[:, 2:]], dim=-1)
        model.output.sum().backward()
    torch.testing.assert_close(grad, model.layers[0].up.weight.grad)
    rnn = nnsight.NNsight(toys.RNN(), envoys={torch.nn.Linear: Heads})
    with rnn.trace(x):
        rnn.cell.mix.heads[:] = 0
        rnn.cell.mix.next().heads[:, 0] = 0
        second = rnn.cell.act.input
    assert second.shape == (3, 4)


def test_what_the_block_called_itself_is_written_nowhere(model, x):
    model.late = torch.nn.Linear(4, 4)
    with model.trace(x):
        model.late(x, hook=True)
        model.late.heads[:] = 0
        model.output
    assert Heads.calls == ()


def test_receipts_and_errors_name_the_line_at_which_the_view_was_had(model, x):
    with model.trace(x) as tracer:
        model.layers[1].up.heads[:, 0] = 0  # this line
        model.layers[2].output
        assert True
    lines = repr(tracer).splitlines()
    read, wrote = (next(line for line in lines if verb in line and "up" in line) for verb in ("read", "wrote"))
    assert read.split()[-1] == wrote.split()[-1]

    class Wrong(Envoy):
        @eproperty
        def heads(self, value):
            return value.clone()

        @heads.transform
        def heads(self, heads, value):
            return heads.no_such_thing

    other = nnsight.NNsight(toys.MLP(), envoys={"up": Wrong})
    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'") as caught:
        with other.trace(x):
            other.layers[1].up.heads[:] = 0
            other.layers[2].output
    assert "`heads` was had and changed in place at test_views.py" in "".join(caught.value.__notes__)
    with pytest.raises(errors.WriteError, match="its forward has run"):
        with model.trace(x):
            model.layers[1].up.output
            model.layers[1].up.halves[0].zero_()


def test_a_transform_takes_the_view_and_the_value(model):
    with pytest.raises(errors.InputError, match=r"(?s)a view and a value.*instead +def heads\(self, view, value\):"):

        class _Wrong(Envoy):
            @eproperty
            def heads(self, value):
                return value

            @heads.transform
            def heads(self, view):
                return view


def test_a_trace_that_is_dropped_with_a_view_is_freed_at_once(model, x):
    gc.collect()
    gc.disable()
    try:
        for ask in (lambda tracer: tracer.rows[0], lambda tracer: tracer.model, lambda _: model):
            tracer = model.trace(x)
            tracer.__enter__()
            heads = ask(tracer).layers[1].up.heads
            run = weakref.ref(tracer._run)
            del tracer
            assert run() is None
            assert heads.shape[1:] == (2, 2)
    finally:
        gc.enable()


class Aliased(Envoy):
    """The same heads, in the value's own memory: what is changed there needs no transform."""

    @eproperty
    def heads(self, value):
        return value.unflatten(-1, (2, 2))

    @heads.postprocess
    def heads(self, heads):
        return heads.flatten(-2)


def change(up, action, vector):
    """One change at a module, in one of the ways in which a block can make it."""
    if action == "heads in place":
        up.heads[:, 0] += vector[:2]
    elif action == "twice in place":
        heads = up.heads
        heads[:, 1] *= 2
        up.output.sum()
        heads[:, 1] -= vector[2:]
    elif action == "whole in place":
        up.output[:, 1:3] += vector[:2]
    elif action == "heads":
        up.heads = up.heads + vector.view(2, 2)
    elif action == "whole":
        up.output = up.output * 2 - vector
    elif action == "read":
        up.heads, up.output


ACTIONS = ["heads in place", "twice in place", "whole in place", "heads", "whole", "read"]


@pytest.mark.parametrize("seed", range(40))
def test_random_programs_on_copies_equal_those_on_the_value_s_own_memory(seed, x):
    rng = random.Random(seed)
    program = [
        (index, row, action, torch.randn(4))
        for index in range(3)
        for row in rng.choices([None, 0, 1, 2], k=rng.randint(0, 4))
        for action in rng.choices(ACTIONS, k=rng.randint(1, 3))
    ]
    grad = rng.random() < 0.5
    results = []
    for kind in (Heads, Aliased):
        model = nnsight.NNsight(toys.MLP(), envoys={"up": kind})
        # Where the rows' changes and the whole's can't both be kept, that is refused.
        with contextlib.suppress(errors.WriteError), torch.set_grad_enabled(grad), model.trace(x) as tracer:
            for index, row, action, vector in program:
                scope = tracer.model if row is None else tracer.rows[row]
                change(scope.layers[index].up, action, vector)
            results.append(tracer.result)
    if len(results) == 2:
        torch.testing.assert_close(*results)
