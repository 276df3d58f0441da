"""`tracer.cache` keeps what plain hooks would keep, behind what the block does, and reads the same however often."""

import copy
import dataclasses
import gc
import io
import pickle
import weakref

import pytest
import snapshots
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import nnsight
import toys
from nnsight import errors


def by_hooks(module, *args, inputs=False):
    """What plain hooks at every module see, by path: a list with one entry a call."""
    seen, handles = {}, []
    for path, part in module.named_modules():
        path = f"model.{path}" if path else "model"

        def hook(_, args, kwargs, output, path=path):
            seen.setdefault(path, []).append((args, kwargs) if inputs else output)

        handles.append(part.register_forward_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad():
            module(*args)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def same(one, other):
    """Bit for bit, through tuples and dicts."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(same, one.values(), other.values()))
    return one == other


@pytest.mark.parametrize("name", toys.everything())
@pytest.mark.parametrize("inputs", [False, True])
def test_a_cache_keeps_what_plain_hooks_keep_bit_for_bit(name, inputs, x, switch):
    module = toys.everything()[name]
    expected = by_hooks(module, x, inputs=inputs)
    before = snapshots.of_model(module)
    model = nnsight.NNsight(module)
    with model.trace(x) as tracer:
        cache = tracer.cache(include_inputs=inputs, include_output=not inputs)
    assert set(cache) == set(expected)
    for path, values in expected.items():
        kept = [visit.inputs if inputs else visit.output for visit in cache[path].visits]
        # By hooks, a call that calls itself is listed at its end; here with its inputs, at its start.
        assert same(kept, values if not inputs or name != "recursive" else values[::-1]), path
    assert not snapshots.differences(before, snapshots.of_model(module))


def test_a_value_is_kept_as_the_block_left_it(mlp, x, switch):
    with mlp.trace(x) as tracer:
        cache = tracer.cache(include_inputs=True)
        mlp.embed.output = torch.ones(3, 4)
        mlp.layers[0].up.output[:] = 2.0  # in place
        mlp.layers[0].output  # armed while the layer runs
        mlp.layers[0].output = torch.full((3, 4), 3.0)
        mlp.layers[1].input = torch.full((3, 4), 4.0)
        mlp.layers[2].skip(torch.full((3, 4), 5.0))
    assert (cache.embed.output == 1).all()
    assert (cache.layers[0].input == 1).all()
    assert (cache.layers[0].up.output == 2).all()
    assert (cache.layers[0].act.output == torch.full((3, 4), 2.0).tanh()).all()
    assert (cache.layers[0].output == 3).all()
    assert (cache.layers[1].input == 4).all()
    assert (cache.layers[2].output == 5).all()
    assert (cache.head.input == 5).all()
    assert not cache.layers[2].up.visits


def test_a_cache_does_not_change_what_the_block_does(mlp, x, switch):
    def work(tracer, cached):
        cache = tracer.cache(include_inputs=True) if cached else None
        mlp.layers[0].act.output = mlp.layers[0].act.output * 2
        mlp.layers[1].input = mlp.layers[0].output + 1
        mlp.layers[1].output[0] = 7
        return cache, mlp.head.output, tracer.result

    with mlp.trace(x) as tracer:
        _, *plain = work(tracer, False)
    with mlp.trace(x) as tracer:
        cache, *cached = work(tracer, True)
    assert all(map(torch.equal, plain, cached))
    assert torch.equal(cache.output, cached[1])


def test_a_cache_can_be_made_at_any_moment_and_there_can_be_several(mlp, x, switch):
    with mlp.trace(x) as tracer:
        first = tracer.cache()
        middle = mlp.layers[1].act.output
        second = tracer.cache(include_inputs=True)
        mlp.layers[1].output = middle
    assert len(first) == 18  # all but the list of layers
    assert "model.layers.0" not in second
    assert "model.layers.1.down" in second
    assert torch.equal(first.layers[1].output, middle)
    assert torch.equal(second.layers[1].output, middle)
    with pytest.raises(errors.NotCachedError, match="had begun before the cache"):
        second.layers[1].inputs


@pytest.mark.parametrize("caches", [1, 2])
def test_each_call_of_a_module_is_kept_and_next_still_is_the_next(x, switch, caches):
    module = toys.RNN(steps=4)
    expected = by_hooks(module, x)["model.cell"]
    model = nnsight.NNsight(module)
    with model.trace(x) as tracer:
        kept = [tracer.cache("cell", include_inputs=True) for _ in range(caches)]
        seen = [model.cell.output, *[model.cell.next().output for _ in range(3)]]
    assert same(seen, expected)
    for cache in kept:
        assert len(cache.cell) == 4
        assert same(cache.cell.outputs, expected)
        assert torch.equal(cache.cell.output, expected[0])
        assert torch.equal(cache.cell.visits[2].inputs[0][1], expected[1])


def test_output_is_of_one_type_however_often_a_module_is_called(x):
    for steps in (1, 3):
        model = nnsight.NNsight(toys.RNN(steps=steps))
        with model.trace(x) as tracer:
            cache = tracer.cache(include_inputs=True)
            first = model.cell.output
        assert torch.equal(cache.cell.output, first)
        assert isinstance(cache.cell.outputs, list)
        assert len(cache.cell.outputs) == len(cache.cell.visits) == len(cache.cell) == steps
        assert torch.equal(cache.cell.input, x)
        assert cache.cell.inputs[0][0] is cache.cell.input


def test_modules_are_given_by_path_envoy_pattern_class_and_function(mlp, x):
    layers = ["model.layers.0", "model.layers.1", "model.layers.2"]
    ups = [f"{layer}.up" for layer in layers]
    choices = {
        "layers.0": layers[:1],
        "model.layers.0": layers[:1],
        "layers.*": layers,
        "model.layers.*": layers,
        "layers.*.up": ups,
        "*.up": ups,
        "layers.[01]": layers[:2],
        toys.Layer: layers,
        "model": ["model"],
    }
    for choice, paths in choices.items():
        with mlp.trace(x) as tracer:
            cache = tracer.cache(choice)
        assert list(cache) == paths, choice
    others = [
        (mlp.layers[1], layers[1:2]),
        (mlp.layers[1]._module, layers[1:2]),
        (list(mlp.layers), layers),
        (["layers.*", mlp.layers[0].up], [ups[0], *layers]),
        (lambda module: isinstance(module, nn.Tanh), [f"{layer}.act" for layer in layers]),
    ]
    for choice, paths in others:
        with mlp.trace(x) as tracer:
            cache = tracer.cache(choice)
        assert list(cache) == paths
    with mlp.trace(x) as tracer:
        cache = tracer.cache(tracer.model.layers[2])
    assert list(cache) == layers[2:]


def test_one_value_is_had_by_path_attribute_index_and_envoy(mlp, x):
    with mlp.trace(x) as tracer:
        cache = tracer.cache()
        value = mlp.layers[1].up.output
    ways = [
        cache["model.layers.1.up"],
        cache["layers.1.up"],
        cache["layers"]["1.up"],
        cache["layers.1"]["up"],
        cache.layers[1].up,
        cache.layers[-2].up,
        cache.layers[0:2][1].up,
        cache.model.layers[1].up,
        cache[mlp.layers[1].up],
        cache["model.layers.1"]["model.layers.1.up"],
        cache.get("layers.1.up"),
        [layer.up for layer in cache.layers][1],
        dict(cache.items())["model.layers.1.up"],
    ]
    for way in ways:
        assert way.path == "model.layers.1.up"
        assert torch.equal(way.output, value)
    assert "layers.1.up" in cache
    assert "model.layers.1.up" in cache
    assert mlp.layers[1].up in cache
    assert "up" in cache.layers[1]
    assert "layers.7" not in cache
    assert "up.deeper" not in cache.layers[1]
    assert len(cache.layers) == 3
    assert list(cache.keys()) == list(cache)
    assert cache.layers[0].keys() == [path for path in cache if path.startswith("model.layers.0")]


def test_a_shared_module_has_both_its_names(x):
    model = nnsight.NNsight(toys.Shared())
    with model.trace(x) as tracer:
        cache = tracer.cache()
    assert len(cache.first) == 2
    assert cache.second.path == cache["second"].path == "model.first"


def test_a_child_called_model_is_found_by_every_path(x):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = toys.MLP()
            self.embed = nn.Linear(4, 4)

        def forward(self, x):
            return self.embed(self.model(x))

    model = nnsight.NNsight(Inner())
    with model.trace(x) as tracer:
        cache = tracer.cache()
        inner, outer = model.model.embed.output, model.embed.output
    assert torch.equal(cache["model.model.embed"].output, inner)
    assert torch.equal(cache["model.embed"].output, outer)
    assert torch.equal(cache["model.head"].output, cache.model.head.output)
    assert torch.equal(cache.model.model.head.output, cache.model.head.output)
    for path in cache:
        assert cache[path].path == path


def test_a_cache_hears_only_its_own_run(mlp, x, switch):
    with mlp.trace(x) as one, mlp.trace(x + 1) as other:
        cache = one.cache()
        other.model.layers[0].output
        mlp.layers[0](x)  # a call of the block's own
        with mlp.trace(x * 2):
            mlp.layers[1].output
    assert all(len(cache[path]) == 1 for path in cache)
    assert torch.equal(cache.output, mlp(x))


def test_kept_values_are_detached_cast_and_moved_as_asked(x):
    model = nnsight.NNsight(toys.MLP())
    with model.trace(x) as tracer:
        plain, graph = tracer.cache(), tracer.cache(detach=False)
        half = tracer.cache("head", dtype=torch.float16, include_inputs=True)
        meta = tracer.cache("head", device="meta")
        loss = model.head.output.sum()
    assert not plain.head.output.requires_grad
    assert graph.head.output.requires_grad
    (grad,) = torch.autograd.grad(loss, [graph.layers[0].output])
    assert grad.shape == (3, 4)
    assert half.head.output.dtype == half.head.input.dtype == torch.float16
    assert meta.head.output.device.type == "meta"


def test_integers_are_not_cast(x):
    class Ids(nn.Module):
        def forward(self, ids):
            return ids

    model = nnsight.NNsight(Ids())
    with model.trace(torch.arange(3)) as tracer:
        cache = tracer.cache(dtype=torch.float16)
    assert cache.output.dtype == torch.int64


def test_a_value_that_is_changed_in_place_later_is_an_error_and_a_clone_is_right(mlp, x):
    with mlp.trace(x) as tracer:
        cache, clones = tracer.cache(), tracer.cache(clone=True)
        before = mlp.layers[0].output.clone()
        mlp.layers[1].input[:] = 0  # the same tensor
    with pytest.raises(errors.BlockError, match=r"`layers.0.output` is lost.*in place") as caught:
        cache.layers[0].output
    assert "clone=True" in str(caught.value)
    assert torch.equal(clones.layers[0].output, before)
    cache.layers[1].output.mul_(2)  # afterwards, it is the reader's
    cache.layers[1].output


def test_a_cache_survives_pickling_saving_and_copying_without_the_model(mlp, x):
    with mlp.trace(x) as tracer:
        cache = tracer.cache(include_inputs=True)
        early = pickle.loads(pickle.dumps(cache))
        value = mlp.layers[1].output
    assert len(early) == 0
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    data = pickle.dumps(cache)
    assert b"torch.nn.modules" not in data
    for copied in (pickle.loads(data), copy.deepcopy(cache), torch.load(file, weights_only=False)):
        assert list(copied) == list(cache)
        assert torch.equal(copied.layers[1].output, value)
        assert torch.equal(copied["layers.1"].output, value)
        assert torch.equal(copied.layers[-2].input, cache.layers[1].input)
        assert repr(copied) == repr(cache)
        assert copied.layers[1].output.data_ptr() != value.data_ptr()
    assert repr(pickle.loads(pickle.dumps(cache.layers[1]))) == repr(cache.layers[1])


def test_a_cache_keeps_neither_model_nor_run(x):
    module = toys.MLP()
    model = nnsight.NNsight(module)
    gone = weakref.ref(module)
    gc.disable()
    try:
        with model.trace(x) as tracer:
            cache = tracer.cache()
        del model, module, tracer
        assert gone() is None
    finally:
        gc.enable()
    assert cache.output.shape == (3, 4)


def test_stopping_keeps_what_was_left_at_the_last_place(mlp, x, switch):
    with mlp.trace(x) as tracer:
        cache = tracer.cache(include_inputs=True)
        mlp.layers[1].output = torch.ones(3, 4)
        tracer.stop()
    assert (cache.layers[1].output == 1).all()
    assert cache.layers[1].input.shape == (3, 4)
    assert len(cache.layers[1]) == 1
    assert "layers.2" not in list(cache.layers[2].keys())


def test_after_an_error_what_was_kept_is_there_and_the_model_as_before(x, switch):
    module = toys.Fails(error=ValueError("broken"))
    before = snapshots.of_model(module)
    model = nnsight.NNsight(module)
    with pytest.raises(ValueError, match="broken"), model.trace(x) as tracer:
        cache = tracer.cache(include_inputs=True)
    assert cache.first.output.shape == (3, 4)
    with pytest.raises(errors.NotCachedError, match="ended in an error"):
        cache.output
    assert not snapshots.differences(before, snapshots.of_model(module))


def test_an_error_that_the_model_catches_does_not_mix_up_its_calls(x):
    module = toys.Catches(toys.Fails(error=RuntimeError("broken")))
    model = nnsight.NNsight(module)
    with model.trace(x) as tracer:
        cache = tracer.cache(include_inputs=True)
    assert torch.equal(cache.output, module(x))
    assert torch.equal(cache.input, x)
    assert same(cache.child.input, x)
    with pytest.raises(errors.NotCachedError):
        cache.child.output


def test_a_model_can_be_copied_in_the_middle_of_a_run_that_caches(mlp, x):
    with mlp.trace(x) as tracer:
        cache = tracer.cache(include_inputs=True)
        mlp.layers[0].output
        copied = copy.deepcopy(mlp._module)
        count = len(cache)
        copied(x)
        assert len(cache) == count
    assert torch.equal(copied(x), mlp(x))


def test_a_compiled_model_is_cached_eagerly(x):
    module = toys.MLP()
    expected = by_hooks(module, x)
    compiled = nnsight.NNsight(torch.compile(module, backend="eager"))
    compiled(x)
    with torch.no_grad(), compiled.trace(x) as tracer:
        cache = tracer.cache("layers.*")
    assert [torch.equal(layer.output, expected[f"model.layers.{i}"][0]) for i, layer in enumerate(
        cache._orig_mod.layers
    )] == [True] * 3  # fmt: skip


@pytest.mark.parametrize("way", ["module", "forward", "class", "above"])
def test_whatever_is_compiled_is_cached_eagerly(x, way):
    module = toys.MLP()
    expected = by_hooks(module, x)
    layer = module.layers[1]
    if way == "module":
        layer.compile(backend="eager")
    elif way == "forward":
        layer.forward = torch.compile(layer.forward, backend="eager")
    elif way == "class":
        forward = torch.compile(toys.Layer.forward, backend="eager")
        layer.__class__ = type("Compiled", (toys.Layer,), {"forward": forward})
    else:
        module.compile(backend="eager")
    with torch.no_grad():
        module(x)
    model = nnsight.NNsight(module)
    for choice in ("layers.*.up", None):
        with torch.no_grad(), model.trace(x) as tracer:
            cache = tracer.cache(choice)
        assert torch.equal(cache.layers[1].up.output, expected["model.layers.1.up"][0])


def test_a_cache_names_modules_as_they_are_called_now(x):
    module = nn.Sequential()
    module.one, module.two = nn.Linear(4, 4), nn.Tanh()
    model = nnsight.NNsight(module)

    def paths():
        with model.trace(x) as tracer:
            cache = tracer.cache()
        return list(cache)

    assert paths() == ["model.one", "model.two", "model"]
    module._modules["three"] = module._modules.pop("two")  # beside the tree, which isn't told
    assert paths() == ["model.one", "model.three", "model"]
    module._modules["one"] = module._modules.pop("one")
    assert paths() == ["model.three", "model.one", "model"]
    module._modules = {"four": nn.Linear(4, 4)}
    assert paths() == ["model.four", "model"]


def test_a_cache_can_be_read_while_the_model_runs(mlp, x, switch):
    with mlp.trace(x) as tracer:
        cache = tracer.cache()
        mlp.layers[1].input
        seen = list(cache)
        first = cache.layers[0].output
        mlp.layers[1].input[:] = 0
        with pytest.raises(errors.BlockError, match=r"`layers.0.output` is lost"):
            cache.layers[0].output
    assert "model.layers.1.up" not in seen
    assert list(cache)[: len(seen)] == seen
    assert len(cache) == 18
    assert len(cache.layers[0]) == 1
    assert not first.any()
    with pytest.raises(errors.BlockError, match=r"`layers.0.output` is lost"):
        cache.layers[0].output


class TestMistakes:
    """Each has an error of its own, at the user's line, and leaves the model as it was."""

    @pytest.fixture(autouse=True)
    def _leaves_the_model(self, mlp):
        before = snapshots.of_model(mlp._module)
        yield
        assert not snapshots.differences(before, snapshots.of_model(mlp._module))

    @pytest.mark.parametrize(
        ("modules", "kind", "text"),
        [
            ("layers.0.upp", errors.UnknownNameError, r"`layers.0.upp` is no module.*nearest +`layers.0.up`"),
            ("up", errors.UnknownNameError, r"`up` is the end of 3 paths.*nearest +`layers.2.up`.*instead .*\*\.up"),
            ("layer.*", errors.UnknownNameError, "matches no module"),
            ([], errors.UnknownNameError, "empty list"),
            (nn.Conv2d, errors.UnknownNameError, "no module is a Conv2d"),
            (lambda module: False, errors.UnknownNameError, "said no to every module"),
            (nn.Linear(4, 4), errors.UnknownNameError, "no module of the model"),
            (5, TypeError, "not 5"),
            ([None], TypeError, "not None"),
        ],
    )
    def test_in_naming_modules(self, mlp, x, modules, kind, text):
        with pytest.raises(kind, match=f"(?s){text}"), mlp.trace(x) as tracer:
            tracer.cache(modules)

    def test_an_envoy_of_another_model(self, mlp, x):
        other = nnsight.NNsight(toys.MLP())
        with pytest.raises(errors.UnknownNameError, match="no module of the model"), mlp.trace(x) as tracer:
            tracer.cache(other.layers[0])

    def test_too_late(self, mlp, x):
        with mlp.trace(x) as tracer:
            tracer.result
            with pytest.raises(errors.AlreadyPastError, match="run to its end"):
                tracer.cache()
        with pytest.raises(errors.OutsideTraceError, match="after the block") as caught:
            tracer.cache()
        assert isinstance(caught.value, ValueError)

    def test_nothing_to_keep_and_a_dtype_that_is_none(self, mlp, x):
        with mlp.trace(x) as tracer:
            with pytest.raises(errors.BlockError, match="would keep nothing"):
                tracer.cache(include_output=False)
            with pytest.raises(TypeError, match=r"torch\.float16"):
                tracer.cache(dtype="float16")

    def test_in_reading(self, mlp, x):
        with mlp.trace(x) as tracer:
            cache = tracer.cache(["layers.0", "layers.2.up"])
            with pytest.raises(errors.NotCachedError, match="has not called it so far"):
                cache.layers[0].output
        reads = [
            (lambda: cache["layers.1"], errors.NotCachedError, "not among its modules"),
            (lambda: cache.layers[1].output, errors.NotCachedError, "not among its modules"),
            (lambda: cache["layers.9"], errors.NotCachedError, "no module of this model"),
            (lambda: cache["resid_post", 0], errors.NotCachedError, r'instead +cache\["layers.0"\], by the names of'),
            (lambda: cache.layers[9], errors.UnknownIndexError, "no child at index 9"),
            (lambda: cache.layers[0].otput, errors.UnknownNameError, "nearest +`output`"),
            (lambda: cache.layer, errors.UnknownNameError, "nearest +`layers`"),
            (lambda: cache.layers[0].input, errors.NotCachedError, "include_inputs=True"),
            (lambda: cache[9], errors.UnknownIndexError, r"instead +cache.layers\[9\]$"),
            (lambda: cache.layers[0].cpu(), errors.UnknownNameError, r"instead +cache.layers\[0\].output.cpu\n"),
        ]
        for read, kind, text in reads:
            with pytest.raises(kind, match=text):
                read()
        assert issubclass(errors.NotCachedError, KeyError)
        assert not hasattr(cache, "layer")

    def test_a_uniform_name_says_how_a_layer_is_found(self):
        model = nnsight.LanguageModel("nnsight/demo")
        with model.trace("Rome") as tracer:
            cache = tracer.cache(model.layers[3])
        with pytest.raises(errors.UnknownNameError, match=r"instead +cache\[model.layers\[3\]\]\n"):
            cache.layers
        assert cache[model.layers[3]].output is cache.transformer.h[3].output

    def test_a_module_that_is_never_called(self, x):
        model = nnsight.NNsight(toys.Wide(5))
        with model.trace(x) as tracer:
            cache = tracer.cache()
        with pytest.raises(errors.NotCachedError, match=r"`layers.4` has no output.*did not call it"):
            cache.layers[4].output


def test_a_repr_is_a_short_table(mlp, x):
    with mlp.trace(x) as tracer:
        cache = tracer.cache(["layers.*"])
    assert repr(cache) == (
        "<cache: 3 modules, 3 calls>\n"
        "  model.layers.0  [3, 4] float32\n"
        "  model.layers.1  [3, 4] float32\n"
        "  model.layers.2  [3, 4] float32"
    )
    with nnsight.NNsight(toys.Wide(40)).trace(x) as tracer:
        cache = tracer.cache()
    assert len(repr(nnsight.NNsight(toys.MLP(depth=9)).trace(x))) < 200
    assert cache.save() is cache


def test_a_cache_holds_no_keywords_of_a_call_that_is_over(x):
    module = toys.Structured()
    seen = []
    module.dict.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(weakref.ref(kwargs["x"])), with_kwargs=True
    )
    model = nnsight.NNsight(module)
    with torch.no_grad(), model.trace(x) as tracer:
        cache = tracer.cache("dict", include_inputs=True, device="meta")
        model.output
        assert seen[0]() is None
    assert cache.dict.input.device.type == "meta"


