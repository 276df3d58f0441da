"""What `envoy.source` promises: each operation as a hand-edited forward would show it, and nothing left afterwards."""

import copy
import functools
import gc
import inspect
import pickle
import threading
import warnings
import weakref

import pytest
import snapshots
import torch
from torch import nn

import nnsight
import toys
from comparing import same
from nnsight import errors

pytestmark = pytest.mark.usefixtures("switch")


class Attention(nn.Module):
    """A toy with every kind of operation, whose `seen` is what a hand-edited forward would collect."""

    scale: float = 0.5

    def __init__(self, seed=0):
        super().__init__()
        self.query, self.key, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        toys.seeded(self, seed)

    def forward(self, x, *, temperature=2.0):
        q, k = self.query(x), self.key(x)
        scores = (q @ k.transpose(0, 1)) * self.scale
        pattern = torch.softmax(scores / temperature, dim=-1)
        mixed: torch.Tensor = mix(pattern, x)
        for _ in range(3):
            mixed = torch.tanh(mixed)
        return self.out(mixed)


def mix(pattern, x):
    shifted = torch.roll(x, 1, 0)
    return pattern @ shifted


def by_hand(module, x, *, pattern=None, tanh=None, seen=None, temperature=2.0):
    """The forward of `Attention`, edited: `pattern` and the second `tanh` replaced."""
    seen = {} if seen is None else seen
    q, k = module.query(x), module.key(x)
    seen["k_transpose_0"] = k.transpose(0, 1)
    seen["scores_0"] = scores = (q @ seen["k_transpose_0"]) * module.scale
    seen["torch_softmax_0"] = torch.softmax(scores / temperature, dim=-1)
    pattern = seen["torch_softmax_0"] if pattern is None else pattern
    seen["torch_roll_0"] = torch.roll(x, 1, 0)
    seen["mix_0"] = mixed = pattern @ seen["torch_roll_0"]
    for turn in range(3):
        mixed = torch.tanh(mixed)
        seen[f"tanh {turn}"] = mixed
        mixed = tanh if turn == 1 and tanh is not None else mixed
    return module.out(mixed)


@pytest.fixture
def model():
    return nnsight.NNsight(nn.Sequential(Attention(), Attention(1)))


@pytest.fixture
def untouched(model):
    before = snapshots.of_model(model._module)
    yield
    assert snapshots.differences(before, snapshots.of_model(model._module)) == []


def test_operations_are_named_and_listed_as_they_are_executed(model):
    assert model[0].source.names == [
        "self_query_0", "self_key_0", "k_transpose_0", "scores_0", "torch_softmax_0", "pattern_0", "mix_0", "mixed_0",
        "range_0", "torch_tanh_0", "mixed_1", "self_out_0",
    ]  # fmt: skip
    assert [operation.name for operation in model[0].source] == model[0].source.names
    assert "mix_0" in model[0].source
    assert "mix_1" not in model[0].source


def test_printing_shows_the_source_with_the_names_beside_it(model):
    lines = repr(model[0].source).splitlines()
    first = Attention.forward.__code__.co_firstlineno
    assert lines[0] == f"Attention.forward (test_source.py:{first})"
    assert lines[1].split(maxsplit=1) == [str(first), "def forward(self, x, *, temperature=2.0):"]
    number = first + 1
    assert lines[2] == f"    self_query_0 -> {number}          q, k = self.query(x), self.key(x)"
    assert lines[3] == "      self_key_0 ->"
    assert repr(model[0].source.mix_0).splitlines()[0] == f"0.source.mix_0, {lines[0]}"
    assert " mix_0 -> " in repr(model[0].source.mix_0)


def test_each_operation_is_what_a_hand_edited_forward_has(model, x, untouched):
    seen = {}
    by_hand(model[0]._module, x, seen=seen)
    for name in ("k_transpose_0", "scores_0", "torch_softmax_0", "mix_0"):
        with model.trace(x):
            value = model[0].source[name].output
        same(value, seen[name])
    with model.trace(x):
        args, kwargs = model[0].source.torch_softmax_0.inputs
        first = model[0].source.torch_softmax_0.input
        assigned = model[0].source.pattern_0.input
    same(args[0], seen["scores_0"] / 2.0)
    same(first, args[0])
    same(assigned, seen["torch_softmax_0"])
    assert kwargs == {"dim": -1}


