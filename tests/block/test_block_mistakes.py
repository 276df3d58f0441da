"""Slips of a tired hand in a block: each is told at its line, with what to write; the model is as it was, and runs."""

import math
import re

import numpy
import pytest
import snapshots
import torch

import nnsight
import toys
from nnsight import errors

MISTAKES = {
    "layer = model.layers[1](model.layers[0])": (
        errors.BlockError,
        r"`layers.0` is a module.*instead +model.layers\[0\].output",
    ),
    "model.layers[0, 1].output": (errors.BlockError, r"instead +\[model.layers\[i\].output for i in \(0, 1\)\]$"),
    "model.layers[4 / 4].output": (errors.BlockError, r"instead +model.layers\[1\].output$"),
    "model.layers[None] = 0": (errors.BlockError, r"instead +model.layers\[0\].output = 0?"),
    "model.layers[1][:] = 0": (errors.BlockError, r"instead +model.layers\[1\].output\[\.\.\.\] = "),
    "model.layers[1].output = model.layers[0]": (
        errors.BlockError,
        r"`layers.0` is.*instead +model.layers\[0\].output$",
    ),
    "model.layers[1].skip(model.layers[0])": (errors.BlockError, r"`layers.0` is.*instead +model.layers\[0\].output$"),
    "model.layers[1].inputs = (model.layers[0],), {}": (errors.BlockError, "`layers.0` is a module, not a value"),
    "tracer.rows[0].layers[1].output = tracer.model.layers[0]": (errors.BlockError, "`layers.0` is a module, not"),
    "model.layers[1].output = None": (errors.WriteError, r"become None.*instead +model.layers\[1\].skip\(None\)"),
    "model.layers[1](x, x=model.layers[0], hook=True)": (errors.BlockError, "`layers.1` can't be called with it"),
    "model.layers[0:2].output": (errors.UnknownNameError, r"a list of 2.*\[one.output for one in"),
    "model.layers[0:2].output = 0": (errors.WriteError, r"a list of 2.*for one in .*: one.output = "),
    "del model.layers[1].output": (errors.BlockError, r"`layers.1.output` is a value.*model.layers\[1\].skip\(value\)"),
    "del model.layers[1]": (errors.BlockError, r"`layers\[1\]` can't be taken out.*model.layers\[1\].skip\("),
    "tracer.rows['a'].output": (errors.BlockError, r"by its number.*not by 'a'.*instead +tracer.rows\[0\]"),
    "model.layers[1].output = [[[[[[[model.layers[0]]]]]]]]": (
        errors.BlockError,
        "`layers.0` is a module, not a value",
    ),
    "model.layers[1].norm[0]": (errors.UnknownIndexError, r"no child at.*instead +model.layers\[1\].norm.output\[0\]"),
    "model.layers[1].source.self_up_0[0]": (errors.BlockError, r"it has no items.*self_up_0.output$"),
    "tracer.iter[0].output": (errors.UnknownNameError, "these are steps.*for step in tracer.iter"),
    "model.layers.trace(x)": (errors.InputError, r"a ModuleList, which has no forward.*'layers.0'\).trace"),
    "tracer[1]": (errors.BlockError, r"may mean a prompt.*instead +tracer.rows\[1\] for the prompt; tracer.model\[1\]"),
    "tracer.cache().layers[1].output": (errors.NotCachedError, "has not called it so far.*behind the block"),
}


COMPUTED = (  # with `it`
    *("-it", "+it", "~it", "abs(it)", "round(it)", "float(it)", "int(it)", "complex(it)", "math.sqrt(it)"),
    *(
        "math.floor(it)",
        "math.ceil(it)",
        "it > 1",
        "it <= x",
        "x < it",
        "1 >= it",
        "it @ x",
        "it // 2",
        "it % 2",
        "2 % it",
    ),
    *("it & x", "1 | it", "it ^ 1", "it << 1", "divmod(it, 2)", "sorted([it, it])", "max(it, 1)", "f'{it:.2f}'"),
    *("'%.2f' % it", "numpy.ones(2) * it"),
)


