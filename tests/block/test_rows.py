"""Rows of any module: those of its inputs' first axis, wherever that axis goes, and whole where there is none."""

import collections
import copy
import dataclasses
import gc
import types
import weakref

import pytest
import snapshots
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import toys
from nnsight import NNsight, errors
from nnsight.core import copies


class Turned(nn.Module):
    """Works on [token, batch, width] inside, as a recurrent network does."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        toys.seeded(self)

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Table(nn.Module):
    """Has a value whose size is the batch's, and which is no batch: a table of three rows."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))

        def forward(self):
            return self.weight * 2

    def __init__(self):
        super().__init__()
        self.table = self.Rows()
        self.inner = nn.Identity()

    def forward(self, x):
        return self.inner(x) @ self.table().T


class Scaled(nn.Module):
    """Two inputs: hidden states, and something to multiply with."""

    def __init__(self, how):
        super().__init__()
        self.inner = Multiplied(how)

    def forward(self, x, by):
        return self.inner(x, by=by)


class Multiplied(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x, *, by):
        return self.how(x, by)


class Towers(nn.Module):
    """Two inputs that never meet."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Identity(), nn.Identity()

    def forward(self, x, y):
        return self.one(x), self.other(y)


class OfOnes(nn.Module):
    """Runs on ones alone."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Identity(), nn.Identity()

    def forward(self, x):
        before = self.before(x)
        if not bool((x == 1).all()):
            raise ValueError("ones")
        return self.after(before)


class Boxed(nn.Module):
    """Passes a list and a dict on."""

    def __init__(self):
        super().__init__()
        self.make = self.Make()

    class Make(nn.Module):
        def forward(self, x):
            return [x * 1, {"twice": x * 2, "n": 3}]

    def forward(self, x):
        one, named = self.make(x)
        return one + named["twice"] * named["n"]


def test_rows_equal_hooks_that_slice_bit_for_bit(mlp, x, switch):
    def hook(module, args, output):
        output = output.clone()
        output[1] = output[0] * 3
        output[2, 2] = 0
        return output

    handle = mlp._module.layers[0].up.register_forward_hook(hook)
    expected = mlp._module(x)
    handle.remove()
    before = snapshots.of_model(mlp._module)
    with mlp.trace(x) as (a, b, c):
        b.layers[0].up.output = a.layers[0].up.output * 3
        c.layers[0].up.output[:, 2] = 0
        got = [row.result for row in (a, b, c)]
    torch.testing.assert_close(torch.cat(got), expected, rtol=0, atol=0)
    assert snapshots.of_model(mlp._module) == before


def test_inputs_are_changed_for_one_row(mlp, x):
    changed = x.clone()
    changed[1] += 1
    expected = mlp._module(changed)
    with mlp.trace(x) as (_, b, _):
        b.embed.input = b.embed.input + 1
        got = b.tracer.result
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    with mlp.trace(x) as (_, b, _):
        (value,), kwargs = b.embed.inputs
        b.embed.inputs = (value + 1,), kwargs
        got = b.tracer.result
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_writing_back_what_each_row_read_changes_nothing(x):
    for module in (toys.MLP(), toys.Structured(), Boxed(), Turned()):
        given = x[:, None].repeat(1, 2, 1) if isinstance(module, Turned) else x
        model, expected = NNsight(module), module(given)
        for name, _ in [*module.named_modules()][1:]:
            if isinstance(module.get_submodule(name), nn.ModuleList):
                continue
            with model.trace(given) as tracer:
                for row in tracer:
                    row.get(name).output = row.get(name).output
                got = tracer.result
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_the_batch_axis_may_be_another_one(x):
    model = NNsight(Turned())
    batch = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2))
    with model.trace(batch) as (_, b, _):
        inner = b.inner.output
        b.inner.output = inner * 0
        whole = model.inner.output
        result = b.result
    assert inner.shape == (5, 1, 4)
    assert result.shape == (1, 5, 4)
    assert not whole[:, 1].any()
    assert whole[:, 0].all()


def test_a_value_whose_size_happens_to_match_is_no_batch(x):
    model = NNsight(Table())
    with model.trace(x) as (a, b, _):
        assert a.inner.output.shape == (1, 4)
        assert a.table.output.shape == (3, 4)
        with pytest.raises(errors.WriteError, match="shared by all 3 rows"):
            b.table.output = torch.zeros(3, 4)


