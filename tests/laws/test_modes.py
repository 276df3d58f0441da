"""Modes: what torch keeps per thread belongs to one side. A block sees its own, and the model goes on with its own."""

import contextlib

import pytest
import snapshots
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import nnsight
import toys


class CountsCalls(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class CountsOps(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def on_stream(stream):
    before = torch.accelerator.current_stream()
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)


def as_it_is(tensor):
    return tensor


def under_no_modes():
    return contextlib.nullcontext()


MANAGERS = {
    "no grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast without its cache": lambda: torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False),
    "a dispatch mode": CountsOps,
    "a torch function mode": CountsCalls,
    "a default device": lambda: torch.device("meta"),
    "torch function off": torch._C.DisableTorchFunctionSubclass,
    "saved tensors hooks": lambda: torch.autograd.graph.saved_tensors_hooks(as_it_is, as_it_is),
    "a default dtype": default_dtype,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
}
if torch.accelerator.is_available():
    ACCELERATOR = torch.accelerator.current_accelerator().type
    MANAGERS["autocast on the accelerator"] = lambda: torch.autocast(ACCELERATOR, dtype=torch.bfloat16)
    if ACCELERATOR != "mps":
        torch.accelerator.current_device_index()  # initialises it, without which there is nothing to see
        STREAM = torch.Stream(device=ACCELERATOR)
        MANAGERS["a stream of the accelerator"] = lambda: on_stream(STREAM)

# Anomaly mode warns that it is on.
pytestmark = pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")


@pytest.fixture(params=MANAGERS)
def manager(request):
    return MANAGERS[request.param]


@pytest.fixture(autouse=True)
def _no_mode_is_left():
    before = snapshots.of_modes()
    yield
    assert snapshots.differences(before, snapshots.of_modes()) == []


def modes_under(manager):
    with manager():
        return snapshots.of_modes()


def test_the_managers_of_this_file_change_something(manager):
    assert modes_under(manager) != snapshots.of_modes()


def test_the_block_keeps_its_modes_and_the_model_has_its_own(manager, x, switch):
    """The model enters a mode and the block reads in the middle of it."""
    plain, inside = snapshots.of_modes(), modes_under(manager)
    module = toys.Under(manager, snapshots.of_modes)
    expected = module(x)
    model = nnsight.NNsight(module)
    module.log.clear()
    with model.trace(x):
        model.before.output
        assert snapshots.of_modes() == plain
        model.child.input
        assert snapshots.differences(plain, snapshots.of_modes()) == []
        model.child.output
        assert snapshots.differences(plain, snapshots.of_modes()) == []
        model.after.input
        assert snapshots.differences(plain, snapshots.of_modes()) == []
        out = model.output
    assert module.log == [plain, inside, inside, plain]
    assert torch.equal(out, expected)


def test_the_block_changes_its_mode_and_the_model_does_not_see_it(manager, x, switch):
    plain, inside = snapshots.of_modes(), modes_under(manager)
    module = toys.Under(under_no_modes, snapshots.of_modes)
    model = nnsight.NNsight(module)
    expected = module(x)
    module.log.clear()
    with model.trace(x):
        model.before.output
        with manager():
            model.child.input
            assert snapshots.differences(inside, snapshots.of_modes()) == []
            model.child.output
            assert snapshots.differences(inside, snapshots.of_modes()) == []
        model.after.input
        out = model.output
    assert module.log == [plain] * 4
    assert torch.equal(out, expected)


def test_the_model_runs_with_what_was_in_force_where_the_trace_was_opened(manager, x, switch):
    inside = modes_under(manager)
    module = toys.Under(under_no_modes, snapshots.of_modes)
    model = nnsight.NNsight(module)
    with manager(), model.trace(x):
        model.before.output
        model.child.output
        assert snapshots.differences(inside, snapshots.of_modes()) == []
    assert module.log == [inside] * 4


def test_both_sides_change_a_mode_at_once(manager, x, switch):
    plain, inside = snapshots.of_modes(), modes_under(manager)
    module = toys.Under(manager, snapshots.of_modes)
    model = nnsight.NNsight(module)
    with model.trace(x):
        model.before.output
        with manager():
            model.child.output
            assert snapshots.differences(inside, snapshots.of_modes()) == []
        assert snapshots.differences(plain, snapshots.of_modes()) == []
        model.after.output
    assert module.log == [plain, inside, inside, plain]


