"""Any module of torch: a CNN, recurrent ones, a graph network, torch's own transformers. All as plain hooks give it."""

import warnings

import pytest
import snapshots
import torch
from torch import nn
from torch.nn.utils import prune

import nnsight
import toys
import zoo
from nnsight import NNsight, errors


def first_tensor(value):
    return value if isinstance(value, torch.Tensor) else first_tensor(value[0])


def with_first(value, new):
    return new if isinstance(value, torch.Tensor) else (with_first(value[0], new), *value[1:])


def by_hooks(module, path, inputs, change=None):
    """The module's outputs, one a call, and the model's; `change` makes of each output what the model goes on with."""
    seen = []

    def hook(_, __, output):
        seen.append(output)
        return None if change is None else change(output)

    handle = module.get_submodule(path).register_forward_hook(hook)
    try:
        return seen, module(*inputs)
    finally:
        handle.remove()


def same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
        return
    assert len(one) == len(other)
    for a, b in zip(one, other):
        same(a, b)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_read_is_what_a_hook_sees_and_changes_nothing(name, grad):
    module, inputs, path = zoo.build(name)
    with torch.set_grad_enabled(grad):
        (seen,), plain = by_hooks(module, path, inputs)
        before = snapshots.of_model(module)
        with NNsight(module).trace(*inputs) as tracer:
            read = tracer.model.get(path).output
            result = tracer.result
    same(read, seen)
    same(result, plain)
    assert snapshots.of_model(module) == before


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_write_and_its_gradient_are_those_of_a_hook(name):
    module, inputs, path = zoo.build(name)

    def change(output):
        return with_first(output, first_tensor(output) * 2 + 1)

    _, plain = by_hooks(module, path, inputs, change)
    parameter = next(module.parameters())
    (wanted,) = torch.autograd.grad(first_tensor(plain).square().sum(), [parameter])

    with NNsight(module).trace(*inputs) as tracer:
        envoy = tracer.model.get(path)
        envoy.output = change(envoy.output)
        result = tracer.result
    same(result, plain)
    same(torch.autograd.grad(first_tensor(result).square().sum(), [parameter])[0], wanted)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_gradient_is_that_of_autograd(name):
    module, inputs, path = zoo.build(name)
    (seen,), plain = by_hooks(module, path, inputs)
    (wanted,) = torch.autograd.grad(first_tensor(plain).square().sum(), [first_tensor(seen)])
    with NNsight(module).trace(*inputs) as tracer:
        value = first_tensor(tracer.model.get(path).output)
        (grad,) = nnsight.grad(first_tensor(tracer.result).square().sum(), [value])
    same(grad, wanted)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_an_edit_that_stays_is_a_hook_that_stays(name):
    module, inputs, path = zoo.build(name)
    _, plain = by_hooks(module, path, inputs, lambda output: with_first(output, first_tensor(output) * 2))
    model = NNsight(module)
    edited = model.edit(
        lambda m: setattr(m.get(path), "output", with_first(m.get(path).output, 2 * first_tensor(m.get(path).output)))
    )
    same(edited(*inputs), plain)
    with edited.trace(*inputs) as tracer:
        result = tracer.result
    same(result, plain)
    same(model(*inputs), module(*inputs))


@pytest.mark.parametrize("name", [name for name in zoo.ZOO if name not in ("packed", "graph")])
def test_a_row_is_what_its_input_gives_alone(name):
    module, inputs, path = zoo.build(name)
    model, alone = NNsight(module), [value[1:] for value in inputs]
    (seen,), plain = by_hooks(module, path, alone)
    with model.trace(*inputs) as (_, row):
        read, result = row.get(path).output, row.result
    torch.testing.assert_close(first_tensor(read), first_tensor(seen))
    torch.testing.assert_close(result, plain)