def test_a_second_input_has_rows_where_the_model_needs_it_to(x):
    square = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    batch = torch.cat([x, x[:1]])
    with NNsight(Scaled(torch.mul)).trace(batch, batch * 2) as (_, b, _, _):
        args, kwargs = b.inner.inputs
        assert torch.equal(kwargs["by"], batch[1:2] * 2)
        assert torch.equal(args[0], batch[1:2])
    with NNsight(Scaled(torch.matmul)).trace(batch, square) as (_, b, _, _):
        assert b.inner.inputs[0][0].shape == (1, 4)
        assert b.inner.output.shape == (1, 4)


def test_inputs_that_never_meet_are_not_guessed_about(x):
    with NNsight(Towers()).trace(x, x * 2) as (a, _, _):
        assert torch.equal(a.one.output, x[:1])
        with pytest.raises(errors.RowError, match="which of the inputs have rows"):
            a.other.output
        first, second = a.result
        assert torch.equal(first, x[:1])
        with pytest.raises(errors.RowError, match="which of the inputs have rows"):
            second + 1


@pytest.mark.parametrize("grad", [True, False])
def test_what_a_row_puts_into_a_list_or_dict_reaches_the_model(x, grad):
    module = Boxed()
    with torch.set_grad_enabled(grad):
        given = x.clone().requires_grad_(grad)
        model = NNsight(module)
        expected = given * 7
        with model.trace(given) as (_, b, c):
            box = b.make.output
            box[0] = torch.zeros_like(box[0])
            c.make.output[1]["twice"] = torch.ones(1, 4)
            got = b.tracer.result
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], given[1] * 6)
    torch.testing.assert_close(got[2], given[2] + 3)


def test_what_a_row_puts_there_that_does_not_fit_is_refused(x):
    model = NNsight(Boxed())
    with pytest.raises(errors.WriteError, match=r"`make.output\[0\]` of row 1 has the shape \[1, 4\]"):
        with model.trace(x) as (_, b, _):
            b.make.output[0] = torch.zeros(3, 4)
    with pytest.raises(errors.WriteError, match="shared by all 3 rows"):
        with model.trace(x) as (_, b, _):
            b.make.output[1]["n"] = 4
    with model.trace(x) as (a, _, _):
        with pytest.raises(errors.WriteError, match="another kind of value"):
            a.make.output = torch.zeros(1, 4)


def test_parts_that_were_given_before_a_write_still_reach_the_model(mlp, x):
    with mlp.trace(x) as (a, b, _):
        first = a.embed.output
        kept = first.clone()
        b.embed.output = first
        first[:] = 0
        again = b.embed.output
        again += 1
        whole = mlp.layers[0].input
    assert not whole[0].any()
    torch.testing.assert_close(whole[1:2], kept + 1, rtol=0, atol=0)


def test_a_write_for_the_whole_batch_after_a_row_was_read_wins(mlp, x):
    with mlp.trace(x) as (a, b, _c):
        old = a.embed.output
        mlp.embed.output = torch.ones(3, 4)
        old[:] = 5
        assert torch.equal(b.embed.output, torch.ones(1, 4))
        b.embed.output = torch.zeros(1, 4)
        whole = mlp.layers[0].input
    assert torch.equal(whole, torch.tensor([1.0, 0.0, 1.0])[:, None].expand(3, 4))


def test_gradients_through_a_row_equal_those_of_the_whole(mlp, x):
    with mlp.trace(x):
        hidden = mlp.layers[0].output
        loss = mlp.output.square().sum()
    (expected,) = torch.autograd.grad(loss, hidden)
    with mlp.trace(x) as (a, b, c):
        parts = [row.layers[0].output for row in (a, b, c)]
        loss = sum(row.result.square().sum() for row in (a, b, c))
    got = torch.autograd.grad(loss, parts, retain_graph=True)
    torch.testing.assert_close(torch.cat(got), expected)
    parts[1].retain_grad()
    loss.backward()
    torch.testing.assert_close(parts[1].grad, expected[1:2])


