"""PEFT adapters on models: put on, swapped, taken off, compared with, and refused where they would change nothing."""

import contextvars
import json
import threading
import warnings

import peft
import pytest
import snapshots
import torch
import transformers
from tiny import PROMPT, build, make_tokenizer
from torch import nn

import nnsight
from nnsight import LanguageModel, NNsight, TransformersModel, errors

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True. and a tied layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning"),
]
IDS = [[3, 1, 4, 1, 5]]
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}


def tuned(name="llama", seed=0, config=peft.LoraConfig, **options):
    """A PeftModel whose adapter's weights are random, not those of a fresh one, which changes nothing."""
    options = {"r": 2, "target_modules": TARGETS[name], **options} if config is peft.LoraConfig else options
    module = peft.get_peft_model(build(name), config(**options))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if any(part in key for part in ("lora", "ia3", "modules_to_save", "ln_1.bias")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Saves an adapter, and returns its folder and its model."""
    known = {}

    def save(name="llama", seed=0, **options):
        key = name, seed, repr(sorted(options.items(), key=repr))
        if key not in known:
            folder = tmp_path_factory.mktemp("adapter")
            module = tuned(name, seed, **options)
            module.save_pretrained(folder)
            known[key] = folder, module
        return known[key]

    return save


@pytest.fixture
def model():
    return LanguageModel(build("llama"), tokenizer=make_tokenizer())


def first_for_all(output):
    """A block's output, a tensor or in a tuple, in which each prompt has that of the first."""
    if isinstance(output, tuple):
        return first_for_all(output[0]), *output[1:]
    return output[:1].expand_as(output).contiguous()


def logits(model, ids=IDS):
    with model.trace(ids) as tracer:
        result = tracer.result.logits
    return result


def of(module, ids=IDS):
    return module(torch.tensor(ids)).logits


KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "with dropout": {"lora_dropout": 0.5},
    "biases": {"target_modules": ["c_attn"], "bias": "all"},
    "a whole head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens"]},
    "ia3": {"config": peft.IA3Config, "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
}


def kind(name):
    return ("gpt2" if name == "biases" else "llama"), KINDS[name]


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_gives_what_peft_gives_and_leaves_nothing_behind(saved, name):
    family, options = kind(name)
    folder, wanted = saved(family, **options)
    module = build(family)
    model, plain = LanguageModel(module, tokenizer=make_tokenizer()), of(module)
    before = snapshots.of_model(module)

    model.load_adapter(folder)
    assert model.peft == str(folder)
    assert torch.equal(logits(model), of(wanted))
    model.load_adapter(None)
    assert model.peft is None
    if name in ("biases", "embeddings"):  # weights of the model's own that were trained too: written, and written back
        different = snapshots.differences(before, snapshots.of_model(module))
        assert all(": tensor " in one for one in different)
    else:
        assert snapshots.of_model(module) == before
    assert torch.equal(of(module), plain)


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_the_targets_become_layers_and_all_else_stays(saved, model, name):
    _, options = kind(name)
    folder, _ = saved(**options)
    module = model._module
    before = dict(module.named_modules())
    learns = {parameter for parameter in module.parameters() if parameter.requires_grad}
    model.load_adapter(folder)
    after = dict(module.named_modules())
    targets = {path for path in before if path.rpartition(".")[2] in options.get("target_modules", TARGETS["llama"])}
    assert targets
    assert {path for path in before if after[path] is not before[path]} == targets
    for path in targets:
        assert after[f"{path}.base_layer"] is before[path]
        assert not after[path].training
    assert learns <= {parameter for parameter in module.parameters() if parameter.requires_grad}


def test_swapping_is_as_loading_the_second_alone_and_random_numbers_stay_the_users(saved, model):
    (one, first), (other, second) = saved(), saved(seed=5, target_modules=["o_proj"])
    torch.manual_seed(3)
    drawn = torch.rand(4)
    torch.manual_seed(3)
    for folder, wanted in ((one, first), (other, second), (one, first)):
        model.load_adapter(folder)
        assert torch.equal(logits(model), of(wanted))
    assert torch.equal(torch.rand(4), drawn)