def test_all_operations_can_be_read_in_one_pass(model, x, untouched):
    with model.trace(x):
        values = {operation.name: operation.output for operation in model[1].source}
        out = model.output
    same(values["self_out_0"], out)
    same(out, model._module(x))


def test_writing_back_what_was_read_changes_nothing(model, x, untouched):
    with model.trace(x):
        for operation in model[0].source:
            operation.inputs = operation.inputs
            operation.output = operation.output
        out = model.output
    same(out, model._module(x))


@pytest.mark.parametrize("how", ["output", "assignment", "skip", "in place", "input"])
def test_a_changed_pattern_gives_what_a_hand_edited_forward_gives(model, x, how, untouched):
    pattern = torch.eye(3)
    with model.trace(x):
        source = model[0].source
        if how == "output":
            source.torch_softmax_0.output = pattern
        elif how == "assignment":
            source.pattern_0.output = pattern
        elif how == "skip":
            source.torch_softmax_0.skip(pattern)
        elif how == "in place":
            source.torch_softmax_0.output[:] = pattern
        else:
            source.mix_0.input = pattern
        out = model[0].output
    same(out, by_hand(model[0]._module, x, pattern=pattern))


def test_gradients_flow_through_a_written_operation(model, x, untouched):
    def gradients(out):
        return torch.autograd.grad(out.sum(), [model[0].query.weight, model[0].out.weight])

    with model.trace(x):
        model[0].source.torch_softmax_0.output = model[0].source.torch_softmax_0.output * 0.5
        out = model[0].output
    module = model[0]._module
    seen = {}
    by_hand(module, x, seen=seen)
    for one, other in zip(
        gradients(out), gradients(by_hand(module, x, pattern=seen["torch_softmax_0"] * 0.5)), strict=1
    ):
        same(one, other)


def test_a_call_in_a_loop_is_had_visit_by_visit(model, x, untouched):
    seen = {}
    by_hand(model[0]._module, x, seen=seen)
    with model.trace(x):
        tanh = model[0].source.torch_tanh_0
        visits = [tanh.output, tanh.next().output, tanh.next().output]
    for turn, visit in enumerate(visits):
        same(visit, seen[f"tanh {turn}"])
    with model.trace(x):
        model[0].source.torch_tanh_0.next().output = torch.ones(3, 4)
        out = model[0].output
    same(out, by_hand(model[0]._module, x, tanh=torch.ones(3, 4)))


def test_what_a_call_calls_has_a_source_of_its_own(model, x, untouched):
    seen = {}
    by_hand(model[0]._module, x, seen=seen)
    with model.trace(x):
        inner = model[0].source.mix_0.source
        assert inner.names == ["torch_roll_0", "shifted_0"]
        rolled = inner.torch_roll_0.output
        model[0].source.mix_0.source.shifted_0.output = rolled * 0
        mixed = model[0].source.mix_0.output
    same(rolled, seen["torch_roll_0"])
    same(mixed, torch.zeros(3, 4))


def test_a_name_without_its_number_is_the_only_call_of_that_name(model, x):
    source = model[0].source
    assert source.torch_softmax.name == "torch_softmax_0"
    assert source.scores.name == "scores_0"
    with pytest.raises(errors.UnknownNameError):
        source.mixed


def test_operations_mix_with_modules_and_their_inputs(model, x, untouched):
    with model.trace(x):
        inside = model[0].input
        scores = model[0].source.scores_0.output
        queried = model[0].source.mix_0.output
        projected = model[0].out.input
        out = model[0].output
        later = model[1].source.scores_0.output
    seen = {}
    same(inside, x)
    same(out, by_hand(model[0]._module, x, seen=seen))
    same(scores, seen["scores_0"])
    same(queried, seen["mix_0"])
    same(projected, seen["tanh 2"])
    by_hand(model[1]._module, out, seen=seen)
    same(later, seen["scores_0"])


def test_the_sources_of_a_scope_are_its_runs(model, x, untouched):
    with model.trace(x) as a, model.trace(x * 2) as b:
        b[0].source.torch_softmax_0.output = a[0].source.torch_softmax_0.output
        first, second = a.output, b[0].output
    seen = {}
    by_hand(model[0]._module, x, seen=seen)
    same(first, model._module(x))
    same(second, by_hand(model[0]._module, x * 2, pattern=seen["torch_softmax_0"]))


