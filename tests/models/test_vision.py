"""VisionLanguageModel: text and images of four families, in one forward pass, in rows and invokes, in generation."""

import importlib.util
from functools import cache

import numpy as np
import pytest
import seeing
import tiny
import torch
import transformers
from seeing import PLACES, picture

import nnsight
from comparing import near, same
from nnsight import LanguageModel, VisionLanguageModel, errors

FAMILIES = list(PLACES)
PROMPTS = ["{}The Eiffel Tower", "{}{}Rome is", "The city of"]
PICTURES = [[1], [2, 3], []]


# Of PaliGemma's processor, which makes arrays in numpy's older way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True, scope="module")
def quiet():
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # of PaliGemma, which likes its prompts without placeholders
    yield
    transformers.logging.set_verbosity(level)


@cache
def module_of(name):
    return seeing.build(name)


@cache
def model_of(name):
    return VisionLanguageModel(module_of(name), processor=seeing.processor_of(name))


def batch(name):
    """Three prompts with one image, two and none."""
    prompts = [prompt.replace("{}", PLACES[name]) for prompt in PROMPTS]
    return prompts, [[picture(seed, (8 + 4 * seed, 16)) for seed in seeds] for seeds in PICTURES]


def inputs_of(name, prompt="{}What is this?", seed=0):
    """What the family's processor makes of a prompt with an image."""
    read = seeing.processor_of(name)(
        text=[prompt.replace("{}", PLACES[name])], images=[[picture(seed)]], return_tensors="pt"
    )
    names = model_of(name)._takes().names
    return {key: value for key, value in read.items() if key in names and key != "labels"}