@pytest.mark.parametrize("name", [name for name in zoo.ZOO if name not in ("packed", "graph")])
def test_one_row_is_patched_from_another(name):
    module, inputs, path = zoo.build(name)
    (seen,), _ = by_hooks(module, path, inputs)
    given = first_tensor(seen).clone()
    given[1] = given[0]
    _, plain = by_hooks(module, path, inputs, lambda output: with_first(output, given))
    with NNsight(module).trace(*inputs) as (one, other):
        value = first_tensor(one.get(path).output)
        first_tensor(other.get(path).output)[:] = value
        result = other.tracer.model.output
    torch.testing.assert_close(result, plain)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_cache_hears_each_call(name):
    module, inputs, path = zoo.build(name)
    (seen,), _ = by_hooks(module, path, inputs)
    with NNsight(module).trace(*inputs) as tracer:
        cache = tracer.cache(path)
    same(first_tensor(cache[path].output), first_tensor(seen))


@pytest.mark.parametrize("name", [name for name in zoo.ZOO if name != "packed"])
def test_a_scan_has_the_shapes_of_a_trace(name):
    module, inputs, path = zoo.build(name)
    (seen,), _ = by_hooks(module, path, inputs)
    with NNsight(module).scan(*inputs) as tracer:
        shape = first_tensor(tracer.model.get(path).output).shape
    assert shape == first_tensor(seen).shape


# A module that is called again and again.


def test_each_call_of_a_cell_is_read_and_written_as_a_hook_would():
    module, inputs, _ = zoo.build("cells")
    seen, _ = by_hooks(module, "cell", inputs)
    calls = iter(range(5))
    _, plain = by_hooks(module, "cell", inputs, lambda output: output * 3 if next(calls) == 2 else None)
    with NNsight(module).trace(*inputs) as tracer:
        cell = tracer.model.cell
        first = cell.output
        third = cell.next(2).output
        cell.output = third * 3
        result = tracer.result
    same([first, third], [seen[0], seen[2]])
    same(result, plain)


def test_all_calls_are_read_in_their_order_and_no_more_than_there_are():
    module, inputs, _ = zoo.build("cells")
    seen, _ = by_hooks(module, "upper", inputs)
    model = NNsight(module)
    with model.trace(*inputs):
        read = [model.upper.output, *(model.upper.next().output for _ in range(4))]
    same(read, seen)
    with pytest.raises(errors.CalledFewerTimesError, match=r"no such call"):
        with model.trace(*inputs):
            for _ in range(6):
                model.upper.next().output


def test_a_cache_and_a_row_have_all_calls():
    module, inputs, _ = zoo.build("cells")
    seen, _ = by_hooks(module, "cell", inputs)
    with NNsight(module).trace(*inputs) as (one, other):
        cache, rows = one.tracer.cache("cell"), other.cache("cell")
    same(cache.cell.outputs, seen)
    same(rows.cell.outputs, [output[1:] for output in seen])


def test_an_edit_of_a_cell_is_at_work_in_each_of_its_calls_and_one_of_the_model_in_the_first():
    module, inputs, _ = zoo.build("cells")
    _, plain = by_hooks(module, "cell", inputs, lambda output: output * 0)
    model = NNsight(module)
    model.cell.edit(lambda cell: setattr(cell, "output", cell.output * 0), inplace=True)
    same(model(*inputs), plain)
    model.clear_edits()
    calls = iter(range(5))
    _, plain = by_hooks(module, "cell", inputs, lambda output: output * 0 if next(calls) == 0 else None)
    edited = model.edit(lambda m: setattr(m.cell, "output", m.cell.output * 0))
    same(edited(*inputs), plain)


def test_the_steps_of_a_plain_trace_are_not_the_calls_of_a_cell():
    module, inputs, _ = zoo.build("cells")
    model = NNsight(module)
    with pytest.raises(errors.BlockError, match=r"(?s)one call of the model.*in range\(5\).*\.next\(\)"):
        with model.trace(*inputs) as tracer:
            for _ in tracer.iter[:5]:
                model.cell.output
    with pytest.raises(errors.BlockError, match=r"(?s)no step 2.*module\.next\(2\)"):
        with model.trace(*inputs) as tracer:
            for _ in tracer.iter[2]:
                model.cell.output


