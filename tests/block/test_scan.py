"""`model.scan` runs the block on fake tensors: what a trace would show, but for the values, and nothing is touched."""

import copy
import threading

import pytest
import snapshots
import torch
import torch._dynamo  # which a first fake tensor imports, with effects on the process
from torch import nn

import nnsight
import toys
from nnsight import errors


def specs(value):
    """Shape, dtype and device, through tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.device, value.requires_grad
    if isinstance(value, (tuple, list)):
        return [specs(item) for item in value]
    if isinstance(value, dict):
        return {name: specs(item) for name, item in value.items()}
    return value


class Branches(nn.Module):
    """Goes one of two ways, as the values say."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        if (x > 0).any():
            x = self.second(x)
        return x


@pytest.mark.parametrize("name", toys.everything())
def test_a_scan_shows_what_a_trace_shows_but_for_the_values(name, x, switch):
    module = toys.everything()[name]
    before, process = snapshots.of_model(module), snapshots.of_process()
    model = nnsight.NNsight(module)
    seen = []
    for run in (model.trace, model.scan):
        with run(x) as tracer:
            cache = tracer.cache(include_inputs=True, detach=False)
            result = tracer.result
        calls = {path: [(specs(v.inputs), specs(v.output)) for v in cache[path].visits] for path in cache}
        seen.append((calls, specs(result)))
    assert seen[0] == seen[1]
    assert not snapshots.differences(before, snapshots.of_model(module))
    assert not snapshots.differences(process, snapshots.of_process())


def test_the_block_reads_writes_skips_and_calls_as_in_a_trace(mlp, x, switch):
    calls = []
    handle = mlp._module.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with mlp.scan(x) as tracer:
        hidden = mlp.layers[0].output
        mlp.layers[1].input = torch.cat([hidden, hidden]) + torch.ones(4)
        inner = mlp.layers[1].up.output
        lens = mlp.head(hidden)
        by_hand = hidden @ mlp.head.weight.T + tracer.head.bias
        mlp.layers[2].skip(hidden[:1])
        out = mlp.head.output
    handle.remove()
    assert inner.shape == (6, 4)
    assert lens.shape == by_hand.shape == (3, 4)
    assert out.shape == (1, 4)
    assert not calls
    assert "wrote    layers.1.input" in repr(tracer) or "layers.1.input" in repr(tracer)


def test_hooked_calls_are_recorded(mlp, x):
    mlp.sae = toys.Pair()
    with mlp.scan(x):
        mlp.sae(mlp.layers[0].output, hook=True)
        assert mlp.sae.first.output.shape == (3, 4)


def test_a_sub_module_can_be_scanned(mlp, x):
    with mlp.layers[1].scan(x):
        assert mlp.layers[1].up.output.shape == (3, 4)
    assert mlp.layers[1].calls(x)[0] == "model.layers.1"


def test_a_cache_in_a_scan_has_shapes(mlp, x):
    with mlp.scan(x) as tracer:
        cache = tracer.cache([mlp.layers[0], "layers.*.up"])
    assert cache.layers[0].output.shape == (3, 4)
    assert len(cache) == 4


def test_a_trace_beside_a_scan_is_a_trace(mlp, x, switch):
    expected = mlp(x)
    with mlp.trace(x) as real, mlp.scan(x) as fake:
        assert real.model.layers[0].output.sum().item()
        assert fake.model.layers[0].output.shape == (3, 4)
        with mlp.trace(x):
            assert mlp.layers[1].output.sum().item()
        assert mlp.layers[1].output.shape == (3, 4)
        with pytest.raises(errors.FakeValueError):
            mlp.layers[2].output.sum().item()
        assert torch.ones(2).sum().item() == 2  # the block's own tensors are real
    assert torch.equal(real.result, expected)


def test_another_thread_scans_for_itself(mlp, x):
    shapes = []
    with mlp.trace(x):
        first = mlp.layers[0].output

        def scan():
            with mlp.scan(torch.ones(7, 4)):
                shapes.append(mlp.layers[0].output.shape)

        thread = threading.Thread(target=scan)
        thread.start()
        thread.join()
        second = mlp.layers[1].output
    assert shapes == [(7, 4)]
    assert first.sum().item()
    assert second.sum().item()


