"""Pipelines of diffusers: traced as a whole, in denoising steps, with the rows of each prompt under guidance."""

import inspect
import pipes
from pipes import FLUX, OTHER, PROMPT, SHORT

import diffusers
import numpy as np
import pytest
import snapshots
import torch
from torch import nn

import nnsight
from nnsight import DiffusionModel, NNsight, errors

pytestmark = [
    pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla:UserWarning"),  # some modules of diffusers
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),  # its schedulers
]


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipeline():
    return pipes.stable_diffusion()


@pytest.fixture(scope="module")
def shared(pipeline):
    return DiffusionModel(pipeline)


@pytest.fixture
def model(shared):
    yield shared
    shared.clear_edits()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pipeline):
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


def by_hooks(pipeline, path, prompt=PROMPT, *, change=None, seed=3, **options):
    """The outputs of a module in all its calls, and the images."""
    seen = []

    def hook(_, __, output):
        seen.append(output)
        return None if change is None else change(output, len(seen) - 1)

    part, _, inner = path.partition(".")
    module = getattr(pipeline, part)
    handle = (module.get_submodule(inner) if inner else module).register_forward_hook(hook)
    try:
        return seen, pipeline(prompt, generator=seeded(seed), **{**SHORT, **options}).images
    finally:
        handle.remove()


# A run is the pipeline's.


def test_traced_or_not_the_images_are_the_pipelines_bit_for_bit(pipeline, model):
    plain = pipeline(PROMPT, generator=seeded(), **SHORT).images
    before = [snapshots.of_model(part) for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)]
    for start in (model.trace, model.generate):
        with start(PROMPT, seed=3, **SHORT) as tracer:
            for _ in tracer.iter[:]:
                model.unet.mid_block.output
            model.vae.decoder.output
            result = tracer.result
        assert isinstance(result, diffusers.pipelines.stable_diffusion.StableDiffusionPipelineOutput)
        assert np.array_equal(result.images, plain)
    assert np.array_equal(model.generate(PROMPT, seed=3, **SHORT).images, plain)
    assert np.array_equal(model(PROMPT, generator=seeded(), **SHORT).images, plain)
    with model.trace(PROMPT, generator=seeded(), **SHORT):
        output = model.output
    assert np.array_equal(output.images, plain)
    assert [snapshots.of_model(part) for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)] == before


