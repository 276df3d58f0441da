"""TransformersModel: any model of transformers, through the class for its task, lazy like a LanguageModel."""

import pytest
import tiny
import torch
import transformers
from tiny import PROMPT

import nnsight
from nnsight import LanguageModel, TransformersModel, errors

SHORT = "Rome is"
TASKS = {
    "t5": "text2text-generation",
    "bart": "text2text-generation",
    "classifier": "text-classification",
    "masked": "fill-mask",
    "bert": "feature-extraction",
    "two heads": None,
    "vit": "image-classification",
    "whisper": "automatic-speech-recognition",
}
READS_TEXT = [name for name in TASKS if name not in ("vit", "whisper")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    found = {}
    for name in TASKS:
        found[name] = tmp_path_factory.mktemp("others") / name.replace(" ", "_")
        tiny.build_other(name).save_pretrained(found[name])
        if name in READS_TEXT:
            tokenizer.save_pretrained(found[name])
    return found


def inputs_of(name, tokenizer=None):
    """What two rows are given, and each of them alone."""
    if name == "vit":
        images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        return {"pixel_values": images}, [{"pixel_values": one[None]} for one in images]
    if name == "whisper":
        sound = torch.rand(2, 8, 20, generator=torch.Generator().manual_seed(1))
        begun = [[0, 3], [0, 4]]
        return {"input_features": sound, "decoder_input_ids": begun}, [
            {"input_features": one[None], "decoder_input_ids": [ids]} for one, ids in zip(sound, begun, strict=True)
        ]
    raise AssertionError(name)


def call(model, prompt, **more):
    begun = {"decoder_input_ids": [[0, 5]]} if model.config.model_type == "t5" else {}
    return model.trace(prompt, **begun, **more)


@pytest.mark.parametrize("name", TASKS)
def test_the_class_is_the_one_that_the_config_names_and_the_weights_come_late(folders, name):
    model = TransformersModel(folders[name])
    assert type(model._module) is type(tiny.OTHERS[name]())
    assert model.task == TASKS[name]
    assert model.repo_id == str(folders[name])
    assert not model.dispatched
    assert model.device.type == "meta"
    assert (model.tokenizer is not None) == (name in READS_TEXT)
    assert model.image_processor is model.processor is model.feature_extractor is None
    assert model.dispatch() is None
    assert model.dispatched
    plain = tiny.build_other(name).state_dict()
    assert all(torch.equal(plain[key], value) for key, value in model._module.state_dict().items())


def test_a_task_chooses_another_head(folders):
    assert type(TransformersModel(folders["bert"], "fill-mask")._module).__name__ == "BertForMaskedLM"
    assert type(TransformersModel(folders["masked"], task="feature-extraction")._module).__name__ == "BertModel"
    assert type(TransformersModel(folders["t5"], task="summarization")._module).__name__.startswith("T5For")
    with pytest.raises(errors.ModelError, match=r"(?s)'fill-mas' is no task.*nearest +'fill-mask'"):
        TransformersModel(folders["bert"], task="fill-mas")
    with pytest.raises(errors.ModelError, match=r"(?s)`vit` has no model for the task 'fill-mask'.*image-class"):
        TransformersModel(folders["vit"], task="fill-mask")


def test_a_causal_model_is_a_language_model_by_either_name(folder):
    general = TransformersModel(folder)
    assert general.task == LanguageModel(folder).task == "text-generation"
    assert torch.equal(
        general.generate(PROMPT, max_new_tokens=2), LanguageModel(folder).generate(PROMPT, max_new_tokens=2)
    )
    assert issubclass(LanguageModel, TransformersModel)
    with pytest.raises(errors.ModelError, match=r"(?s)for the task 'text-generation'.*TransformersModel\(\.\.\., task"):
        LanguageModel(folder, task="text-classification")


def test_a_loaded_module_needs_no_tokenizer_and_finds_its_task(folders):
    model = TransformersModel(tiny.build_other("classifier"))
    assert (model.task, model.tokenizer, model.dispatched, model.repo_id) == ("text-classification", None, True, None)
    with model.trace([[5, 6], [7]]):
        assert model.output.logits.shape == (2, 3)
    found = TransformersModel(transformers.BertForMaskedLM.from_pretrained(folders["masked"]))
    assert found.tokenizer is not None
    assert found.repo_id == str(folders["masked"])


@pytest.mark.parametrize("name", READS_TEXT)
def test_text_is_what_tokenizer_and_module_give_by_hand(folders, name, tokenizer):
    model, module = TransformersModel(folders[name]), tiny.build_other(name)
    begun = {"decoder_input_ids": torch.tensor([[0, 5]])} if name == "t5" else {}
    takes = set(model._takes().names)
    fields = {key: value for key, value in tokenizer(PROMPT, return_tensors="pt").items() if key in takes}
    with call(model, PROMPT) as tracer:
        got = tracer.result
    torch.testing.assert_close(got[0], module(**fields, **begun)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in READS_TEXT if name != "two heads"])
