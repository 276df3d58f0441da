"""Rows, and invokes, of what goes on in a module that an edit calls with `hook=True`."""

import pytest
import torch
from torch import nn

import toys
from comparing import same
from nnsight import LanguageModel, NNsight
from nnsight.errors import RowError

PROMPTS = ["The Eiffel Tower is in the city of", "Rome"]


@pytest.fixture
def square():
    """As many rows as there are channels: sizes that match tell nothing."""
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(2))


def test_each_row_has_its_part_of_all_values_in_there(switch, spliced, square):
    encoded, decoded, output = toys.spliced_by_hand(spliced, square)
    with spliced.trace(square) as tracer:
        for at, row in enumerate(tracer.rows):
            same(row.layers[0].sae.encoder.output, encoded[at : at + 1])
        for at, row in enumerate(tracer.rows):
            same(row.layers[0].sae.output, decoded[at : at + 1])
        result = tracer.result
    same(result, output)


@pytest.mark.parametrize("how", ["in place", "assigned", "skipped"])
def test_what_a_row_changes_there_is_changed_for_that_row(switch, spliced, square, how):
    def change(features):
        features = features.clone()
        features[2:3] = 9
        return features

    with spliced.trace(square) as (_, _, c, _):
        encoder = c.layers[0].sae.encoder
        if how == "in place":
            encoder.output[:] = 9
        elif how == "assigned":
            encoder.output = torch.full((1, 6), 9.0)
        else:
            encoded = toys.spliced_by_hand(spliced, square, change)[0]
            for at, row in enumerate(c.tracer.rows):
                row.layers[0].sae.encoder.skip(encoded[at : at + 1])
        result = c.tracer.result
    same(result, toys.spliced_by_hand(spliced, square, change)[2])


def test_gradients_flow_through_a_row_s_features(spliced, square):
    with spliced.trace(square) as (_, b, _, _):
        features = b.layers[0].sae.encoder.output
        loss = b.tracer.result[1].sum()
    (gradient,) = torch.autograd.grad(loss, features)
    kept = []
    toys.spliced_by_hand(spliced, square, lambda f: kept.append(f) or f)[2][1].sum().backward(
        inputs=[spliced.layers[0].sae._module.encoder.bias]
    )
    same(gradient[0], spliced.layers[0].sae._module.encoder.bias.grad)


def test_invokes_have_theirs(switch, spliced, x):
    encoded, *_ = toys.spliced_by_hand(spliced, x)
    with spliced.trace() as tracer:
        with tracer.invoke(x[:1]):
            one = spliced.layers[0].sae.encoder.output
            spliced.layers[0].sae.encoder.output = torch.zeros(1, 6)
        with tracer.invoke(x[1:]):
            two = spliced.layers[0].sae.encoder.output
        with tracer.invoke():
            both = spliced.layers[0].sae.encoder.output, spliced.output
    same(one, encoded[:1])
    same(two, encoded[1:])
    keep = torch.tensor([[0.0], [1], [1]])
    same(both[0], encoded * keep)
    same(both[1], toys.spliced_by_hand(spliced, x, lambda features: torch.where(keep > 0, features, 0))[2])


def test_what_one_edit_passes_on_from_call_to_call_is_known(square):
    """The output of a call, a value in it, and what was had earlier; also under a keyword, beside numbers."""

    class Both(nn.Module):
        def forward(self, one, *, other, scale):
            return {"sum": one + other * scale, "swapped": (one.T,)}

    model = NNsight(toys.MLP())
    model.first, model.second, model.both = toys.SAE(), toys.SAE(features=5), Both()

    def edit(model):
        early = model.embed.output
        hidden = model.layers[1].output
        rebuilt = model.second(model.first(hidden, hook=True), hook=True)
        coded = model.second.decoder.input
        inner = model.second.decoder(coded, hook=True)
        found = model.both(inner, other=early, scale=0.5, hook=True)
        model.layers[1].output = found["sum"] + rebuilt

    module, first, second = model._module, model.first._module, model.second._module
    early = module.embed(square)
    hidden = module.layers[1](module.layers[0](early))
    rebuilt = second(first(hidden))
    with model.edit(edit).trace(square) as (_, b, _, _):
        same(b.first.output, first(hidden)[1:2])
        same(b.second.encoder.output, second.encoder(first(hidden))[1:2])
        same(b.second.decoder.output, rebuilt[1:2])
        both = b.both.output
        same(both["sum"], (rebuilt + early * 0.5)[1:2])
        same(both["swapped"][0], rebuilt.T[:, 1:2])
        result = b.tracer.result
    same(result, module.head(module.layers[2](rebuilt + early * 0.5 + rebuilt)))