SCHEDULERS = {
    "PNDM": (lambda: diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1), 4),
    "multistep": (lambda: diffusers.DPMSolverMultistepScheduler(steps_offset=1), 3),
    "two calls a step": (lambda: diffusers.HeunDiscreteScheduler(steps_offset=1), 5),
    "random": (lambda: diffusers.EulerAncestralDiscreteScheduler(steps_offset=1), 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_remembers_earlier_steps_is_not_disturbed(name):
    make, calls = SCHEDULERS[name]
    pipeline = pipes.stable_diffusion(make())
    model, plain = DiffusionModel(pipeline), pipeline(PROMPT, generator=seeded(), **SHORT).images
    with model.trace([PROMPT, OTHER], seed=3, **SHORT) as (row, _):
        steps = []
        for step in row.tracer.iter[:]:
            row.unet.mid_block.output
            steps.append(step)
        images = row.result.images
    assert steps == list(range(calls))
    np.testing.assert_allclose(images, plain, atol=1e-5)
    with model.trace(PROMPT, seed=3, **SHORT) as tracer:
        for _ in tracer.iter[1]:
            tracer.stop()
    assert np.array_equal(model.generate(PROMPT, seed=3, **SHORT).images, plain)


@pytest.mark.slow
def test_as_many_steps_inside_a_with_as_outside(model, pipeline):
    default = inspect.signature(pipeline.__call__).parameters["num_inference_steps"].default
    assert default == 50
    for start in (model.trace, model.generate):
        with start(PROMPT, height=16, width=16, output_type="latent") as tracer:
            cache = tracer.cache("unet.time_embedding")
        assert len(cache.unet.time_embedding) == default


# Steps.


def test_each_step_is_read_as_a_hook_sees_it(pipeline, model):
    seen, plain = by_hooks(pipeline, "unet.mid_block")
    texts, _ = by_hooks(pipeline, "text_encoder")
    images, _ = by_hooks(pipeline, "vae.decoder")
    with model.generate(PROMPT, seed=3, **SHORT) as tracer:
        prompt = model.text_encoder.output[0]
        nothing = model.text_encoder.next().output[0]
        read = []
        for step in tracer.iter[:]:  # noqa: B007
            read.append(model.unet.mid_block.output)
        latents = model.vae.decoder.input
        image = model.vae.decoder.output
        result = tracer.result
    assert step == 2
    assert torch.equal(prompt, texts[0][0])
    assert torch.equal(nothing, texts[1][0])
    assert all(torch.equal(one, other) for one, other in zip(read, seen, strict=True))
    assert latents.shape == (1, 4, 8, 8)
    assert torch.equal(image, images[0])
    assert np.array_equal(result.images, plain)


def test_a_write_in_one_step_is_that_of_a_hook(pipeline, model):
    _, plain = by_hooks(pipeline, "unet.mid_block", change=lambda value, step: value * 2 if step == 1 else None)
    with model.trace(PROMPT, seed=3, **SHORT) as tracer:
        for _ in tracer.iter[1]:
            model.unet.mid_block.output = model.unet.mid_block.output * 2
        images = tracer.result.images
    assert np.array_equal(images, plain)
    _, plain = by_hooks(pipeline, "vae.decoder", change=lambda value, _: value.flip(-1))
    with model.trace(PROMPT, seed=3, **SHORT) as tracer:
        model.vae.decoder.output = model.vae.decoder.output.flip(-1)
        images = tracer.result.images
    assert np.array_equal(images, plain)
    names = [name for name, _ in pipeline.text_encoder.named_modules() if name.endswith("layers.0")]
    path = f"text_encoder.{names[0]}"
    _, plain = by_hooks(pipeline, path, change=lambda value, call: value * 0)
    with model.trace(PROMPT, seed=3, **SHORT) as tracer:
        layer = model.get(path)
        for call in range(2):
            value = (layer.next() if call else layer).output
            value[:] = 0
        images = tracer.result.images
    assert np.array_equal(images, plain)


@pytest.mark.slow
def test_what_is_behind_the_steps_needs_no_loop_and_what_is_in_them_is_past_there(model):
    with model.trace(PROMPT, seed=3, **SHORT):
        first = model.unet.conv_in.output
        image = model.vae.decoder.output
    assert first.shape == (2, 8, 8, 8)
    assert image.shape == (1, 3, 16, 16)
    with pytest.raises(errors.AlreadyPastError, match=r"(?s)`unet.conv_in.output` is past.*it stood +at `vae.decoder"):
        with model.trace(PROMPT, seed=3, **SHORT):
            model.vae.decoder.output
            model.unet.conv_in.output
    with pytest.raises(errors.AlreadyPastError, match=r"(?s)`unet.conv_in.output` is past.*step +1"):
        with model.trace(PROMPT, seed=3, **SHORT) as tracer:
            for _ in tracer.iter[1]:
                model.unet.conv_out.output
                model.unet.conv_in.output
    with pytest.raises(errors.AlreadyPastError, match="Step 0 is past"):
        with model.trace(PROMPT, seed=3, **SHORT) as tracer:
            for _ in tracer.iter[:]:
                model.unet.conv_out.output
            for _ in tracer.iter[:]:
                model.unet.conv_out.output


def test_what_can_not_be_had_any_more_says_where_it_was(model):
    with pytest.raises(
        errors.AlreadyPastError, match=r"(?s)`text_encoder.output` is past.*it came +before the first step"
    ):
        with model.trace(PROMPT, seed=3, **SHORT):
            model.unet.conv_in.output
            model.text_encoder.output
    with pytest.raises(
        errors.NeverCalledError, match=r"(?s)`vae.output` has no value.*`vae.decoder`.*model.vae.decoder"
    ):
        with model.trace(PROMPT, seed=3, **SHORT):
            model.vae.output
    with pytest.raises(errors.NeverCalledError, match=r"(?s)`vae.encoder.output` has no value.*nothing of it"):
        with model.trace(PROMPT, seed=3, **SHORT):
            model.vae.encoder.output
    with pytest.raises(
        errors.AlreadyPastError, match=r"(?s)`vae.decoder.conv_in.output` is past.*behind the last step"
    ):
        with model.trace(PROMPT, seed=3, **SHORT):
            model.vae.decoder.conv_out.output
            model.vae.decoder.conv_in.output
    with pytest.raises(errors.BlockError, match=r"(?s)nothing says how many steps.*instead +break in"):
        with model.trace(PROMPT, seed=3, **SHORT) as tracer:
            list(tracer.iter[-1])
    with pytest.raises(
        errors.GradientError, match=r"(?s)a pipeline runs its parts under torch.no_grad.*model.unet.trace"
    ):
        with model.trace(PROMPT, seed=3, **SHORT):
            nnsight.grad(model.unet.output[0].sum(), [model.unet.output[0]])


def test_a_loop_is_chosen_left_and_stopped(model):
    with model.trace(PROMPT, seed=3, **SHORT) as tracer:
        seen = [(step, model.unet.time_embedding.output.sum().item()) for step in tracer.iter[::2]]
        image = model.vae.decoder.output
    assert [step for step, _ in seen] == [0, 2]
    assert image.shape == (1, 3, 16, 16)
    with model.trace(PROMPT, seed=3, **SHORT) as tracer:
        for step in tracer.iter[:]:
            if step == 1:
                break
        hidden = model.unet.conv_in.output
        image = model.vae.decoder.output
    assert hidden.shape == (2, 8, 8, 8)


def test_a_cache_knows_the_steps(pipeline, model):
    seen, _ = by_hooks(pipeline, "unet.mid_block")
    with model.trace(PROMPT, seed=3, **SHORT) as tracer:
        cache = tracer.cache(["unet.mid_block", "vae.decoder", "text_encoder"])
    assert [visit.step for visit in cache.unet.mid_block.visits] == [0, 1, 2]
    assert all(torch.equal(one, other) for one, other in zip(cache.unet.mid_block.outputs, seen, strict=True))
    assert len(cache.text_encoder) == 2


def test_a_part_that_is_called_between_steps_is_not_their_end(pipeline):
    control = diffusers.ControlNetModel(**pipes.UNET, conditioning_embedding_out_channels=(8, 8)).eval()
    model = DiffusionModel(pipes.stable_diffusion(kind=diffusers.StableDiffusionControlNetPipeline, controlnet=control))
    with model.trace(PROMPT, image=torch.zeros(1, 3, 16, 16), seed=3, **SHORT) as tracer:
        cache = tracer.cache("controlnet")
        steps = [step for step in tracer.iter[:] if model.unet.mid_block.output is not None]
        image = model.vae.decoder.output
    assert steps == [0, 1, 2]
    assert len(cache.controlnet) == 3
    assert image.shape == (1, 3, 16, 16)


def test_a_part_that_comes_late_between_steps_is_learned(model):
    late = torch.nn.Linear(1, 1)
    model.late = late  # on the wrapper alone

    def between(_, step, __, values):
        if step == 0:
            late(torch.zeros(1))
        return values

    def run():
        with model.trace(PROMPT, seed=3, callback_on_step_end=between, **SHORT) as tracer:
            return list(tracer.iter[:])

    with pytest.raises(errors.BlockError, match=r"(?s)A Linear is called between two steps.*known from now on"):
        run()
    assert run() == [0, 1, 2]
    del model.late


@pytest.mark.slow
def test_two_runs_of_one_pipeline_at_once_have_a_scheduler_each():
    pipeline = pipes.stable_diffusion(diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1))
    model, long = DiffusionModel(pipeline), {**SHORT, "num_inference_steps": 5}
    alone = [model.generate(PROMPT, seed=3, **SHORT).images, model.generate(OTHER, seed=4, **long).images]
    with model.trace(PROMPT, seed=3, **SHORT) as one, model.trace(OTHER, seed=4, **long) as other:
        for step in other.iter[:3]:
            if step == 0:
                one.model.unet.mid_block.output
            other.model.unet.mid_block.output
        for _ in one.iter[1:]:
            one.model.unet.mid_block.output
        images = one.result.images, other.result.images
    assert np.array_equal(images[0], alone[0])
    assert np.array_equal(images[1], alone[1])
    assert len(pipeline.scheduler.timesteps) == 4
    assert np.array_equal(model.generate(PROMPT, seed=3, **SHORT).images, alone[0])