def test_values_writes_and_gradients_are_those_of_hooks_on_the_peft_model(saved, model):
    folder, wanted = saved()
    model.load_adapter(folder)
    path = "model.layers.1.self_attn.q_proj"
    seen = {}

    def hook(_, __, output):
        seen["output"] = output
        return output * 2

    handle = wanted.get_base_model().get_submodule(path).register_forward_hook(hook)
    plain = of(wanted)
    handle.remove()
    (grad,) = torch.autograd.grad(plain[0, -1, 7], [seen["output"]])

    with model.trace(IDS) as tracer:
        layer = model.get(path)
        base, output = layer.base_layer.output, layer.output
        layer.output = output * 2
        result = tracer.result.logits
        (own,) = nnsight.grad(result[0, -1, 7], [output])
    assert torch.equal(output, seen["output"])
    assert not torch.equal(base, output)
    assert torch.equal(result, plain)
    assert torch.equal(own, grad)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_uniform_names_hold_with_an_adapter_and_after_it(saved, family):
    model = LanguageModel(build(family), tokenizer=make_tokenizer())
    folder, _ = saved(family)

    def read():
        with model.trace(PROMPT):
            attn = model.layers[1].attn
            q, pattern, z = attn.q, attn.pattern, attn.z
            values = [q, z, pattern, attn.output, model.layers[1].mlp.output, model.layers[1].output, model.logits]
        return values

    bare = read()
    model.load_adapter(folder)
    with_it = read()
    assert nnsight.verify(model)
    model.load_adapter(None)
    again = read()
    assert all(torch.equal(a, b) for a, b in zip(bare, again))
    assert not any(torch.equal(a, b) for a, b in zip(bare, with_it))
    assert nnsight.verify(model)


def test_generation_rows_caches_and_scans_work_with_an_adapter(saved, model):
    folder, wanted = saved()
    model.load_adapter(folder)
    ids = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(
        ids, wanted.generate(input_ids=torch.tensor(IDS), max_new_tokens=3, do_sample=False, pad_token_id=0)
    )
    two = [[3, 1, 4], [2, 6, 5]]
    with model.trace(two) as (one, other):
        cache = one.tracer.cache("q_proj.lora_A.*")
        delta = other.model.layers[0].self_attn.q_proj.lora_B["default"].output
        other.layers[0].output = one.layers[0].output
        results = torch.cat([one.result.logits, other.result.logits])
    hook = model._module.model.layers[0].register_forward_hook(lambda *call: first_for_all(call[-1]))
    by_hook = model.trace(two, trace=False).logits
    hook.remove()
    assert delta.shape == (1, 3, 16)
    assert torch.equal(results, by_hook)
    assert len(cache) == 2
    with model.scan(IDS) as tracer:
        assert tracer.result.logits.shape == (1, 5, 320)


# Where the weights come later.


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", [LanguageModel, TransformersModel])
def test_an_adapter_is_there_before_the_weights_are(saved, folder, make):
    path, wanted = saved()
    model = make(str(folder), peft=path)
    layer = model.model.layers[0].self_attn.q_proj
    assert not model.dispatched
    assert layer.base_layer.weight.is_meta
    assert layer.lora_A["default"].weight.is_meta
    with model.scan(IDS):
        assert layer.output.shape == (1, 5, 16)
    assert torch.equal(logits(model), of(wanted))
    with model.trace(IDS):
        assert layer.output.shape == (1, 5, 16)
    model.load_adapter(None)
    assert torch.equal(logits(model), of(build("llama")))


def test_an_adapter_that_comes_before_the_weights_can_be_swapped_and_taken_off_before_them(saved, folder):
    (one, _), (other, second) = saved(), saved(seed=5, target_modules=["o_proj"])
    model = LanguageModel(str(folder), peft=one)
    model.load_adapter(other)
    assert torch.equal(logits(model), of(second))
    model = LanguageModel(str(folder), peft=one)
    model.load_adapter(None)
    assert torch.equal(logits(model), of(build("llama")))