class Held:
    """An object of a class of its own, which a model fills while it runs, as a key-value cache."""

    def __init__(self):
        self.kept = []


class Fills(nn.Module):
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, held):
            held.kept.append(self.inner(x))
            return Record(held.kept[-1]), held

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList([self.Step(), self.Step()])

    def forward(self, x):
        held = Held()
        for step in self.steps:
            record, held = step(x, held)
            x = record.hidden
        return x, held


@dataclasses.dataclass
class Record:
    hidden: torch.Tensor


def test_objects_that_hold_tensors_are_left_out_and_say_so_when_used(x):
    with nnsight.NNsight(Fills()).trace(x) as tracer:
        cache = tracer.cache(include_inputs=True, dtype=torch.float16)
    record, _held = cache.steps[0].output
    assert record.hidden.dtype == torch.float16
    assert not record.hidden.requires_grad
    assert "Held" in repr(cache)
    for copied in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        for value in (copied.steps[0].output[1], copied.steps[0].inputs[0][1], copied.output[1]):
            with pytest.raises(errors.NotCachedError, match="this is a Held, which may change later"):
                value.kept
    assert len(pickle.dumps(cache)) < 8000


def test_a_pickled_view_of_a_cache_has_no_more_than_what_is_below(mlp, x):
    with mlp.trace(torch.ones(1000, 4)) as tracer:
        cache = tracer.cache()
    view = pickle.loads(pickle.dumps(cache.layers[1]))
    assert torch.equal(view.output, cache.layers[1].output)
    assert torch.equal(view.up.output, cache.layers[1].up.output)
    assert view.keys() == cache.layers[1].keys()
    assert len(pickle.dumps(cache.layers[1].up)) * 5 < len(pickle.dumps(cache))