# Rows.


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_each_prompt_has_its_rows_of_both_halves(pipeline, model, images, guidance):
    options = {"num_images_per_prompt": images, "guidance_scale": guidance}
    halves = 2 if guidance > 1 else 1
    batch = 2 * images
    with model.trace([PROMPT, OTHER], seed=3, **SHORT, **options) as (one, other):
        text = other.text_encoder.output[0]
        for step in one.tracer.iter[:]:  # noqa: B007
            whole = one.tracer.model.unet.mid_block.output
            first, second = one.unet.mid_block.output, other.unet.mid_block.output
            own = [half * batch + image for half in range(halves) for image in range(images)]
            assert torch.equal(first, whole[own])
            assert torch.equal(second, whole[[row + images for row in own]])
        image = other.vae.decoder.output
        results = [one.result.images, other.result.images]
    assert step == 2
    assert text.shape == (1, 16, 16)
    assert image.shape == (images, 3, 16, 16)
    for row, prompt in enumerate((PROMPT, OTHER)):
        generators = [seeded(3 + row * images + image) for image in range(images)]
        alone = pipeline(prompt, generator=generators, **SHORT, **options).images
        np.testing.assert_allclose(results[row], alone, atol=1e-5)


@pytest.mark.parametrize("how", ["assigned", "in place"])
@pytest.mark.parametrize("images", [1, 2])
def test_a_row_writes_its_rows_of_both_halves(pipeline, model, images, how):
    options = {"num_images_per_prompt": images}
    own = [half * 2 * images + images + image for half in range(2) for image in range(images)]

    def change(value, _):
        value = value.clone()
        value[own] = value[own] * 2 + 1
        return value

    generators = [seeded(3 + image) for image in range(2 * images)]
    handle = pipeline.unet.mid_block.register_forward_hook(lambda _, __, value: change(value, None))
    plain = pipeline([PROMPT, OTHER], generator=generators, **SHORT, **options).images
    handle.remove()
    with model.trace([PROMPT, OTHER], seed=3, **SHORT, **options) as (one, other):
        for _ in one.tracer.iter[:]:
            if how == "assigned":
                other.unet.mid_block.output = other.unet.mid_block.output * 2 + 1
            else:
                value = other.unet.mid_block.output
                value *= 2
                value += 1
        result = one.tracer.result.images
    assert np.array_equal(result, plain)