def test_each_row_and_each_invoke_has_what_its_prompt_has_alone(folders, name):
    model = TransformersModel(folders[name], dispatch=True)
    alone = []
    for prompt in (PROMPT, SHORT):
        with call(model, prompt) as tracer:
            alone.append(tracer.result[0])
    with model.trace([PROMPT, SHORT], **({"decoder_input_ids": [[0, 5]] * 2} if name == "t5" else {})) as (a, b):
        rows = [row.result[0] for row in (a, b)]
    begun = {"decoder_input_ids": [[0, 5]]} if name == "t5" else {}
    with model.trace() as tracer:
        with tracer.invoke(PROMPT, **begun):
            first = tracer.result[0]
        with tracer.invoke(SHORT, **begun):
            second = tracer.result[0]
    for got in (rows, [first, second]):
        for one, expected in zip(got, alone, strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_images_and_sound_come_by_keyword_and_have_rows_and_invokes(folders, name):
    model, module = TransformersModel(folders[name]), tiny.build_other(name)
    both, (one, other) = inputs_of(name)
    with model.trace(**both) as tracer:
        whole = tracer.result.logits
    tensors = {key: torch.as_tensor(value) for key, value in both.items()}
    torch.testing.assert_close(whole, module(**tensors).logits, rtol=0, atol=0)
    with model.trace(**both) as (a, b):
        rows = [row.result.logits for row in (a, b)]
    with model.trace() as tracer:
        with tracer.invoke(**one):
            first = tracer.result.logits
        with tracer.invoke(**other):
            second = tracer.result.logits
    for got in (rows, [first, second]):
        torch.testing.assert_close(torch.cat(got), whole, rtol=1e-5, atol=1e-6)
    with pytest.raises(errors.InputError, match=f"(?s)needs a prompt.*{next(iter(both))}="):
        model.trace(labels=[1], trace=False)


def test_an_image_goes_through_the_processor_that_is_given_and_a_tensor_does_not(folders):
    class Image:
        mode = "RGB"

        def convert(self, mode):
            return self

    def reads(images, return_tensors):
        count = len(images) if isinstance(images, list) else 1
        return {"pixel_values": torch.ones(count, 3, 8, 8)}

    model = TransformersModel(folders["vit"], image_processor=reads)
    expected = tiny.build_other("vit")(torch.ones(1, 3, 8, 8)).logits
    for given in (Image(), [Image()], torch.ones(1, 3, 8, 8)):
        assert torch.equal(model.trace(given, trace=False).logits, expected)
    both = model.trace(images=[Image(), Image()], trace=False).logits
    torch.testing.assert_close(both, expected.expand(2, -1))
    with pytest.raises(errors.InputError, match=r"(?s)no image processor.*pixel_values="):
        TransformersModel(folders["vit"]).trace(Image())
    with pytest.raises(errors.InputError, match=r"(?s)no tokenizer.*pixel_values="):
        model.trace("a cat")


def test_text_and_images_go_through_the_processor_together(tokenizer):
    def reads(images, text, return_tensors):
        return {"input_ids": torch.tensor([[len(images), len(text)]])}

    module = tiny.build_other("bert")
    model = TransformersModel(module, processor=reads, tokenizer=tokenizer)
    expected = module(torch.tensor([[2, 5]])).last_hidden_state
    assert torch.equal(model.trace("A cat", images=["one", "two"], trace=False).last_hidden_state, expected)
    with pytest.raises(errors.InputError, match="`images` is no input of BertModel: it reads text alone"):
        TransformersModel(module, tokenizer=tokenizer).trace("A cat", images=["one"])


@pytest.mark.parametrize("name", ["t5", "bart", "vit", "classifier"])
def test_a_scan_calls_what_a_trace_calls_and_loads_nothing(folders, name):
    model = TransformersModel(folders[name])
    inputs = {"pixel_values": torch.rand(1, 3, 8, 8)} if name == "vit" else {"input_ids": [[5, 6, 7]]}
    inputs |= {"decoder_input_ids": [[0, 5]]} if name == "t5" else {}
    called = model.calls(**inputs)
    assert not model.dispatched
    with model.trace(**inputs) as tracer:
        cache = tracer.cache()
    assert set(called) == set(cache)


def test_labels_count_prompts_tokens_or_an_answer_of_their_own(folders, tokenizer):
    classifier = TransformersModel(folders["classifier"])
    fields = {key: value for key, value in tokenizer([PROMPT], return_tensors="pt").items() if key != "token_type_ids"}
    expected = tiny.build_other("classifier")(**fields, labels=torch.tensor([2])).loss
    for labels in (2, [2], torch.tensor([2])):
        assert torch.equal(classifier.trace(PROMPT, labels=labels, trace=False).loss, expected)
    assert classifier.trace([PROMPT, SHORT], labels=[0, 2], trace=False).loss.ndim == 0
    answers = TransformersModel(folders["t5"]).trace([PROMPT, SHORT], labels=[[5, 6, 0], [7, 0]], trace=False)
    assert answers.logits.shape[:2] == (2, 3)


def test_a_decoder_that_was_given_nothing_is_told_before_anything_runs(folders):
    with pytest.raises(errors.InputError, match=r"(?s)reads with one half.*decoder_input_ids=.*model.generate"):
        TransformersModel(folders["t5"]).trace(PROMPT)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_and_a_decoder_generate_and_each_row_has_its_own(folders, name, switch):
    model = TransformersModel(folders[name], dispatch=True)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    halves = model if name == "t5" else model.model
    alone, inner = [], []
    for prompt in (PROMPT, SHORT):
        with model.generate(prompt, **options) as tracer:
            read = halves.encoder.output[0]
            inner.append([model.lm_head.output for _ in tracer.iter[:]])
            alone.append(tracer.result)
        assert read.shape[1] == len(model.tokenizer(prompt)["input_ids"])
    assert alone[0].tolist() == model.generate(PROMPT, **options).tolist()
    assert model.generate([PROMPT, SHORT], **options).tolist() == torch.cat(alone).tolist()
    with model.generate([PROMPT, SHORT], **options) as (a, b):
        steps = [[row.lm_head.output for row in (a, b)] for _ in a.tracer.iter[:]]
        results = [row.result for row in (a, b)]
    assert [result.tolist() for result in results] == [ids.tolist() for ids in alone]
    for step, (first, second) in enumerate(steps):
        torch.testing.assert_close(first, inner[0][step], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(second, inner[1][step], rtol=1e-4, atol=1e-5)
    with (
        pytest.raises(errors.RowError, match="told from its first step"),
        model.generate([PROMPT, SHORT], **options) as (
            a,
            b,
        ),
    ):
        (a if name == "t5" else a.get("model.model")).encoder.output


def test_a_write_into_the_decoder_of_one_row_stays_in_it(folders):
    model = TransformersModel(folders["t5"], dispatch=True)
    begun = {"decoder_input_ids": [[0, 5]] * 2}
    plain = model.trace([PROMPT, SHORT], **begun, trace=False).logits
    with model.trace([PROMPT, SHORT], **begun) as (a, _b):
        a.decoder.block[0].layer[2].output[:] = 0
        whole = a.tracer.result.logits
    assert not torch.equal(whole[0], plain[0])
    assert torch.equal(whole[1], plain[1])


def test_sound_is_not_text_and_goes_through_the_feature_extractor(folders, tokenizer):
    model = TransformersModel(folders["whisper"], tokenizer=tokenizer)
    for given in (PROMPT, [0.5, 0.25]):
        with pytest.raises(errors.InputError, match=r"(?s)reads `input_features`.*model\.feature_extractor\(sound"):
            model.trace(given, decoder_input_ids=[[0, 3]])


def test_the_module_s_own_name_comes_before_the_library_s():
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,),
        conv_stride=(5,),
        conv_kernel=(10,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    model = TransformersModel(transformers.Wav2Vec2Model(config).eval())
    with model.trace(torch.rand(1, 200)):
        assert model.feature_extractor.output.shape[1] == 8
    assert isinstance(model.feature_extractor, nnsight.Envoy)


# Options that nobody has a use for.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dipatch": True}, "`dipatch` is no option.*nearest +`dispatch`"),
        ({"revison": "main"}, "nearest +`revision`"),
        ({"n_layers": 2}, "nearest +`n_layer`"),
        ({"torch_dtype": "flaot16"}, "'flaot16' is no dtype"),
        ({"dtype": 16}, "16 is no dtype"),
        ({"tokenizer_kwargs": {"zzz": 1}}, "`zzz` is no option of this"),
        ({"tokenizer_kwargs": {"padding_sid": "left"}}, "nearest +.*`padding_side`"),
    ],
)
def test_an_option_that_nobody_has_a_use_for_is_refused_with_the_nearest(folder, options, says):
    with pytest.raises(errors.InputError, match=f"(?s){says}"):
        LanguageModel(folder, **options)