def trace(name, prompt="{}What is this?", seed=0):
    return model_of(name).trace(prompt.replace("{}", PLACES[name]), images=picture(seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_with_an_image_is_what_processor_and_module_give_by_hand(name):
    with trace(name), torch.no_grad():
        logits = model_of(name).logits
    with torch.no_grad():
        same(logits, module_of(name)(**inputs_of(name)).logits)
    assert model_of(name).task == "image-text-to-text"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_image_and_its_place_matter(name):
    with trace(name):
        one = model_of(name).logits
    with trace(name, seed=1):
        other = model_of(name).logits
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_tower_has_the_uniform_names_and_the_image_s_tokens_are_of_the_prompt(name):
    model = model_of(name)
    with trace(name) as tracer:
        tokens = tracer.rows[0].tokens
        embedded, stream = model.embed.output, model.layers[0].input
        pattern = model.layers[1].attn.pattern
        projected, logits = model.project(model.layers[-1].output), model.logits
    count = inputs_of(name)["input_ids"].shape[1]
    place = "<|image_pad|>" if name == "qwen2_vl" else "<image>"
    assert len(tokens) == count == pattern.shape[-1]
    assert tokens.count(place) > 1
    is_text = torch.tensor([token != place for token in tokens])
    if name != "paligemma":  # which scales all embeddings
        same(embedded[:, is_text], stream[:, is_text])  # where an image is, its embeddings stand
    assert not torch.equal(embedded, stream)
    assert model.n_layers == 2
    same(projected, logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_reads_writes_and_gradients_are_those_of_plain_hooks(name):
    model, module = model_of(name), module_of(name)
    layer = module.get_submodule(model.uniform._layout.layers[0].path)
    seen = []

    def change(_, __, output):
        first = output[0] if isinstance(output, tuple) else output
        seen.append(first)
        new = (first * 1.5).detach().requires_grad_()
        seen.append(new)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = layer.register_forward_hook(change)
    try:
        logits = module(**inputs_of(name)).logits
    finally:
        handle.remove()
    (expected,) = torch.autograd.grad(logits[:, -1].sum(), seen[1])
    with trace(name):
        read = model.layers[0].output
        new = (read * 1.5).detach().requires_grad_()
        model.layers[0].output = new
        got = model.logits
    same(read, seen[0])
    same(got, logits)
    same(torch.autograd.grad(got[:, -1].sum(), new)[0], expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_row_and_each_invoke_has_what_its_prompt_has_alone(name):
    model = model_of(name)
    prompts, images = batch(name)
    alone, patterns = [], []
    for prompt, own in zip(prompts, images, strict=True):
        with model.trace(prompt, images=own or None):
            patterns.append(model.layers[0].attn.pattern)
            alone.append(model.logits)
    with model.trace(prompts, images=images) as rows:
        of_rows = [row.layers[0].attn.pattern for row in rows]
        got = [row.logits for row in rows]
    flat = [image for own in images for image in own]
    same(model.trace(prompts, images=flat, trace=False).logits, model.trace(prompts, images=images, trace=False).logits)
    with model.trace() as tracer:
        invoked = [None] * 3
        with tracer.invoke(prompts[0], images=images[0]):
            invoked[0] = model.logits
        with tracer.invoke(prompts[1], images=images[1]):
            invoked[1] = model.logits
        with tracer.invoke(prompts[2]):
            invoked[2] = model.logits
    for i in range(3):
        near(of_rows[i], patterns[i])
        near(got[i], alone[i])
        near(invoked[i], alone[i])


@pytest.mark.parametrize("name", FAMILIES)
def test_queries_and_keys_are_turned_in_a_batch_as_they_are_alone(name):
    model = model_of(name)
    prompts, images = batch(name)
    with model.trace(prompts, images=images) as rows:
        of_rows = [(row.layers[0].attn.q, row.layers[0].attn.k) for row in rows]
    with model.trace() as tracer:
        with tracer.invoke(prompts[0], images=images[0]):
            of_invoke = model.layers[0].attn.q, model.layers[0].attn.k
        with tracer.invoke(prompts[1], images=images[1]):
            pass
    for i, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
        with model.trace(prompt, images=own or None):
            q, k = model.layers[0].attn.q, model.layers[0].attn.k
        for in_batch in [of_rows[i], of_invoke][: 2 - (i > 0)]:
            near(in_batch[0], q)
            near(in_batch[1], k)


@cache
def crossing():
    return VisionLanguageModel(seeing.build_crossing(), processor=seeing.crossing_processor())


CROSSING = ["<|image|>Rome", "<|image|>The Eiffel Tower is in <|image|>the city of Paris", "<|image|>The city of Rome"]
CROSSED = [[picture(1)], [picture(2, (40, 16)), picture(3, (16, 40))], [picture(4, (8, 8))]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_which_tokens_see_an_image_is_padded_as_the_tokens_are(side):
    model, alone = crossing(), []
    for prompt, images in zip(CROSSING, CROSSED, strict=True):
        with model.trace(prompt, images=images):
            alone.append((model.layers[1].output, model.logits))
    with model.trace(CROSSING, images=CROSSED, padding_side=side) as rows:
        of_rows = [row.layers[1].output for row in rows]
        got = [row.logits for row in rows]
    for i in range(3):
        near(of_rows[i], alone[i][0])
        near(got[i], alone[i][1])
    with model.trace() as tracer:
        with tracer.invoke(CROSSING[:1], images=CROSSED[:1]):
            first = model.logits
        with tracer.invoke(CROSSING[1:], images=CROSSED[1:]):
            rest = model.logits
    near(first, alone[0][1])
    near(rest[:1], alone[1][1])
    near(rest[1:, -alone[2][1].shape[1] :], alone[2][1])


def test_prompts_without_images_are_refused_where_a_model_wants_a_row_of_images_for_each():
    with pytest.raises(errors.InputError, match="Some of these prompts have images and others none"):
        crossing().trace([CROSSING[0], "Rome is in"], images=[CROSSED[0], []])
    with (
        pytest.raises(errors.InputError, match="Some of these prompts have images and others none"),
        crossing().trace() as tracer,
    ):
        with tracer.invoke(CROSSING[0], images=CROSSED[0]):
            crossing().logits
        with tracer.invoke("Rome is in"):
            crossing().logits


@pytest.mark.parametrize("name", FAMILIES)
def test_a_write_into_one_row_leaves_the_others(name):
    model = model_of(name)
    prompts, images = batch(name)
    with model.trace(prompts, images=images) as tracer:
        plain = tracer.model.logits
    with model.trace(prompts, images=images) as (_, second, _third):
        second.layers[0].output[:] = 0
        whole = second.tracer.model.logits
    same(whole[[0, 2]], plain[[0, 2]])
    assert not torch.equal(whole[1], plain[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_generation_sees_the_image_and_each_row_has_its_own_steps(name):
    model = model_of(name)
    prompts, images = batch(name)
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    alone, streams = [], []
    for prompt, own in zip(prompts[:2], images[:2], strict=True):
        with model.generate(prompt, images=own, **options) as tracer:
            streams.append([model.layers[1].output for _ in tracer.iter[:]])
            alone.append(tracer.result)
    with torch.no_grad():
        plain = module_of(name).generate(**inputs_of(name), **options, pad_token_id=320)
    same(model.generate("{}What is this?".replace("{}", PLACES[name]), images=picture(0), **options), plain)
    with model.generate(prompts[:2], images=images[:2], **options) as (a, b):
        steps = [[row.layers[1].output for row in (a, b)] for _ in a.tracer.iter[:]]
        results = [row.result for row in (a, b)]
    for i in range(2):
        assert results[i].tolist() == alone[i].tolist()
        for step in range(2):
            near(steps[step][i], streams[i][step])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_names_are_proven_by_numbers(name):
    report = nnsight.verify(model_of(name))
    assert report, str(report)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_images_of_all_forms_are_the_same_image(name):
    model, prompt = model_of(name), f"{PLACES[name]}Rome"
    image = picture()
    array = np.array(image)
    tensor = torch.tensor(array).permute(2, 0, 1)
    expected = model.trace(prompt, images=image, trace=False).logits
    for form in (array, tensor, tensor.float(), [image], [array], tensor[None], [[image]]):
        same(model.trace(prompt, images=form, trace=False).logits, expected)
    same(model.trace(text=prompt, images=image, trace=False).logits, expected)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_chat_says_where_its_images_stand(name):
    model, image = model_of(name), picture()
    text = [{"type": "text", "text": "What?"}]
    written = model.trace(f"user: {PLACES[name]}What?\nassistant:", images=image, trace=False).logits
    bare = [{"role": "user", "content": [{"type": "image"}, *text]}]
    own = [{"role": "user", "content": [{"type": "image", "image": image}, *text]}]
    same(model.trace(bare, images=image, trace=False).logits, written)
    same(model.trace(own, trace=False).logits, written)
    with model.trace([own, [{"role": "user", "content": "Rome"}]]) as (first, _):
        near(first.logits, written)
    with pytest.raises(errors.InputError, match="images in the chat, and as `images=`"):
        model.trace(own, images=image)


@pytest.mark.parametrize("name", ["llava", "idefics3"])
def test_a_folder_has_its_processor_beside_it_and_the_weights_come_late(name, tmp_path):
    module_of(name).save_pretrained(tmp_path)
    seeing.processor_of(name).save_pretrained(tmp_path)
    model = VisionLanguageModel(tmp_path)
    assert not model.dispatched
    assert model.tokenizer is not None
    with model.scan("Rome is"):
        assert model.layers[1].output.shape == (1, 3, 16)
    with pytest.raises(errors.FakeValueError, match=r"instead +model\.trace"):
        with model.scan(f"{PLACES[name]}Rome", images=picture()):
            model.layers[1].output
    assert not model.dispatched
    with model.trace(f"{PLACES[name]}Rome", images=picture()):
        logits = model.logits
    same(logits, model.trace(f"{PLACES[name]}Rome", images=picture(), trace=False).logits)
    near(logits, model_of(name).trace(f"{PLACES[name]}Rome", images=picture(), trace=False).logits)
    for path, weight in module_of(name).state_dict().items():
        same(model._module.state_dict()[path], weight)
    with pytest.raises(errors.ModelError, match=rf"(?s)`{name}` is not a model that predicts tokens.*VisionLanguage"):
        LanguageModel(tmp_path)


def test_text_alone_is_read_as_by_the_tokenizer():
    model = model_of("llava")
    ids = model.tokenizer("Rome is", return_tensors="pt")
    with torch.no_grad():
        same(
            model.trace("Rome is", trace=False).logits, module_of("llava")(**{k: ids[k] for k in ("input_ids",)}).logits
        )


def test_a_prompt_of_text_does_not_go_on_from_the_images_of_the_last_run():
    model = model_of("qwen2_vl")
    expected = VisionLanguageModel(seeing.build("qwen2_vl"), tokenizer=model.tokenizer)
    prompts, images = batch("qwen2_vl")
    model.trace(prompts, images=images, trace=False)
    for prompt in ("Rome is", ["Rome is", "The city of"]):
        near(model.trace(prompt, trace=False).logits, expected.trace(prompt, trace=False).logits)


def test_what_the_eyes_return_is_the_whole_batch_s_and_can_be_replaced():
    model, prompts = model_of("llava"), ["<image>Rome", "<image>The city of"]
    images = [picture(1), picture(2)]
    with model.trace(prompts, images=images) as tracer:
        seen = tracer.model.model.multi_modal_projector.output
        plain = model.logits
    with model.trace(prompts, images=images):
        model.model.multi_modal_projector.output = seen.flip(0)
        swapped = model.logits
    same(swapped, model.trace(prompts, images=images[::-1], trace=False).logits)
    assert not torch.allclose(plain, swapped)
    with model.trace(prompts, images=images) as (row, _), pytest.raises(errors.RowError, match="can't be told"):
        row.model.model.multi_modal_projector.output


def test_the_command_line_reads_a_model_that_sees(tmp_path):
    from typer.testing import CliRunner

    from nnsight.cli import app

    module_of("llava").save_pretrained(tmp_path)
    seeing.processor_of("llava").save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "LlavaForConditionalGeneration" in done.output
    assert "no image for it" in CliRunner().invoke(app, ["lens", "<image>Rome", "--model", str(tmp_path)]).output


# Mistakes.

ONE = "<image>Rome"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prompt": ONE, "text": ONE}, "two prompts: one by position, and one as `text=`"),
        ({"prompt": "Rome", "images": [1]}, '1 image for a prompt that has 0 places.*"<image>Rome"'),
        ({"prompt": ONE}, "a place for an image, `<image>`, and no image for it"),
        ({"prompt": ONE, "images": [1, 2]}, "2 images for a prompt that has 1 place for"),
        ({"prompt": ONE * 2, "images": [1]}, "1 image for a prompt that has 2 places"),
        ({"prompt": [ONE, ONE], "images": [1, 2, 3]}, "3 images, and 2 places for them.*1 in '<image>Rome', 1 in"),
        ({"prompt": [ONE, ONE], "images": [[1]]}, "images for 1 prompt, and there are 2.*a list for each prompt"),
        ({"prompt": ["Rome", ONE], "images": [[1], []]}, '0 places for images.*"<image>Rome"'),
        ({"images": [1]}, "images, and no text that says where they stand"),
        ({"prompt": [[1, 2]], "images": [1]}, "images, and no text that says where they stand"),
        ({"prompt": ONE, "image": [1]}, "`image` is no input of Llava"),
        ({"prompt": ONE, "images": "cat.png"}, r"not the name of a file.*PIL\.Image\.open\('cat\.png'\)"),
        ({"prompt": ONE, "images": torch.rand(3, 8, 8)}, "0 to 1, and the processor divides by 255"),
        ({"prompt": ONE, "images": [1], "max_new_tokens": 3}, "an option of generation"),
    ],
)
def test_images_and_places_that_do_not_match_are_told_before_anything_runs(given, says):
    given = dict(given)
    args = [given.pop("prompt")] if "prompt" in given else []
    if isinstance(given.get("images"), list):
        pictures = [[picture(i) for i in one] if isinstance(one, list) else picture(one) for one in given["images"]]
        given["images"] = pictures
    model = VisionLanguageModel(module_of("llava"), processor=seeing.processor_of("llava"))
    ran = []
    handle = model._module.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(errors.InputError, match=f"(?s){says}"):
            model.trace(*args, **given)
    finally:
        handle.remove()
    assert not ran


def test_an_image_by_position_is_answered_with_its_name():
    with pytest.raises(errors.InputError, match=r"(?s)images by name.*'<image>Rome', images="):
        model_of("llava").trace(ONE, picture())


def test_without_pillow_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.MissingPackageError, match=r"(?s)with Pillow.*nnsight\[vision\]"):
        model_of("llava").trace(ONE, images=torch.zeros(3, 8, 8, dtype=torch.uint8))


def test_a_model_of_text_has_no_use_for_images():
    model = LanguageModel(tiny.build("gpt2"), tokenizer=tiny.make_tokenizer())
    with pytest.raises(errors.InputError, match=r"(?s)`images` is no input of GPT2LMHeadModel.*VisionLanguageModel"):
        model.trace("Rome", images=picture())
    with pytest.raises(errors.ModelError, match="`gpt2` is not a model that reads images and text"):
        VisionLanguageModel("nnsight/demo")


def test_without_a_processor_an_image_can_not_be_read():
    model = VisionLanguageModel(module_of("llava"), tokenizer=seeing.tokenizer_of("llava"))
    with pytest.raises(errors.InputError, match=r"(?s)no processor to turn an image into numbers.*processor="):
        model.trace(ONE, images=picture())
