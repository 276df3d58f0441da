"""Models that fill in masks: the lens, the head with its transform, padding behind, patterns that look both ways."""

from functools import cache

import architectures
import pytest
import tiny
import torch
import transformers
from architectures import passing
from transformers import CONFIG_MAPPING
from transformers.models.albert.modeling_albert import AlbertTransformer

import nnsight
from comparing import near, same
from nnsight import LanguageModel
from nnsight.analysis import logit_lens
from nnsight.anatomy.tiny import tiny_ids, tiny_model
from nnsight.errors import AnatomyError

# A family's layers, below it what attention and the MLP add, and the norm behind both, if the stream goes through one.
FAMILIES = {
    "bert": ("bert.encoder.layer", "attention.output.dense", "output.dense"),
    "roberta": ("roberta.encoder.layer", "attention.output.dense", "output.dense"),
    "electra": ("electra.encoder.layer", "attention.output.dense", "output.dense"),
    "distilbert": ("distilbert.transformer.layer", "attention", "ffn"),
    "modernbert": ("model.layers", "attn", "mlp"),
}
MORE = ["camembert", "mpnet", "xlm-roberta"]
every = pytest.mark.parametrize("name", FAMILIES)


@cache
def model_of(name):
    config = CONFIG_MAPPING[name]()
    config.tie_word_embeddings = True
    return LanguageModel(tiny_model(config, transformers.AutoModelForMaskedLM, n_layers=3), tokenizer=tokenizer())


@cache
def tokenizer():
    return tiny.make_tokenizer(mask_token="[MASK]", pad_token="[PAD]")


@cache
def reader():
    """A BERT whose vocabulary is the tokenizer's."""
    config = transformers.BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=tokenizer().pad_token_id,
    )
    torch.manual_seed(0)
    module = transformers.BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return LanguageModel(module, tokenizer=tokenizer())


def trace(name):
    return architectures.trace(model_of(name))


def hooked(name, path, change=None):
    return passing(model_of(name), path, change)


def sites(name):
    layers, attn, mlp = FAMILIES[name]
    return [
        (lambda m: m.layers[1], f"{layers}.1"),
        (lambda m: m.layers[1].attn, f"{layers}.1.{attn}"),
        (lambda m: m.layers[2].mlp, f"{layers}.2.{mlp}"),
    ]


@every
def test_what_is_read_is_what_a_plain_hook_sees(name):
    for node, path in sites(name):
        with trace(name):
            got, logits = node(model_of(name)).output, model_of(name).logits
        (seen,), plain = hooked(name, path)
        same(got, seen)
        same(logits, plain)


@every
def test_a_write_and_its_gradient_are_a_plain_hook_s(name):
    def changed(value):
        return (value * 1.5).detach().requires_grad_()

    for node, path in sites(name):
        seen, plain = hooked(name, path, changed)
        (expected,) = torch.autograd.grad(plain[:, 2].sum(), seen[1])
        with trace(name):
            new = changed(node(model_of(name)).output)
            node(model_of(name)).output = new
            logits = model_of(name).logits
        same(logits, plain)
        same(torch.autograd.grad(logits[:, 2].sum(), new)[0], expected)


@every
def test_the_last_layer_projects_to_the_logits_through_the_whole_head(name):
    model = model_of(name)
    with trace(name):
        last, logits = model.layers[-1].output, model.logits
    same(model.project(last), logits)
    assert model.unembed.weight is model.embed.weight  # of a head that is tied
    if name != "electra":  # whose unembedding is narrower
        with torch.no_grad():
            assert not torch.allclose(last @ model.W_U, logits)  # there is a transform before that