def test_a_range_goes_through_the_calls_where_its_body_reads_two_modules():
    module, inputs, _ = zoo.build("cells")
    cell, _ = by_hooks(module, "cell", inputs)
    upper, _ = by_hooks(module, "upper", inputs)
    model = NNsight(module)
    with model.trace(*inputs):
        both = [(model.cell.output, model.upper.output) for _ in range(5)]
    same(both, list(zip(cell, upper)))


# Recurrent layers of torch's own.


def test_packed_sequences_are_read_written_and_cached():
    module, inputs, _ = zoo.build("packed")
    model = NNsight(module)
    (seen,), _ = by_hooks(module, "rnn", inputs)

    def doubled(output):
        states, last = output
        return states._replace(data=states.data * 2), last

    _, plain = by_hooks(module, "rnn", inputs, doubled)
    with model.trace(*inputs) as tracer:
        cache = tracer.cache("rnn")
        states, last = model.rnn.output
        model.rnn.output = doubled((states, last))
        result = tracer.result
    same(states.data, seen[0].data)
    same(result, plain)
    same(cache.rnn.output[0].data, seen[0].data * 2)


def test_rows_of_a_packed_sequence_are_refused_and_say_why():
    module, inputs, _ = zoo.build("packed")
    with pytest.raises(errors.RowError, match=r"_pack_padded_sequence"):
        with NNsight(module).trace(*inputs) as (one, _):
            one.rnn.output[0].data + 1
    packed = nn.utils.rnn.pack_padded_sequence(zoo.random(5, 2, 8), [5, 3])
    with pytest.raises(errors.RowError, match=r"a packed sequence"):
        with NNsight(module.rnn).trace(packed) as (_, _):
            pass