# Adapters that a model came with.


def test_a_peft_model_is_the_model_in_it():
    module = tuned()
    model = LanguageModel(module, tokenizer=make_tokenizer())
    assert model._module is module.get_base_model()
    assert torch.equal(logits(model), of(module))
    assert model.layers[0].raw.self_attn.q_proj.base_layer.path == "model.model.layers.0.self_attn.q_proj.base_layer"
    with module.disable_adapter():
        assert torch.equal(logits(model), of(build("llama")))
    model.load_adapter(None)
    assert torch.equal(logits(model), of(build("llama")))


def test_a_plain_wrapper_takes_a_peft_model_as_it_is():
    module = tuned()
    model = NNsight(module)
    with model.trace(torch.tensor(IDS)) as tracer:
        model.base_model.model.model.layers[0].self_attn.q_proj.output
        result = tracer.result.logits
    assert torch.equal(result, of(module))


def test_an_adapter_of_transformers_own_loading_is_swapped_and_taken_off(saved):
    (one, first), (other, second) = saved(), saved(seed=5, target_modules=["o_proj"])
    module = build("llama")
    module.load_adapter(str(one))
    model = LanguageModel(module, tokenizer=make_tokenizer())
    assert torch.equal(logits(model), of(first))
    model.load_adapter(other)
    assert torch.equal(logits(model), of(second))
    model.load_adapter(None)
    assert torch.equal(logits(model), of(build("llama")))
    assert not any("lora" in name for name, _ in module.named_modules())


def test_transformers_own_switch_works(saved, model):
    model.load_adapter(saved()[0])
    model.disable_adapters()
    assert torch.equal(logits(model), of(build("llama")))
    model.enable_adapters()
    assert torch.equal(logits(model), of(saved()[1]))


# With and without.


