"""Uniform names mean the same in every architecture, and what is assigned under them reaches the model."""

import copy
import gc
import pickle
import weakref

import families
import pytest
import torch
import transformers
from architectures import (
    ATTENDING,
    FAMILIES,
    IN_PLACE,
    PLAIN,
    WITHOUT_ROWS,
    close,
    equal,
    first,
    fresh,
    given,
    hooked,
    model_of,
    seen,
    trace,
)
from torch import nn

import nnsight
from nnsight import LanguageModel
from nnsight.anatomy.halves import HALVES
from nnsight.anatomy.uniform import NAMES
from nnsight.errors import (
    AlreadyPastError,
    AnatomyError,
    BlockError,
    NotOnThisLayerError,
    OutsideTraceError,
    UnknownIndexError,
    UnknownNameError,
    WriteError,
)

IDS = torch.tensor([[3, 14, 15, 9, 26]])
EVERY = list(FAMILIES)
every = pytest.mark.parametrize("name", EVERY)
attending = pytest.mark.parametrize("name", ATTENDING)


def below(name, layer, path):
    return f"{FAMILIES[name].layers}.{layer}.{path}"


# What is read.


@every
def test_the_residual_stream_is_what_the_raw_layers_are_given_and_return(name):
    model, raw = model_of(name), FAMILIES[name]
    inputs = {}
    paths = [f"{raw.layers}.{i}" for i in range(len(model.layers))]
    outputs = seen(model, *paths)
    hooked(model, inputs={path: lambda value, path=path: inputs.update({path: value.clone()}) for path in paths})
    with trace(model), torch.no_grad():
        for i, path in enumerate(paths):
            equal(model.layers[i].input, inputs[path])
            equal(model.layers[i].output, outputs[i])
            assert model.layers[i].output is first(model.get(path).output)


@every
def test_what_attn_and_mlp_add_is_what_their_modules_return_summed_and_scaled(name):
    model, raw = model_of(name), FAMILIES[name]
    attn, mlp = ([seen(model, below(name, 1, path))[0] for path in paths] for paths in (raw.attn, raw.mlp))
    with trace(model), torch.no_grad():
        if name == "falcon_h1":  # the feed-forward's module runs last everywhere
            equal(model.layers[1].attn.output, attn[0] + attn[1])
        else:
            equal(model.layers[1].attn.output, attn[0] * raw.scale)
        if mlp:
            equal(model.layers[1].mlp.output, mlp[0] * raw.scale)


@pytest.mark.parametrize("name", PLAIN)
def test_input_and_what_is_added_make_the_output(name):
    model = model_of(name)
    with trace(model), torch.no_grad():
        for layer in model.layers:
            total = layer.input
            for part in ("attn", "mlp"):
                if layer.has(part):
                    total = total + getattr(layer, part).output
            close(total, layer.output)


@every
def test_logits_are_the_models_and_the_last_layer_projects_to_them(name):
    model = model_of(name)
    untouched = hooked(model)
    with trace(model), torch.no_grad():
        last = model.layers[-1].output
        projected = model.project(last)
        equal(model.logits, untouched)
    close(projected, untouched)
    with torch.no_grad():
        close(model.project(last), untouched)  # outside a trace too


@every
def test_sizes_are_those_of_the_arrays(name):
    model = model_of(name)
    ids, _ = given(model)
    with trace(model), torch.no_grad():
        layer = model.layers[1]
        assert model.n_layers == len(model.layers) == len(model.get(FAMILIES[name].layers))
        assert layer.input.shape == (*ids.shape, model.d_model)
        if name in ATTENDING:
            assert layer.attn.q.shape == (*ids.shape, model.n_heads, model.d_head)
            assert layer.attn.k.shape == (*ids.shape, model.n_kv_heads, model.d_head)
        assert model.logits.shape == (*ids.shape, model.n_vocab)
    assert model.W_E.shape == (model.n_vocab, model.d_model)


@every
def test_modules_of_the_whole_model_are_its_own(name):
    model, raw = model_of(name), FAMILIES[name]
    assert model.embed._module is model._module.get_input_embeddings()
    assert model.layers[1].raw is model.get(f"{raw.layers}.1")
    if raw.norm:
        assert model.norm is model.get(raw.norm)
        assert model.unembed is model.get(raw.unembed)
        assert torch.equal(model.W_U, model.unembed.weight.T)
        assert model.W_U.data_ptr() == model.unembed.weight.data_ptr()
    assert model.W_E is model.embed._module.weight


ATTN_GIVEN = {"gemma2": "self_attn", "olmo2": "self_attn", "bloom": "self_attention", "bert": "attention.self"}
MLP_GIVEN = {"gemma2": "mlp", "olmo2": "mlp", "bloom": "mlp", "bert": "intermediate"}


@every
def test_what_attn_and_mlp_are_given_is_what_their_modules_are(name):
    model, raw = model_of(name), FAMILIES[name]
    given_to = {"attn": ATTN_GIVEN.get(name, raw.attn[-1]), "mlp": MLP_GIVEN.get(name, (*raw.mlp, None)[0])}
    for part, module in given_to.items():
        if not model.layers[1].has(f"{part}.input"):
            assert (name, part) in [("falcon_h1", "attn"), ("mamba", "mlp")]
            with pytest.raises(NotOnThisLayerError), trace(model):
                getattr(model.layers[1], part).input = 0
            continue
        kept = []
        hooked(model, inputs={below(name, 1, module): lambda value, kept=kept: kept.append(value.clone())})
        with trace(model), torch.no_grad():
            equal(getattr(model.layers[1], part).input, kept[0])
        wanted = hooked(model, inputs={below(name, 1, module): noise_like})
        with trace(model), torch.no_grad():
            getattr(model.layers[1], part).input = noise_like(kept[0])
            written = model.logits
        equal(written, wanted)
        assert not torch.equal(written, hooked(model))