def test_what_an_edit_within_another_s_call_passes_on_is_known(square):
    model = NNsight(toys.MLP())
    model.outer, model.inner = toys.SAE(), toys.SAE(width=6)

    @model.edit
    def model(model):
        model.layers[0].output = model.outer(model.layers[0].output, hook=True)

    @model.edit
    def model(model):
        model.outer.encoder.output = model.inner(model.outer.encoder.output, hook=True)

    module, outer, inner = model._module, model.outer._module, model.inner._module
    coded = outer.encoder(module.layers[0](module.embed(square)))
    with model.trace(square) as (_, b, _, _):
        same(b.inner.encoder.output, inner.encoder(coded)[1:2])
        same(b.inner.output, inner(coded)[1:2])
        same(b.outer.output, outer.decoder(torch.relu(inner(coded)))[1:2])
        same(b.layers[0].output, outer.decoder(torch.relu(inner(coded)))[1:2])


def test_what_an_edit_puts_in_the_place_of_a_value_stands_for_it(square):
    model = NNsight(toys.MLP())
    model.sae = toys.SAE()

    def edit(model):
        doubled = model.layers[0].output * 2
        model.layers[0].output = doubled
        model.sae(doubled, hook=True)

    with model.edit(edit).trace(square) as (_, b, _, _):
        coded = b.sae.encoder.output
    doubled = model._module.layers[0](model._module.embed(square)) * 2
    same(coded, model.sae._module.encoder(doubled)[1:2])


def test_a_cache_in_an_invoke_keeps_its_part(spliced, x):
    with spliced.trace() as tracer:
        with tracer.invoke(x[:1]):
            cache = tracer.cache(["layers.0.sae.encoder", "layers.0.sae"], include_inputs=True)
        with tracer.invoke(x[1:]):
            pass
    encoded, decoded, _ = toys.spliced_by_hand(spliced, x)
    same(cache["model.layers.0.sae.encoder"].output, encoded[:1])
    same(cache["model.layers.0.sae"].output, decoded[:1])


def test_of_what_an_edit_computed_it_is_not_known(square):
    model = NNsight(toys.MLP())
    model.sae = toys.SAE()
    sae = model.sae._module

    def edit(model):
        model.layers[0].output = model.sae(model.layers[0].output.T, hook=True).T

    edited = model.edit(edit)
    why = r"`sae.encoder.output` can't be told: an edit called `sae` on a tensor that it computed; rows are known in"
    with pytest.raises(RowError, match=why), edited.trace(square) as (a, *_):
        a.sae.encoder.output
    hidden = model._module.layers[0](model._module.embed(square))
    with edited.trace(square) as (a, *_):
        same(a.tracer.model.sae.encoder.output, sae.encoder(hidden.T))
        same(a.layers[0].output, sae(hidden.T).T[:1])


def test_a_module_that_the_model_calls_too_is_another_call_there(square):
    """Rows stand on its first axis where the model calls it, and not where the edit does."""
    model = NNsight(toys.MLP())

    def edit(model):
        model.layers[0].output = model.head(model.layers[0].output.T, hook=True).T

    edited = model.edit(edit)
    with pytest.raises(RowError, match=r"an edit called `head` on a tensor"), edited.trace(square) as (_, b, _, _):
        b.head.output
    head = model._module.head
    with edited.trace(square) as (_, b, _, _):
        b.layers[0].output
        last = b.head.output
        result = b.tracer.result
    same(last, result[1:2])
    same(
        result[1:2],
        head(
            model._module.layers[2](
                model._module.layers[1](head(model._module.layers[0](model._module.embed(square)).T).T)
            )
        )[1:2],
    )