def test_invokes_have_their_prompts_and_images(pipeline, model):
    with model.trace(num_images_per_prompt=2, **SHORT) as tracer:
        with tracer.invoke(PROMPT, seed=3) as row:
            a, image = model.unet.mid_block.output, model.vae.decoder.output
            first = row.result.images
        with tracer.invoke([OTHER, PROMPT], seed=9, negative_prompt="dull"):
            hidden = [model.unet.mid_block.output for _ in tracer.iter[:]]
            second = tracer.result.images
        with tracer.invoke():
            whole = model.unet.mid_block.output
    assert a.shape[0] == 4
    assert image.shape[0] == 2
    assert [one.shape[0] for one in hidden] == [8] * 3
    assert whole.shape[0] == 12
    alone = pipeline(PROMPT, generator=[seeded(3), seeded(4)], num_images_per_prompt=2, **SHORT).images
    np.testing.assert_allclose(first, alone, atol=1e-5)
    generators = [seeded(9 + image) for image in range(4)]
    alone = pipeline(
        [OTHER, PROMPT], negative_prompt=["dull"] * 2, generator=generators, num_images_per_prompt=2, **SHORT
    ).images
    np.testing.assert_allclose(second, alone, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (
            {"guidance_scale": 2.0},
            {"guidance_scale": 3.0},
            r"(?s)`guidance_scale` holds for the whole.*2\.0, 3\.0",
        ),
        ({"seed": 3}, {}, "1 of 2 invokes have `seed`"),
        ({"generator": seeded()}, {"generator": seeded()}, "(?s)draws for one image after the other.*seed="),
    ],
)
def test_what_invokes_of_a_pipeline_do_not_have_in_common_is_told(model, first, second, says):
    with pytest.raises(errors.InputError, match=says):
        with model.trace(num_images_per_prompt=2, **{**SHORT, "num_inference_steps": 1}) as tracer:
            with tracer.invoke(PROMPT, **first):
                pass
            with tracer.invoke([OTHER, OTHER], **second):
                pass