# What is assigned.


def noise_like(value):
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(5))


@every
@pytest.mark.parametrize("port", ["input", "output"])
def test_a_written_stream_is_what_a_hook_writes(name, port):
    model, path = model_of(name), f"{FAMILIES[name].layers}.1"
    wanted = hooked(model, **{f"{port}s": {path: noise_like}})
    with trace(model), torch.no_grad():
        layer = model.layers[1]
        setattr(layer, port, noise_like(getattr(layer, port)))
        equal(model.logits, wanted)
    assert not torch.equal(wanted, hooked(model))


@every
def test_what_is_written_to_attn_and_mlp_is_added(name):
    model, raw = model_of(name), FAMILIES[name]
    for part, paths in (("attn", raw.attn), ("mlp", raw.mlp)):
        if not paths:
            continue
        others = seen(model, *(below(name, 1, path) for path in paths[:-1]))
        change = lambda value, others=others: (noise_like(value) - sum(others)) / raw.scale  # noqa: E731
        wanted = hooked(model, outputs={below(name, 1, paths[-1]): change})
        with trace(model), torch.no_grad():
            getattr(model.layers[1], part).output = noise_like(model.layers[1].input)
            equal(model.logits, wanted)
        assert not torch.equal(wanted, hooked(model))


@every
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_change_in_place_of_what_is_added_reaches_the_model(name, part):
    model = model_of(name)
    if not model.layers[1].has(part):
        return
    with trace(model), torch.no_grad():
        added = getattr(model.layers[1], part)
        added.output = added.output + 1.0
        written = model.logits
    with trace(model), torch.no_grad():
        getattr(model.layers[1], part).output[:] += 1.0
        changed = model.logits
    close(changed, written)
    assert not torch.equal(changed, hooked(model))


@every
@pytest.mark.parametrize("port", ["input", "output"])
def test_a_change_in_place_of_the_stream_is_one_of_the_raw_tensor(name, port):
    model = model_of(name)
    raw = model.get(f"{FAMILIES[name].layers}.1")
    with trace(model), torch.no_grad():
        stream = first(raw.output) if port == "output" else raw.input
        stream[:, 0] *= 2
        wanted = model.logits
    with trace(model), torch.no_grad():
        getattr(model.layers[1], port)[:, 0] *= 2
        equal(model.logits, wanted)
    assert not torch.equal(wanted, hooked(model))


@every
def test_writing_back_what_was_read_changes_nothing(name):
    model = model_of(name)
    with trace(model), torch.no_grad():
        for layer in model.layers:
            layer.input = layer.input
            for part in ("attn", "mlp"):
                if layer.has(part):
                    added = getattr(layer, part)
                    added.output = added.output
            layer.output = layer.output
        model.logits = model.logits
        logits = model.logits
    equal(logits, hooked(model))


@pytest.mark.parametrize(("name", "part"), [("granite", "attn"), ("granite", "mlp"), ("falcon_h1", "attn")])
def test_an_unchanged_object_is_had_again_and_passes_untouched(name, part):
    model = model_of(name)
    last = {"granite": FAMILIES[name].attn if part == "attn" else FAMILIES[name].mlp}.get(name, ("self_attn",))[-1]
    with trace(model), torch.no_grad():
        added = getattr(model.layers[1], part)
        value = added.output
        assert added.output is value
        raw = first(model.layers[1].raw.get(last).output)
        added.output = value
        assert first(model.layers[1].raw.get(last).output) is raw


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_value_that_the_model_adds_to_afterwards_stays_what_was_added(name):
    model, part = model_of(name), IN_PLACE[name]
    with trace(model), torch.no_grad():
        value = getattr(model.layers[1], part).output
        kept = value.clone()
        raw = getattr(model.layers[1].raw, part).output
        raw_kept = raw.clone()
        model.logits  # the model runs on
    equal(value, kept)
    assert not torch.equal(raw, raw_kept)  # else this test says nothing


@every
def test_written_logits_are_returned(name):
    model = model_of(name)
    with trace(model) as tracer, torch.no_grad():
        new = noise_like(model.logits)
        model.logits = new
        assert model.logits is new
        assert tracer.result.logits is new


# Studies, written once.


def lens(model):
    with trace(model), torch.no_grad():
        return [model.project(layer.output) for layer in model.layers]


@every
def test_a_lens_agrees_with_one_written_by_hand(name):
    model, raw = model_of(name), FAMILIES[name]
    streams = seen(model, *(f"{raw.layers}.{i}" for i in range(model.n_layers)))
    module = model._module
    for found, stream in zip(lens(model), streams, strict=True):
        with torch.no_grad():
            normed = module.get_submodule(raw.norm)(stream) if raw.norm else stream
            logits = module.get_submodule(raw.unembed)(normed) * raw.logits_scale
        close(found, logits if raw.cap is None else raw.cap * torch.tanh(logits / raw.cap))