def test_options_of_transformers_and_fields_of_the_config_are_taken(folder):
    model = LanguageModel(
        folder,
        n_layer=1,
        num_attention_heads=4,
        low_cpu_mem_usage=True,
        use_safetensors=True,
        output_loading_info=False,
        tokenizer_kwargs={"padding_side": "left", "use_fast": True, "add_prefix_space": False},
        ignore_mismatched_sizes=True,
    )
    assert model.config.n_layer == 1
    assert model.trace(PROMPT, trace=False).logits.shape == (1, 8, 320)


@pytest.mark.parametrize("thing", [None, 3, ["a name"]])
def test_what_is_no_model_is_told_so(thing):
    with pytest.raises(errors.ModelError, match=r"A model is a name on the hub, a folder, or a torch.nn.Module"):
        LanguageModel(thing)


# Text where it can't be read.


def test_text_for_a_part_or_a_plain_module_says_where_it_is_read(model, gpt2):
    for thing in (lambda: model.transformer.trace("text"), lambda: nnsight.NNsight(gpt2).trace(["text"])):
        with pytest.raises(errors.InputError, match=r"(?s)takes numbers here.*model.trace\(text\), of a LanguageModel"):
            thing()
    for given in (PROMPT, [PROMPT]):
        with pytest.raises(errors.InputError, match=r"(?s)`model` takes numbers.*trace=False"):
            model(given)