class Beside(nn.Module):
    """What is given to a part of it is added to what that returns, as in a layer with a norm."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(toys.WIDTH, toys.WIDTH), nn.Linear(toys.WIDTH, toys.WIDTH)
        toys.seeded(self)

    def forward(self, x):
        hidden = self.first(x)
        return hidden + self.second(hidden)


@pytest.mark.parametrize("then", ["nothing", "looks", "changes it in place"])
def test_a_change_in_place_reaches_all_who_hold_the_value_whatever_another_row_has_written(x, then):
    model = NNsight(Beside())
    with torch.no_grad(), model.trace(x) as (a, b, _):
        a.second.input = a.second.input * (3 if then != "changes it in place" else 1.5)
        if then == "looks":
            a.second.input  # of the batch that has it
        elif then == "changes it in place":
            a.second.input[:] *= 2
        b.second.input[:] *= 2
        first, second = a.result, b.result
    with torch.no_grad(), model.trace(x[1:2]) as tracer:
        model.second.input[:] *= 2
        torch.testing.assert_close(second, tracer.result)
    with torch.no_grad(), model.trace(x[:1]) as tracer:
        model.second.input = model.second.input * 3
        torch.testing.assert_close(first, tracer.result)


class Two(nn.Module):
    def forward(self, one, other):
        return one * other


class Held(nn.Module):
    """Both inputs of a part of it are held by others, as keys and values are by a cache."""

    def __init__(self):
        super().__init__()
        self.first, self.two = nn.Linear(toys.WIDTH, toys.WIDTH), Two()
        toys.seeded(self)

    def forward(self, x):
        one, other = self.first(x), self.first(x) + 1
        return self.two(one, other) + one + 2 * other


@pytest.mark.parametrize("own", [0, 1])
def test_of_several_inputs_a_row_keeps_the_ones_that_it_has_not_written(x, own):
    model, other = NNsight(Held()), 1 - own

    def assign(scope, at, change):
        args = list(scope.two.inputs[0])
        args[at] = change(args[at])
        scope.two.inputs = tuple(args), {}

    with torch.no_grad(), model.trace(x) as (a, b, _):
        assign(a, own, lambda value: value * 3)
        assign(b, other, lambda value: value + 1)
        a.two.inputs[0][other][:] -= 2
        first, second = a.result, b.result
    with torch.no_grad(), model.trace(x[:1]) as tracer:
        assign(model, own, lambda value: value * 3)
        model.two.inputs[0][other][:] -= 2
        torch.testing.assert_close(first, tracer.result)
    with torch.no_grad(), model.trace(x[1:2]) as tracer:
        assign(model, other, lambda value: value + 1)
        torch.testing.assert_close(second, tracer.result)


@pytest.mark.parametrize("written", [lambda hidden: hidden, lambda hidden: hidden.mul_(2)])
@pytest.mark.parametrize("kind", ["input", "output"])
def test_a_part_that_is_written_back_keeps_its_gradient(mlp, x, kind, written):
    def ask(scope):
        layer = scope.layers[1]
        hidden = getattr(layer, kind)
        setattr(layer, kind, written(hidden))
        assert getattr(layer, kind) is hidden
        return hidden

    with mlp.trace(x) as tracer:
        hidden = ask(tracer.rows[1])
        getattr(tracer.rows[0].layers[1], kind)
        loss = tracer.rows[1].result.square().sum()
    with mlp.trace(x[1:2]) as tracer:
        alone = ask(tracer)
        expected = tracer.result.square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, alone))


def test_gradients_hold_where_the_block_turned_them_off_for_a_while(mlp, x):
    with mlp.trace(x) as (a, b, _):
        part = a.layers[0].output
        with torch.no_grad():
            b.layers[0].output = b.layers[0].output * 2
            mlp.layers[1].output
        loss = a.result.sum()
    assert torch.autograd.grad(loss, part)[0].any()


def test_a_model_that_no_twin_can_run_is_refused_with_the_reason(x):
    model = NNsight(OfOnes())
    with model.trace(torch.ones_like(x)) as (a, _, _):
        assert a.before.output.shape == (1, 4)  # measured before it failed
        with pytest.raises(errors.RowError, match="can't be run on fake tensors"):
            a.after.output
        assert a.tracer.after.output.shape == (3, 4)


def test_inputs_without_rows_are_told(mlp):
    class Number(nn.Module):
        def forward(self, x):
            return x + 1

    for given, what in ((torch.tensor(1.0), "single number"), (3, "no tensor")):
        with pytest.raises(errors.RowError, match=what):
            with NNsight(Number()).trace(given) as (_a,):
                pass
    with mlp.trace(torch.ones(4)) as tracer:  # one vector: no axis of it can be of another size
        with pytest.raises(errors.RowError, match="can't be run on fake tensors"):
            tracer.rows[0].head.output


def test_rows_have_no_tokens_here(mlp, x):
    with mlp.trace(x) as (a, _, _):
        with pytest.raises(errors.RowError, match="tokens"):
            a.tokens


def test_a_module_of_the_model_has_rows_too(mlp, x):
    with mlp.layers[1].trace(x) as (a, b, _):
        assert a.up.output.shape == (1, 4)
        b.up.output[:] = 0
        assert b.down.output.shape == (1, 4)


def test_a_module_that_is_called_again_goes_on_for_all_rows(x):
    model = NNsight(toys.RNN())
    with model.trace(x):
        states = [model.cell.output, model.cell.next().output]
    with model.trace(x) as tracer:
        a, b, _ = tracer
        first = [row.cell.output for row in (a, b)]
        tracer.model.cell.next()
        second = [row.cell.output for row in (a, b)]
    assert torch.equal(torch.cat(first), states[0][:2])
    assert torch.equal(torch.cat(second), states[1][:2])


def test_a_module_called_in_the_block_is_not_cut(mlp, x):
    with mlp.trace(x) as (a, b, _):
        hidden = a.embed.output
        assert a.head(hidden).shape == (1, 4)
        out = b.layers[0](hidden, hook=True)
        assert b.layers[0].up.output.shape == (1, 4)
    assert out.shape == (1, 4)


def test_a_result_is_written_for_one_row(mlp, x):
    with mlp.trace(x) as (a, b, _):
        b.result = torch.zeros(1, 4)
        whole = a.tracer.result
    assert not whole[1].any()
    assert whole[0].all()


def test_inference_mode_has_rows(mlp, x):
    with torch.inference_mode(), mlp.trace(x) as (a, b, _):
        b.embed.output = a.embed.output
        a.layers[0].output[:] = 0
        whole = mlp.layers[1].input
    assert not whole[0].any()
    assert whole[1].any()


def test_measuring_is_done_once(mlp, x, monkeypatch):
    from nnsight.core import measuring

    made = []
    monkeypatch.setattr(measuring, "Twin", lambda *given, real=measuring.Twin: made.append(given) or real(*given))
    for size in (3, 2, 3):
        with mlp.trace(x[:size]) as tracer:
            for row in tracer:
                row.embed.output
    assert len(made) == 1
    mlp.extra = nn.Linear(4, 4)  # another tree is measured anew
    with mlp.trace(x) as (a, *_):
        a.embed.output
    assert len(made) == 2


def test_a_trace_with_rows_that_is_dropped_is_freed(x, switch):
    gc.disable()
    try:
        module = toys.MLP()
        model = NNsight(module)
        held = weakref.ref(module)
        for _ in range(3):
            tracer = model.trace(x)
            a, *_ = tracer.__enter__()
            a.layers[0].output
            run = weakref.ref(tracer._run)
            del tracer, a, _
            assert run() is None
        del module, model
        assert held() is None
    finally:
        gc.enable()


def test_rows_of_two_traces_at_once_stay_apart(mlp, x):
    with mlp.trace(x) as (a, *_), mlp.trace(x * 2) as (p, *_):
        one, other = a.embed.output, p.embed.output
        p.embed.output = one
        got, untouched = p.result, a.result
    torch.testing.assert_close(got, untouched)
    assert not torch.equal(one, other)


def test_a_part_that_was_read_without_gradients_keeps_those_of_the_model(mlp, x):
    given = x.clone().requires_grad_()
    expected = torch.autograd.grad(mlp._module(given).sum(), given)[0]
    for off in (torch.no_grad, torch.inference_mode):
        with mlp.trace(given) as rows:
            a, b, _ = rows
            with off():
                a.layers[0].output, b.layers[0].output
            loss = rows.result.sum()
        torch.testing.assert_close(torch.autograd.grad(loss, given)[0], expected)


def test_what_is_put_into_keywords_or_numbers_is_refused_not_lost(x):
    model = NNsight(toys.Structured())
    before = snapshots.of_model(model._module)
    with pytest.raises(errors.WriteError, match="shared by all 3 rows") as raised:
        with model.trace(x) as (a, _, _):
            a.dict.inputs[1]["scale"] = 3.0
    assert snapshots.of_model(model._module) == before, raised
    with pytest.raises(errors.WriteError, match="another kind of value"):
        with model.trace(x) as (a, _, _):
            a.dict.inputs[1]["more"] = 3.0
    expected = model._module(x)
    with model.trace(x) as (a, _, _):
        a.dict.inputs[1]["x"] = a.dict.inputs[1]["x"] * 0
        got = a.tracer.result
    torch.testing.assert_close(got[1:], expected[1:], rtol=0, atol=0)
    assert not torch.equal(got[0], expected[0])


def test_a_receipt_names_the_rows(mlp, x):
    with mlp.trace(x) as tracer:
        a, b, _ = tracer
        b.embed.output = a.embed.output
    text = repr(tracer)
    assert "embed.output of row 0" in text
    assert "wrote   embed.output of row 1  [1, 4] float32" in text


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("row", "token", ""), (2, 1, 8), [(0, 1), (0, 1), (0, 8)]),  # the new token alone
        (("row", "token", ""), (2, 6, 8), [(0, 1), (2, 6), (0, 8)]),  # without a cache: all so far
        (("row", "", "token", "token"), (2, 3, 1, 6), [(0, 1), (0, 3), (0, 1), (2, 6)]),  # a pattern
        (("row*token", ""), (2, 8), [(0, 1), (0, 8)]),
        (("token*row", ""), (12, 8), [(4, 11), (0, 8)]),
    ],
)
def test_a_later_step_has_the_prompts_own_positions_and_the_new_ones(axes, shape, expected):
    from nnsight.block.cuts import Batch, Knife

    knife = Knife(Batch(2, 4, [(2, 4), (0, 4)]), copies=1, step=2)
    cut = knife.cut(torch.zeros(shape), axes, 0)
    assert [part.indices(size)[:2] for part, size in zip(cut.at, shape, strict=True)] == expected


def test_threads_have_their_own_rows(mlp, x, switch):
    from concurrent.futures import ThreadPoolExecutor

    def work(factor):
        with mlp.trace(x * factor) as (a, b, _):
            b.layers[0].output = a.layers[0].output
            return a.tracer.result

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(1, 9)))
    for factor, got in enumerate(together, 1):
        assert torch.equal(got[0], got[1])
        torch.testing.assert_close(got[::2], mlp._module(x * factor)[::2])


class Uncopyable(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x)

    def __deepcopy__(self, memo):
        raise TypeError("never copied")


def test_a_model_that_cant_be_copied_is_refused_with_the_reason(x):
    with NNsight(Uncopyable()).trace(x) as (a, _, _):
        with pytest.raises(errors.RowError, match=r"can't be copied.*never copied"):
            a.inner.output
        assert a.tracer.inner.output.shape == (3, 4)


def test_measuring_leaves_running_statistics_alone():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3))
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(module)
    expected = plain(images)
    with NNsight(module).trace(images) as (a, b, _):
        parts = a[0].output, b[2].output
        got = a.tracer.result
    assert [part.shape for part in parts] == [(1, 2, 6, 6), (1, 72)]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert all(torch.equal(one, other) for one, other in zip(module.buffers(), plain.buffers(), strict=True))


def test_a_recurrent_network_has_its_batch_on_two_axes():
    module = nn.LSTM(4, 5, batch_first=True)
    x = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    out, (hidden, cell) = module(x)
    with NNsight(nn.Sequential(module)).trace(x) as (_, b, _):
        got = b[0].output
    for part, whole in ((got[0], out[1:2]), (got[1][0], hidden[:, 1:2]), (got[1][1], cell[:, 1:2])):
        torch.testing.assert_close(part, whole, rtol=0, atol=0)


@dataclasses.dataclass(frozen=True)
class Frozen:
    hidden: torch.Tensor
    name: str = "it"


class Handed(nn.Module):
    """Hands its values on in an object of some class."""

    class Make(nn.Module):
        def __init__(self, pack):
            super().__init__()
            self.pack = pack

        def forward(self, x):
            return self.pack(x * 1), x * 2

    def __init__(self, pack, unpack):
        super().__init__()
        self.make, self.unpack = self.Make(pack), unpack

    def forward(self, x):
        packed, twice = self.make(x)
        return self.unpack(packed) + twice


def a_cache_of(x):
    cache = transformers.DynamicCache()
    cache.update(x[:, None, None], x[:, None, None], 0)
    return cache


CLOSED = {
    "namespace": (lambda x: types.SimpleNamespace(hidden=x), lambda v: v.hidden),
    "deque": (lambda x: collections.deque([x]), lambda v: v[0]),
    "user dict": (lambda x: collections.UserDict(hidden=x), lambda v: v["hidden"]),
    "key-value cache": (a_cache_of, lambda v: v.layers[0].keys[:, 0, 0]),
    "set": (lambda x: frozenset([x]), lambda v: next(iter(v))),
}


@pytest.mark.parametrize("name", CLOSED)
def test_what_is_in_an_object_of_another_class_is_refused_when_it_is_used(name, x):
    pack, unpack = CLOSED[name]
    with NNsight(Handed(pack, unpack)).trace(x) as (a, _b, _c):
        packed, twice = a.make.output
        assert twice.shape == (1, 4)
        with pytest.raises(errors.RowError, match=r"`make.output\[0\]` can't be told: it is a \w+, which may hold"):
            unpack(packed)


@pytest.mark.parametrize("name", CLOSED)
def test_what_cant_be_told_is_passed_on_as_it_is(name, x):
    pack, unpack = CLOSED[name]
    model = NNsight(Handed(pack, unpack))
    with model.trace(x) as (a, b, _c):
        a.make.output = a.make.output
        b.make.output = (b.make.output[0], b.make.output[1] * 0)
        got = a.tracer.result
    torch.testing.assert_close(got, x * torch.tensor([[3.0], [1.0], [3.0]]), rtol=0, atol=0)
    with pytest.raises(errors.WriteError, match="shared by all 3 rows"), model.trace(x) as (a, _b, _c):
        a.make.output = (pack(x[:1]), a.make.output[1])


def test_a_dataclass_is_cut_field_by_field(x):
    model = NNsight(Handed(Frozen, lambda v: v.hidden))
    with model.trace(x) as (a, b, c):
        assert torch.equal(b.make.output[0].hidden, x[1:2])
        assert b.make.output[0].name == "it"
        a.make.output = a.make.output
        b.make.output = (Frozen(torch.zeros(1, 4)), b.make.output[1])
        c.make.output[0].hidden[:] = 1
        got = a.tracer.result
    torch.testing.assert_close(got, torch.cat([x[:1] * 3, x[1:2] * 2, x[2:] * 2 + 1]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_shared_value_that_a_row_changes_in_place_is_put_back(x, mode):
    module = Table()
    before = module.table.weight.detach().clone()
    module.table.forward = lambda: module.table.weight
    with pytest.raises(errors.WriteError, match=r"row 1 changed it in place\. It has been put back") as caught:
        with mode(), NNsight(module).trace(x.clone()) as (_a, b, _c):
            b.table.output[0] = 0
            b.tracer.result
    assert "`table.output` is shared by all 3 rows" in str(caught.value)
    assert "b.table.output[0] = 0" in str(caught.value)
    assert torch.equal(module.table.weight, before)


class Changes(nn.Module):
    """Leaves out one axis where the batch is large, as a model with another kernel may."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        table = torch.ones(2 if len(x) > 8 else 1, 4)
        return self.inner(table) + x[:1]