def test_a_row_of_what_has_none_is_refused(model):
    with pytest.raises(errors.RowError, match=r"(?s)The rows of `model` aren't known.*row.result"):
        with model.trace([PROMPT, OTHER], seed=3, **SHORT) as (row, _):
            row.output
    with pytest.raises(errors.RowError, match=r"can't be assigned"):
        with model.trace([PROMPT, OTHER], seed=3, **SHORT) as (row, _):
            row.result = None
    with pytest.raises(errors.InputError, match=r"`guidance_scale` holds for the whole batch"):
        with model.trace(**SHORT) as tracer:
            with tracer.invoke(PROMPT, guidance_scale=2.0):
                model.unet.output
            with tracer.invoke(OTHER, guidance_scale=3.0):
                model.unet.output


# Edits, scans, parts.


def test_an_edit_of_the_denoiser_is_at_work_in_each_step(pipeline, model):
    _, plain = by_hooks(pipeline, "unet.mid_block", change=lambda value, _: value * 0)
    model.unet.edit(lambda unet: setattr(unet.mid_block, "output", unet.mid_block.output * 0), inplace=True)
    assert np.array_equal(model.generate(PROMPT, seed=3, **SHORT).images, plain)
    assert np.array_equal(model(PROMPT, generator=seeded(), **SHORT).images, plain)
    model.clear_edits()
    assert not np.array_equal(model.generate(PROMPT, seed=3, **SHORT).images, plain)


def test_an_edit_knows_its_step_and_one_of_the_whole_is_for_what_is_outside_of_steps(pipeline, model):
    _, plain = by_hooks(pipeline, "unet.mid_block", change=lambda value, step: value * 0 if step == 1 else None)

    def in_one_step(tracer, unet):
        if tracer.step == 1:
            unet.mid_block.output = unet.mid_block.output * 0

    model.unet.edit(in_one_step, inplace=True)
    assert np.array_equal(model.generate(PROMPT, seed=3, **SHORT).images, plain)
    model.clear_edits()

    _, plain = by_hooks(pipeline, "vae.decoder", change=lambda value, _: value.flip(-1))
    edited = model.edit(lambda m: setattr(m.vae.decoder, "output", m.vae.decoder.output.flip(-1)))
    assert np.array_equal(edited.generate(PROMPT, seed=3, **SHORT).images, plain)

    with model.edit() as edited:
        edited.unet.mid_block.output[:] = 0
    for run in (edited.generate, edited.trace, edited):
        with pytest.raises(errors.BlockError, match=r"(?s)runs once, and this one asks for `unet`.*model.unet.edit"):
            run(PROMPT, **SHORT)


@pytest.mark.slow
def test_a_scan_has_the_shapes_and_runs_nothing(pipeline, model):
    called = []
    handle = pipeline.unet.register_forward_pre_hook(lambda *_: called.append(1))
    with model.scan([PROMPT, OTHER]) as tracer:
        hidden, image = model.unet.mid_block.output, model.vae.decoder.output
        result = tracer.result.images
    handle.remove()
    assert hidden.shape == (4, 16, 4, 4)
    assert image.shape == result.shape == (2, 3, 16, 16)
    assert not called
    assert type(pipeline.scheduler) is diffusers.DDIMScheduler


@pytest.mark.slow
def test_one_part_is_traced_alone_and_has_gradients(model):
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with model.unet.trace(sample, torch.tensor(3), text) as (one, _):
        hidden = one.mid_block.output
        (grad,) = nnsight.grad(one.result[0].sum(), [hidden])
    assert hidden.shape == grad.shape == (1, 16, 4, 4)


