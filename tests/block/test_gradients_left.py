"""What backward blocks leave behind on a model, on torch and in memory: nothing; and gradients of larger models."""

import contextlib
import gc
import os
import pathlib
import subprocess
import sys
import weakref

import pytest
import torch
from snapshots import differences, of_model, of_modes, of_process

import nnsight
import toys
from comparing import same
from gradients_by_hooks import by_hand
from nnsight.core import origins
from nnsight.errors import (
    BlockError,
    GradientError,
    IndependentError,
)


@pytest.mark.parametrize("form", ["with", "function"])
def test_gradients_in_an_edit(mlp, x, switch, form):
    got = []
    if form == "with":
        with mlp.edit() as (_, edited):
            hidden = edited.layers[0].output
            loss = edited.layers[1].output.square().sum()
            with loss.backward(retain_graph=True):
                got.append(hidden.grad)
            got.append(nnsight.grad(loss, at=edited.layers[0], retain_graph=True))
    else:

        def edit(model):
            hidden = model.layers[0].output
            loss = model.layers[1].output.square().sum()
            with loss.backward(retain_graph=True):
                got.append(hidden.grad)
            got.append(nnsight.grad(loss, at=model.layers[0], retain_graph=True))

        edited = mlp.edit(edit)
    with edited.trace(x):
        early = edited.layers[0].output
        late = edited.layers[1].output
        (expected,) = torch.autograd.grad(late.square().sum(), early)
    same(got, [expected, expected])
    assert torch._C._len_torch_function_stack() == 0


def test_nothing_of_torch_changes_and_nothing_stays_on_the_model(mlp, x, switch):
    with mlp.trace(x):
        pass
    x.requires_grad_()
    before = of_model(mlp._module), of_process()
    with mlp.trace(x):
        hidden = mlp.layers[1].output
        loss = mlp.output.sum()
        inside = dict(vars(torch.Tensor))
        with loss.backward():
            hidden.grad
            mlp.layers[0].norm.weight.grad = torch.zeros(4)
            x.grad
            assert dict(vars(torch.Tensor)) == inside
    mlp._module.zero_grad()
    after = of_model(mlp._module), of_process()
    for one in (before[0], after[0]):
        for _, entry in one:
            for name in list(entry):
                if name.startswith("tensor"):
                    entry[name] = entry[name][:3]
    assert differences(before[0], after[0]) == []
    assert differences(before[1], after[1]) == []
    assert x._backward_hooks is None
    assert dict(vars(torch.Tensor)) == inside


def test_a_trace_that_names_no_backward_has_no_mode(mlp, x):
    with mlp.trace(x):
        assert torch._C._len_torch_function_stack() == 0
        mlp.output


def test_a_generator_that_ends_late_takes_its_mode_with_it(mlp, x, switch):
    def block():
        with mlp.trace(x):
            hidden = mlp.layers[1].output
            yield
            loss = hidden.sum()
            with loss.backward():
                hidden.grad

    before = of_modes()
    one, two = block(), block()
    next(one)
    next(two)
    one.close()
    two.close()
    assert differences(before, of_modes()) == []


def test_memory_is_freed_when_the_block_ends(x, switch):
    """Law 9, with the collector off: neither tensors nor passes stay, whether a block ends well or not."""
    seen = []

    def block(model, fails, asks):
        with model.trace(x):
            hidden = model.layers[1].output
            loss = model.output.sum()
            with loss.backward() as opened:
                if asks:
                    gradient = hidden.grad
                    seen.append(weakref.ref(gradient))
                seen.extend([weakref.ref(hidden), weakref.ref(loss), weakref.ref(opened._backward)])
                if fails:
                    raise ZeroDivisionError

    gc.collect()
    gc.disable()
    model = nnsight.NNsight(toys.MLP())
    try:
        for fails in (False, True):
            for asks in (False, True):
                with contextlib.suppress(ZeroDivisionError):
                    block(model, fails, asks)
        assert [one for one in seen if one() is not None] == []
        freed = weakref.ref(model._module)
        del model
        assert freed() is None
    finally:
        gc.enable()


def test_what_is_noted_of_tensors_is_forgotten_with_them(mlp, x):
    def block():
        with mlp.trace(x):
            [layer.output for layer in mlp.layers]
            if False:
                nnsight.grad(x, x)

    kept = []
    for _ in range(1000):
        block()
        kept.append(len(origins._noted))
    assert max(kept) < 1500


def test_a_dropped_generator_frees_its_backward_pass(x, switch):
    seen = []

    def block(model):
        with model.trace(x):
            hidden = model.layers[1].output
            loss = model.output.sum()
            with loss.backward() as opened:
                seen.extend([weakref.ref(hidden.grad), weakref.ref(hidden), weakref.ref(opened._backward)])
                yield

    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            model = nnsight.NNsight(toys.MLP())
            running = block(model)
            next(running)
            del running
            seen.append(weakref.ref(model._module))
            del model
        assert [one for one in seen if one() is not None] == []
    finally:
        gc.enable()
    assert torch._C._current_graph_task_id() == -1
    assert torch._C._len_torch_function_stack() == 0