def test_a_model_that_does_otherwise_at_the_real_size_is_refused(x):
    model = NNsight(Changes())
    with model.trace(x) as (a, _b, _c):
        assert a.inner.output.shape == (1, 4)
    with pytest.raises(errors.RowError, match=r"its axis 0 is 2 long, and was 1 .* differently at this batch size"):
        with model.trace(torch.ones(9, 4)) as tracer:
            tracer.rows[0].inner.output


def test_another_width_is_measured_anew_and_right(x):
    model = NNsight(nn.Sequential(nn.ReLU()))
    for width in (4, 6):
        x = torch.randn(3, width)
        with model.trace(x) as (_a, b, _c):
            assert torch.equal(b.get("0").output, x[1:2].relu())


def test_inputs_that_are_closed_objects_are_refused_with_the_reason(x):
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x, box):
            return self.inner(x) + box.hidden

    box = types.SimpleNamespace(hidden=x)
    with pytest.raises(errors.RowError, match="an input is a SimpleNamespace"):
        with NNsight(Takes()).trace(x, box) as (a, _b, _c):
            a.inner.output


def test_a_mode_of_the_block_sees_nothing_of_the_measuring():
    class Counts(TorchFunctionMode):
        n = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.n += 1
            return func(*args, **(kwargs or {}))

    def counted():
        with model.trace(torch.ones(2, 4)) as (_, b), Counts() as counts:
            seen = b.layers[0].output
            torch.relu(seen)
        return counts.n

    model = NNsight(toys.MLP())
    first, again = counted(), counted()
    assert first == again


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_change_in_place_of_the_whole_behind_a_row_s_write_reaches_the_rows_that_were_read_before(mlp, x, mode):
    with torch.no_grad():
        expected = mlp._module.layers[1].up(mlp._module.layers[1].norm(alone_up_to_layer_1(mlp, x)))
        expected[2] = expected[2] * 2 + 1
        expected[:, 2:] *= 3
        expected[0, 0] = 5
    with mode(), mlp.trace(x) as tracer:
        first, _, last = tracer.rows
        kept = first.layers[1].up.output
        last.layers[1].up.output = last.layers[1].up.output * 2 + 1
        tracer.model.layers[1].up.output[:, 2:] *= 3
        tracer.model.layers[1].up.output[0, 0] = 5
        inner = tracer.model.layers[1].act.input
    assert torch.allclose(inner.detach(), expected)
    assert kept.shape == (1, 4)