def test_another_part_in_the_place_of_one_is_the_pipelines_too():
    model = DiffusionModel(pipes.stable_diffusion())
    other = pipes.unet()
    model.unet = other
    assert model.pipeline.unet is other
    plain = model.pipeline(PROMPT, generator=seeded(), **SHORT).images
    with model.trace(PROMPT, seed=3, **SHORT) as tracer:
        hidden = model.unet.mid_block.output
        images = tracer.result.images
    assert hidden.shape == (2, 16, 4, 4)
    assert np.array_equal(images, plain)


# Other pipelines.


@pytest.mark.slow
def test_a_transformer_is_a_denoiser_too(tmp_path):
    pipeline = pipes.flux()
    pipeline.save_pretrained(tmp_path)
    model = DiffusionModel(tmp_path)
    assert not model.dispatched
    with model.scan(PROMPT, **{name: value for name, value in FLUX.items() if name != "output_type"}):
        shapes = [part.shape for part in model.transformer.transformer_blocks[0].output]
    assert not model.dispatched
    assert shapes == [(1, 16, 32)] * 2
    model.dispatch()
    pipeline = pipes.quiet(model.pipeline)
    alone = pipeline(OTHER, generator=[seeded(5), seeded(6)], num_images_per_prompt=2, **FLUX).images
    with model.trace([PROMPT, OTHER], num_images_per_prompt=2, seed=3, **FLUX) as (one, other):
        text = one.text_encoder_2.output[0]
        for step in one.tracer.iter[:]:  # noqa: B007
            read = other.transformer.single_transformer_blocks[0].output
        image, result = other.vae.decoder.output, other.result.images
    assert step == 1
    assert text.shape == (1, 16, 32)
    assert read[0].shape[0] == image.shape[0] == 2
    np.testing.assert_allclose(result, alone, atol=1e-5)


@pytest.mark.slow
def test_a_pipeline_without_prompts_has_a_batch_size():
    pipeline = pipes.unconditional()
    model, plain = DiffusionModel(pipeline), pipeline(generator=[seeded(3), seeded(4)], batch_size=2, **SHORT).images
    with model.trace(batch_size=2, seed=3, **SHORT) as (_, row):
        for step in row.tracer.iter[:]:  # noqa: B007
            hidden = row.unet.mid_block.output
        images = row.result.images
    assert (step, hidden.shape[0]) == (2, 1)
    np.testing.assert_allclose(images, plain[1:], atol=1e-5)


# Loading.


@pytest.mark.slow
def test_the_tree_is_there_before_the_weights(pipeline, folder):
    model = DiffusionModel(folder)
    pipes.quiet(model.pipeline)
    envoy = model.unet.mid_block
    assert (model.dispatched, envoy.attentions[0].proj_in.weight.is_meta) == (False, True)
    with model.scan(PROMPT):
        assert envoy.output.shape == (2, 16, 4, 4)
    assert not model.dispatched
    with model.trace(PROMPT, seed=3, **SHORT) as tracer:
        read = envoy.output
        images = tracer.result.images
    (seen, *_), plain = by_hooks(pipeline, "unet.mid_block")
    assert model.dispatched
    assert torch.equal(read, seen)
    assert np.array_equal(images, plain)


@pytest.mark.slow
def test_what_is_set_in_a_pipeline_before_its_weights_are_loaded_goes_on(folder):
    model = DiffusionModel(folder)
    pipes.quiet(model.pipeline)
    model.pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(model.pipeline.scheduler.config)
    assert not model.dispatched
    model.dispatch()
    assert type(model.pipeline.scheduler) is diffusers.EulerDiscreteScheduler
    assert model.pipeline._progress_bar_config == {"disable": True}
    assert not model.unet.conv_in.weight.is_meta


BY_HAND = {
    r"A hook was put on `unet.mid_block`": lambda pipeline: pipeline.unet.mid_block.register_forward_hook(print),
    r"`unet.conv_in.weight` was changed": lambda pipeline: nn.init.zeros_(pipeline.unet.conv_in.weight),
    r"Whether `unet.conv_in.weight` has a gradient": lambda pipeline: pipeline.unet.requires_grad_(False),
    r"`vae` was exchanged or taken out": lambda pipeline: setattr(pipeline, "vae", pipes.vae()),
}


@pytest.mark.slow
@pytest.mark.parametrize("told", BY_HAND)
def test_what_would_be_lost_of_a_pipeline_is_refused(folder, told):
    model = DiffusionModel(folder)
    BY_HAND[told](model.pipeline)
    with pytest.raises(errors.ModelError, match=told + r"(.|\n)*before the weights were loaded"):
        model.dispatch()