def test_an_array_of_strings_says_how_to_make_a_list_of_it(model):
    import numpy as np

    with pytest.raises(errors.InputError, match=r"(?s)An array of strings.*tolist\(\)"):
        model.trace(np.array([PROMPT]))


def test_a_model_out_of_reach_has_a_short_traceback(tmp_path):
    import traceback

    (tmp_path / "config.json").write_text("{")
    with pytest.raises(errors.HubError, match=r"(?s)can't be read.*because +OSError: .*not a valid JSON") as caught:
        LanguageModel(tmp_path)
    text = "".join(traceback.format_exception(caught.value))
    assert text.count("Traceback") == 1
    assert len(text.splitlines()) < 25


def test_an_edit_of_encoder_and_decoder_is_one_in_a_trace_and_two_where_it_generates(tokenizer):
    model = LanguageModel(tiny.build_other("t5"), tokenizer=tokenizer)
    encoder, decoder = (getattr(model._module, half).block[0].layer[1] for half in ("encoder", "decoder"))
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}

    def zero(_module, _args, output):
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    handles = [module.register_forward_hook(zero) for module in (encoder, decoder)]
    generated = model.generate(PROMPT, **options).logits
    answered = model.trace(PROMPT, decoder_input_ids=[[0]], trace=False).logits
    for handle in handles:
        handle.remove()

    def edit_encoder(model):
        model.encoder.block[0].layer[1].output[:] = 0

    def edit_decoder(model):
        model.decoder.block[0].layer[1].output[0][:] = 0

    both = model.edit(lambda model: (edit_encoder(model), edit_decoder(model)))
    assert torch.equal(both.trace(PROMPT, decoder_input_ids=[[0]], trace=False).logits, answered)
    advice = r"edit that module: model\.encoder\.edit\(.*What follows for other modules is an edit of its own"
    with pytest.warns(UserWarning, match=advice):
        neither = both.generate(PROMPT, **options).logits
    assert all(map(torch.equal, neither, model.generate(PROMPT, **options).logits))
    edited = model.edit(edit_decoder)
    edited.encoder.edit(lambda encoder: encoder.block[0].layer[1].output.zero_(), inplace=True)
    assert all(map(torch.equal, edited.generate(PROMPT, **options).logits, generated))
    assert torch.equal(edited.trace(PROMPT, decoder_input_ids=[[0]], trace=False).logits, answered)