def test_runs_that_end_in_any_order_leave_the_model_as_it_was(model, x, untouched):
    outer = model.trace(x)
    outer.__enter__()
    outer.model[0].input
    with model.trace(x) as inner:
        first = inner.model[0].source.scores_0.output
        second = outer.model[0].source.scores_0.output
    outer.__exit__(None, None, None)
    same(first, second)


def test_threads_see_their_own_runs(model, x, untouched):
    found = {}

    def work(turn):
        for _ in range(5):
            with model.trace(x * turn):
                found.setdefault(turn, []).append(model[0].source.scores_0.output)

    threads = [threading.Thread(target=work, args=(turn,)) for turn in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for turn, values in found.items():
        seen = {}
        by_hand(model[0]._module, x * turn, seen=seen)
        assert len(values) == 5
        for value in values:
            same(value, seen["scores_0"])


def test_a_call_of_the_module_in_the_block_is_no_visit(model, x, untouched):
    with model.trace(x):
        scores = model[0].source.scores_0
        model[0](x * 3)
        value = scores.output
        again = model[0](x * 3)
    same(again, by_hand(model[0]._module, x * 3))
    seen = {}
    by_hand(model[0]._module, x, seen=seen)
    same(value, seen["scores_0"])


# Forwards of every making.


def keeping(function):
    """A decorator in the usual way, with state that must stay the same object."""
    calls = []

    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        calls.append(type(self).__name__)
        return function(self, *args, **kwargs) + 1

    wrapper.calls = calls
    return wrapper


def make_class():
    offset = 0.25

    class Base(nn.Module):
        def forward(self, x):
            return x * 2

    class Odd(Base):
        __secret = 3.0

        @torch.no_grad()
        @keeping
        def forward(self, x, *more, factor=2.0, **rest):
            """Its docstring."""
            doubled = super().forward(x)
            private = doubled * self.__secret + offset
            parts = [torch.sin(part) for part in private.split(1)]
            text = f"{len(parts)} {Odd.__name__}"
            return torch.cat(parts) * factor if text else None

    return Odd


def test_decorators_closures_super_and_private_names_stay_what_they_are(x):
    odd = make_class()()
    model = nnsight.NNsight(odd)
    expected = odd(x)
    calls = type(odd).forward.__wrapped__.calls
    names = model.source.names
    assert names[:4] == ["forward_0", "doubled_0", "private_0", "private_split_0"]
    before, names_before = snapshots.of_model(odd), set(globals())
    with model.trace(x):
        doubled = model.source.forward_0.output
        private = model.source.private_0.output
        sines = [model.source.torch_sin_0.output, model.source.torch_sin_0.next().output]
        out = model.output
    same(doubled, x * 2)
    same(private, x * 2 * 3.0 + 0.25)
    same(sines[1], torch.sin(private[1:2]))
    same(out, expected)
    assert len(calls) == 2
    assert set(globals()) == names_before
    assert snapshots.differences(before, snapshots.of_model(odd)) == []


def test_a_forward_that_was_put_on_the_instance_is_put_back(x):
    module = Attention()
    inner = Attention.forward

    def mine(x):
        y = inner(module, x)
        return y + 1

    module.forward = mine
    model = nnsight.NNsight(nn.Sequential(module))
    with model.trace(x):
        y = model[0].source.y_0.output
        model[0].source.y_0.output = y * 2
        out = model.output
    assert module.forward is mine
    same(out, inner(module, x) * 2 + 1)


def test_accelerates_forward_on_the_instance_stays_in_place(x):
    accelerate = pytest.importorskip("accelerate")
    module = Attention()
    expected = module(x)
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True))
    model = nnsight.NNsight(nn.Sequential(module))
    before = snapshots.of_model(module)
    with model.trace(x):
        pattern = model[0].source.pattern_0.output
        out = model[0].output
    assert pattern.shape == (3, 3)
    same(out, expected)
    assert snapshots.differences(before, snapshots.of_model(module)) == []


def test_a_users_hooks_are_seen(model, x):
    handle = model[0]._module.register_forward_hook(lambda module, args, out: out * 10)
    with model.trace(x):
        raw = model[0].source.self_out_0.output
        out = model[0].output
    handle.remove()
    same(out, raw * 10)