@pytest.mark.slow
def test_another_class_of_pipeline_on_the_same_weights(folder):
    for automodel in ("StableDiffusionImg2ImgPipeline", diffusers.AutoPipelineForImage2Image):
        model = DiffusionModel(folder, automodel=automodel)
        pipes.quiet(model.pipeline)
        with model.trace(
            PROMPT, image=torch.rand(1, 3, 16, 16), strength=0.5, seed=3, **{**SHORT, "num_inference_steps": 4}
        ) as tracer:
            encoded = model.vae.encoder.output
            steps = [step for step in tracer.iter[:] if model.unet.output is not None]
            decoded = model.vae.decoder.output
        assert isinstance(model.pipeline, diffusers.StableDiffusionImg2ImgPipeline)
        assert (steps, encoded.shape, decoded.shape) == ([0, 1], (1, 8, 8, 8), (1, 3, 16, 16))


MISTAKES = {
    "a part": (lambda folder, _: DiffusionModel(folder, vea=None), errors.InputError, "nearest +`vae`"),
    "a class": (
        lambda folder, _: DiffusionModel(folder, automodel="StableDifusionPipeline"),
        errors.ModelError,
        "(?s)no `StableDifusionPipeline`.*nearest +`StableDiffusionPipeline`",
    ),
    "a folder": (lambda folder, _: DiffusionModel(folder / "unet"), errors.HubError, "no model_index.json"),
    "no folder": (lambda folder, _: DiffusionModel(folder / "nowhere"), errors.HubError, "there is no such folder"),
    "a module": (lambda _, model: DiffusionModel(model.unet._module), errors.ModelError, r"nnsight\.NNsight\(module\)"),
    "loaded": (
        lambda _, model: DiffusionModel(model.pipeline, torch_dtype=torch.float16),
        errors.ModelError,
        "is loaded already",
    ),
    "an input": (
        lambda _, model: model.generate(PROMPT, num_inference_step=3),
        errors.InputError,
        "nearest +`num_inference_steps`",
    ),
    "twice": (lambda _, model: model.generate(PROMPT, prompt=OTHER), errors.InputError, "`prompt` was given twice"),
    "two seeds": (
        lambda _, model: model.generate(PROMPT, seed=1, generator=seeded()),
        errors.InputError,
        "`seed` and `generator`",
    ),
    "no seed": (lambda _, model: model.generate(PROMPT, seed="x"), errors.InputError, "`seed` is a whole number"),
    "no prompt": (lambda _, model: model.generate(**SHORT), errors.InputError, "needs a prompt"),
    "a method": (
        lambda _, model: model.trace(PROMPT, fn="to"),
        errors.InputError,
        "has one call, and takes no `fn`",
    ),
    "no denoiser": (
        lambda _, model: DiffusionModel(NoDenoiser(model)),
        errors.ModelError,
        "Which part of this Fake denoises isn't known",
    ),
}


class Fake(diffusers.DiffusionPipeline):
    def __init__(self, vae):
        super().__init__()
        self.register_modules(vae=vae)


def NoDenoiser(model):
    return Fake(model.vae._module)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told(model, folder, name):
    make, kind, text = MISTAKES[name]
    with pytest.raises(kind, match=text):
        make(folder, model)


def test_a_trace_without_a_prompt_is_told(model):
    with pytest.raises(errors.InputError, match="needs a prompt"):
        with model.trace(**SHORT):
            pass


def test_a_missing_package_is_told_in_a_line(monkeypatch, folder):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(
        errors.MissingPackageError, match=r'(?s)package `diffusers`.*pip install "nnsight\[diffusion\]"'
    ):
        DiffusionModel(folder)


def test_a_part_of_a_pipeline_is_any_module(pipeline):
    with NNsight(pipeline.unet).trace(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 16)) as tracer:
        assert tracer.result[0].shape == (1, 4, 8, 8)