def patched(model, layer):
    """The logits of one prompt with the stream of another behind a layer, at the last token."""
    with trace(model, seed=1), torch.no_grad():
        clean = model.layers[layer].output[:, -1]
    with trace(model), torch.no_grad():
        model.layers[layer].output[:, -1] = clean
        return model.logits


@every
def test_an_activation_patch_agrees_with_one_written_by_hand(name):
    model, path = model_of(name), f"{FAMILIES[name].layers}.1"
    (clean,) = seen(model, path, seed=1)

    def patch(value):
        value = value.clone()
        value[:, -1] = clean[:, -1]
        return value

    wanted = hooked(model, outputs={path: patch})
    equal(patched(model, 1), wanted)
    assert not torch.equal(wanted, hooked(model))


def ablated(model, layer, head):
    with trace(model), torch.no_grad():
        model.layers[layer].attn.z[:, :, head] = 0
        return model.logits


@attending
def test_a_head_ablation_agrees_with_one_written_by_hand(name):
    model = model_of(name)
    width = model.d_head

    def ablate(value):
        value = value.clone()
        value[..., width : 2 * width] = 0
        return value

    wanted = hooked(model, inputs={below(name, 1, FAMILIES[name].projection): ablate})
    close(ablated(model, 1, 1), wanted)
    assert not torch.equal(wanted, hooked(model))


@attending
@pytest.mark.parametrize("value", ["q", "k", "v", "scores", "pattern", "z"])
def test_inside_attention_a_change_in_place_is_a_write(name, value):
    model = model_of(name)
    with torch.no_grad(), trace(model):  # with a graph, torch lets nobody change in place one of several views
        attn = model.layers[1].attn
        setattr(attn, value, getattr(attn, value) * 0.5)
        written = model.logits
    with torch.no_grad(), trace(model):
        getattr(model.layers[1].attn, value).mul_(0.5)
        equal(model.logits, written)
    assert not torch.equal(written, hooked(model))


# With what else a trace can do.


def prompts(model):
    ids, others = given(model)
    return ids.tolist(), {name: value for name, value in others.items() if not isinstance(value, torch.Tensor)}


@every
def test_rows_have_the_names_and_a_patch_between_them_is_one_between_runs(name):
    if name in WITHOUT_ROWS:
        pytest.skip("this transformers' can't be run on fake tensors")
    model = model_of(name)
    (one, two), others = prompts(model)
    with model.trace([one], **others), torch.no_grad():
        clean = model.layers[0].output
        clean_added = model.layers[-1].attn.output
    with model.trace([two], **others), torch.no_grad():
        model.layers[0].output = clean
        wanted = model.logits
    with model.trace([one, two], **others) as (a, b), torch.no_grad():
        b.layers[0].output = a.layers[0].output
        close(a.layers[-1].attn.output, clean_added)
        close(b.uniform.layers[-1].attn.output, clean_added)
        close(b.logits, wanted)


@pytest.mark.parametrize("name", ["gpt2", "granite", "falcon", "falcon_h1", "gemma2"])
def test_a_row_changed_in_place_leaves_the_other_alone(name):
    if name in WITHOUT_ROWS:
        pytest.skip("this transformers' can't be run on fake tensors")
    model = model_of(name)
    both, others = prompts(model)
    untouched = hooked(model)
    for part in ("attn", "mlp"):
        with model.trace(both, **others) as (a, b), torch.no_grad():
            getattr(b.layers[1], part).output[:] += 1
            close(a.logits, untouched[:1])
            assert not torch.equal(b.logits, untouched[1:])


@every
def test_invokes_have_the_names(name):
    if name in WITHOUT_ROWS:
        pytest.skip("this transformers' can't be run on fake tensors")
    model = model_of(name)
    (one, two), others = prompts(model)
    untouched = hooked(model)
    with model.trace(**others) as tracer, torch.no_grad():
        with tracer.invoke([one]):
            kept = model.layers[1].attn.output
            one_logits = model.logits
        with tracer.invoke([two]):
            model.layers[1].attn.output = kept
            two_logits = model.logits
    close(one_logits, untouched[:1])
    assert not torch.allclose(two_logits, untouched[1:])


@pytest.mark.parametrize("name", ["gpt2", "granite", "falcon", "falcon_h1", "mamba"])
def test_each_step_of_a_generation_has_the_names(name):
    model = model_of(name)
    (one, _), _ = prompts(model)
    streams, added, logits = [], [], []
    with model.generate([one], max_new_tokens=3, do_sample=False, eos_token_id=None) as tracer:
        for _ in tracer.iter[:]:
            added.append(model.layers[1].attn.output)
            streams.append(model.layers[1].output)
            logits.append(model.logits)
        ids = tracer.result
    assert [len(values) for values in (streams, added, logits)] == [3, 3, 3]
    assert [one.shape[1] for one in added][1:] == [1, 1]
    assert [int(one[0, -1].argmax()) for one in logits] == ids[0, -3:].tolist()


@every
def test_an_edit_is_written_in_uniform_names(name):
    model = fresh(name)
    with model.edit() as edited:
        edited.layers[0].attn.output = edited.layers[0].attn.output * 0
        if name in ATTENDING:
            edited.layers[-1].attn.z[:, :, 0] = 0
    with trace(model), torch.no_grad():
        model.layers[0].attn.output = model.layers[0].attn.output * 0
        if name in ATTENDING:
            model.layers[-1].attn.z[:, :, 0] = 0
        wanted = model.logits
    with trace(edited), torch.no_grad():
        equal(edited.logits, wanted)
    with trace(model), torch.no_grad():
        assert not torch.equal(model.logits, wanted)


