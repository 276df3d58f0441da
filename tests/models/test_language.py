"""A language model from a folder: the tree first, the weights when they are needed, one tree throughout."""

import contextlib
import copy
import threading

import pytest
import tiny
import torch
import transformers
from tiny import PROMPT

import nnsight
from nnsight import LanguageModel, errors


@pytest.fixture
def lazy(folder):
    return LanguageModel(folder)


@pytest.fixture
def plain(gpt2, tokenizer):
    """What tokenizer and model give without us."""
    return gpt2(**tokenizer(PROMPT, return_tensors="pt")).logits


def test_the_tree_is_there_before_the_weights(lazy):
    assert not lazy.dispatched
    assert lazy.device == torch.device("meta")
    assert lazy.config.n_layer == 2
    assert [block.path for block in lazy.transformer.h] == ["model.transformer.h.0", "model.transformer.h.1"]
    assert lazy.tokenizer.decode(lazy.tokenizer(PROMPT)["input_ids"]) == PROMPT


def test_the_first_run_loads_the_weights(lazy, plain):
    with lazy.trace(PROMPT):
        logits = lazy.output.logits
    assert lazy.dispatched
    torch.testing.assert_close(logits, plain, rtol=0, atol=0)


def test_an_envoy_from_before_the_weights_is_the_same_afterwards(lazy):
    block, attention = lazy.transformer.h[1], lazy.transformer.h[0].attn
    lazy.dispatch()
    assert lazy.transformer.h[1] is block
    assert block.path == "model.transformer.h.1"
    assert block.mlp.c_fc.weight.device.type == "cpu"
    with lazy.trace(PROMPT):
        early = attention.output[0]
        block.mlp.output = torch.zeros_like(early)
        added = block.mlp.output
    assert early.shape == (1, 8, 16)
    assert not added.any()


def test_a_module_attached_before_the_weights_stays(lazy):
    lazy.sae = torch.nn.Linear(16, 16)
    with lazy.trace(PROMPT):
        coded = lazy.sae(lazy.transformer.h[0].mlp.output)
    assert lazy.dispatched
    assert coded.shape == (1, 8, 16)


def test_dispatch_loads_once(lazy):
    lazy.dispatch()
    module = lazy._module
    lazy.dispatch()
    assert lazy._module is module
    assert LanguageModel(lazy.config._name_or_path, dispatch=True).dispatched