@pytest.mark.parametrize("end", ["stop", "raise", "return", "drop"])
def test_a_run_that_is_ended_in_a_mode_leaves_none(manager, x, end, switch):
    plain = snapshots.of_modes()
    module = toys.Under(manager, snapshots.of_modes)
    model = nnsight.NNsight(module)

    def block():
        with model.trace(x) as tracer:
            yield model.child.output
            if end == "stop":
                tracer.stop()
            if end == "raise":
                raise KeyError
            return

    generator = block()
    next(generator)
    assert snapshots.differences(plain, snapshots.of_modes()) == []
    if end == "drop":
        del generator
    else:
        with contextlib.suppress(KeyError):
            list(generator)
    assert snapshots.differences(plain, snapshots.of_modes()) == []
    with torch.no_grad():
        assert not torch.is_grad_enabled()


def test_an_error_of_the_models_in_a_mode_leaves_none(manager, x, switch):
    plain = snapshots.of_modes()
    module = toys.Under(manager, snapshots.of_modes)
    model = nnsight.NNsight(module)

    def fail(*_):
        raise AssertionError("the model's own")

    handle = module.child.register_forward_hook(fail)
    with pytest.raises(AssertionError, match="the model's own"), model.trace(x):
        model.child.input
        model.after.output
    handle.remove()
    assert snapshots.differences(plain, snapshots.of_modes()) == []


def test_a_block_that_raises_in_its_own_mode_leaves_none(manager, x):
    plain = snapshots.of_modes()
    model = nnsight.NNsight(toys.Under(under_no_modes))
    with pytest.raises(KeyError), model.trace(x), manager():
        model.child.output
        raise KeyError
    assert snapshots.differences(plain, snapshots.of_modes()) == []


def test_two_runs_that_are_each_in_a_mode_and_end_out_of_order(manager, x, switch):
    plain, inside = snapshots.of_modes(), modes_under(manager)

    def block(model):
        with model.trace(x) as tracer:
            yield tracer.model.child.output
            yield tracer.model.after.output

    modules = [toys.Under(manager, snapshots.of_modes) for _ in range(2)]
    one, other = (block(nnsight.NNsight(module)) for module in modules)
    next(one)
    next(other)
    assert snapshots.differences(plain, snapshots.of_modes()) == []
    next(one)
    one.close()
    assert snapshots.differences(plain, snapshots.of_modes()) == []
    next(other)
    other.close()
    assert snapshots.differences(plain, snapshots.of_modes()) == []
    assert [module.log for module in modules] == [[plain, inside, inside, plain]] * 2


def test_a_mode_of_the_models_does_not_reach_what_the_block_makes(x):
    model = nnsight.NNsight(toys.Under(lambda: torch.device("meta")))
    with model.trace(x):
        model.child.output
        made = torch.ones(2)
    assert made.device.type == "cpu"
    model = nnsight.NNsight(toys.Under(torch.no_grad))
    weight = torch.ones(3, 4, requires_grad=True)
    with model.trace(x):
        child = model.child.output
        mine = weight * child
        model.child.output = mine
        after = model.after.output
    assert mine.requires_grad
    assert after.requires_grad
    mine.sum().backward()
    assert weight.grad is not None


def test_a_dispatch_mode_of_the_models_sees_the_models_operations_only(x, switch):
    seen = []

    class Notes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    module = toys.Under(Notes)
    model = nnsight.NNsight(module)
    module(x)
    expected = list(seen)
    seen.clear()
    with model.trace(x):
        out = model.child.output
        torch.cosh(out)
        model.after.input
        torch.sinh(out)
    assert seen == expected