def alone_up_to_layer_1(mlp, x):
    return mlp._module.layers[0](mlp._module.embed(x))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_rows_and_the_whole_see_each_other_s_changes_behind_a_row_s_write(mlp, x, mode):
    with mode(), mlp.trace(x) as tracer:
        first, _, last = tracer.rows
        kept = first.layers[1].up.output
        last.layers[1].up.output = torch.ones(1, 4)
        kept[:] = 2
        whole = tracer.model.layers[1].up.output
        assert (whole[0] == 2).all()
        assert (whole[2] == 1).all()
        whole[:] += 1
        assert (first.layers[1].up.output == 3).all()
        assert (last.layers[1].up.output == 2).all()
        inner = tracer.model.layers[1].act.input
    assert (inner[0] == 3).all()
    assert (inner[2] == 2).all()


def test_what_a_row_had_is_forgotten_where_the_whole_is_assigned(mlp, x):
    with torch.no_grad(), mlp.trace(x) as tracer:
        first, _, last = tracer.rows
        kept = first.layers[1].up.output
        last.layers[1].up.output = torch.ones(1, 4)
        tracer.model.layers[1].up.output = torch.zeros(3, 4)
        kept[:] = 2
        seen = tracer.model.layers[1].up.output.clone()
        inner = tracer.model.layers[1].act.input
    assert not seen.any()
    assert not inner.any()