@every
def test_a_pattern_looks_both_ways(name):
    with trace(name):
        pattern = model_of(name).layers[1].attn.pattern
    near(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
    assert (pattern.triu(1).sum((-1, -2)) > 0).all()


@pytest.mark.parametrize("name", [*FAMILIES, *[pytest.param(one, marks=pytest.mark.slow) for one in MORE]])
def test_the_names_are_proven_by_numbers(name):
    report = nnsight.verify(model_of(name))
    assert report, str(report)
    assert not any("ahead" in check.detail for check in report.checks)


@every
def test_padding_stands_behind_and_each_row_has_what_its_prompt_has_alone(name):
    model = model_of(name)
    ids, others = tiny_ids(model._module)
    prompts = [ids[0].tolist(), ids[1, :4].tolist()]
    alone = []
    for prompt in prompts:
        with model.trace([prompt], **others):
            alone.append((model.layers[0].attn.pattern, model.layers[2].output, model.logits))
    with model.trace(prompts, **others) as (a, b):
        starts = [row.embed.input[0, 0].item() for row in (a, b)]
        patterns = [row.layers[0].attn.pattern for row in (a, b)]
        streams = [row.layers[2].output for row in (a, b)]
        logits = [row.logits for row in (a, b)]
    assert starts == [prompt[0] for prompt in prompts]
    for got in zip(zip(patterns, streams, logits, strict=True), alone, strict=True):
        for mine, expected in zip(*got, strict=True):
            near(mine, expected)
    with model.trace(prompts, **others):
        assert model.embed.input[1, 0] == prompts[1][0]


def test_a_folder_whose_config_names_that_head_has_it(tmp_path):
    reader()._module.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = LanguageModel(tmp_path)
    assert (model.task, type(model._module).__name__) == ("fill-mask", "BertForMaskedLM")
    assert LanguageModel(tmp_path, task="text-generation", is_decoder=True).task == "text-generation"
    assert model.layers[0].index == 0
    assert not model.dispatched


def test_the_lens_ends_with_what_the_model_fills_in():
    model, prompt = reader(), "The [MASK] Tower is in the city"
    lens = logit_lens(model, prompt)
    at = lens.tokens.index("[MASK]")
    logits = model.trace(prompt, trace=False).logits
    assert lens.best(at)[-1] == model.tokenizer.decode(logits[0, at].argmax())
    assert lens.values.shape == (3, len(lens.tokens), 5)


def test_the_command_line_asks_about_the_mask(tmp_path):
    from typer.testing import CliRunner

    from nnsight.cli import app

    reader()._module.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    prompt = "The [MASK] Tower is in the city"
    done = CliRunner().invoke(app, ["lens", prompt, "--model", str(tmp_path)])
    assert done.exit_code == 0, done.output
    said = done.stdout.partition("in the place of [MASK], after the last layer:")[2]
    lens = logit_lens(reader(), prompt)
    for word, _ in lens.top(-1, lens.tokens.index("[MASK]")):
        assert word.strip() in said


class Between(AlbertTransformer):
    """Gives its layer something else than that returned."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        hidden_states = self.embedding_hidden_mapping_in(hidden_states)
        for _ in range(3):
            hidden_states = self.albert_layer_groups[0](hidden_states + 1, attention_mask)
            hidden_states = hidden_states[0] if isinstance(hidden_states, tuple) else hidden_states
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden_states)


class Shifting(transformers.AlbertForMaskedLM):
    def __init__(self, config):
        super().__init__(config)
        self.albert.encoder = Between(config)


def test_a_module_that_is_called_again_with_something_else_is_told_with_what_leads_to_its_calls():
    model = LanguageModel(tiny_model(CONFIG_MAPPING["albert"](num_hidden_layers=3), Shifting))
    with pytest.raises(
        AnatomyError, match=r"(?s)One module is called 3 times.*\.next\(\) for the call after it"
    ) as caught:
        model.layers
    path = str(caught.value).partition("model.get('")[2].partition("')")[0]
    ids, others = tiny_ids(model._module)
    with model.trace(ids, **others):
        first = model.get(path).output
        second = model.get(path).next().output
    assert not torch.equal(first, second)