NEEDS_A_VALUE = {
    "branch": lambda x: 1 if x.sum() > 0 else 0,
    "item": lambda x: x[0, 0].item(),
    "print": lambda x: print(x[0, 0].item()),
    "float": lambda x: float(x.sum()),
    "index": lambda x: [1, 2, 3][x.argmax()],
    "tolist": lambda x: x.tolist(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "equal": torch.equal,
    "allclose": lambda x: torch.allclose(x, x),
}


@pytest.mark.parametrize("name", NEEDS_A_VALUE)
@pytest.mark.parametrize("when", ["in the block", "afterwards"])
def test_a_line_that_needs_a_value_is_an_error_of_its_own(mlp, x, name, when, switch):
    work = (lambda x: torch.equal(x, x)) if name == "equal" else NEEDS_A_VALUE[name]
    with pytest.raises(errors.FakeValueError, match="shapes and no values") as caught:
        with mlp.scan(x):
            hidden = mlp.layers[0].output
            if when == "in the block":
                work(hidden)
        work(hidden)
    assert "test_scan.py" in str(caught.value)
    assert mlp(x).sum().item()


def test_a_model_that_branches_on_a_value_is_told_with_its_own_line(x, switch):
    model = nnsight.NNsight(Branches())
    with model.scan(x):
        assert model.first.output.shape == (3, 4)  # up to there, it can be scanned
        with pytest.raises(errors.FakeValueError, match=r"if \(x > 0\).any\(\):"):
            model.second.output
    with pytest.raises(errors.FakeValueError):
        model.calls(x)
    assert model(x).shape == (3, 4)


def test_mistakes_are_those_of_a_trace(mlp, x):
    with mlp.scan(x):
        mlp.layers[1].output
        with pytest.raises(errors.AlreadyPastError, match=r"layers.0.output"):
            mlp.layers[0].output
    with pytest.raises(errors.UnknownNameError, match="nearest"), mlp.scan(x):
        mlp.layer[0].output
    with pytest.raises(RuntimeError), mlp.scan(x):
        mlp.layers[1].output = torch.zeros(3, 5)
    with pytest.raises(errors.InputError), mlp.scan():
        pass
    with pytest.raises(errors.NeverCalledError), nnsight.NNsight(toys.Wide(5)).scan(x) as tracer:
        tracer.layers[4].output
    with mlp.scan(x) as tracer:
        mlp.layers[0].output
    with pytest.raises(errors.OutsideTraceError):
        mlp.layers[0].output
    with pytest.raises(errors.BlockError, match="used once"), tracer:
        pass


def test_a_module_that_cannot_be_copied_is_refused(x):
    class Stubborn(toys.Pair):
        def __deepcopy__(self, memo):
            raise TypeError("no")

    with pytest.raises(errors.ModelError, match="can't be copied"), nnsight.NNsight(Stubborn()).scan(x):
        pass


def test_inputs_are_not_changed(mlp):
    class Fills(nn.Module):
        def forward(self, x, store):
            store["x"] = x
            return x.mul_(0)

    x, store = torch.ones(2, 2), {}
    with nnsight.NNsight(Fills()).scan(x, store) as tracer:
        assert tracer.result.shape == (2, 2)
    assert x.sum() == 4
    assert not store


def test_calls_are_in_the_order_in_which_they_begin_with_repeats(x):
    assert nnsight.NNsight(toys.RNN(steps=2)).calls(x) == [
        "model",
        *["model.cell", "model.cell.mix", "model.cell.act"] * 2,
        "model.head",
    ]
    shared = nnsight.NNsight(toys.Shared())
    assert shared.calls(x) == ["model", "model.first", "model.between", "model.first"]
    with shared.trace(x) as tracer:
        cache = tracer.cache(shared.calls(x))
    assert set(cache) == set(shared.calls(x))


def test_a_scanned_model_is_copied_and_freed(mlp, x):
    with mlp.scan(x):
        copied = copy.deepcopy(mlp._module)
        mlp.layers[0].output
    assert torch.equal(copied(x), mlp(x))


def test_other_dtypes_and_devices(x):
    module = toys.MLP().to(torch.bfloat16)
    with nnsight.NNsight(module).scan(x.to(torch.bfloat16)) as tracer:
        assert tracer.head.output.dtype == torch.bfloat16
    with nnsight.NNsight(toys.MLP().to("meta")).scan(x.to("meta")) as tracer:
        assert tracer.head.output.device.type == "meta"


def test_rows_have_the_shapes_that_they_have_in_a_trace(mlp, x):
    seen = []
    for run in (mlp.trace, mlp.scan):
        with run(x) as (a, b, _c):
            cache = b.cache("layers")
            hidden = a.layers[0].output
            b.layers[1].output = hidden * 2
            seen.append((hidden.shape, b.layers[2].input.shape, b.result.shape, cache.layers[0].output.shape))
    assert seen[0] == seen[1]
    with (
        pytest.raises(errors.WriteError, match=r"`layers.0.output` of row 1 has the shape"),
        mlp.scan(x) as (_a, b, _c),
    ):
        b.layers[0].output = torch.zeros(2, 4)


def halve(model):
    model.layers[0].output = model.layers[0].output[:, :2]


def test_edits_are_at_work_in_a_call_of_a_part_with_hook_in_a_scan(mlp, x):
    def edit(model):
        model.layers[1].down.output = model.layers[1].down.output[:, :1]

    layer = mlp.edit(edit)
    layer.layers[1].edit(lambda layer: setattr(layer, "output", layer.output[:1]), inplace=True)
    with layer.scan(x):
        called, plain = layer.layers[1](x, hook=True), layer.layers[1](x)
    with layer.trace(x):
        really = layer.layers[1](x, hook=True)
    assert called.shape == really.shape == (1, 4)
    assert plain.shape == (3, 4)


def test_edits_are_at_work_in_a_scan(mlp, x):
    with mlp.edit() as cut:
        cut.layers[0].output = cut.layers[0].output[:1] * torch.ones(4)
    with cut.scan(x) as tracer:
        assert tracer.layers[0].output.shape == tracer.result.shape == (1, 4)
    with mlp.scan(x) as tracer:
        assert tracer.result.shape == (3, 4)
    assert cut.calls(x) == mlp.calls(x)
    wrong = mlp.edit(halve)
    with pytest.raises(RuntimeError, match=r"size|shape") as caught:
        wrong.calls(x)
    assert "an edit" in "".join(caught.value.__notes__)
    assert torch.equal(cut(x), cut.trace(x, trace=False))


def test_operations_are_scanned(mlp, x):
    with mlp.scan(x):
        assert mlp.layers[0].source.self_up_0.output.shape == (3, 4)


def test_what_would_be_lost_is_refused(mlp, x):
    kept = torch.zeros(3, 4)
    with mlp.scan(x):
        hidden = mlp.layers[0].output
        with pytest.raises(errors.FakeValueError, match=r"test_scan\.py:\d+: kept\[:\] = hidden"):
            kept[:] = hidden
        with pytest.raises(errors.FakeValueError, match="writes one into a tensor with values"):
            kept.add_(hidden)
        with pytest.raises(errors.FakeValueError, match="writes one into a tensor with values"):
            torch.add(hidden.detach(), 1, out=kept)
        hidden[:] = torch.ones(4)
        hidden.add_(1)
    assert not kept.any()
    assert not kept.requires_grad
    writes = [
        lambda: setattr(mlp.layers[1], "output", hidden),
        lambda: setattr(mlp.layers[1], "input", hidden * 2),
        lambda: mlp.layers[1].skip(hidden),
        lambda: mlp.layers[1].output.mul_(hidden),
    ]
    for write in writes:
        with mlp.trace(x) as tracer:
            with pytest.raises(errors.FakeValueError, match="shapes and no values"):
                write()
            result = tracer.result
        assert torch.equal(result, mlp(x))


def test_gradients_have_their_shapes_and_reach_no_weight(mlp, x):
    with mlp.scan(x) as tracer:
        hidden, loss = mlp.layers[0].output, tracer.result.sum()
        with loss.backward(retain_graph=True):
            assert hidden.grad.shape == (3, 4)
        loss.backward(retain_graph=True)
        assert [one.shape for one in nnsight.grad(loss, [hidden])] == [(3, 4)]
    assert all(parameter.grad is None for parameter in mlp._module.parameters())


def test_a_wrong_shape_is_one_error_and_nothing_else(mlp, capfd):
    with pytest.raises(RuntimeError, match="5"):
        mlp.calls(torch.ones(3, 5))
    with mlp.scan(torch.ones(3, 4)), pytest.raises(RuntimeError):
        mlp.layers[0].output @ torch.ones(5, 5)
    assert capfd.readouterr().err == ""


def test_options_are_answered_as_in_a_trace(mlp, x):
    for run in (mlp.trace, mlp.scan, mlp.calls):
        run(x, remote=False, backend=None)
        with pytest.raises(errors.InputError, match="`remote` has no meaning here"):
            run(x, remote=True)
        with pytest.raises(errors.InputError, match="`backend` has no meaning here"):
            run(x, backend="local")


def test_a_scan_takes_no_invokes(mlp, x):
    with pytest.raises(errors.InputError, match=r"takes no `tracer.invoke\(...\)`"):
        with mlp.scan() as tracer, tracer.invoke(x):
            pass


def test_a_lazy_module_is_scanned_once_it_has_shapes(x):
    model = nnsight.NNsight(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3)))
    for scanned in (lambda: model.scan(x).__enter__(), lambda: model.calls(x)):
        with pytest.raises(errors.ModelError, match=r"`1\.weight` has no shape yet(.|\n)*model.trace"):
            scanned()
    model(x)
    assert model.calls(x) == ["model", "model.0", "model.1"]


@pytest.mark.parametrize("way", ["trace", "scan"])
def test_a_model_without_weights_says_where_its_inputs_belong(way):
    with torch.device("meta"):
        model = nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    with pytest.raises(RuntimeError, match="meta") as raised, getattr(model, way)(torch.ones(1, 4)):
        model[0].output
    assert any('x.to("meta")' in note for note in getattr(raised.value, "__notes__", []))
    with getattr(model, way)(torch.ones(1, 4, device="meta")):
        assert model[0].output.device.type == "meta"
    with pytest.raises(RuntimeError) as raised, model.trace(torch.ones(1, 3, device="meta")):
        model[0].output
    assert not any("x.to" in note for note in getattr(raised.value, "__notes__", []))