def test_an_operation_taken_before_the_weights_came_stays_valid():
    model = nnsight.LanguageModel("nnsight/demo")
    assert str(model.device) == "meta"
    split = model.transformer.h[0].attn.source.split_1
    with model.trace("The Eiffel Tower"):
        query, key, value = split.output
        whole = model.transformer.h[0].attn.c_attn
    assert query.shape == key.shape == value.shape
    assert str(query.device) == "cpu"
    with model.trace("The Eiffel Tower"):
        fused = model.transformer.h[0].attn.source.self_c_attn_1.output
    same(torch.cat([query, key, value], -1), fused)
    assert whole is model.transformer.h[0].attn.c_attn


def test_an_operation_in_the_first_step_of_a_generation():
    model = nnsight.LanguageModel("nnsight/demo")
    plain = model.generate("The Eiffel Tower is in the city of", max_new_tokens=3, trace=False)
    with model.generate("The Eiffel Tower is in the city of", max_new_tokens=3) as tracer:
        out = model.transformer.h[0].attn.source.attention_interface_1.output[0]
        result = tracer.result
    assert out.shape[1] > 3
    assert torch.equal(torch.as_tensor(result), torch.as_tensor(plain))


def test_operations_in_each_step_of_a_generation():
    model = nnsight.LanguageModel("nnsight/demo")
    attn = model.transformer.h[2].attn
    with model.generate("The Eiffel Tower is in the city of", max_new_tokens=4) as tracer:
        plain = [attn.c_proj.output for _ in tracer.iter[:]]
    with model.generate("The Eiffel Tower is in the city of", max_new_tokens=4) as tracer:
        read, called = [], []
        for step in tracer.iter[:]:
            called.append(model.source.self_transformer_0.inputs)
            if step in (1, 2):
                read.append(attn.source.self_c_proj_0.output)
                attn.source.attn_output_1.output = read[-1] * 1
    assert len(called) == len(plain) > 2
    same(read[0], plain[1])
    same(read[1], plain[2])
    with pytest.raises(errors.StillRunningError, match="in step 0, or in the step before"):
        with model.generate("The Eiffel Tower is in the city of", max_new_tokens=4) as tracer:
            attn.output
            with pytest.raises(errors.OutOfOrderError):
                attn.input  # the wait ends where the next step begins, which nobody asked to stand at
                model.transformer.h[0].output
            for _ in tracer.iter[1:]:
                model.source.self_transformer_0.inputs


def test_operations_in_a_scan_are_fake_and_load_nothing():
    model = nnsight.LanguageModel("nnsight/demo")
    with model.scan("The Eiffel Tower"):
        split = model.transformer.h[0].attn.source.split_1
        query, _, _ = split.output
        pattern = model.transformer.h[3].attn.source.attention_interface.source
        names = pattern.names
        out = model.transformer.h[3].attn.source.attention_interface.output[0]
    assert query.shape[-1] == model.config.n_embd
    assert out.shape[-1] * model.config.n_head == model.config.n_embd
    assert "torch_nn_functional_scaled_dot_product_attention_0" in names
    assert str(model.device) == "meta"


def test_gradients_of_operations(model, x):
    with model.trace(x):
        pattern = model[0].source.torch_softmax_0.output
        loss = model.output.sum()
        with loss.backward():
            gradient = pattern.grad
    seen = {}
    module = model._module
    out = module[1](by_hand(module[0], x, seen=seen))
    (expected,) = torch.autograd.grad(out.sum(), [seen["torch_softmax_0"]])
    same(gradient, expected)


def test_a_row_and_the_batch_have_an_operation():
    model = nnsight.LanguageModel("nnsight/demo")
    with model.trace(["The Eiffel Tower", "The Colosseum is in"]) as (_, b):
        whole = model.transformer.h[1].attn.source.attn_output_0.output
        part = b.transformer.h[1].attn.source.attn_output_0.output
        own = b.transformer.h[1].attn.c_proj.input
    same(whole[1:, -own.shape[1] :], own)
    same(part, own)


# Mistakes.


def wrong(model, x, error, text, block):
    before = snapshots.of_model(model._module)
    with pytest.raises(error, match=text), model.trace(x):
        block(model)
    assert snapshots.differences(before, snapshots.of_model(model._module)) == []
    same(model.trace(x, trace=False), model._module(x))


def read(path):
    return lambda model: model.get(path)


