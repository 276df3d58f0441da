"""Law 3: every read, every write and every gradient after a write equals plain torch hooks, bit for bit."""

import linecache

import programs
import pytest
import torch

import nnsight
import toys

CHUNK = 100


def check(seed, grads=programs.equal):
    """Runs the program of a seed both ways; fails with the seed and the program as Python source."""
    program = programs.program(seed)
    expected = programs.with_hooks(programs.module_of(seed), program)
    module = programs.module_of(seed)
    source = program.source()
    linecache.cache[f"<program {seed}>"] = (len(source), None, source.splitlines(True), f"<program {seed}>")
    try:
        got = programs.with_trace(nnsight.NNsight(module), module, program, nnsight.errors)
    except Exception as error:  # noqa: BLE001  the program has to be shown with it
        pytest.fail(f"seed {seed} raised {error!r} on\n{module}\n\n{source}")
    if wrong := programs.difference(expected, got, grads):
        pytest.fail(f"seed {seed}, hooks / trace: {wrong}\n\non {module}\n\n{source}")


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 10 * CHUNK, CHUNK))
def test_random_blocks_equal_plain_torch_hooks(first):
    for seed in range(first, first + CHUNK):
        check(seed)


@pytest.mark.slow
def test_random_blocks_equal_plain_torch_hooks_with_either_switch(switch):
    """With a thread, gradients differ by rounding: torch adds up in the order of a number that it counts per thread."""
    for seed in range(10_000, 10_000 + 2 * CHUNK):
        check(seed, programs.equal if switch == "greenlet" else programs.close)


def test_the_generator_draws_every_kind_of_step_and_of_outcome():
    seen, raised = set(), set()
    for seed in range(300):
        program = programs.program(seed)
        seen |= {(step.act, step.port) for step in program.steps}
        raised.add(programs.with_hooks(programs.module_of(seed), program).raised)
    ports = ("in", "out")
    wanted = {(act, port) for act in ("read", "write", "edit", "augment") for port in ports}
    wanted |= {
        ("look back", "out"),
        ("read", "ins"),
        ("write", "ins"),
        ("skip", "skip"),
        ("call", None),
        ("stop", None),
    }
    wanted |= {("read", "result"), ("write", "result")}
    assert seen >= wanted
    assert raised == {None, "past", "never", "late", "untaken"}


def recorded(module, x, names):
    """What plain hooks see at the outputs of some children, in the order in which they come."""
    seen, handles = [], []
    for name in names:
        child = module.get_submodule(name)
        handles.append(child.register_forward_hook(lambda _, args, out, name=name: seen.append((name, out.clone()))))
    module(x)
    for handle in handles:
        handle.remove()
    return seen


def test_a_childs_output_and_then_its_parents(mlp, x, switch):
    expected = dict(recorded(mlp._module, x, ["layers.1.down", "layers.1", "layers.2", ""]))
    with mlp.trace(x):
        down = mlp.layers[1].down.output
        layer = mlp.layers[1].output
        later = mlp.layers[2].output
        root = mlp.output
    assert all(map(torch.equal, (down, layer, later, root), expected.values()))


def test_a_childs_input_and_then_its_parents_output(mlp, x):
    expected = dict(recorded(mlp._module, x, ["layers.0", "layers.0.act"]))
    with mlp.trace(x):
        before = mlp.layers[0].act.input
        after = mlp.layers[0].act.output
        layer = mlp.layers[0].output
    assert torch.equal(torch.tanh(before), after)
    assert torch.equal(after, expected["layers.0.act"])
    assert torch.equal(layer, expected["layers.0"])


def test_a_write_in_a_child_reaches_what_its_parent_gives(mlp, x):
    with mlp.trace(x):
        into = mlp.layers[0].input
        mlp.layers[0].down.output = torch.zeros(3, 4)
        assert torch.equal(mlp.layers[0].output, into)


def test_every_layer_and_the_root_last(x):
    model = nnsight.NNsight(toys.MLP(depth=12))
    names = [f"layers.{i}" for i in range(12)] + [""]
    expected = recorded(model._module, x, names)
    with model.trace(x):
        seen = [layer.output for layer in model.layers] + [model.output]
    assert [name for name, _ in expected] == names
    assert all(torch.equal(a, b) for a, (_, b) in zip(seen, expected, strict=True))


def test_reading_a_port_twice_gives_the_same_object(mlp, x, switch):
    with mlp.trace(x):
        assert mlp.layers[0].input is mlp.layers[0].input
        assert mlp.layers[0].output is mlp.layers[0].output
        assert mlp.layers[1].output is mlp.layers[1].output


def test_at_a_modules_output_its_input_is_still_known(mlp, x):
    with mlp.trace(x):
        out = mlp.layers[1].act.output
        into = mlp.layers[1].act.input
        args, kwargs = mlp.layers[1].act.inputs
    assert torch.equal(torch.tanh(into), out)
    assert args[0] is into
    assert kwargs == {}