def test_names_of_an_edited_view_are_the_views():
    model = fresh("llama")
    assert model.layers[0].raw.root is model
    edited = model.edit(lambda edited: edited.layers[1].mlp.output.zero_())
    assert edited.layers[0].raw.root is edited
    with trace(edited), torch.no_grad():
        assert float(edited.layers[1].mlp.output.abs().max()) == 0
    with trace(model), torch.no_grad():
        assert float(model.layers[1].mlp.output.abs().max()) > 0


@every
def test_a_cache_of_raw_modules_stands_beside(name):
    model = model_of(name)
    path = f"{FAMILIES[name].layers}.1"
    with trace(model) as tracer, torch.no_grad():
        cache = tracer.cache(modules=[f"model.{path}"])
        added = model.layers[1].attn.output
        stream = model.layers[1].output
    equal(first(cache[f"model.{path}"].output), stream)
    assert added.shape == stream.shape


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("mamba", "falcon_h1")])
def test_a_scan_has_the_shapes_of_a_trace(name):
    model = model_of(name)
    ids, others = given(model)

    def shapes():
        layer = model.layers[1]
        values = [layer.input, layer.attn.output, layer.mlp.output] if name not in PARALLEL else [layer.input]
        return [tuple(value.shape) for value in (*values, layer.output, model.logits)]

    with model.scan(ids, **others):
        scanned = shapes()
    with trace(model), torch.no_grad():
        assert scanned == shapes()


PARALLEL = {"gpt_neox", "falcon"}


@attending
def test_a_scan_has_what_is_inside_attention(name):
    if name == "falcon_h1":
        pytest.skip("its state space can't be scanned")
    model = model_of(name)
    ids, others = given(model)
    with model.scan(ids, **others):
        z = tuple(model.layers[1].attn.z.shape)
    assert z == (*ids.shape, model.n_heads, model.d_head)


@every
def test_gradients_are_those_of_plain_autograd(name):
    model = model_of(name)
    path = f"{FAMILIES[name].layers}.1"
    ids, others = given(model)
    kept = []

    def note(_, __, output):
        kept.append(first(output))

    handle = model._module.get_submodule(path).register_forward_hook(note)
    logits = model._module(ids, **others).logits
    handle.remove()
    (wanted,) = torch.autograd.grad(logits[:, -1].square().sum(), kept)
    with trace(model):
        layer = model.layers[1]
        stream = layer.output
        found = nnsight.grad(model.logits[:, -1].square().sum(), [stream])[0]
    close(found, wanted)


@pytest.mark.parametrize("name", ["gpt2", "granite", "falcon_h1", "falcon"])
def test_gradients_of_what_is_added_are_those_of_the_stream(name):
    if name in WITHOUT_ROWS:
        pytest.skip("this transformers' can't be run on fake tensors")
    """In its last part, a layer only adds."""
    model = model_of(name)
    untouched = hooked(model)
    for rows in (False, True):
        with trace(model) as scopes:
            scope = scopes.rows[1] if rows else model
            part = scope.layers[2].mlp.parts and "mlp"
            added = getattr(scope.layers[2], part).output
            stream = scope.layers[2].output
            of_added, of_stream = nnsight.grad(scope.logits.square().sum(), [added, stream])
            logits = model.logits
        close(of_added, of_stream)
        equal(logits, untouched)


def test_gradients_of_a_sum_of_two_mixers_are_those_of_each():
    model = model_of("falcon_h1")
    with trace(model):
        mixed = model.layers[1].attn.output
        summed = nnsight.grad(model.logits.square().sum(), [mixed])[0]
    with trace(model):
        one = model.layers[1].raw.mamba.output
        other = model.layers[1].raw.self_attn.output[0]
        alone = nnsight.grad(model.logits.square().sum(), [one, other])
    close(summed, alone[0])
    close(summed, alone[1])
    with trace(model):
        one = model.layers[1].raw.mamba.output
        model.layers[1].attn.output  # what is read leaves the others' gradients as they are
        close(nnsight.grad(model.logits.square().sum(), [one])[0], alone[0])


# Whose name it is.