@pytest.mark.parametrize("line", COMPUTED)
def test_what_has_values_and_is_none_is_told_from_them_in_whatever_is_computed(mlp, x, line):
    names = {"x": x, "math": math, "numpy": numpy}
    operation = mlp.layers[1].source.self_up_0
    with mlp.trace(x) as tracer:
        for it, text in [
            (mlp.layers[1].norm, r"`layers.1.norm` is a module, not a value: .*instead +model.layers\[1\].norm.output"),
            (tracer.model.head, r"`head` is a module, not a value: .*instead +model.head.output$"),
            (
                operation,
                r"`layers.1.source.self_up_0` is an operation.*instead +model.layers\[1\].source.self_up_0.output$",
            ),
        ]:
            with pytest.raises(errors.BlockError, match="(?s)" + text):
                exec(line, {**names, "it": it})


def test_a_module_is_equal_to_itself_has_a_hash_and_is_found_among_its_siblings(mlp, x):
    layers = mlp.layers
    assert layers[0] == layers[0] != layers[1]
    assert {layers[0]: 1}[layers[0]] == 1
    assert layers[1] in layers
    assert layers[1] not in layers[0]
    assert layers[1].norm in layers[1]
    assert "norm" in layers[1]
    assert f"{layers[1].norm}" == str(layers[1].norm)
    with mlp.trace(x) as tracer:
        assert tracer.layers[1] in tracer.layers
        assert tracer.layers[1] == tracer.model.layers[1] != mlp.layers[1]
        first, second, _ = tracer.rows
        assert first.layers[1] == tracer.rows[0].layers[1] != second.layers[1]
        assert {tracer.layers[1]: 1}[tracer.layers[1]] == 1
        assert layers[1].source.self_up_0 == layers[1].source[1] != layers[0].source.self_up_0
    with pytest.raises(TypeError, match=r"has no length; its value may: len\(model.head.output\)"):
        len(mlp.head)


@pytest.mark.parametrize("line", MISTAKES)
def test_a_slip_is_told_at_its_line_and_leaves_the_model_as_it_was(mlp, x, line, capfd):
    error, text = MISTAKES[line]
    before, scope = snapshots.of_model(mlp._module), {"model": mlp, "x": x}
    with pytest.raises(error, match="(?s)" + text) as raised:
        exec(f"with model.trace(x) as tracer:\n    {line}", scope)
    assert raised.traceback[1].lineno == 1
    assert snapshots.differences(before, snapshots.of_model(mlp._module)) == []
    assert capfd.readouterr() == ("", "")
    with mlp.trace(x):
        assert torch.equal(mlp.layers[1].output, mlp.layers[1].output)


def test_what_is_asked_of_an_invoke_that_was_not_entered_says_how_it_is(mlp, x):
    text = r"(?s)not entered.*with tracer.invoke\(...\) as a: a.layers"
    with pytest.raises(errors.UnknownNameError, match=text), mlp.trace() as tracer:
        tracer.invoke(x).layers


def test_modules_of_a_slice_are_a_list(mlp):
    assert mlp.layers[0:2] == [mlp.layers[0], mlp.layers[1]]
    assert not hasattr(mlp.layers[0:2], "output")
    assert repr(mlp.layers[0:2]).startswith("[Layer(")


OF_TUPLES = {
    "model.tuple.output[0] = x": (r"module.output = \(new,", "does not support item assignment"),
    "model.tuple.output += 1": (r"module.output\[0\]\[:\] = new", "can only concatenate tuple"),
    "(1, 2)[0] = 1": (None, "does not support item assignment"),
}


@pytest.mark.parametrize("line", OF_TUPLES)
def test_an_output_that_is_a_tuple_and_taken_for_a_tensor_is_explained(x, line, tmp_path):
    note, text = OF_TUPLES[line]
    path = tmp_path / "block.py"
    path.write_text(f"with model.trace(x):\n    {line}\n", encoding="utf-8")
    model = nnsight.NNsight(toys.Structured())
    with pytest.raises(TypeError, match=text) as raised:
        exec(compile(path.read_text("utf-8"), str(path), "exec"), {"model": model, "x": x})
    notes = getattr(raised.value, "__notes__", [])
    assert (notes == []) if note is None else re.search(note, *notes)


def test_the_result_of_a_stopped_trace_says_that_the_rest_was_left_out(mlp, x):
    with mlp.trace(x) as tracer:
        tracer.stop()
    with pytest.raises(errors.AlreadyPastError, match=r"instead +no tracer.stop\(\)"):
        tracer.result


@pytest.mark.parametrize(("what", "text"), [("gpt2", r"LanguageModel\('gpt2'\)"), (None, "wrapped already")])
def test_what_is_no_module_and_wrapped_says_what_to_do_with_it(mlp, what, text):
    with pytest.raises(TypeError, match="wraps a torch.nn.Module, not a .*" + text):
        nnsight.NNsight(what or mlp)