@pytest.mark.parametrize("given", ["layers", "model.layers", "Envoy", "*ayers", nn.ModuleList])
def test_a_list_of_modules_means_those_in_it(mlp, x, given):
    with mlp.trace(x) as tracer:
        cache = tracer.cache(mlp.layers if given == "Envoy" else given)
    assert list(cache) == ["model.layers.0", "model.layers.1", "model.layers.2"]


def test_the_end_of_just_one_path_is_enough(mlp, x):
    with mlp.trace(x) as tracer:
        cache = tracer.cache("1.up")
    assert list(cache) == ["model.layers.1.up"]


def test_a_module_called_in_the_block_with_its_hooks_is_heard(mlp, x, switch):
    mlp.sae = toys.Pair()
    with mlp.trace(x) as tracer:
        cache = tracer.cache(["sae", "sae.first", "layers.0"], include_inputs=True)
        hidden = mlp.layers[0].output
        mlp.sae(hidden)  # without hooks, as elsewhere
        out = mlp.sae(hidden * 2, hook=True)
        inner = mlp.sae.first.output
    assert torch.equal(cache.sae.output, out)
    assert torch.equal(cache.sae.first.output, inner)
    assert torch.equal(cache.sae.input, hidden * 2)
    assert len(cache.sae) == len(cache.sae.first) == len(cache.layers[0]) == 1