def test_rows_are_on_the_second_axis_where_a_module_of_torch_says_so():
    module = toys.seeded(nn.LSTM(8, 6))
    x, state = zoo.random(5, 2, 8), (zoo.random(1, 2, 6), zoo.random(1, 2, 6))
    with NNsight(module).trace(x, state) as (_, row):
        inputs, (output, (last, _)) = row.inputs[0], row.result
    same(inputs, (x[:, 1:], tuple(part[:, 1:] for part in state)))
    alone = module(x[:, 1:], tuple(part[:, 1:].contiguous() for part in state))
    torch.testing.assert_close((output, last), (alone[0], alone[1][0]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Transformer(8, 2, 1, 1, 16),
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        lambda: nn.MultiheadAttention(8, 2),
        lambda: nn.GRU(8, 6),
    ],
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_what_takes_tokens_first_is_known(make):
    module = make()
    n = 3 if isinstance(module, nn.MultiheadAttention) else 2 if isinstance(module, nn.Transformer) else 1
    with NNsight(module.eval()).trace(*[zoo.random(5, 3, 8)] * n) as rows_of:
        rows = rows_of.rows
        assert first_tensor(rows[0].result).shape[:2] == (5, 1)
    assert len(rows) == 3


def test_a_model_that_takes_tokens_first_is_told_so():
    module = toys.seeded(zoo.Recurrent(batch_first=False))
    ids = zoo.IDS.T
    with NNsight(module, batch_axis=1).trace(ids) as (one, other):
        read = one.rnn.output[0]
        other.rnn.output = one.rnn.output
        results = one.result, other.result
    assert read.shape == (5, 1, 12)
    same(*results)
    with NNsight(module, batch_axis=1).trace() as tracer:
        with tracer.invoke(ids[:, :1]):
            alone = tracer.model.rnn.output[0]
        with tracer.invoke(ids):
            both = tracer.model.rnn.output[0]
    assert alone.shape == (5, 1, 12)
    same(both[:, :1], alone)


def test_rows_that_a_recurrent_layer_would_take_for_time_are_refused():
    model = NNsight(toys.seeded(zoo.Recurrent(batch_first=False)))
    with pytest.raises(errors.RowError, match=r"(?s)`rnn`, without `batch_first`.*batch_axis=1"):
        with model.trace(zoo.IDS.T) as (one, *_):
            one.rnn.output[0] + 1


def test_an_input_without_a_batch_has_no_rows():
    for batch_first in (True, False):
        with pytest.raises(errors.RowError, match=r"its first input is \[5, 8\].* one with rows has 3 axes"):
            with NNsight(nn.LSTM(8, 6, batch_first=batch_first)).trace(zoo.random(5, 8)) as (_, _):
                pass
    for axis in ("1", -1, True):
        with pytest.raises(errors.InputError, match=r"`batch_axis`"):
            NNsight(zoo.CNN(), batch_axis=axis)


# Attention of torch's own, and its fast path.


@pytest.fixture
def encoder():
    """With padding and no gradients, torch turns the batch into a nested tensor."""
    return toys.seeded(nn.TransformerEncoder(zoo.encoder_layer(), 2)).eval()


MASK = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


@pytest.mark.parametrize("path", ["layers.0", "layers.1.linear1", "layers.0.self_attn"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_of_the_fast_path_are_read_as_they_are(encoder, path):
    x = zoo.random(2, 5, 8)
    with torch.no_grad():
        handles = [encoder.get_submodule(path).register_forward_hook(lambda _, __, output: seen.append(output))]
        seen = []
        plain = encoder(x, src_key_padding_mask=MASK)
        handles[0].remove()
        with NNsight(encoder).trace(x, src_key_padding_mask=MASK) as tracer:
            read = tracer.model.get(path).output
            result = tracer.result
    assert first_tensor(read).is_nested
    for one, other in zip(first_tensor(read).unbind(), first_tensor(seen[0]).unbind()):
        same(one, other)
    same(result, plain)
    assert "[2, -1, " in str(tracer)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_rows_of_a_padded_encoder_are_cut_where_torch_makes_no_nested_tensor(encoder):
    x, model = zoo.random(2, 5, 8), NNsight(encoder)
    with model.trace(x, src_key_padding_mask=MASK) as (_, row):
        hidden, result = row.layers[0].linear1.output, row.result
    assert hidden.shape == (1, 5, 16)
    same(result, encoder(x, src_key_padding_mask=MASK)[1:])
    with torch.no_grad(), pytest.raises(errors.RowError, match=r"(?s)nested tensor.*set_fastpath_enabled\(False\)"):
        with model.trace(x, src_key_padding_mask=MASK) as (_, row):
            row.layers[0].output + 1


def test_a_module_whose_weights_a_function_is_given_is_told_from_one_that_is_not_used(encoder):
    model = NNsight(encoder)
    with pytest.raises(errors.NeverCalledError, match=r"`layers.0.self_attn` gives its weights to a function"):
        with model.trace(zoo.random(2, 5, 8)):
            model.layers[0].self_attn.out_proj.output


# TorchScript and DataParallel.


# TorchScript's interpreter turns a warning of torch's that is shown nowhere into an error without a text.
SCRIPTS_WARN = pytest.mark.filterwarnings("default::UserWarning", "ignore:`torch.jit")


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(4, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.script = torch.jit.script(toys.Pair())

    def forward(self, x):
        return self.script(self.plain(x))


@SCRIPTS_WARN
def test_a_scripted_module_is_read_written_skipped_cached_and_cut_and_what_is_inside_refused(x):
    model = NNsight(Scripted())
    with model.trace(x) as (one, other, _):
        read = one.script.output
        other.script.output = read
        result = other.result
    same(result, read)
    with model.trace(x) as tracer:
        cache = tracer.cache()
        model.script.skip(x)
        result = tracer.result
    same(result, x)
    assert list(cache) == ["model.plain", "model.script", "model"]
    assert model.calls(x) == ["model", "model.plain", "model.script"]
    with pytest.raises(errors.ModelError, match=r"`script.first` runs inside TorchScript"):
        with model.trace(x):
            model.script.first.output


@SCRIPTS_WARN
def test_a_scripted_model_is_edited_as_a_whole_and_what_is_inside_refused(switch, x):
    module = Scripted().script
    model = NNsight(module)

    def edit(edited):
        edited.input = edited.input * 2
        edited.output = edited.output + 1

    same(model.edit(edit)(x), module(x * 2) + 1)
    inside = r"`first` runs inside TorchScript \(`model`\)"
    with pytest.raises(errors.ModelError, match=inside):
        model.edit(lambda edited: edited.first.output)(x)
    with pytest.raises(errors.ModelError, match=inside), model.trace(x):
        assert torch.equal(model.input, x)
        model.first.output


@SCRIPTS_WARN
def test_a_scripted_model_is_run_as_a_whole(x):
    module = Scripted().script
    with NNsight(module).trace(x) as (_, row, _):
        result = row.result
    torch.testing.assert_close(result, module(x)[1:2])


def test_data_parallel_is_refused_by_name_and_read_from_outside(x):
    model = NNsight(toys.Pair(second=nn.DataParallel(nn.Linear(4, 4))))
    with model.trace(x):
        out = model.second.output
    same(out, model._module(x))
    with pytest.raises(errors.ModelError, match=r"`second.module` is inside a DataParallel \(`second`\)"):
        with model.trace(x):
            model.second.module.output
    with pytest.raises(errors.ModelError, match=r"`model` is a DataParallel"):
        with NNsight(nn.DataParallel(toys.Pair())).trace(x) as tracer:
            tracer.model.module.first.output


@pytest.mark.parametrize("by", ["module", "envoy"])
def test_a_list_that_was_given_a_forward_after_something_in_it_was_read_is_known_to_be_called(by):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x):
            return self.parts(x) if "forward" in vars(self.parts) else self.parts[0](x)

    module, x = Model(), torch.randn(2, 4)
    model = nnsight.NNsight(module)
    with model.trace(x):
        before = model.parts[0].output
    (module if by == "module" else model).parts.forward = lambda x: module.parts[0](x) * 3

    def read():
        with model.trace(x):
            inner = model.parts[0].output
            return inner, model.parts.output

    if by == "module":
        with pytest.raises(errors.StillRunningError, match=r"`parts` was given a forward(?s:.)*the same block again"):
            read()
    inner, outer = read()
    assert torch.equal(inner, before)
    assert torch.equal(outer, before * 3)


def test_a_list_that_somebody_gave_a_forward_is_read_behind_what_is_in_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 4)])
            self.parts.forward = lambda x: self.parts[0](x) * 3

        def forward(self, x):
            return self.parts(x) + 1

    module, x = Model(), torch.randn(2, 4)
    model = nnsight.NNsight(module)
    with model.trace(x):
        inner = model.parts[0].output
        outer = model.parts.output
    assert torch.equal(inner, module.parts[0](x))
    assert torch.equal(outer, module.parts(x))