def test_a_rows_part_of_a_sparse_tensor_is_refused():
    class Sparse(torch.nn.Module):
        def forward(self, x):
            return x.to_sparse()

    model = nnsight.NNsight(torch.nn.Sequential(Sparse()))
    with pytest.raises(errors.RowError, match=r"its layout is torch\.sparse_coo"):
        with model.trace(torch.eye(3)) as tracer:
            tracer.rows[1].get("0").output


def test_a_module_whose_forward_is_called_past_its_call_is_told_so():
    class Past(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = toys.Pair()
            self.head = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.inner.forward(x))

    model = nnsight.NNsight(Past())
    with pytest.raises(
        errors.NeverCalledError, match=r"(?s)because +it was run without.*`inner.forward\(...\)`"
    ) as raised:
        with model.trace(torch.ones(1, 4)):
            model.inner.output
    assert re.search(r"instead +what is in it", str(raised.value))
    with model.trace(torch.ones(1, 4)):
        assert model.inner.first.output.shape == (1, 4)
    model.other = toys.Pair(*model._module.inner.children())  # not called, though what is in it is
    with pytest.raises(errors.NeverCalledError) as raised, model.trace(torch.ones(1, 4)):
        model.other.output
    assert "because" not in str(raised.value)


def test_of_a_list_of_lists_a_module_is_shown_that_is_called():
    class Listed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.h = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(4, 4)])])

        def forward(self, x):
            return self.h[0][0](x)

    model = nnsight.NNsight(Listed())
    with pytest.raises(errors.NeverCalledError, match=r"instead +model\.h\[0\]\[0\]\.output$"):
        with model.trace(torch.ones(1, 4)):
            model.h.output


def test_sizes_that_were_not_varied_are_not_told_of_an_axis_that_is_no_row():
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x.reshape(-1, 4)).view_as(x)

    model = nnsight.NNsight(Flat())
    with pytest.raises(
        errors.RowError, match=r"axis 0 follows neither rows nor tokens \(15 for 3 rows, 25 for 5 rows\)"
    ):
        with model.trace(torch.ones(2, 5, 4)) as tracer:
            tracer.rows[0].inner.output


BY_THE_BLOCK = {
    "model.sae(x); model.sae.encoder.output": r"called `sae` as a function.*model.sae\(..., hook=True\), and",
    "model.sae(x, hook=True); model.sae.encoder.output = x": r"own call of it is over.*in an edit that calls it",
    "model.sae.encoder(x); model.sae.output": r"it called   17 modules, `embed` first and `head` last$",
}


@pytest.mark.parametrize("line", BY_THE_BLOCK)
def test_a_value_in_a_module_that_the_block_called_says_how_it_is_had(mlp, x, line):
    mlp.sae = toys.SAE()
    with pytest.raises(errors.NeverCalledError, match="(?s)" + BY_THE_BLOCK[line]):
        exec(f"with model.trace(x):\n    {line}", {"model": mlp, "x": x})


def test_the_wrong_order_of_a_loop_says_which_comes_first(mlp, x):
    first = r"instead     `layers.1.output` first, in the order in which the model runs"
    with pytest.raises(errors.AlreadyPastError, match=first), mlp.trace(x):
        [layer.output for layer in mlp.layers[::-1]]
    with pytest.raises(errors.AlreadyPastError, match=r"read `layers.1.output` before that line"), mlp.trace(x):
        mlp.layers[2].output
        mlp.layers[1].output


def test_a_loop_that_means_steps_says_so():
    model = nnsight.LanguageModel("nnsight/demo")
    steps = r"instead +keep the value.*`for step in tracer.iter\[:\]:`"
    with pytest.raises(errors.AlreadyPastError, match=steps), model.generate("Rome is", max_new_tokens=2):
        for _ in range(2):
            model.transformer.h[3].output, model.transformer.h[5].output


def test_an_error_of_the_models_names_what_was_skipped(x):
    model = nnsight.NNsight(toys.Structured())
    with pytest.raises(ValueError, match="unpack") as raised, model.trace(x):
        model.tuple.skip(x)
        model.output
    note = raised.value.__notes__[0]
    assert note.endswith("model.tuple.skip(x)\n    skipped `tuple`, for which it gave [3, 4] float32")