def test_a_module_called_in_a_rows_block_is_kept_whole(mlp, x, switch):
    mlp.sae = toys.Pair()
    with mlp.trace(x) as (a, b, _):
        cache = b.cache(["sae", "layers.0"])
        out = mlp.sae(a.layers[0].output, hook=True)
    assert torch.equal(cache.sae.output, out)
    assert cache.layers[0].output.shape == out.shape == (1, 4)


@pytest.mark.parametrize("inputs", [False, True])
def test_what_a_model_computes_again_for_its_own_gradients_is_kept_once(x, inputs):
    def question(x):
        hidden = checkpoint(module.inner, x, use_reentrant=False)
        return torch.autograd.grad(hidden.sum(), x)[0]

    module = toys.Ask(question)
    module.inner = toys.Layer()
    with nnsight.NNsight(module).trace(x) as tracer:
        cache = tracer.cache(include_inputs=inputs)
    assert len(cache.inner.up) == len(cache.inner) == 1


@pytest.mark.parametrize("inputs", [False, True])
def test_a_module_inside_vmap_is_refused_by_name(x, inputs):
    module = toys.Ask(lambda x: torch.vmap(module.inner)(x))
    module.inner = nn.Linear(4, 4)
    model = nnsight.NNsight(module)
    with pytest.raises(errors.TransformError, match="A Linear was called inside `vmap`"), model.trace(x) as tracer:
        tracer.cache(include_inputs=inputs, include_output=not inputs)
    with model.trace(x) as tracer:
        cache = tracer.cache(["before", "model"])
    assert len(cache) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