def test_two_threads_load_once(folder, monkeypatch):
    loads = []
    load = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loads.append(1) or load(*a, **k)
    )
    model = LanguageModel(folder)
    threads = [threading.Thread(target=model.dispatch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == [1]


def test_labels_of_the_bundled_model_print_nothing(capfd):
    model = LanguageModel("nnsight/demo")
    ids = model.tokenizer(PROMPT)["input_ids"]
    assert model.trace(PROMPT, labels=ids, trace=False).loss < 5
    assert capfd.readouterr() == ("", "")


def test_a_mistake_costs_no_loading(lazy):
    for mistake in ([], "", ("Rome", "Paris")):
        with pytest.raises(errors.InputError):
            lazy.trace(*mistake) if isinstance(mistake, tuple) else lazy.trace(mistake)
    with pytest.raises(errors.InputError):
        lazy.generate("")
    assert not lazy.dispatched


def test_a_part_of_an_unloaded_model_can_be_traced(lazy):
    part = lazy.transformer
    with part.trace(torch.tensor([[5, 6]])):
        hidden = part.ln_f.output
    assert lazy.dispatched
    assert hidden.device.type == "cpu"


def test_a_plain_call_loads_the_weights_too(lazy, gpt2):
    ids = torch.tensor([[5, 6]])
    torch.testing.assert_close(lazy(ids).logits, gpt2(ids).logits, rtol=0, atol=0)


def test_it_loads_in_evaluation_mode_and_leaves_the_process_alone(lazy):
    assert not lazy._module.training
    transformers.logging.enable_progress_bar()
    dtype, rng = torch.get_default_dtype(), torch.get_rng_state()
    fresh = LanguageModel(lazy.config._name_or_path, dtype=torch.bfloat16, dispatch=True)
    assert not fresh._module.training
    assert torch.get_default_dtype() == dtype
    assert torch.get_rng_state().equal(rng)
    assert transformers.logging.is_progress_bar_enabled()


def test_loading_prints_nothing(folder, capfd):
    LanguageModel(folder, dispatch=True).trace(PROMPT, trace=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_type_of_the_weights_can_be_chosen(folder, name):
    model = LanguageModel(folder, **{name: torch.bfloat16})
    assert model.transformer.wte.weight.dtype == torch.bfloat16
    model.dispatch()
    assert model.transformer.wte.weight.dtype == torch.bfloat16
    assert LanguageModel(folder, dtype="auto", dispatch=True).transformer.wte.weight.dtype == torch.float32


def test_the_attention_implementation_can_be_chosen(folder):
    model = LanguageModel(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    with model.trace(PROMPT):
        weights = model.transformer.h[0].attn.output[1]
    assert weights.shape == (1, 2, 8, 8)


def test_the_config_can_be_changed_on_the_way(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    config.n_layer = 1
    before = config.to_dict(), config._attn_implementation
    model = LanguageModel(folder, config=config, attn_implementation="eager", dtype=torch.bfloat16, dispatch=True)
    assert len(model.transformer.h) == 1
    assert (config.to_dict(), config._attn_implementation) == before
    shallow = LanguageModel(folder, n_layer=1)
    assert len(shallow.transformer.h) == 1
    assert config.n_layer == 1


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"transformer": "cpu", "lm_head": "cpu"}])
def test_weights_go_where_the_device_map_says(folder, plain, device_map):
    model = LanguageModel(folder, device_map=device_map)
    torch.testing.assert_close(model.trace(PROMPT, trace=False).logits.cpu(), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("on_disk", ["model.layers", "model.embed_tokens"])
def test_offloaded_weights_get_their_ids_where_they_run(tmp_path, on_disk):
    module = tiny.build("llama")  # its embedding and its head are two tables; offloading a shared one fails upstream
    module.save_pretrained(tmp_path / "llama")
    parts = ["model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {part: "disk" if part == on_disk else "cpu" for part in parts}
    model = LanguageModel(tmp_path / "llama", device_map=device_map, offload_folder=tmp_path / "offloaded")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model.trace(ids, trace=False).logits, module(ids).logits, rtol=1e-4, atol=1e-5)


def test_options_for_the_tokenizer_reach_it(folder):
    model = LanguageModel(folder, tokenizer_kwargs={"padding_side": "right", "pad_token": "!"})
    assert model.tokenizer.padding_side == "right"
    assert model.tokenizer.pad_token == "!"


def test_a_tokenizer_that_is_loaded_here_gets_a_pad_token(lazy, tokenizer):
    assert lazy.tokenizer.pad_token == lazy.tokenizer.eos_token
    assert tokenizer.pad_token is None


def test_a_folder_without_a_tokenizer_works_with_ids(tmp_path, gpt2):
    gpt2.save_pretrained(tmp_path)
    model = LanguageModel(tmp_path)
    assert model.tokenizer is None
    assert model.trace([5, 6], trace=False).logits.shape == (1, 2, 320)
    with pytest.raises(errors.InputError, match=r"(?s)no tokenizer.*because.*has none"):
        model.trace("Rome")


def test_a_loaded_module_finds_its_tokenizer_where_it_came_from(folder, plain):
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = LanguageModel(module)
    assert model.dispatched
    assert model._module is module
    torch.testing.assert_close(model.trace(PROMPT, trace=False).logits, plain, rtol=0, atol=0)


def test_options_for_loading_are_refused_for_what_is_loaded_already(gpt2, tokenizer):
    with pytest.raises(errors.ModelError, match=r"(?s)no effect.*dtype="):
        LanguageModel(gpt2, dtype=torch.float16)
    for device_map in ("meta", {"transformer": 0, "lm_head": "cpu"}, "balanced"):
        with pytest.raises(errors.ModelError, match=r"(?s)no effect.*device_map="):
            LanguageModel(gpt2, device_map=device_map)
    with pytest.raises(
        errors.ModelError, match=r"(?s)no effect.*attn_implementation='eager', revision='main', config=GPT2"
    ):
        LanguageModel(gpt2, attn_implementation="eager", config=copy.deepcopy(gpt2.config), revision="main")
    with pytest.raises(errors.ModelError, match=r"(?s)no effect on a tokenizer.*padding_side="):
        LanguageModel(gpt2, tokenizer=tokenizer, tokenizer_kwargs={"padding_side": "left"})


def test_options_for_loading_that_say_what_a_loaded_module_is_are_taken(gpt2, tokenizer):
    what_it_is = {
        "device_map": ["auto", "cpu", torch.device("cpu"), {"": "cpu"}, None],
        "dtype": [torch.float32, "float32", "auto", None],
        "torch_dtype": [torch.float32],
        "attn_implementation": [gpt2.config._attn_implementation, None],
        "config": [gpt2.config, None],
        "automodel": [transformers.AutoModelForCausalLM, "AutoModelForCausalLM", type(gpt2), None],
        "trust_remote_code": [True],
    }
    for name, values in what_it_is.items():
        for value in values:
            assert LanguageModel(gpt2, tokenizer=tokenizer, dispatch=True, **{name: value})._module is gpt2
    with pytest.warns(FutureWarning, match="no effect on a module that is loaded already"):
        LanguageModel(gpt2, tokenizer=tokenizer, automodel=transformers.AutoModelForMaskedLM)


def test_the_class_that_a_model_is_loaded_with_is_its_task(folder):
    with pytest.warns(FutureWarning, match=r"write LanguageModel\(..., task='text-generation'\)"):
        model = LanguageModel(folder, automodel=transformers.AutoModelForCausalLM)
    assert model.task == "text-generation"
    with pytest.raises(errors.ModelError, match=r"(?s)TransformersModel\(..., task='text-classification'"):
        LanguageModel(folder, task="text-classification")
    with pytest.raises(errors.ModelError, match="`GPT2Model` is none that is known here"):
        LanguageModel(folder, automodel=transformers.GPT2Model)
    with pytest.raises(errors.ModelError, match="not one of `automodel`"):
        nnsight.TransformersModel(folder, task="fill-mask", automodel=transformers.AutoModelForCausalLM)


def test_a_class_for_another_task_is_taken_from_programs_for_the_existing_package(tokenizer, tmp_path):
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=len(tokenizer), num_labels=3)
    config.pad_token_id = tokenizer.pad_token_id
    classifier = transformers.GPT2ForSequenceClassification(config).eval()
    classifier.save_pretrained(tmp_path)
    with pytest.warns(FutureWarning, match=r"write TransformersModel\(..., task='text-classification'\)"):
        model = LanguageModel(
            str(tmp_path), tokenizer=tokenizer, automodel=transformers.AutoModelForSequenceClassification
        )
    with model.trace("Rome"):
        given, scores = model.score.input, model.output.logits
    assert model.task == "text-classification"
    assert model.args == (str(tmp_path),)
    ids = tokenizer("Rome", return_tensors="pt")["input_ids"]
    assert scores.equal(classifier(ids).logits)
    assert given.shape[-1] == 16
    assert LanguageModel(classifier, tokenizer=tokenizer).args == (classifier,)


def test_a_model_that_predicts_no_token_is_refused(tmp_path):
    transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(
        errors.ModelError, match=r"(?s)`vit` is not a model that predicts tokens.*TransformersModel.*image-class"
    ) as caught:
        LanguageModel(tmp_path)
    assert len(str(caught.value)) < 300


# generate


def test_generate_in_a_with_is_a_trace_and_alone_a_call(model, gpt2, tokenizer):
    plain = gpt2.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=3, do_sample=False, pad_token_id=0)
    with model.generate(PROMPT, max_new_tokens=3, do_sample=False) as tracer:
        first = model.lm_head.output
        ids = tracer.result
    assert first.shape[-1] == 320
    assert first[0, -1].argmax() == plain[0, 8]
    assert ids.equal(plain)
    assert model.generate(PROMPT, max_new_tokens=3, do_sample=False).equal(plain)
    assert model.generate(inputs=tokenizer(PROMPT)["input_ids"], max_new_tokens=3, do_sample=False).equal(plain)


def test_another_method_or_a_function_reads_prompts_too(model, gpt2):
    expected = gpt2(**model.tokenizer(PROMPT, return_tensors="pt")).logits
    for fn in ("forward", lambda **inputs: gpt2(**inputs)):
        with model.trace(PROMPT, fn=fn) as tracer:
            assert model.transformer.h[0].mlp.output.shape == (1, 8, 16)
            assert torch.equal(tracer.result.logits, expected)
    with pytest.raises(errors.UnknownNameError, match=r"nearest +`generate`"):
        model.trace(PROMPT, fn="generat")


def test_trace_says_which_it_is_where_the_call_does_not(model):
    with contextlib.ExitStack() as stack:
        tracer = stack.enter_context(model.generate(PROMPT, max_new_tokens=2, trace=True))
        hidden = model.transformer.h[0].mlp.output
    assert hidden.shape == (1, 8, 16)
    assert tracer.result.shape[0] == 1


def test_a_block_of_any_length_is_a_block(model, tmp_path):
    """On CPython 3.10, what enters a long `with` has an instruction of its own in front."""
    many = ["count += 1"] * 400

    def block(depth, *lines):
        return "\n".join("    " * depth + line for line in lines)

    text = f"""
with model.generate(prompt, max_new_tokens=1) as tracer:
{block(1, *many)}
    ids = tracer.result
with model.trace(prompt):
    hidden = model.transformer.h[0].mlp.output
    with model.lm_head.output.sum().backward():
{block(2, *many)}
        grad = hidden.grad
with model.trace() as tracer:
    with tracer.invoke(prompt):
{block(2, *many)}
        logits = model.lm_head.output
with model.edit() as edited:
{block(1, "count = 0", *many)}
    edited.lm_head.output[:] = 0
"""
    path = tmp_path / "long.py"
    path.write_text(text)
    names = {"model": model, "prompt": PROMPT, "count": 0}
    exec(compile(text, str(path), "exec"), names)
    assert names["count"] == 1200
    assert names["ids"].shape == (1, 9)
    assert names["grad"].shape == names["hidden"].shape
    assert names["logits"].any()
    with names["edited"].trace(PROMPT):
        assert not model.lm_head.output.any()


def test_generate_takes_prompts_options_and_the_tokenizers_too(model, tokenizer):
    assert model.generate([PROMPT, "Rome"], max_new_tokens=2, min_new_tokens=2).shape == (2, 10)
    assert model.generate(PROMPT, max_length=9).shape == (1, 9)
    assert model.generate(PROMPT, truncation=True, max_length=3, max_new_tokens=1).shape == (1, 4)
    stopped = model.generate(PROMPT, max_new_tokens=4, stop_strings=["a", "e", "i", "o", "u", " "])
    assert stopped.shape[1] <= 12
    out = model.generate(PROMPT, max_new_tokens=2, return_dict_in_generate=True, output_scores=True)
    assert out.sequences.shape[0] == 1


def test_a_model_without_a_head_says_that_it_cannot_generate(tokenizer, gpt2):
    model = LanguageModel(gpt2.transformer, tokenizer=tokenizer)
    assert model.trace([PROMPT, "Rome"], trace=False).last_hidden_state.shape == (2, 8, 16)
    with pytest.raises(errors.ModelError, match="GPT2Model can't generate"):
        model.generate(PROMPT)


# the package


@pytest.mark.slow
def test_importing_nnsight_imports_no_transformers():
    import subprocess
    import sys

    code = (
        "import nnsight, sys; assert 'transformers' not in sys.modules; "
        "nnsight.LanguageModel; assert 'transformers' in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_bundled_model_is_a_folder_like_any_other():
    model = LanguageModel("nnsight/demo")
    assert model.config.model_type == "gpt2"
    assert str(nnsight.__path__[0]) in model.config._name_or_path
    with model.trace(PROMPT):
        logits = model.output.logits
    assert logits.shape[-1] == model.config.vocab_size