def test_what_was_written_is_what_is_read(mlp, x):
    mine = torch.ones(3, 4)
    with mlp.trace(x):
        mlp.layers[0].input = mine
        assert mlp.layers[0].input is mine
        mlp.layers[1].output = mine
        assert mlp.layers[1].output is mine
        assert torch.equal(mlp.layers[2].input, mine)


def test_inputs_are_what_the_caller_gave_positions_and_keywords(x):
    model = nnsight.NNsight(toys.Structured())
    with model.trace(x):
        args, kwargs = model.tuple.inputs
        assert torch.equal(args[0], x)
        assert (len(args), kwargs) == (1, {})
        args, kwargs = model.dict.inputs
        assert args == ()
        assert list(kwargs) == ["x", "scale"]
        assert model.dict.input is kwargs["x"]
        model.dict.inputs = ((), {"x": torch.zeros(3, 4), "scale": 0.0})
        out = model.dict.output
    assert torch.equal(out["hidden"], torch.zeros(3, 4))


def test_skip_runs_nothing_beneath_and_may_depend_on_the_input(mlp, x, switch):
    calls = []
    handle = mlp._module.layers[1].down.register_forward_hook(lambda *_: calls.append(1))
    with mlp.trace(x):
        into = mlp.layers[1].input
        mlp.layers[1].skip(into * 2)
        assert torch.equal(mlp.layers[1].output, into * 2)
        assert torch.equal(mlp.layers[2].input, into * 2)
    handle.remove()
    assert calls == []


def test_calling_a_module_in_a_block_runs_its_forward_and_no_tap(mlp, x, switch):
    hooked = []
    handle = mlp._module.head.register_forward_hook(lambda *_: hooked.append(1))
    with mlp.trace(x):
        early = mlp.head(mlp.layers[0].output)
        assert hooked == []
        late = mlp.head(mlp.layers[2].output)
        assert torch.equal(late, mlp.head.output)
    assert hooked == [1]
    assert not torch.equal(early, late)
    handle.remove()


def test_a_repeatedly_called_child_is_read_call_by_call(x):
    model = nnsight.NNsight(toys.RNN(steps=3))
    expected = recorded(model._module, x, ["cell"])
    seen = []
    with model.trace(x):
        for _ in range(3):
            model.cell.mix.output
            seen.append(model.cell.output)
    assert all(torch.equal(a, b) for a, (_, b) in zip(seen, expected, strict=True))


def test_a_shared_child_is_one_port_under_both_names(x):
    model = nnsight.NNsight(toys.Shared())
    first, second = (out for _, out in recorded(model._module, x, ["first"]))
    with model.trace(x):
        one = model.second.output  # the first call: under whichever name it is asked for
        model.between.output
        two = model.first.output
    assert torch.equal(one, first)
    assert torch.equal(two, second)


def test_children_in_a_plain_list_run_untouched(x):
    model = nnsight.NNsight(toys.Hidden())
    expected = dict(recorded(model._module, x, ["seen", "outer", ""]))
    with model.trace(x):
        assert torch.equal(model.outer.output, expected["outer"])
        assert torch.equal(model.output, expected[""])
    with model.trace(x):
        assert torch.equal(model.seen.output, expected["seen"])
        assert torch.equal(model.output, expected[""])


def test_a_module_entered_before_it_was_held_is_an_error_of_its_own(x):
    """`outer` calls `seen` without owning it: paused in `seen`, it is too late to ask for `outer`."""
    model = nnsight.NNsight(toys.Hidden())
    with pytest.raises(nnsight.errors.BlockError, match="outer") as caught, model.trace(x):
        model.seen.output
        model.outer.output
    assert not isinstance(caught.value, (nnsight.errors.NeverCalledError, nnsight.errors.AlreadyPastError))


def test_gradients_after_a_write_equal_those_of_hooks(x):
    def loss(out):
        return (out**3).sum()

    hooked, module = toys.MLP(), toys.MLP()
    handle = hooked.layers[1].register_forward_hook(lambda _, args, out: out * 2 + args[0])
    loss(hooked(x)).backward()
    handle.remove()
    model = nnsight.NNsight(module)
    with model.trace(x):
        model.layers[1].output = model.layers[1].output * 2 + model.layers[1].input
        out = model.output
    loss(out).backward()
    for one, other in zip(hooked.parameters(), module.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_the_result_is_the_return_value_and_can_be_assigned(mlp, x, switch):
    plain = mlp._module(x)
    with mlp.trace(x) as tracer:
        assert torch.equal(tracer.result, plain)
        tracer.result = plain * 2
        assert torch.equal(tracer.result, plain * 2)


def test_users_hooks_and_taps_see_each_others_changes(mlp, x):
    handle = mlp._module.layers[0].register_forward_hook(lambda _, args, out: out + 1)
    plain = mlp._module(x)
    with mlp.trace(x):
        mlp.layers[0].output = mlp.layers[0].output
        out = mlp.output
    handle.remove()
    assert torch.equal(out, plain)