@pytest.mark.parametrize("asks", [False, True])
def test_a_row_is_changed_again_and_again_behind_another_one_s_write(mlp, x, asks):
    with torch.no_grad(), mlp.trace(x) as tracer:
        first, second, last = tracer.rows
        kept = first.layers[1].up.output
        last.layers[1].up.output = torch.ones(1, 4)
        if asks:
            second.layers[1].up.output[:] = 4
        kept[:] = 2
        assert (tracer.model.layers[1].up.output[0] == 2).all()
        kept[:] = 3
        assert (tracer.model.layers[1].up.output[0] == 3).all()
        kept[:] = 5
        inner = tracer.model.layers[1].act.input
    assert inner[::2, 0].tolist() == [5, 1]
    assert (inner[1] == 4).all() == asks


def test_two_changes_of_a_row_of_which_one_would_be_lost_are_refused(mlp, x):
    with pytest.raises(
        errors.WriteError,
        match=r"(?s)of row 0 was changed in place, and so was the value of.*read at.*kept = .*instead +read it",
    ):
        with torch.no_grad(), mlp.trace(x) as tracer:
            first, _, last = tracer.rows
            kept = first.layers[1].up.output
            last.layers[1].up.output = torch.ones(1, 4)
            tracer.model.layers[1].up.output[:] = 3
            kept[:] = 2
            mlp.layers[2].output