def test_a_name_that_is_not_in_reach_is_told_at_once(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(errors.HubError, match=r"`acme/none` can't be loaded: there is no such folder.*no copy\.$"):
        DiffusionModel("acme/none")


# What goes wrong.

FIRST, SECOND = [0, 1, 4, 5], [2, 3, 6, 7]  # of two prompts with two images each, under guidance


def changed(program, output):
    """The output behind these changes, and what is read on the way."""
    output, reads = output.clone(), []
    for who, verb, factor in program:
        at = {0: FIRST, 1: SECOND}.get(who, slice(None))
        if verb == "read":
            reads.append(output[at].clone())
        else:
            output[at] = output[at] * factor
    return output, reads


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "program",
    [
        [(0, "in place", 2.0)],
        [(0, "in place", 2.0), ("whole", "read", 0), ("whole", "assign", 3.0), (0, "read", 0)],
        [(1, "read", 0), ("whole", "in place", 0.5), (1, "in place", 3.0), ("whole", "read", 0)],
        [(0, "in place", 2.0), (1, "assign", 3.0), ("whole", "read", 0), (0, "in place", 0.5), (1, "read", 0)],
    ],
)
def test_a_rows_part_of_several_images_is_as_the_whole_batch_is(pipeline, model, mode, program):
    options = {"num_images_per_prompt": 2, "num_inference_steps": 1, "output_type": "latent"}
    expected = []

    def hook(_, __, output):
        new, reads = changed(program, output)
        expected.extend(reads)
        return new

    handle = pipeline.unet.mid_block.register_forward_hook(hook)
    with mode():
        images = pipeline([PROMPT, OTHER], generator=[seeded(3 + i) for i in range(4)], **options).images
    handle.remove()
    reads = []
    with mode(), model.trace([PROMPT, OTHER], seed=3, **options) as tracer:
        for who, verb, factor in program:
            block = model.unet.mid_block if who == "whole" else tracer.rows[who].unet.mid_block
            if verb == "read":
                reads.append(block.output.clone())
            elif verb == "in place":
                block.output.mul_(factor)
            else:
                block.output = block.output * factor
        result = tracer.result.images
    assert torch.equal(result, images)
    assert all(torch.equal(*pair) for pair in zip(reads, expected, strict=True))


def test_a_copy_and_the_whole_changed_between_two_lines_are_two_changes_for_one_place(model):
    options = {"num_images_per_prompt": 2, "num_inference_steps": 1, "output_type": "latent"}
    with (
        pytest.raises(errors.WriteError, match="which is a copy"),
        model.trace([PROMPT, OTHER], seed=3, **options) as tracer,
    ):
        own, whole = tracer.rows[0].unet.mid_block.output, model.unet.mid_block.output
        own.mul_(2)
        whole.mul_(3)


def test_what_the_model_or_its_pipeline_is_given_is_what_runs():
    pipeline = pipes.stable_diffusion()
    model = DiffusionModel(pipeline)
    model.scheduler = diffusers.EulerDiscreteScheduler()
    assert isinstance(pipeline.scheduler, diffusers.EulerDiscreteScheduler)
    pipeline.unet = pipes.unet()
    seen, images = by_hooks(pipeline, "unet.mid_block")
    with model.trace(PROMPT, seed=3, **SHORT) as tracer:
        outputs = [model.unet.mid_block.output for _ in tracer.iter[:]]
        result = tracer.result.images
    assert len(outputs) == 3
    assert all(torch.equal(*pair) for pair in zip(outputs, seen, strict=True))
    assert np.array_equal(result, images)


def test_a_unet_that_was_compiled_in_its_pipeline_is_the_one_that_denoises():
    pipeline = pipes.stable_diffusion()
    model = DiffusionModel(pipeline)
    seen, _ = by_hooks(pipeline, "unet.mid_block")
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    with model.trace(PROMPT, seed=3, **SHORT) as tracer:
        outputs = [model.get("unet._orig_mod.mid_block").output for _ in tracer.iter[:]]
    assert all(torch.equal(*pair) for pair in zip(outputs, seen, strict=True))


def test_a_scan_has_no_rows_and_says_so(model):
    with (
        pytest.raises(errors.RowError, match="A scan of a pipeline has no rows"),
        model.scan([PROMPT, OTHER]) as tracer,
    ):
        tracer.rows[0].unet.mid_block.output
