"""Gradient checkpointing: what is computed again in the backward pass is not changed, and says so at the line."""

import contextlib
import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import toys
from nnsight import NNsight
from nnsight.errors import WriteError

REENTRANT = pytest.mark.parametrize("reentrant", [False, True])
pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # torch, of a checkpoint in no_grad
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.* is deprecated"),
]


class Checkpointed(nn.Module):
    def __init__(self, reentrant, seed=0):
        super().__init__()
        self.inner = toys.seeded(toys.Layer(), seed)
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant) * 2


@pytest.fixture
def x():
    return torch.randn(3, toys.WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()


def assign(model):
    model.inner.up.output = model.inner.up.output * 2


def in_place(model):
    model.inner.up.output[:] = 0


def in_place_without_grad(model):
    with torch.no_grad():
        model.inner.up.output[:] = 0


def in_place_of_itself(model):
    model.inner.up.output *= 2


def assign_input(model):
    model.inner.down.input = model.inner.down.input * 2


def skip(model):
    model.inner.act.skip(model.inner.act.input * 2)


def operation(model):
    model.inner.source.self_up_0.output = model.inner.source.self_up_0.output * 2


WRITES = pytest.mark.parametrize(
    "write", [assign, in_place, in_place_without_grad, in_place_of_itself, assign_input, skip, operation]
)


@WRITES
@REENTRANT
def test_a_write_in_a_checkpoint_is_refused(write, reentrant, x, switch):
    model = NNsight(Checkpointed(reentrant))
    with pytest.raises(WriteError, match="backward pass computes again") as caught, model.trace(x):
        write(model)
    assert "gradient_checkpointing_disable" in str(caught.value)
    assert "model.inner" in str(caught.value)


@WRITES
@REENTRANT
def test_an_edit_in_a_checkpoint_is_refused(write, reentrant, x, switch):
    edited = NNsight(Checkpointed(reentrant)).edit(write)
    with pytest.raises(WriteError, match="backward pass computes again"):
        edited(x)
    with pytest.raises(WriteError, match="backward pass computes again"), edited.trace(x):
        pass


@REENTRANT
def test_an_edit_of_a_module_in_a_checkpoint_is_refused(reentrant, x, switch):
    model = NNsight(Checkpointed(reentrant))

    @model.inner.edit(inplace=True)
    def doubled(inner):
        inner.up.output = inner.up.output * 2

    with pytest.raises(WriteError, match="backward pass computes again"):
        model(x)


@REENTRANT
def test_a_row_and_an_invoke_write_in_a_checkpoint_are_refused(reentrant, x, switch):
    model = NNsight(Checkpointed(reentrant))
    with pytest.raises(WriteError, match="backward pass computes again"):
        with model.trace(x) as (_, second, _):
            second.inner.up.output = second.inner.up.output * 2
    with pytest.raises(WriteError, match="backward pass computes again"):
        with model.trace(x) as (_, second, _):
            second.inner.up.output[:] = 0
    with pytest.raises(WriteError, match="backward pass computes again"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.inner.up.output = model.inner.up.output * 2
    with pytest.raises(WriteError, match="backward pass computes again"):
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.inner.up.output[:] = 0


@REENTRANT
def test_a_change_in_a_checkpoint_of_what_was_had_before_is_refused(reentrant, x, switch):
    model = NNsight(Checkpointed(reentrant))
    with (
        pytest.raises(WriteError, match=r"(?s)`inner\.up\.output` can't.*what was had at .*up = model") as caught,
        model.trace(x),
    ):
        up = model.inner.up.output
        model.inner.act.output
        with torch.no_grad():
            up.mul_(2)
        model.inner.down.output
    assert "model.inner.down.output" not in str(caught.value)


@REENTRANT
def test_behind_a_checkpoint_what_was_had_in_it_is_the_blocks_own(reentrant, x, switch):
    model = NNsight(nn.Sequential(Checkpointed(reentrant), Checkpointed(reentrant, seed=1)))
    model._module(x).sum().backward()
    wanted, x.grad = x.grad, None
    with model.trace(x):
        up = model[0].inner.up.output
        model[0].output
        with torch.no_grad():
            up.mul_(2)
        model[1].inner.up.output
        loss = model.output.sum()
    loss.backward()
    assert torch.equal(x.grad, wanted)


class ChangesItself(Checkpointed):
    """Changes in place, in its checkpoint, what the block had in it."""

    def forward(self, x):
        return checkpoint(self.within, x, use_reentrant=self.reentrant)

    def within(self, x):
        up = self.inner.up(x)
        up *= 2
        return self.inner.down(self.inner.act(up))


@REENTRANT
def test_what_the_model_changes_in_a_checkpoint_itself_is_no_change_of_the_blocks(reentrant, x, switch):
    model = NNsight(ChangesItself(reentrant))
    with model.trace(x):
        model.inner.up.output
        model.inner.act.output
        model.inner.down.output
        assert model.output.shape == (3, toys.WIDTH)


@REENTRANT
def test_a_refused_change_that_is_caught_is_refused_again(reentrant, x):
    model = NNsight(Checkpointed(reentrant))
    with pytest.raises(WriteError, match="changed in place"), model.trace(x):
        model.inner.up.output[:] = 0
        with pytest.raises(WriteError):
            model.inner.act.output


@WRITES
@REENTRANT
def test_without_gradients_a_checkpoint_is_written_in_as_elsewhere(write, reentrant, x, switch):
    module = Checkpointed(reentrant)
    plain = NNsight(copy.deepcopy(module))
    plain._module.forward = lambda x: plain._module.inner(x) * 2
    with torch.no_grad():
        with NNsight(module).trace(x.detach()) as tracer:
            write(tracer.model)
            got = tracer.result
        with plain.trace(x.detach()) as tracer:
            write(tracer.model)
            wanted = tracer.result
    assert torch.equal(got, wanted)


@REENTRANT
def test_reading_in_a_checkpoint_and_writing_back_change_nothing(reentrant, x, switch):
    module = Checkpointed(reentrant)
    module(x).sum().backward()
    wanted = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    model = NNsight(module)
    with model.trace(x):
        model.inner.up.output = model.inner.up.output
        model.inner.act.output
        loss = model.output.sum()
    loss.backward()
    for parameter, gradient in zip(module.parameters(), wanted, strict=True):
        assert torch.equal(parameter.grad, gradient)


class _KeepsAsBefore(torch.utils.checkpoint._CheckpointFrame):
    """Keeps its inputs as torch did in 2.11: in the graph node of a tensor that has no values."""

    input_saver = None

    def save_inputs(self, *args):
        super().save_inputs(*args)
        self.input_saver = torch.empty(0, requires_grad=True).view(0)


@pytest.mark.parametrize("grad", [False, True])
def test_a_checkpoint_is_known_by_what_an_older_torch_keeps(grad, x, monkeypatch):
    if hasattr(torch.utils.checkpoint, "_NoopSaveInputs"):
        pytest.skip("this torch is as old")
    monkeypatch.setattr(torch.utils.checkpoint, "_CheckpointFrame", _KeepsAsBefore)
    refused = pytest.raises(WriteError, match="computes again") if grad else contextlib.nullcontext()
    model = NNsight(Checkpointed(reentrant=False))
    with torch.set_grad_enabled(grad), refused, model.trace(x):
        assign(model)
        model.output


def test_a_model_that_fails_in_a_checkpoint_leaves_no_hooks_to_either_side(x, switch):
    """Nor does its error, for as long as that is kept and when it is given up."""

    class Fails(nn.Module):
        def forward(self, x):
            return checkpoint(self.fail, x, use_reentrant=False)

        def fail(self, x):
            raise ValueError("in a checkpoint")

    module = nn.Sequential(nn.Tanh(), Fails())
    model, packed = NNsight(module), []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: packed.append(kept) or kept, lambda kept: kept):
        with pytest.raises(ValueError, match="in a checkpoint") as caught, model.trace(x):
            model[0].output
            model.output
        before = len(packed)
        x.exp()
        del caught
        x.exp()
        assert len(packed) == before + 2
    x.exp()
    assert len(packed) == before + 2


@REENTRANT
def test_a_write_outside_of_the_checkpoint_has_the_gradients_of_a_plain_hook(reentrant, x, switch):
    hooked = Checkpointed(reentrant)
    hooked.register_forward_hook(lambda _, __, output: output * 3)
    hooked(x).sum().backward()
    module = Checkpointed(reentrant)
    model = NNsight(module)
    with model.trace(x):
        model.output = model.output * 3
        loss = model.output.sum()
    loss.backward()
    for parameter, wanted in zip(module.parameters(), hooked.parameters(), strict=True):
        assert torch.equal(parameter.grad, wanted.grad)


def test_the_output_of_what_is_checkpointed_is_written_with_the_right_gradients(x, switch):
    hooked = Checkpointed(reentrant=False)
    hooked.inner.register_forward_hook(lambda _, __, output: output * 3)
    hooked(x).sum().backward()
    module = Checkpointed(reentrant=False)
    model = NNsight(module)
    with model.trace(x):
        model.inner.output = model.inner.output * 3
        loss = model.output.sum()
    loss.backward()
    for parameter, wanted in zip(module.parameters(), hooked.parameters(), strict=True):
        assert torch.equal(parameter.grad, wanted.grad)


def test_an_edited_model_may_be_called_in_a_checkpoint_which_runs_its_edits_again(x, switch):
    model = NNsight(toys.seeded(toys.Layer()))
    edited = model.edit(lambda layer: setattr(layer.up, "output", layer.up.output * 2))
    plain = copy.deepcopy(model._module)
    plain.up.register_forward_hook(lambda _, __, output: output * 2)
    plain(x).sum().backward()
    checkpoint(edited, x, use_reentrant=False).sum().backward()
    for parameter, wanted in zip(model._module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, wanted.grad)


@REENTRANT
def test_a_model_of_transformers_that_is_checkpointed_says_so(reentrant):
    from nnsight import LanguageModel

    model = LanguageModel("nnsight/demo", dispatch=True)
    model._module.train()
    model._module.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model._module.enable_input_require_grads()
    with pytest.raises(WriteError, match="backward pass computes again"), model.trace("The Eiffel Tower"):
        model.transformer.h[2].mlp.output = model.transformer.h[2].mlp.output * 2
    if not reentrant:  # otherwise it depends on what transformers checkpoints, a layer or its forward
        with model.trace("The Eiffel Tower"):
            model.transformer.h[2].output = model.transformer.h[2].output * 2
            model.output.logits.sum().backward()
    with torch.no_grad(), model.trace("The Eiffel Tower"):
        model.transformer.h[2].mlp.output = model.transformer.h[2].mlp.output * 2
    model._module.gradient_checkpointing_disable()
    with model.trace("The Eiffel Tower"):
        model.transformer.h[2].mlp.output = model.transformer.h[2].mlp.output * 2


def test_a_part_with_an_edit_may_be_called_in_a_checkpoint_of_the_block(x, switch):
    """By the name of a scope, too: the edit is run again with the part, and nothing of it is missing."""
    edited = NNsight(toys.MLP()).layers[0].edit(lambda layer: setattr(layer, "output", layer.output * 2)).root
    given = x.detach().clone().requires_grad_()
    with edited.trace(x) as tracer:
        call = functools.partial(tracer.model.layers[0], hook=True)
        checkpoint(call, given, use_reentrant=False).sum().backward()
    by_hand = x.detach().clone().requires_grad_()
    (edited._module.layers[0](by_hand) * 2).sum().backward()
    assert torch.equal(given.grad, by_hand.grad)


@REENTRANT
def test_what_was_had_in_a_part_that_is_over_may_be_changed_in_the_next(x, reentrant):
    model = NNsight(nn.Sequential(Checkpointed(reentrant, 0), Checkpointed(reentrant, 1)))
    model._module(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in model._module.parameters()]
    model._module.zero_grad()
    with model.trace(x):
        before = model[0].inner.up.output
        model[1].inner.up.output
        with torch.no_grad():
            before.mul_(2)
        model.output.sum().backward()
    for parameter, wanted in zip(model._module.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, wanted)


def test_the_input_of_a_part_is_not_changed_while_the_model_is_in_it(x):
    """A checkpoint that is reentrant keeps it at its end, where torch would not see the change."""
    model = NNsight(nn.Sequential(nn.Linear(toys.WIDTH, toys.WIDTH), Checkpointed(True)))
    with pytest.raises(WriteError, match="backward pass computes again"), model.trace(x):
        before = model[0].output
        model[1].inner.down.output
        with torch.no_grad():
            before.mul_(2)
        model.output