def test_what_an_edit_reads_of_its_own_call_is_that_call_s(square):
    """Not of the model's own call of the same module, which has its rows elsewhere."""
    model = NNsight(toys.MLP())
    model.sae = toys.SAE()

    def edit(model):
        model.head(model.layers[0].output.T, hook=True)
        model.layers[0].output = model.sae(model.head.output, hook=True)

    with (
        pytest.raises(RowError, match=r"an edit called `head` on a tensor"),
        model.edit(edit).trace(square) as (_, b, *_),
    ):
        b.sae.encoder.output


def test_an_operation_in_its_forward_has_rows(spliced, square):
    encoded, *_ = toys.spliced_by_hand(spliced, square)
    with spliced.trace(square) as (_, b, _, _):
        same(b.layers[0].sae.source.torch_relu_0.output, torch.relu(encoded)[1:2])
        b.layers[0].sae.source.torch_relu_0.output[:] = 2
        result = b.tracer.result
    encoded[1] = 2
    same(result, toys.spliced_by_hand(spliced, square, lambda _: encoded)[2])


@pytest.mark.parametrize("spliced_in", [True, False])
def test_a_recurrent_module_that_would_take_rows_for_time_is_refused(square, spliced_in):
    model = NNsight(nn.Sequential(nn.Linear(4, 4), nn.Identity() if spliced_in else nn.GRU(4, 4, batch_first=True)))
    if spliced_in:
        model.gru = nn.GRU(4, 4)
        model.edit(lambda model: model.gru(model[0].output, hook=True), inplace=True)
    recurrent = "gru" if spliced_in else "1"
    with model.trace(square) as tracer, pytest.raises(RowError, match=f"`{recurrent}` takes them for steps in time"):
        tracer.rows[1].get(recurrent).output[0] + 1


@pytest.fixture(scope="module")
def language_model():
    model = LanguageModel("nnsight/demo", dispatch=True)
    model.transformer.h[5].features = toys.SAE(128, 32)
    with model.edit(inplace=True):
        model.layers[5].output = model.transformer.h[5].features(model.layers[5].output, hook=True)
    return model


def test_a_prompt_s_features_are_of_its_own_tokens(language_model):
    model, alone = language_model, []
    for prompt in PROMPTS:
        with torch.no_grad(), model.trace(prompt):
            alone.append(model.transformer.h[5].features.encoder.output)
    with torch.no_grad(), model.trace(PROMPTS) as (a, b):
        features = [row.transformer.h[5].features.encoder.output for row in (a, b)]
        assert features[1].shape == (1, len(b.tokens), 32)
    for one, other in zip(alone, features, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), model.trace() as tracer:
        for prompt, expected in zip(PROMPTS, features, strict=True):
            with tracer.invoke(prompt):
                same(model.transformer.h[5].features.encoder.output, expected)


def test_a_prompt_s_features_can_be_cached_and_steered_in_each_step(language_model):
    model = language_model
    three = {
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "do_sample": False,
    }  # a token that ends a text would end the prompt alone

    def generated(prompt):
        with torch.no_grad(), model.generate(prompt, **three) as tracer:
            for step in tracer.iter[:]:
                model.transformer.h[5].features.encoder.output[:, -1, step] = 50
            return tracer.result[0, -3:]

    plain = model.generate(PROMPTS[0], **three)[0, -3:]
    with torch.no_grad(), model.generate(PROMPTS, **three) as (a, b):
        shapes = []
        for step in a.tracer.iter[:]:
            features = b.transformer.h[5].features.encoder.output
            features[:, -1, step] = 50
            shapes.append(list(features.shape))
        result = a.tracer.result[:, -3:]
    assert shapes == [[1, len(model.tokenizer(PROMPTS[1])["input_ids"]), 32], [1, 1, 32], [1, 1, 32]]
    assert torch.equal(result[0], plain)
    assert torch.equal(result[1], generated(PROMPTS[1]))