def write(path, name, value):
    return lambda model: setattr(model.get(path), name, value)


def second_read_first(model):
    model[0].source.mix_0.output
    model[0].source.scores_0.output


def module_first(model):
    model[0].key.output
    model[0].source.mix_0.output


def whole_module_first(model):
    model[0].output
    model[0].source.mix_0.output


def too_late(verb):
    def block(model):
        model[0].source.mix_0.output
        verb(model[0].source.mix_0)

    return block


MISTAKES = [
    (
        "UnknownNameError",
        "has no operation `torch_sofmax_0`%nearest +`torch_softmax_0`",
        read("0.source.torch_sofmax_0"),
    ),
    ("UnknownNameError", "has no operation `mix_1`%nearest +`mix_0`", read("0.source.mix_1")),
    ("UnknownNameError", "an operation, has no `ouptut`%nearest +`output`", read("0.source.mix_0.ouptut")),
    ("UnknownNameError", "an operation, has no `ouptut`", write("0.source.mix_0", "ouptut", 1)),
    ("WriteError", r"can't be replaced%\.mix_0\.output = ", write("0.source", "mix_0", 1)),
    ("UnknownIndexError", "no operation at index 99%it has +12 operations", lambda model: model[0].source[99]),
    ("UnknownNameError", r"no operation `foo`%inside +what a call calls", read("0.source.foo")),
    ("WriteError", "takes a pair", write("0.source.mix_0", "inputs", (1, 2))),
    ("AlreadyPastError", r"is past: the model had run beyond%stood +at `0\.source\.mix_0\.output`", second_read_first),
    ("AlreadyPastError", r"is past: the model had run beyond%stood +at `0\.output`, since", whole_module_first),
    ("StillRunningError", "`0.source` can't be had in this call: it began before", module_first),
    ("CalledFewerTimesError", "no such call", lambda model: model[0].source.mix_0.next().output),
    ("WriteError", "can't be skipped any more", too_late(lambda mix: mix.skip(1))),
    ("WriteError", "can't be written any more", too_late(lambda mix: setattr(mix, "input", 1))),
    ("AlreadyPastError", "the call has returned", too_late(lambda mix: mix.source.names)),
    ("NoSourceError", "calls the module `0.query`%model.0.query.source", read("0.source.self_query_0.source.names")),
    ("NoSourceError", "is an assignment%you wrote", read("0.source.scores_0.source.names")),
    ("NoSourceError", "softmax` has no Python source", read("0.source.torch_softmax_0.source.names")),
]


@pytest.mark.parametrize(("error", "text", "block"), MISTAKES)
def test_a_mistake_says_what_is_wrong_and_leaves_the_model_usable(model, x, error, text, block):
    wrong(model, x, getattr(errors, error), text.replace("%", r"(.|\n)*"), block)


def test_outside_a_trace(model):
    with pytest.raises(errors.OutsideTraceError, match=r"value of `0\.source\.mix_0` was asked for where no trace"):
        model[0].source.mix_0.output
    with pytest.raises(errors.OutsideTraceError, match="is known only while the model runs"):
        print(model[0].source.mix_0.source)


def test_a_line_that_the_forward_does_not_come_to(x):
    class Branch(nn.Module):
        def forward(self, x, double=False):
            if double:
                x = torch.mul(x, 2)
            return x + 1

    model = nnsight.NNsight(nn.Sequential(Branch()))
    wrong(
        model, x, errors.NeverCalledError,
        r"the function was called, but never came to that line(.|\n)*its line +\d+: x = torch.mul\(x, 2\)",
        lambda model: model[0].source.torch_mul_0.output,
    )  # fmt: skip


def test_a_module_that_is_never_called(x):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = Attention(), Attention()

        def forward(self, x):
            return self.used(x)

    model = nnsight.NNsight(Spare())
    wrong(
        model, x, errors.NeverCalledError, "`spare.source.mix_0.output` has no value: this forward pass never called",
        lambda model: model.spare.source.mix_0.output,
    )  # fmt: skip


def test_a_forward_without_source(x):
    space = {"nn": nn}
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return x.sin()\n", space)
    model = nnsight.NNsight(nn.Sequential(space["Typed"]()))
    with pytest.raises(errors.NoSourceError, match="No source is to be had of `forward`, which was compiled from"):
        print(model[0].source)
    wrong(model, x, errors.NoSourceError, "No source is to be had", read("0.source.x_sin_0.output"))