def test_gradients_with_a_language_model():
    model = nnsight.LanguageModel("nnsight/demo")
    prompts = ["The Colosseum is in the city of", "Paris"]
    with model.trace(prompts):
        outputs = [layer.output for layer in model.transformer.h]
        hidden = [output[0] if isinstance(output, tuple) else output for output in outputs]  # transformers 5.2: a tuple
        logits = model.lm_head.output
        loss = logits[:, -1].logsumexp(-1).sum()
        expected = torch.autograd.grad(loss, hidden, retain_graph=True)
        with loss.backward():
            got = [value.grad for value in reversed(hidden)]
    for one, other in zip(got, reversed(expected)):
        same(one, other)


def test_gradients_of_a_row(switch):
    model = nnsight.LanguageModel("nnsight/demo")
    with model.trace(["The Colosseum is in the city of", "Paris is"]) as (one, other):
        left, right = one.transformer.h[3].output, other.transformer.h[5].output
        right, left = (value[0] if isinstance(value, tuple) else value for value in (right, left))
        loss = other.lm_head.output[0, -1].logsumexp(-1)
        (expected,) = torch.autograd.grad(loss, right, retain_graph=True)
        with loss.backward(retain_graph=True):
            got = right.grad
            of_the_other_row = left.grad
        with pytest.raises(BlockError, match="not of a row"):
            nnsight.grad(loss, at=other.transformer.h[5])
    same(got, expected)
    assert got.shape[1] == len(model.tokenizer("Paris is")["input_ids"])
    assert not of_the_other_row.any()


def test_generation_has_no_graph_and_says_what_to_do():
    model = nnsight.LanguageModel("nnsight/demo")
    with pytest.raises(GradientError, match=r"`generate` runs the model under torch\.no_grad\(\)(.|\n)*model\.trace"):
        with model.generate("The Colosseum is in the city of", max_new_tokens=2):
            loss = model.lm_head.output.sum()
            with loss.backward():
                pass
    with pytest.raises(GradientError, match="`generate` runs"):
        with model.generate("The Colosseum is in the city of", max_new_tokens=2):
            loss = model.lm_head.output.sum()
            nnsight.grad(loss, at=model.lm_head)


@pytest.mark.parametrize("how", ["block", "function", "plain call", "assigned", "copied"])
def test_a_value_changed_in_place_behind_its_use_says_to_assign_it(how):
    model = nnsight.LanguageModel("nnsight/demo")
    square = torch.nn.Linear(128, 128)
    is_right = how in ("assigned", "copied")
    with contextlib.ExitStack() as stack:
        if not is_right:
            raised = stack.enter_context(pytest.raises(RuntimeError, match="modified by an inplace operation"))
        with model.trace("Paris is"):
            layer = model.transformer.h[3].mlp
            had = layer.output.clone() if how == "copied" else layer.output
            features = square(had)
            if how == "assigned":
                layer.output = layer.output + features
            else:
                layer.output[:] = had + features
            loss = model.lm_head.output.sum()
            if how == "function":
                nnsight.grad(loss, square.weight)
            elif how == "plain call":
                loss.backward()
            else:
                with loss.backward():
                    gradient = features.grad
    if is_right:
        assert gradient.any()
    else:
        assert "Assign it, `layer.output = new`, or use a copy" in raised.value.__notes__[0]


@pytest.mark.slow
def test_no_program_of_nested_passes_and_errors_ends_the_process():
    """Law 11: errors of torch's in the engine, in the block and at depth, in a process of its own."""
    folder = pathlib.Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(folder.parent)])}
    done = subprocess.run(
        [sys.executable, str(folder / "fuzz_gradients.py"), "0", "120"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr[-2000:]


def test_behind_invokes_the_gradients_at_one_place_are_read_in_any_order(switch, mlp, x):
    with mlp.trace() as tracer:
        with tracer.invoke(x[:1]):
            one = mlp.layers[1].output
            first = mlp.output
        with tracer.invoke(x[1:]):
            other = mlp.layers[1].output
            second = mlp.output
    with nnsight.backward(first.square().sum() + second.square().sum()):
        gradients = [one.grad, other.grad]
    expected, _ = by_hand(mlp._module, x, ["layers.1"])
    assert torch.equal(torch.cat(gradients), expected["layers.1"])


def test_of_what_a_row_had_before_a_write_it_is_not_said_that_it_is_a_part(mlp, x):
    with mlp.trace(x) as (a, *_):
        before = a.layers[1].output
        a.layers[1].output = torch.zeros(1, 4)
        with pytest.raises(IndependentError, match="or what was there before a write"):
            nnsight.grad(a.tracer.result.sum(), [before])


@pytest.mark.parametrize("edited_by", ["model", "layer"])
def test_edits_are_at_work_while_a_backward_pass_is_paused(switch, mlp, x, edited_by):
    """Of something else, which another task on this thread may be in: torch has one engine call for both."""
    leaf = torch.ones(3, requires_grad=True)

    def double(layer):
        layer.output = layer.output * 2

    if edited_by == "model":
        mlp.edit(lambda model: double(model.layers[1]), inplace=True)
    else:
        mlp.layers[1].edit(double, inplace=True)
    expected = mlp(x)
    with mlp.trace(x) as tracer:
        mlp.layers[0].output
        with nnsight.backward((leaf * leaf).sum()):
            leaf.grad
            inside = tracer.result
    with mlp.trace(x) as tracer:
        mlp.layers[0].output
        with nnsight.backward((leaf * leaf).sum()):
            leaf.grad
            mlp.layers[1].up.output
        after = tracer.result
    assert torch.equal(inside, expected)
    assert torch.equal(after, expected)
    assert not torch.equal(expected, mlp._module(x))