def test_a_module_that_only_holds_parameters_is_said_to_be_called_by_nothing(x):
    """As the modules in what `torch.export` makes."""
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = NNsight(torch.export.export(module, (x,)).module())
    with model.trace(x) as tracer:
        result = tracer.result
    same(result, module(x))
    with pytest.raises(errors.NeverCalledError, match=r"a Module has no forward, and nothing calls it") as caught:
        with model.trace(x):
            model[0].output
    assert "instead" not in str(caught.value)


def test_modules_that_have_numbers_for_names_are_written_so_that_they_can_be_typed():
    class Model(nn.Sequential):
        def forward(self, x):
            return self[0][0](x)

    model = NNsight(Model(nn.ModuleList([nn.Linear(4, 4)])))
    with pytest.raises(errors.NeverCalledError, match=r"instead +model\[0\]\[0\].output "):
        with model.trace(torch.ones(1, 4)):
            model[0].output


def test_names_that_are_no_python_are_written_so_that_they_can_be_typed():
    names = ["two words", "class", "output", "7"]
    model = NNsight(nn.ModuleDict({"inner": nn.ModuleDict({name: nn.Linear(4, 4) for name in names})}))
    told = []
    for name in names:
        with pytest.raises(errors.BlockError) as caught:
            model.inner[name] + 1
        told.append(str(caught.value).rpartition("instead     ")[2])
    assert told == [f"model.inner[{name!r}].output" for name in names]
    assert [eval(one.removesuffix(".output")) is model.inner[name] for one, name in zip(told, names)] == [True] * 4


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_what_jit_trace_made_is_traced_as_one():
    module, x = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.ones(1, 4)), torch.ones(2, 4)
    with NNsight(module).trace(x) as tracer:
        output = tracer.model.output * 2
        tracer.model.output = output
    assert torch.equal(tracer.result, module(x) * 2)