def test_an_invoke_for_the_whole_sees_what_others_changed_behind_a_write(mlp, x):
    with torch.no_grad(), mlp.trace() as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke(x[:1]):
            kept = mlp.layers[1].up.output
            meet()
            kept[:] = 2
        with tracer.invoke(x[1:]):
            mlp.layers[1].up.output = torch.ones(2, 4)
            meet()
        with tracer.invoke():
            seen = mlp.layers[1].up.output.clone()
            inner = mlp.layers[1].act.input
    for whole in (seen, inner):
        assert (whole[0] == 2).all()
        assert (whole[1:] == 1).all()


def test_a_row_of_a_trace_that_nobody_asked_is_not_told_of_a_generation(mlp, x):
    with mlp.trace(x) as tracer:
        first, *_ = tracer.rows
    with pytest.raises(errors.RowError, match=r"(?s)No row of this trace was asked.*tracer\.result, which"):
        first.result
    with mlp.trace(x) as tracer:
        first, *_ = tracer.rows
        first.layers[1].up.output
    assert torch.equal(first.result, tracer.result[:1])


@pytest.mark.parametrize("axes", [2, 3])
def test_the_rows_of_what_a_generate_of_the_models_own_returns_are_not_known(x, axes):
    """It may stack steps in front, or have any other form; a row of what the modules return is known all the same."""

    class Own(nn.Linear):
        def generate(self, x):
            steps = torch.stack([self(x), self(x)])
            return steps if axes == 3 else steps[:, :, 0]

    model = NNsight(toys.seeded(Own(4, 4)))
    with model.trace(x, fn="generate") as (a, *_):
        same = a.output
        with pytest.raises(errors.RowError, match="can't be told: it is what a `generate` of the model's own"):
            a.result
        assert a.tracer.result.ndim == axes
    assert torch.equal(same, model._module(x)[:1])


