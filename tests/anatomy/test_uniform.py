"""Uniform names mean the same in every architecture, and what is assigned under them reaches the model."""

import pytest
import torch
from architectures import (
    ATTENDING,
    FAMILIES,
    IN_PLACE,
    PLAIN,
    WITHOUT_ROWS,
    close,
    every,
    first,
    fresh,
    given,
    hooked,
    model_of,
    seen,
    trace,
)

import nnsight
from comparing import same
from nnsight.errors import (
    NotOnThisLayerError,
)

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
            same(model.layers[i].input, inputs[path])
            same(model.layers[i].output, outputs[i])
            assert model.layers[i].output is first(model.get(path).output)


@every
def test_what_attn_and_mlp_add_is_what_their_modules_return_summed_and_scaled(name):
    model, raw = model_of(name), FAMILIES[name]
    attn, mlp = ([seen(model, below(name, 1, path))[0] for path in paths] for paths in (raw.attn, raw.mlp))
    with trace(model), torch.no_grad():
        if name == "falcon_h1":  # the feed-forward's module runs last everywhere
            same(model.layers[1].attn.output, attn[0] + attn[1])
        else:
            same(model.layers[1].attn.output, attn[0] * raw.scale)
        if mlp:
            same(model.layers[1].mlp.output, mlp[0] * raw.scale)


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
        same(model.logits, untouched)
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
            same(getattr(model.layers[1], part).input, kept[0])
        wanted = hooked(model, inputs={below(name, 1, module): noise_like})
        with trace(model), torch.no_grad():
            getattr(model.layers[1], part).input = noise_like(kept[0])
            written = model.logits
        same(written, wanted)
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
        same(model.logits, wanted)
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
            same(model.logits, wanted)
        assert not torch.equal(wanted, hooked(model))


@every
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_change_in_place_of_what_is_added_reaches_the_model(name, part):
    model = model_of(name)
    if not model.layers[1].has(part):
        pytest.skip("it has none")
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
        same(model.logits, wanted)
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
    same(logits, hooked(model))


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
    same(value, kept)
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
    same(patched(model, 1), wanted)
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
        same(model.logits, written)
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
        same(edited.logits, wanted)
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
    same(first(cache[f"model.{path}"].output), stream)
    assert added.shape == stream.shape


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("mamba", "falcon_h1")])
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
        same(logits, untouched)


def test_two_mixers_have_an_input_each_and_what_to_write_leads_to_it():
    model = model_of("falcon_h1")
    text = r"(?s)no single `attn.input`: each .*model.get\('model.layers.1.mamba'\).input and .*_attn'\).input"
    with pytest.raises(NotOnThisLayerError, match=text), trace(model):
        model.layers[1].attn.input
    with trace(model):
        one, other = model.get("model.layers.1.mamba").input, model.get("model.layers.1.self_attn").input
    assert one.shape == other.shape


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