@pytest.mark.parametrize("name", [name for name in KINDS if name != "biases"])
def test_with_and_without_the_adapter_in_one_block(saved, name):
    family, options = kind(name)
    folder, wanted = saved(family, **options)
    model = LanguageModel(build(family), tokenizer=make_tokenizer())
    model.load_adapter(folder)
    bare, plain = model.without_adapter(), build(family)
    with model.trace(IDS) as one, bare.trace(IDS) as other:
        a, b = one.model.layers[0].output, other.model.layers[0].output
        results = one.result.logits, other.result.logits
    assert not torch.equal(a, b)
    assert torch.equal(results[0], of(wanted))
    assert torch.equal(results[1], of(plain))
    own = plain.generate(torch.tensor(IDS), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(bare.generate(IDS, max_new_tokens=3, do_sample=False), own)
    assert torch.equal(logits(model), of(wanted))


def test_an_adapter_that_is_in_the_models_own_weights_too_is_not_left_out_by_halves(saved):
    model = LanguageModel(build("gpt2"), peft=saved("gpt2", **KINDS["biases"])[0])
    with pytest.raises(errors.AdapterError, match="other values for weights of the model's own, such as biases"):
        model.without_adapter()


def test_the_bare_model_follows_a_swap_and_an_edit_of_it_comes_behind(saved, model):
    model.load_adapter(saved()[0])
    bare = model.without_adapter()
    edited = bare.edit(lambda m: setattr(m.layers[0], "output", m.layers[0].output * 2))
    for options in ({"seed": 5, "target_modules": ["o_proj"]}, {}):
        model.load_adapter(saved(**options)[0])
        assert torch.equal(logits(bare), of(build("llama")))
        assert torch.equal(
            logits(edited), logits(LanguageModel(build("llama")).edit(edited._tree.edits[-1].body.function))
        )
    bare.clear_edits()
    bare.model.layers[0].clear_edits()
    assert torch.equal(logits(bare), of(build("llama")))
    model.load_adapter(None)
    assert torch.equal(logits(bare), of(build("llama")))
    with pytest.raises(errors.AdapterError, match="has no adapter"):
        model.without_adapter()


def test_edits_stay_with_their_paths(saved, model):
    layer = model.model.layers[0].self_attn.q_proj
    edited = model.edit(
        lambda m: setattr(m.model.layers[0].self_attn.q_proj, "output", m.model.layers[0].self_attn.q_proj.output * 0)
    )
    layer.edit(lambda q: setattr(q, "output", q.output + 1), inplace=True)
    model.load_adapter(saved()[0])
    with edited.trace(IDS):
        seen = layer.output
    assert not seen.any()
    with model.trace(IDS):
        base, seen = layer.base_layer.output, layer.output
    assert layer._module is model._module.model.layers[0].self_attn.q_proj
    assert not torch.equal(base, seen)
    layer.lora_A["default"].edit(lambda a: setattr(a, "output", a.output * 0), inplace=True)
    with pytest.raises(
        errors.AdapterError, match=r"(?s)lora_A.default` would go with the adapter, and is edited.*edited at"
    ):
        model.load_adapter(None)
    assert "lora_A" in str(model)
    layer.lora_A.clear_edits()
    model.load_adapter(None)
    assert layer._module is model._module.model.layers[0].self_attn.q_proj


# What would do nothing, or something else.


def changed(folder, tmp_path, *, config=None, weights=None):
    """A copy of an adapter with something else in it."""
    from safetensors.torch import load_file, save_file

    told = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**told, **(config or {})}))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(weights(tensors) if weights else tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


WRONG = {
    "no such module": ({"target_modules": ["wq"]}, None, r"(?s)can't be put on this LlamaForCausalLM.*wq"),
    "weights without a place": (
        {"target_modules": ["q_proj"]},
        None,
        r"(?s)it belongs to another model.*without a place +model.layers.0.mlp.down_proj.lora_A",
    ),
    "modules without weights": (
        {"target_modules": ["q_proj", "k_proj", "down_proj"]},
        None,
        r"(?s)it belongs to another model.*without weights +model.layers.0.self_attn.k_proj",
    ),
    "another name above": (
        None,
        lambda weights: {key.replace("layers", "h"): value for key, value in weights.items()},
        r"(?s)it belongs to another model.*without a place",
    ),
    "another width": (
        None,
        lambda weights: {
            key: value.repeat(1, 2) if "q_proj.lora_A" in key else value for key, value in weights.items()
        },
        r"(?s)it belongs to another model.*of other shapes +model.layers.0.self_attn.q_proj.lora_A.weight \[2, 32\]",
    ),
}


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_an_adapter_that_would_change_nothing_is_refused_and_the_model_stays(saved, tmp_path, folder, name, lazily):
    config, weights, text = WRONG[name]
    good, wanted = saved()
    wrong = changed(good, tmp_path, config=config, weights=weights)
    model = LanguageModel(str(folder), peft=good) if lazily else LanguageModel(build("llama"), peft=good)
    before = snapshots.of_model(model._module)
    with pytest.raises(errors.AdapterError, match=text):
        model.load_adapter(wrong)
    assert model.peft == str(good)
    assert snapshots.of_model(model._module) == before
    assert torch.equal(logits(model), of(wanted))


def test_an_adapter_of_another_family_is_refused(saved):
    model = LanguageModel(build("gpt2"))
    before = snapshots.of_model(model._module)
    with pytest.raises(
        errors.AdapterError, match=r"(?s)can't be put on this GPT2LMHeadModel.*made for +a LlamaForCausalLM"
    ):
        model.load_adapter(saved()[0])
    assert snapshots.of_model(model._module) == before


def test_an_adapter_of_another_base_of_the_same_shape_is_told(saved, tmp_path, folder):
    other = changed(saved()[0], tmp_path, config={"base_model_name_or_path": "acme/llama-instruct"})
    with pytest.warns(UserWarning, match="was made for `acme/llama-instruct`"):
        model = LanguageModel(str(folder), peft=other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.dispatch()


def test_prompt_tuning_is_refused_by_name(tmp_path):
    module = peft.get_peft_model(build("gpt2"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    module.save_pretrained(tmp_path)
    with pytest.raises(errors.AdapterError, match="PROMPT_TUNING, which adds tokens in front of the prompt"):
        LanguageModel(build("gpt2")).load_adapter(tmp_path)
    with pytest.raises(errors.AdapterError, match=r"NNsight\(module\)"):
        LanguageModel(module)


def test_what_is_no_adapter_is_told(tmp_path, model, folder, saved):
    with pytest.raises(errors.HubError, match=r"the folder has no adapter_config\.json"):
        model.load_adapter(folder)
    with pytest.raises(errors.HubError, match="there is no such folder"):
        model.load_adapter(tmp_path / "nowhere")
    with pytest.raises(errors.AdapterError, match="a folder or a name on the hub, not a PeftModel"):
        model.load_adapter(tuned())
    with pytest.raises(errors.HubError, match=r"(?s)is an adapter, not a model.*peft=the adapter's"):
        LanguageModel(str(saved()[0]))
    tuned().save_pretrained(tmp_path)
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(errors.HubError, match=r"(?s)has a model and an adapter.*peft=the adapter's"):
        LanguageModel(str(tmp_path))


def test_an_adapter_whose_files_are_broken_is_told_and_the_model_stays(saved, tmp_path, model):
    before = snapshots.of_model(model._module)
    broken = changed(saved()[0], tmp_path)
    (broken / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(errors.HubError, match=r"(?s)The weights of the adapter `.*` can't be read.*because"):
        model.load_adapter(broken)
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(errors.HubError, match=r"(?s)No adapter can be read from `.*because"):
        model.load_adapter(broken)
    assert snapshots.of_model(model._module) == before


def test_an_adapter_stays_while_the_model_runs(saved, model):
    model.load_adapter(saved()[0])
    with pytest.raises(errors.BlockError, match="can't come or go while the model runs"):
        with model.trace(IDS):
            model.load_adapter(None)
    assert torch.equal(logits(model), of(saved()[1]))


def test_an_adapter_may_go_while_a_backward_pass_waits_which_does_not_run_the_model(saved, model):
    model.load_adapter(saved()[0])
    with model.trace(IDS) as tracer:
        hidden = model.model.layers[0].output
        loss = tracer.result.logits.sum()
    expected = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    with nnsight.backward(loss):
        loss.grad
        model.load_adapter(None)
        gradient = hidden.grad
    assert torch.equal(gradient, expected)
    assert torch.equal(logits(model), of(build("llama")))


def test_an_adapter_stays_while_the_model_runs_on_another_thread_or_in_a_generator(saved, model):
    folder, expected = saved()
    model.load_adapter(folder)
    began, may_end, found = threading.Event(), threading.Event(), []

    def trace():
        with model.trace(IDS):
            first = model.model.layers[0].output
            began.set()
            may_end.wait(10)
            found.append((first, model.lm_head.output))

    thread = threading.Thread(target=trace, name="traces")
    thread.start()
    began.wait(10)
    try:
        for change in (lambda: model.load_adapter(None), lambda: model.without_adapter().load_adapter(None)):
            with pytest.raises(errors.BlockError, match="while the model runs, as it does on the thread 'traces'"):
                change()
    finally:
        may_end.set()
        thread.join()
    assert torch.equal(found[0][1], of(expected))

    def generator():
        with model.trace(IDS):
            yield model.model.layers[0].output

    values = contextvars.copy_context().run(generator)
    contextvars.copy_context().run(next, values)
    with pytest.raises(errors.BlockError, match="as it does in another task or generator"):
        model.load_adapter(None)
    values.close()
    model.load_adapter(None)
    assert not torch.equal(logits(model), of(expected))


def test_a_view_that_edits_what_goes_with_the_adapter_is_named(saved, model):
    model.load_adapter(saved()[0])
    lora = "model.layers.0.self_attn.q_proj.lora_A.default"
    for view, whose in (
        (model.without_adapter(), "what without_adapter"),
        (model.edit(lambda _: None), "the edited model"),
    ):
        view.get(lora).edit(lambda a: setattr(a, "output", a.output * 0), inplace=True)
        with pytest.raises(errors.AdapterError, match=rf"(?s)edited in a view.*clear_edits\(\) of {whose}"):
            model.load_adapter(None)
        model.clear_edits()
        with pytest.raises(errors.AdapterError, match="in a view"):
            model.load_adapter(None)
        view.clear_edits()
        model.load_adapter(None)
        model.load_adapter(saved()[0])


def test_an_option_that_nobody_has_a_use_for_is_told(saved, model):
    with pytest.raises(errors.InputError, match=r"(?s)`revison` is no option of looking up an adapter.*`revision`"):
        model.load_adapter(saved()[0], revison="main")
    model.load_adapter(saved()[0].parent, subfolder=saved()[0].name)
    assert torch.equal(logits(model), of(saved()[1]))


def test_weights_that_an_adapter_is_part_of_are_no_views(model, saved):
    model.load_adapter(saved(target_modules=["lm_head", "embed_tokens"])[0])
    for name in ("W_E", "W_U"):
        with pytest.raises(errors.NotOnThisLayerError, match=rf"`{name}`.*an adapter.*(?s:.)*base_layer.weight"):
            getattr(model, name)
    model.load_adapter(saved()[0])
    with pytest.raises(errors.NotOnThisLayerError, match="adapted"):
        model.layers[0].attn.W_Q
    with pytest.raises(errors.NotOnThisLayerError, match="an adapter is a part of it"):
        model.layers[0].mlp.W_out
    model.load_adapter(None)
    assert model.W_U.shape == model.W_E.T.shape
    assert model.layers[0].mlp.W_out.shape == (32, 16)


def test_a_merged_adapter_can_not_be_told_from_the_weights():
    module = tuned()
    module.merge_adapter()
    with pytest.raises(errors.AdapterError, match="is merged into the weights"):
        LanguageModel(module)
    module.unmerge_adapter()


def test_a_missing_package_is_told_in_a_line(saved, model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(errors.MissingPackageError, match=r'(?s)package `peft`.*pip install "nnsight\[peft\]"'):
        model.load_adapter(saved()[0])


def test_a_classifier_takes_an_adapter_with_its_own_head(tmp_path):
    def make():
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=1)
        return transformers.GPT2ForSequenceClassification(config).eval()

    module = peft.get_peft_model(make(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["c_attn"])).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)) if parameter.requires_grad else None
    module.save_pretrained(tmp_path)
    model = TransformersModel(make(), peft=tmp_path)
    assert torch.equal(logits(model), of(module))
    assert isinstance(model.score.original_module._module, nn.Linear)


def test_a_name_that_is_not_in_reach_is_told_at_once(monkeypatch, model):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(errors.HubError, match=r"`acme/none` can't be loaded: there is no such folder.*no copy\.$"):
        model.load_adapter("acme/none")


def test_an_adapter_does_not_come_through_another_view_while_the_model_runs(saved, model):
    model.load_adapter(saved()[0])
    bare = model.without_adapter()
    with pytest.raises(errors.BlockError, match="while the model runs"), model.trace(IDS):
        model.model.layers[0].output
        bare.load_adapter(saved(seed=1)[0])


def test_an_adapter_that_was_merged_meanwhile_is_not_taken_for_none(saved, model):
    model.load_adapter(saved()[0])
    bare = model.without_adapter()
    for layer in model._module.modules():
        if hasattr(layer, "lora_A"):
            layer.merge()
    with pytest.raises(errors.AdapterError, match="merged"):
        model.without_adapter()
    with pytest.raises(errors.AdapterError, match="merged"):
        model.load_adapter(None)
    with pytest.raises(errors.AdapterError, match="merged"), bare.trace(IDS):
        bare.lm_head.output


def test_what_the_model_was_given_beside_an_adapter_stays(saved, model):
    module = model._module
    model.load_adapter(saved()[0])
    module.train()
    module.flag = 3
    model.load_adapter(None)
    assert module.training
    assert module.flag == 3
    assert "peft_config" not in vars(module)