class Bare(nn.Module):
    """Has children of two of our names, as a bare LlamaModel has."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.layers, self.norm = inner.model.layers, inner.model.norm

    def forward(self, input_ids, **options):
        return self.inner(input_ids, **options)


def test_a_child_of_the_modules_own_wins_and_uniform_is_ours():
    module = model_of("llama")._module.model
    model = LanguageModel(module)
    assert model.layers is model.get("layers")
    assert model.norm is model.get("norm")
    assert model.layers[0]._module is module.layers[0]


def test_an_alias_of_the_users_wins():
    model = LanguageModel(model_of("gpt2")._module, rename={"transformer.h": "layers", "transformer.wpe": "embed"})
    assert model.layers._module is model._module.transformer.h
    assert model.embed._module is model._module.transformer.wpe
    assert model.norm is model.transformer.ln_f
    with trace(model) as tracer, torch.no_grad():
        assert model.layers[1].output is not None
        assert tracer.layers._module is model._module.transformer.h
        stream = tracer.uniform.layers[2].output
        assert model.uniform.layers[2].output is stream


def test_below_a_layer_ours_win_and_others_are_the_modules():
    model = model_of("gpt2")
    layer = model.layers[1]
    assert layer.ln_1 is model.transformer.h[1].ln_1
    assert layer.raw.attn is model.transformer.h[1].attn
    assert layer.attn is not layer.raw.attn
    with trace(model), torch.no_grad():
        stream = layer.input
        assert layer.ln_1.output.shape == stream.shape


def test_names_lead_to_a_module_that_was_put_in_place_of_another():
    model = LanguageModel(transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL)).eval())
    before = model.layers[1].raw
    model._module.transformer.h[1] = transformers.GPT2LMHeadModel(model.config).transformer.h[1].eval()
    assert model.layers[1].raw._module is model._module.transformer.h[1] is not before._module
    with model.trace([[1, 2, 3]]), torch.no_grad():
        assert model.layers[1].output is first(model.transformer.h[1].output)


SMALL = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 64}


def test_names_from_before_the_weights_came_hold_afterwards():
    model = LanguageModel("nnsight/demo")
    layer, embed = model.layers[1], model.embed
    assert layer.raw._module is model._module.transformer.h[1]
    model.dispatch()
    with model.trace("The Eiffel Tower"), torch.no_grad():
        assert embed.output.device.type == "cpu"
        assert layer.output.device.type == "cpu"
    assert layer.raw._module is model._module.transformer.h[1]
    assert not model.W_E.is_meta


def test_a_model_is_freed_without_the_collector_and_pickled():
    module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL)).eval()
    model = LanguageModel(module)
    with model.trace([[1, 2, 3]]), torch.no_grad():
        model.layers[1].attn.z
        model.layers[1].attn.output
    copied = pickle.loads(pickle.dumps(model))
    assert copied.layers[1].raw._module is copied._module.transformer.h[1]
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


# By one string.


@every
def test_every_site_is_read_and_listed_in_the_order_of_a_pass(name):
    model = model_of(name)
    places = model.sites()
    sizes = {"prompt": 2, "token": 7, "query": 7, "key": 7, "model": model.d_model, "vocabulary": model.n_vocab}
    if name in ATTENDING:
        sizes |= {"head": model.n_heads, "kv_head": model.n_kv_heads, "d_head": model.d_head}
    sizes |= {"d_mlp": model.d_mlp, "expert": 4, "k": 2}  # Mixtral's, made small
    for place in places:
        with trace(model), torch.no_grad():
            assert tuple(place.value.shape) == tuple(sizes[axis] for axis in place.axes), place
    assert places[0].name == "embed.output"
    assert places[-1].name == "logits"
    assert len(repr(places).splitlines()) == len(places)


@pytest.mark.parametrize(
    ("lens", "ours"),
    [
        ("blocks.1.hook_resid_pre", "layers.1.input"),
        ("blocks.1.hook_resid_post", "layers.1.output"),
        ("blocks.1.hook_attn_out", "layers.1.attn.output"),
        ("blocks.1.hook_mlp_out", "layers.1.mlp.output"),
        ("blocks.2.attn.hook_z", "layers.2.attn.z"),
        ("blocks.2.attn.hook_q", "layers.2.attn.q"),
        ("blocks.2.attn.hook_pattern", "layers.2.attn.pattern"),
        ("blocks.2.attn.hook_attn_scores", "layers.2.attn.scores"),
        ("ln_final", "norm.output"),
        ("unembed", "logits"),
        ("layers[2].attn.v", "layers.2.attn.v"),
        ("logits", "logits"),
    ],
)
def test_a_site_has_our_name_and_transformer_lens_s(lens, ours):
    model = model_of("gpt2")
    assert model.site(lens).name == model.site(ours).name == ours


def test_a_sites_value_is_read_and_assigned():
    model = model_of("gpt2")
    with trace(model) as tracer, torch.no_grad():
        assert tracer.site("blocks.0.hook_resid_post").value is model.layers[0].output
        model.site("blocks.1.attn.hook_z").value = torch.zeros(2, 7, model.n_heads, model.d_head)
        found = model.logits
    with trace(model), torch.no_grad():
        model.layers[1].attn.z[:] = 0
        equal(model.logits, found)


def test_a_site_that_is_not_there_has_the_nearest():
    with pytest.raises(UnknownNameError, match=r"no site `blocks\.1\.attn\.hook_x`[\s\S]*nearest"):
        model_of("gpt2").site("blocks.1.attn.hook_x")
    with pytest.raises(UnknownNameError, match=r"no site `layers\.1\.attn\.z`"):
        model_of("mamba").site("layers.1.attn.z")


# Mistakes.


def test_there_is_no_such_layer():
    model = model_of("gpt2")
    with pytest.raises(UnknownIndexError, match=r"There is no layer 3\.[\s\S]*3 layers: 0 to 2, or -3 to -1"):
        model.layers[3]
    with pytest.raises(IndexError, match="There is no layer -4"):
        model.layers[-4]
    assert [layer.index for layer in model.layers[1:]] == [1, 2]
    assert model.layers[1:][-1].index == 2


def test_a_misspelt_name_has_the_nearest():
    model = model_of("gpt2")
    with pytest.raises(UnknownNameError, match=r"nearest\s+`pattern`"):
        model.layers[1].attn.patern
    with pytest.raises(UnknownNameError, match="output"):
        model.layers[1].attn.ouput = torch.zeros(1)
    with pytest.raises(AttributeError, match="has no `layer`"):
        model.layer
    with trace(model), pytest.raises(UnknownNameError, match="has no `ouput`"):
        model.layers[1].ouput = torch.zeros(1)


def test_a_layer_that_is_assigned_is_told_with_what_to_write():
    model = copy.deepcopy(model_of("gpt2"))
    text = r"layers\[1\]\.output = \.\.\., or for another module model\.get\('transformer\.h'\)\[1\] = "
    with pytest.raises(WriteError, match=text):
        model.layers[1] = torch.nn.Identity()
    with pytest.raises(UnknownIndexError):
        model.layers[9] = torch.nn.Identity()
    model.get("transformer.h")[1] = torch.nn.Identity()
    assert type(model._module.transformer.h[1]) is torch.nn.Identity


def test_a_name_that_is_further_in_is_told_with_where_it_is():
    model = model_of("gpt2")
    with pytest.raises(UnknownNameError, match="has no `z`") as caught:
        model.layers[1].z
    assert caught.value.__notes__ == ["`layers[1].attn.z` is one."]
    with pytest.raises(UnknownNameError, match="has no `act`") as caught:
        model.layers[1].act
    assert caught.value.__notes__ == ["`layers[1].mlp.act` is one."]
    with pytest.raises(UnknownNameError, match=r"it is all of them\.[\s\S]*\[layer\.attn for layer in model\.layers\]"):
        model.layers.attn


def test_a_layer_is_called_as_its_module_is():
    model = model_of("gpt2")
    hidden = torch.randn(1, 2, model.d_model)
    with torch.no_grad():
        found, expected = model.layers[1](hidden), model.layers[1].raw(hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_layers_that_are_added_later_are_layers_or_told():
    model = LanguageModel(families.build("llama"))
    assert model.n_layers == 2
    added = copy.deepcopy(model._module.model.layers[1])
    added.self_attn.layer_idx = 2
    model._module.model.layers.append(added)
    with pytest.raises(AnatomyError, match=r"config, by which they are found, counts 2(.|\n)*num_hidden_layers"):
        model.layers[-1]
    model.config.num_hidden_layers = 3
    with torch.no_grad(), model.trace(IDS):
        stream = model.layers[-1].output
    with torch.no_grad():
        expected = model._module.model(IDS, output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(model._module.model.norm(stream), expected.last_hidden_state)


def test_what_a_layer_lacks_is_not_on_it():
    model = model_of("mamba")
    with trace(model):
        with pytest.raises(NotOnThisLayerError, match=r"has no `attn\.pattern`: no attention is computed in it"):
            model.layers[1].attn.pattern
        with pytest.raises(NotOnThisLayerError, match="has no `mlp`: nothing in it works on each token alone"):
            model.layers[1].mlp.output
        with pytest.raises(NotOnThisLayerError):
            model.layers[1].mlp.output = torch.zeros(1)
    assert len(model.layers.having("attn.pattern")) == 0
    assert len(model.layers.having("attn.output")) == 3
    assert repr(model.layers.having("mlp")) == "no layers"


@pytest.mark.parametrize("name", ["gpt2", "granite", "falcon_h1", "falcon"])
def test_only_a_tensor_of_the_values_shape_can_be_assigned(name):
    model = model_of(name)
    sites = [(1, None, "input"), (1, "attn", "output"), (1, "mlp", "output"), (1, None, "output")]
    if name == "falcon":
        sites = [(1, None, "input"), (1, "mlp", "output"), (1, None, "output")]
    with trace(model), torch.no_grad():
        for index, part, port in sites:
            node = model.layers[index] if part is None else getattr(model.layers[index], part)
            for wrong in (None, 3.0, (getattr(node, port),)):
                with pytest.raises(WriteError, match=f"is a tensor, not a {type(wrong).__name__}"):
                    setattr(node, port, wrong)
            with pytest.raises(WriteError, match="another shape"):
                setattr(node, port, getattr(node, port)[:, :-1])
        logits = model.logits
    equal(logits, hooked(model))


def test_a_value_asked_for_too_late_is_past():
    model = model_of("gpt2")
    with trace(model), torch.no_grad():
        model.layers[1].output
        with pytest.raises(AlreadyPastError):
            model.layers[0].attn.output
        with pytest.raises(AlreadyPastError):
            model.layers[1].input = torch.zeros(2, 7, model.d_model)


@pytest.mark.parametrize("name", ["gpt2", "granite", "falcon_h1", "bert", "mamba"])
def test_outside_a_trace_there_are_no_values(name):
    model = model_of(name)
    nodes = [(model.layers[1], "input"), (model.layers[1], "output"), (model.layers[1].attn, "output")]
    for node, port in [*nodes, (model, "logits")]:
        with pytest.raises(OutsideTraceError):
            getattr(node, port)
        with pytest.raises(OutsideTraceError):
            setattr(node, port, torch.zeros(1))
    with trace(model) as tracer:
        scope = tracer.layers[1]
    with pytest.raises(OutsideTraceError, match="after the block"):
        scope.output


@pytest.mark.parametrize("name", ["norm", "layers", "embed", "n_layers", "W_E", "project"])
def test_a_name_that_is_no_value_can_not_be_assigned(name):
    model = model_of("gpt2")
    with trace(model) as tracer:
        for node in (model, model.uniform, tracer.model):
            with pytest.raises(WriteError, match=f"`{name}` is not a value that can be assigned"):
                setattr(node, name, torch.zeros(1))


def test_an_error_of_the_models_is_its_own():
    model = LanguageModel(transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL)).eval())
    model.uniform

    def broken(*_, **__):
        raise AttributeError("broken in the model")

    model._module.transformer.h[0].ln_1.forward = broken
    for read in (
        lambda: model.layers[1].output,
        lambda: model.layers[1].input,
        lambda: model.layers[1].attn.output,
        lambda: model.layers[1].attn.z,
        lambda: model.logits,
        lambda: model.uniform.logits,
    ):
        with pytest.raises(AttributeError, match="broken in the model"), model.trace([[1, 2, 3]]):
            read()


# As it is shown.


def test_completion_knows_the_names():
    model = model_of("gpt2")
    assert set(dir(model)) >= NAMES - HALVES
    assert not HALVES & set(dir(model))
    assert {"transformer", "lm_head", "trace", "uniform"} <= set(dir(model))
    assert {"input", "output", "attn", "mlp", "raw", "ln_1"} <= set(dir(model.layers[0]))
    assert {"q", "k", "v", "z", "scores", "pattern", "output"} <= set(dir(model.layers[0].attn))


def test_a_model_is_shown_by_where_its_names_lead():
    assert repr(model_of("gemma2").uniform) == (
        "embed   `model.embed_tokens`\n"
        "layers  3, the first is `model.layers.0`\n"
        "        Gemma2DecoderLayer: input + post_attention_layernorm.output + post_feedforward_layernorm.output\n"
        "logits  `model.norm` -> `lm_head` -> cap 30"
    )
    model = model_of("granite")
    assert repr(model.layers[1]) == (
        "layer 1, `model.layers.1`: input + 0.22 * self_attn.output[0] + 0.22 * mlp.output"
    )
    assert repr(model.layers[1].mlp) == "layer 1.mlp: 0.22 * model.layers.1.mlp.output"
    assert len(repr(model.layers).splitlines()) == 3


def test_layers_that_were_cut_off_are_none():
    whole, model = LanguageModel(tiny()), LanguageModel(tiny())
    module = model._module
    module.model.layers = module.model.layers[:2]
    assert [len(model.layers), model.n_layers, len(whole.layers)] == [2, 2, 3]
    assert [layer.attn.W_Q.shape for layer in model.layers] == [(4, 32, 8)] * 2
    assert whole.layers[2].attn.W_Q.shape == (4, 32, 8)
    assert "layers.1.output" in map(str, (one.name for one in model.sites()))
    assert "layers  2" in repr(model.uniform)
    with torch.no_grad(), model.trace(IDS):
        outputs, logits = [layer.output for layer in model.layers], model.logits
    with torch.no_grad():
        assert torch.equal(logits, module(IDS).logits)
    assert len(outputs) == 2
    with pytest.raises(UnknownIndexError, match="no layer 2"):
        model.layers[2]
    cut = whole.layers[2]
    whole._module.model.layers = whole._module.model.layers[:2]
    with pytest.raises(UnknownNameError, match="has no `2`"), whole.trace(IDS):
        cut.output


def test_a_layer_whose_mlp_or_attention_was_replaced_says_so():
    class Nothing(torch.nn.Module):
        def forward(self, hidden_states, **_):
            return hidden_states * 0, None

    model = LanguageModel(tiny())
    model._module.model.layers[1].mlp = torch.nn.Identity()
    model._module.model.layers[2].self_attn = Nothing()
    with torch.no_grad(), model.trace(IDS):
        assert torch.equal(model.layers[1].mlp.input, model.layers[1].mlp.output)
        assert not model.layers[2].attn.output.any()
    assert [layer.index for layer in model.layers.having("mlp.act")] == [0, 2]
    assert [layer.index for layer in model.layers.having("attn.W_Q")] == [0, 1]
    assert model.layers[1].attn.W_O.shape == (4, 8, 32)
    with pytest.raises(NotOnThisLayerError, match="another module stands in its place"), model.trace(IDS):
        model.layers[1].mlp.act[:] = 0
    for ask in (lambda: model.layers[1].mlp.W_in, lambda: model.layers[2].attn.W_Q):
        with pytest.raises(NotOnThisLayerError, match="without `model"):
            ask()


def test_what_a_layer_adds_is_no_value_itself():
    model = LanguageModel(tiny())
    with pytest.raises(WriteError, match=r"instead +model.layers\[1\].attn.output = "), model.trace(IDS):
        model.layers[1].attn = torch.zeros(1, 5, 32)


def tiny():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=2)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("name", ATTENDING)
@pytest.mark.parametrize("what", ["q", "k", "v", "z"])
def test_what_is_inside_attention_is_changed_in_place_where_there_is_a_graph(name, what):
    model = model_of(name)
    ids, others = given(model)
    place = f"layers.{model.layers.having('attn.q')[-1].index}.attn.{what}"
    with model.trace(ids, **others):
        new = model.site(place).value.clone()
        new[-1, :, 0] *= 2
        model.site(place).value = new
        expected, of_new = model.logits, nnsight.grad(model.logits[-1].sum(), new)
    with model.trace(ids, **others):
        value = model.site(place).value
        value[-1, :, 0] *= 2
        assert torch.equal(model.site(place).value, new)
        assert torch.equal(model.logits, expected)
    if name in ("gpt2", "gpt_neox"):  # whose own are views of one fused tensor
        assert of_new.any()


# Names that are asked for on a module, and modules that are called under uniform names.


def tiny_llama(kind):
    sizes = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return kind(transformers.LlamaConfig(**sizes, num_attention_heads=4))


@pytest.mark.parametrize(
    ("wrap", "instead"),
    [
        (LanguageModel, "instead     model.uniform.layers[1].attn"),
        (nnsight.NNsight, "instead     model = TransformersModel(module), and model.uniform.layers[1].attn"),
    ],
)
def test_a_uniform_name_on_a_bare_models_own_layer_is_told_where_it_is(wrap, instead):
    model = wrap(tiny_llama(transformers.LlamaModel))
    with pytest.raises(UnknownNameError) as caught:
        model.layers[1].attn
    assert instead in str(caught.value)


def test_an_mlp_is_called_as_its_module_is():
    model = LanguageModel(tiny_llama(transformers.LlamaForCausalLM))
    hidden = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        equal(model.layers[1].mlp(hidden), model.model.layers[1].mlp._module(hidden))
        with model.trace(IDS):
            again = model.layers[1].mlp(model.layers[1].mlp.input)
            equal(again, model.layers[1].mlp.output)


def test_what_no_single_module_makes_cant_be_called():
    model = model_of("gemma2")
    with pytest.raises(NotOnThisLayerError, match="can't be called: no single module makes it"):
        model.layers[0].mlp(torch.zeros(1, 3, 32))


FORGOTTEN = {
    "m.layers[1] + 1": r"`layers\[1\]` is no value itself: nothing can be.*instead +model.layers\[1\].output$",
    "torch.norm(m.layers[1])": r"`norm` can't compute with it.*instead +model.layers\[1\].output$",
    "m.layers[1][:] = 0": r"`layers\[1\]` is no value itself: it has no items.*instead +model.layers\[1\].output$",
    "-m.layers[1].attn": r"`layers\[1\].attn` is no value.*instead +model.layers\[1\].attn.output$",
    "m.layers[1].output = m.layers[0]": r"`layers\[0\]` is no value.*instead +model.layers\[0\].output$",
    "m.layers[1].mlp.output = m.layers[0].mlp": r"`layers\[0\].mlp` is no.*instead +model.layers\[0\].mlp.output$",
    "m.layers[1].raw.output = m.layers[0]": r"`layers\[0\]` is no value.*instead +model.layers\[0\].output$",
    "m.lm_head(m.layers[1])": r"`layers\[1\]` is no value.*instead +model.layers\[1\].output$",
    "m.project(m.layers[1])": r"`layers\[1\]` is no value.*instead +model.layers\[1\].output$",
    "m.project(m.transformer.h[1])": r"`transformer.h.1` is a module.*instead +model.transformer.h\[1\].output$",
    "-m.layers[1].attn.output[0] < m.layers[1].mlp": r"`layers\[1\].mlp` is no.*instead +model.layers\[1\].mlp.output$",
    "abs(m.site('layers.1.attn.z'))": r"is a place, not a value.*instead +model.site\('layers.1.attn.z'\).value$",
    "m.layers[1].output = m.site('layers.0.output')": r"is a place.*instead +model.site\('layers.0.output'\).value$",
    "del m.layers[1].output": r"`layers\[1\].output` is a value of .*instead +model.layers\[1\].output\[:\] = 0$",
    "del m.layers[1].attn.z": r"`layers\[1\].attn.z` is a value of .*instead +model.layers\[1\].attn.z\[:\] = 0$",
    "del m.layers[1].attn": r"`layers\[1\].attn` is a part of the model's, which can't be deleted\.",
    "del m.site('layers.1.output').value": r"is a value of the model's, which can't be deleted",
    "del m.layers[1]": r"taken out of its place.*instead +model.layers\[1\].output = model.layers\[1\].input,",
    "del m.logits": r"`model.logits` is a part of the model's",
    "m.layers['1'].output": r"by its number.*instead +model.layers\[1\]$",
    "m.layers['attn'].output": r"by its number.*instead +model.layers\[3\]$",
    "m.layers[4 / 4].output": r"by its number.*instead +model.layers\[1\]$",
    "m.layers[0, 1].output": r"by its number.*instead +\[model.layers\[i\] for i in \(0, 1\)\]$",
}


@pytest.mark.parametrize("line", FORGOTTEN)
def test_a_layer_that_is_taken_for_its_value_is_told_apart(line):
    with pytest.raises(BlockError, match="(?s)" + FORGOTTEN[line]) as raised:
        exec(f"with m.trace(ids):\n    {line}", {"m": model_of("gpt2"), "ids": IDS, "torch": torch})
    assert "modeling" not in str(raised.value)


def test_a_layer_equals_itself_in_lists_and_dicts_however_often_it_is_asked_for():
    model = model_of("gpt2")
    chosen = [model.layers[1], model.layers[2].attn]
    assert [layer in chosen for layer in model.layers] == [False, True, False]
    assert model.layers[2].attn in chosen
    assert model.layers[2].mlp not in chosen
    assert {model.layers[-1]: "last"}[model.layers[2]] == "last"
    assert model.layers[1] in model.layers
    with model.trace(IDS) as tracer:
        assert tracer.layers[1] == tracer.layers[1] != model.layers[1]
