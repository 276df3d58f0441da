"""A denoiser that is left out in a step, and something else in its place: as a plain hook that exchanges its output."""

import pipes
from pipes import FLUX, OTHER, PROMPT, SHORT

import numpy as np
import pytest
import snapshots
import torch

from nnsight import DiffusionModel, LanguageModel, errors

pytestmark = [
    pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla:UserWarning"),  # some modules of diffusers
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),  # its schedulers
]
ZEROS = (torch.zeros(2, 4, 8, 8),)


@pytest.fixture(scope="module")
def pipeline():
    return pipes.stable_diffusion()


@pytest.fixture
def model(pipeline):
    found = DiffusionModel(pipeline)
    yield found
    found.clear_edits()


def by_hook(pipeline, change, prompt=PROMPT):
    """The images where a hook exchanges what the denoiser returns."""
    step = [-1]

    def hook(_, __, output):
        step[0] += 1
        return change(step[0], output)

    with pipeline.unet.register_forward_hook(hook):
        return pipeline(prompt, generator=torch.Generator().manual_seed(3), **SHORT).images


def images_of(model, in_step, prompt=PROMPT):
    with model.trace(prompt, seed=3, **SHORT) as tracer:
        for step in tracer.iter[:]:
            in_step(step)
        return tracer.result.images


def test_what_stands_for_a_step_is_what_the_pipeline_goes_on_with(pipeline, model):
    wanted = by_hook(pipeline, lambda step, _: ZEROS if step == 1 else None)
    before = snapshots.of_model(pipeline.unet)
    assert np.array_equal(images_of(model, lambda step: model.unet.skip(ZEROS) if step == 1 else None), wanted)
    assert snapshots.of_model(pipeline.unet) == before
    assert not np.array_equal(wanted, images_of(model, lambda _: None))


def test_its_forward_is_not_run_and_what_is_inside_says_so(pipeline, model):
    calls = []
    kept = {}

    def in_step(step):
        if step == 0:
            kept["first"] = model.unet.output
        else:
            model.unet.skip(kept["first"])

    with pipeline.unet.mid_block.register_forward_hook(lambda *_: calls.append(1)):
        reused = images_of(model, in_step)
    assert len(calls) == 1
    assert np.array_equal(reused, by_hook(pipeline, lambda step, _: kept["first"] if step else None))
    with pytest.raises(errors.NeverCalledError, match=r"`unet` above it was skipped"):
        images_of(model, lambda _: (model.unet.skip(ZEROS), model.unet.mid_block.output))


def test_it_may_be_made_of_its_input_and_is_read_as_its_output(model):
    shapes = []

    def in_step(_):
        model.unet.skip((model.unet.input * 0,))
        shapes.append(model.unet.output[0].shape)

    images_of(model, in_step)
    assert set(shapes) == {torch.Size([2, 4, 8, 8])}


def test_an_edit_skips_it_in_each_step_and_rows_and_invokes_skip_it_together(pipeline, model):
    wanted = by_hook(pipeline, lambda *_: ZEROS)
    model.unet.edit(lambda unet: unet.skip(ZEROS), inplace=True)
    assert np.array_equal(model.generate(PROMPT, seed=3, **SHORT).images, wanted)
    model.clear_edits()
    with model.trace([PROMPT, OTHER], seed=3, **SHORT) as (one, other):
        for _ in one.tracer.iter[:]:
            for row in (one, other):
                row.unet.skip(ZEROS)
        images = one.result.images
    np.testing.assert_allclose(images, wanted, atol=1e-5)
    with pytest.raises(errors.RowError, match="was not skipped for row 1"):
        with model.trace([PROMPT, OTHER], seed=3, **SHORT) as (one, _):
            for _ in one.tracer.iter[:]:
                one.unet.skip(ZEROS)


def test_a_tensor_for_the_tuple_that_it_is_called_for_is_refused(model):
    with pytest.raises(errors.WriteError, match=r"(?s)return_dict=False.*model.unet.skip\(\(value,\)\)"):
        images_of(model, lambda _: model.unet.skip(ZEROS[0]))


@pytest.mark.slow
def test_what_the_pipeline_comes_to_behind_its_steps_is_skipped_there_too(pipeline, model):
    zeros = torch.zeros(1, 4, 8, 8)
    with pipeline.vae.post_quant_conv.register_forward_hook(lambda *_: zeros):
        wanted = pipeline(PROMPT, generator=torch.Generator().manual_seed(3), **SHORT).images
    before = snapshots.of_model(pipeline.vae)
    with model.trace(PROMPT, seed=3, **SHORT) as tracer:
        for _ in tracer.iter[:]:
            pass
        model.vae.post_quant_conv.skip(zeros)
        images = tracer.result.images
    assert np.array_equal(images, wanted)
    assert snapshots.of_model(pipeline.vae) == before


def test_a_transformer_that_denoises_is_skipped_too():
    model = DiffusionModel(pipes.flux())
    with model.trace(PROMPT, seed=3, **FLUX) as tracer:
        for step in tracer.iter[:]:
            if step == 0:
                kept = model.transformer.output
            else:
                model.transformer.skip(kept)
        images = tracer.result.images
    assert np.isfinite(images).all()


def test_a_step_of_a_language_model_can_not_be_and_what_to_write_is_told():
    model = LanguageModel("nnsight/demo")
    text = r"(?s)the next one goes on from what it makes.*tracer.stop\(\)"
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    with pytest.raises(errors.WriteError, match=text), model.generate("Rome", **options) as tracer:
        for _ in tracer.iter[1:]:
            model.skip(torch.zeros(1))