# Modules of which something can't be had, and that say so.


class ForwardIsProperty(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    @property
    def forward(self):
        return self._forward

    def _forward(self, x):
        return self.inner(x) * 2


def test_a_module_whose_forward_is_a_property_is_read_and_written_and_can_not_be_skipped(x):
    module = toys.Pair(second=ForwardIsProperty())
    model = NNsight(module)
    with model.trace(x):
        model.second.input = model.second.input + 1
        model.second.inner.output = model.second.inner.output * 3
        out = model.output
    same(out, module.second.inner(module.first(x) + 1) * 3 * 2)
    with pytest.raises(errors.WriteError, match=r"(?s)`second` can't be skipped.*instead +model.second.output = "):
        with model.trace(x):
            model.second.skip(x)
    with pytest.raises(errors.WriteError, match="`second` can't be skipped"):
        model.edit(lambda edited: edited.second.skip(x))(x)
    with pytest.raises(errors.NoSourceError, match="forward of `second` is a property"):
        model.second.source.names


class Alike(nn.Linear):
    def __eq__(self, other):
        return isinstance(other, Alike)

    def __hash__(self):
        return 1


def test_modules_that_equal_each_other_are_refused_since_one_would_be_taken_for_the_other(x):
    model = NNsight(toys.Pair(Alike(4, 4), Alike(4, 4)))
    with pytest.raises(
        errors.ModelError, match=r"(?s)`second`, a Alike, equals another module.*@dataclass\(eq=False\)"
    ):
        with model.trace(x):
            model.second.output
    alone = NNsight(toys.Pair(second=Alike(4, 4)))
    with alone.trace(x):
        out = alone.second.output
    same(out, alone._module(x))


@pytest.mark.parametrize("how", ["pruned", "weight_norm"])
def test_a_model_whose_weights_are_made_in_each_call_has_rows_and_scans(x, how):
    module = toys.Pair()
    if how == "pruned":
        prune.l1_unstructured(module.second, "weight", 0.5)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(module.second)
    model = NNsight(module)
    wanted = module(x)  # the weight has a graph by now, and torch copies none that has
    with model.trace(x) as (one, other, _):
        one.second.output = other.second.output
        out = model.output
    same(out, wanted[[1, 1, 2]])
    with model.scan(x):
        assert model.second.output.shape == (3, 4)


def test_a_module_that_another_has_taken_the_place_of_says_so(x):
    model = NNsight(toys.Pair())
    old = model.second
    model.second = nn.Identity()
    with pytest.raises(errors.NeverCalledError, match="This Linear is no part of the model any more"), model.trace(x):
        old.output