def test_a_device_that_is_not_there_is_told_at_the_call(mlp, x):
    with pytest.raises(errors.BlockError, match="no such device here") as caught, mlp.trace(x) as tracer:
        tracer.cache(device="cuda")
    assert 'tracer.cache(device="cuda")' in str(caught.value)


def test_a_rows_cache_keeps_the_rows_part_alone(mlp, x, switch):
    with mlp.trace(x) as (a, b, _c):
        whole, part = a.tracer.cache("layers"), b.cache("layers", include_inputs=True)
        a.layers[1].output[:] = 0
        b.layers[1].output = torch.ones(1, 4)
    for layer in range(3):
        assert torch.equal(part.layers[layer].output, whole.layers[layer].output[1:2])
    assert torch.equal(part.layers[1].output, torch.ones(1, 4))
    assert len(pickle.dumps(part.layers[0].output)) < 600
    assert part.layers[2].input.shape == (1, 4)


def test_a_cache_in_an_invoke_keeps_its_own_rows(mlp, x, switch):
    with mlp.trace() as tracer:
        with tracer.invoke(x[:1]):
            first = tracer.cache("layers")
            mlp.layers[0].output[:] = 0
        with tracer.invoke(x[1:]):
            rest = tracer.cache(["layers", "embed"])
        with tracer.invoke():
            whole = tracer.cache("layers")
    for layer in range(3):
        assert torch.equal(first.layers[layer].output, whole.layers[layer].output[:1])
        assert torch.equal(rest.layers[layer].output, whole.layers[layer].output[1:])
    assert not first.layers[0].output.any()
    assert pickle.loads(pickle.dumps(rest)).embed.output.shape == (2, 4)


def test_a_value_on_meta_is_kept_there():
    class Nowhere(torch.nn.Module):
        def forward(self, x):
            return x.to("meta")

    model = nnsight.NNsight(torch.nn.Sequential(Nowhere()))
    with model.trace(torch.ones(2, 3)) as tracer:
        cache = tracer.cache()
    assert cache["model.0"].output.device.type == "meta"