def test_a_scripted_forward_has_no_python_source():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(nn.Tanh())
    with pytest.raises(errors.NoSourceError, match="has no Python source"):
        print(nnsight.NNsight(scripted).source)


def test_a_file_that_was_changed_since_it_was_imported(tmp_path, monkeypatch, x):
    text = (
        "from torch import nn\n\n\nclass Changing(nn.Module):\n    def forward(self, x):\n        return x.sin() + 1\n"
    )
    (tmp_path / "changing_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import changing_module

    (tmp_path / "changing_module.py").write_text(text.replace("+ 1", "* 2"))
    with pytest.raises(errors.NoSourceError, match="isn't what `forward` was compiled from: it has changed since"):
        nnsight.NNsight(changing_module.Changing()).source.names


def test_an_attribute_error_of_the_models_comes_out_as_itself(x):
    class Broken(nn.Module):
        def forward(self, x):
            y = x.sin()
            return y.no_such_thing

    model = nnsight.NNsight(nn.Sequential(Broken(), Attention()))
    with pytest.raises(AttributeError, match="'Tensor' object has no attribute 'no_such_thing'"), model.trace(x):
        model[1].source.mix_0.output
    with pytest.raises(AttributeError, match="'Tensor' object has no attribute 'no_such_thing'"), model.trace(x):
        model[1].source.mix_0.source.names


def test_an_error_beneath_a_written_operation_names_the_line(model, x):
    with pytest.raises(RuntimeError) as caught, model.trace(x):
        model[0].source.torch_softmax_0.output = torch.ones(5, 5)
    assert any("0.source.torch_softmax_0.output" in note for note in caught.value.__notes__)
    files = {frame.filename for frame in __import__("traceback").extract_tb(caught.value.__traceback__)}
    assert not any(file.endswith("operations.py") for file in files)


def test_the_receipt_tells_of_operations(model, x):
    with model.trace(x) as tracer:
        model[0].source.torch_softmax_0.output = torch.eye(3)
        model[0].source.mix_0.output
    assert "wrote   0.source.torch_softmax_0.output" in repr(tracer)
    assert "read    0.source.mix_0.output" in repr(tracer)


# What is left.


@pytest.mark.parametrize("end", ["stop", "error", "drop", "finish"])
def test_however_a_run_ends_the_forward_is_put_back(model, x, end, untouched):
    if end == "drop":
        tracer = model.trace(x)
        tracer.__enter__()
        tracer.model[0].source.scores_0.output
        del tracer
        return
    try:
        with model.trace(x) as tracer:
            model[0].source.scores_0.output
            if end == "stop":
                tracer.stop()
            if end == "error":
                raise KeyError("mine")
    except KeyError:
        assert end == "error"


def test_a_model_that_is_copied_or_pickled_meanwhile(model, x):
    with model.trace(x):
        model[0].source.scores_0.output
        twin = copy.deepcopy(model._module)
        copied = pickle.loads(pickle.dumps(model._module))
    for other in (twin, copied):
        same(other(x), model._module(x))
        assert other[0].forward.__self__ is other[0]


def test_a_dropped_model_is_freed_without_the_collector(x):
    gc.collect()
    gc.disable()
    try:
        model = nnsight.NNsight(nn.Sequential(Attention()))
        with model.trace(x) as tracer:
            model[0].source.mix_0.source.shifted_0.output
        freed = weakref.ref(model._module[0])
        del model, tracer
        assert freed() is None
    finally:
        gc.enable()


def test_signatures_are_the_forwards_own_meanwhile(model, x):
    import inspect

    with model.trace(x):
        model[1].source.scores_0.output
        assert str(inspect.signature(model[1]._module.forward)) == "(x, *, temperature=2.0)"


@pytest.mark.slow
def test_a_sourced_module_compiles_afterwards_and_runs_eagerly_meanwhile(model, x):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(model._module, backend=counter, fullgraph=True)
    expected = compiled(x)
    assert counter.frame_count == 1
    with model.trace(x):
        model[0].source.scores_0.output
    traced = nnsight.NNsight(compiled)
    with traced.trace(x):
        scores = traced._orig_mod[0].source.scores_0.output
    assert scores.shape == (3, 3)
    same(compiled(x), expected)
    assert counter.frame_count == 1


def test_the_models_own_operations_can_be_had_first_in_any_step():
    demo = nnsight.LanguageModel("nnsight/demo", dispatch=True)
    for first in (0, 1, 2):
        with demo.generate("The Eiffel Tower is in", max_new_tokens=4, min_new_tokens=4) as tracer:
            seen = []
            for _step in tracer.iter[first:]:
                seen.append(demo.source.self_lm_head_0.output)
                assert torch.equal(demo.output.logits, seen[-1])
            result = tracer.result
        assert len(seen) == 4 - first
        assert torch.equal(result, demo.generate("The Eiffel Tower is in", max_new_tokens=4, min_new_tokens=4))
        assert "forward" not in vars(demo._module)


def test_a_module_whose_input_is_waited_for_has_its_own_signature(x):
    class Scales(nn.Module):
        def forward(self, x, *, scale=1):
            return x * scale

    model = nnsight.NNsight(Scales())
    looks = []

    def look(x):
        looks.append(list(inspect.signature(model._module.forward).parameters))
        return model._module(x)

    model._module.look = look
    with model.trace(x, fn="look"):
        assert torch.equal(model.input, x)
    assert looks == [["x", "scale"]]


# Names


def test_a_call_counted_among_calls_has_a_name_that_assignments_dont_move(model, x):
    source = model[0].source
    with model.trace(x):
        seen = source.torch_softmax_call_0.output
        mixed = source.mix_call_0.source.torch_roll_call_0.output
    with model.trace(x):
        same(source.torch_softmax_0.output, seen)
        same(source.mix_0.source.torch_roll_0.output, mixed)
    assert "mix_call_0" in source
    assert "mix_call_1" not in source
    assert "scores_call_0" not in source


def test_the_source_of_an_assignment_is_that_of_the_call_it_was_named_after():
    demo = nnsight.LanguageModel("nnsight/demo", attn_implementation="eager")
    attn = demo.transformer.h[2].attn
    with demo.trace("The Eiffel Tower"):
        new = attn.source.attention_interface_1.source.nn_functional_softmax_0.output
    for name in ("attention_interface_0", "attention_interface_call_0", "attention_interface"):
        with demo.trace("The Eiffel Tower"):
            same(attn.source[name].source.nn_functional_softmax_0.output, new)


def test_operations_by_index(model):
    source = model[0].source
    assert [source[at].name for at in range(len(source))] == source.names
    assert source[-1].name == source.names[-1]


def test_a_name_inside_another_call_is_told_where_to_look():
    for how, says in (("eager", r"attention_interface_1\.source(.|\n)*eager"), ("sdpa", "eager")):
        demo = nnsight.LanguageModel("nnsight/demo", attn_implementation=how)
        attn = demo.transformer.h[2].attn
        source = attn.source if how == "eager" else attn.source.attention_interface_1.source
        with pytest.raises(errors.UnknownNameError, match=says), demo.trace("The"):
            source.nn_functional_softmax_0.output


def test_an_operation_can_become_none(x):
    class Maybe(nn.Module):
        def forward(self, x):
            extra = torch.sin(x)
            return x if extra is None else extra

    model = nnsight.NNsight(nn.Sequential(Maybe()))
    for name in ("torch_sin_0", "extra_0"):
        with model.trace(x) as tracer:
            model[0].source[name].output = None
        same(tracer.result, x)


def test_a_container_and_a_compiled_module_say_whose_source_is_meant(x):
    model = nnsight.NNsight(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])}))
    with pytest.raises(errors.NoSourceError, match=r"`layers`, a ModuleList, has no forward(.|\n)*you wrote"):
        print(model.layers.source)
    for module in (nn.Sequential(nn.Linear(4, 4)), Attention()):
        compiled = nnsight.NNsight(torch.compile(module, backend="eager"))
        with pytest.raises(errors.NoSourceError, match=r"torch\.compile(.|\n)*\._orig_mod\.source"):
            print(compiled.source)
        assert compiled._orig_mod.source.names == nnsight.NNsight(module).source.names


def test_a_late_write_of_an_operation_speaks_of_the_operation(model, x):
    with pytest.raises(errors.WriteError, match=r"any more: it has run(.|\n)*this operation's output"), model.trace(x):
        model[0].source.mix_0.output
        model[0].source.mix_0.input = x