def test_a_copy_to_measure_on_is_made_again_where_another_thread_put_a_hook_on_the_model_meanwhile(monkeypatch, mlp, x):
    deepcopy, failed = copies.copy.deepcopy, []

    def deepcopy_while_others_trace(*args):
        if len(failed) < 3:
            failed.append(args)
            raise RuntimeError("OrderedDict mutated during iteration")
        return deepcopy(*args)

    monkeypatch.setattr(copies, "copy", types.SimpleNamespace(deepcopy=deepcopy_while_others_trace))
    with mlp.trace(x) as (_, b, _):
        output = b.layers[1].output
        whole = b.tracer.model.output
    assert len(failed) == 3
    assert torch.equal(whole, mlp._module(x))
    assert output.shape == (1, 4)


class Copies(TorchDispatchMode):
    """Counts the copies that are made of tensors of one shape, by the model and by the block."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.clone.default and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["output", "input"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("reads", [True, False])
def test_rows_that_are_written_one_after_the_other_copy_the_batch_once(mlp, kind, grad, reads):
    x, more = torch.randn(16, 4), torch.randn(16, 4)
    with torch.set_grad_enabled(grad), Copies(x.shape) as copied, mlp.trace(x) as tracer:
        first = getattr(tracer.rows[0].layers[1], kind)
        before = getattr(mlp.layers[1], kind)
        copied.count = 0  # of those that it took to measure the axes
        for row, part in zip(tracer.rows, more.split(1), strict=True):
            setattr(row.layers[1], kind, getattr(row.layers[1], kind) + part if reads else part)
        result = tracer.result
    assert copied.count == 1
    assert torch.equal(first, before[:1])
    put = "register_forward_hook" if kind == "output" else "register_forward_pre_hook"
    handle = getattr(mlp._module.layers[1], put)(lambda *_: before + more if reads else more)
    assert torch.equal(result, mlp._module(x))
    handle.remove()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_rows_wrote_is_there_for_whoever_asks(mlp, x, mode):
    one, other = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 4)
    with mode(), mlp.trace(x) as tracer:
        a, b, c = tracer.rows
        cache = tracer.cache("layers.1")
        before = mlp.layers[1].output.clone()
        a.layers[1].output = one
        c.layers[1].output = other
        assert torch.equal(a.layers[1].output, one.float())
        assert torch.equal(b.layers[1].output, before[1:2])
        now = mlp.layers[1].output
        assert torch.equal(now, torch.cat([one.float(), before[1:2], other]))
        b.layers[1].output = other
        wanted = torch.cat([one.float(), other, other])
        other.zero_()  # what was written is what it was then
        tracer.stop()
    assert torch.equal(cache["layers.1"].output, wanted)
    assert not torch.equal(now, wanted)


def test_what_is_written_for_a_row_can_be_given_the_trace(mlp, x):
    def first(it):
        return it.layers[0].output, it.tracer.model.layers[1].output, it.result

    with mlp.trace(x) as tracer:
        whole = first(tracer)
        assert tracer.tracer is tracer
    with mlp.trace(x) as (row, *_):
        part = first(row)
    for one, other in zip(part, whole, strict=True):
        assert torch.equal(one[:1], other[:1])


def test_what_is_shared_in_a_result_is_written_for_the_whole_batch():
    class WithNumbers(nn.Linear):
        def forward(self, x):
            return super().forward(x), torch.arange(5.0)

    model = NNsight(WithNumbers(3, 3))
    with pytest.raises(errors.WriteError, match=r"write it for the whole batch: tracer\.result = \.\.\."):
        with model.trace(torch.ones(2, 3)) as (a, _):
            own, numbers = a.result
            a.result = own, numbers + 1