def test_a_function_mode_of_the_blocks_does_not_hear_of_the_switches(x, switch):
    heard = []

    class Hears(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            heard.append(func.__name__)
            return func(*args, **(kwargs or {}))

    model = nnsight.NNsight(toys.Under(torch.no_grad))
    with model.trace(x), Hears():
        child = model.child.output
        torch.cosh(child)
        model.after.output
        torch.sinh(child)
    assert heard == ["cosh", "sinh"]


def test_writing_under_inference_mode_of_the_models(x, switch):
    model = nnsight.NNsight(toys.Under(torch.inference_mode))
    with model.trace(x):
        out = model.child.output
        assert out.is_inference()
        model.child.output = torch.zeros(3, 4)
        after = model.after.input
    assert torch.equal(after, torch.zeros(3, 4))
    assert not (torch.ones(1) + 1).is_inference()


def test_deterministic_flags_and_random_numbers_are_shared(x):
    """Documented: one generator for both sides."""
    module = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Dropout(0.5))
    model = nnsight.NNsight(module)
    torch.manual_seed(1)
    first = module[0](x)
    drawn = torch.rand(2)
    second = module[1](first)
    torch.manual_seed(1)
    with model.trace(x):
        model[0].output
        mine = torch.rand(2)
        out = model.output
    assert torch.equal(mine, drawn)
    assert torch.equal(out, second)


# functorch and tracing compilers, where a run can't pause


def test_a_value_inside_vmap_is_refused_by_name(x):
    module = toys.Ask(lambda x: torch.vmap(module.inner)(x))
    module.inner = toys.seeded(torch.nn.Linear(4, 4))
    plain = module(x)
    model = nnsight.NNsight(module)
    with pytest.raises(nnsight.errors.TransformError, match="vmap"), model.trace(x):
        model.inner.output
        pytest.fail("it was read")
    assert torch.equal(module(x), plain)
    with model.trace(x):
        before = model.before.output
        after = model.after.output
    assert before.shape == (3, 4)
    assert torch.equal(after, plain)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("transform", ["grad", "jacrev", "jvp"])
def test_a_value_inside_a_transform_is_refused_by_name(x, transform):
    def question(x):
        f = lambda x: module.inner(x).sum()  # noqa: E731
        if transform == "grad":
            return torch.func.grad(f)(x)
        if transform == "jacrev":
            return torch.func.jacrev(f)(x)
        return torch.func.jvp(module.inner, (x,), (x,))[1]

    module = toys.Ask(question)
    module.inner = toys.seeded(torch.nn.Linear(4, 4))
    plain = module(x)
    model = nnsight.NNsight(module)
    with pytest.raises(nnsight.errors.TransformError, match=r"func\.grad|torch\.func"), model.trace(x):
        model.inner.input
        pytest.fail("it was read")
    assert torch.equal(module(x), plain)
    assert torch._C._functorch.maybe_current_level() is None


def test_a_block_that_transforms_what_it_reads(mlp, x):
    """The other way round works: `vmap` and `func.grad` of values that the block has."""
    with mlp.trace(x):
        out = mlp.layers[0].output
        rows = torch.vmap(lambda row: row.sum())(out)
        slope = torch.func.grad(lambda value: (value**2).sum())(out.detach())
        second = mlp.layers[1].output
    assert torch.equal(rows, out.sum(1))
    assert torch.equal(slope, 2 * out)
    assert second.shape == (3, 4)


def test_going_on_inside_a_transform_of_the_blocks_is_refused(mlp, x):
    with mlp.trace(x) as tracer:
        mlp.layers[0].output
        with pytest.raises(nnsight.errors.TransformError):
            torch.vmap(lambda row: row + mlp.layers[1].output)(x)
        out = tracer.result
    assert torch.equal(out, mlp._module(x))


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_value_inside_jit_trace_is_refused_by_name(mlp, x):
    mlp._module.requires_grad_(False)

    def function(x):
        with mlp.trace(x):
            return mlp.layers[0].output

    with pytest.raises(nnsight.errors.TransformError, match="jit"):
        torch.jit.trace(function, (x,))
    assert mlp(x).shape == (3, 4)


@pytest.mark.slow
def test_a_value_inside_export_is_refused_or_right(mlp, x):
    class Exported(torch.nn.Module):
        def forward(self, x):
            with mlp.trace(x):
                return mlp.layers[0].output

    mlp._module.requires_grad_(False)
    with mlp.trace(x):
        expected = mlp.layers[0].output
    with contextlib.suppress(nnsight.errors.TransformError):
        program = torch.export.export(Exported(), (x,), strict=False)
        assert torch.equal(program.module()(x), expected)
    assert not any(module._forward_pre_hooks for module in mlp._module.modules())
