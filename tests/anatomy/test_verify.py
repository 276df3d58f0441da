"""`verify` is true of what was found, and each of its checks fails where that is wrong."""

import re
from dataclasses import replace

import families
import pytest
import torch
from architectures import fresh, model_of
from torch import nn
from transformers import CONFIG_MAPPING

from nnsight import LanguageModel
from nnsight.anatomy import attention, layer
from nnsight.anatomy.heads import names, result
from nnsight.anatomy.heads.weights import Heads
from nnsight.anatomy.layout import Step
from nnsight.anatomy.tiny import tiny_model
from nnsight.anatomy.verify import Check, Report, verify
from nnsight.errors import InputError

HAND_ON = "A layer's output is the next one's input"
SUMS = "Input and what is added make the output"
ADDED = "Input + attn + mlp is the output"
ROLES = "Attention mixes tokens, the MLP doesn't"
PROJECTS = "The last output projects to the logits"
PATTERNS = "Patterns sum to one, and look back"
MIXES = "Pattern times v is z"
MADE = "Weights W_Q, W_K, W_V make q, k and v"
THROUGH = "z through W_O is the attention's output"
REACH = "Each write reaches the logits"
WRITE_BACK = "Writing back what was read changes nothing"
PADDED = "A padded batch is its prompts alone"
INSIDE_MLPS = [
    "Act through down projection is mlp.output",
    "Act is pre through the non-linearity",
    "Experts and shared add up to mlp.output",
    "An expert's act makes its output",
    "Chosen experts have the largest logits",
]
EVERY = [HAND_ON, SUMS, ADDED, ROLES, PROJECTS, PATTERNS, MIXES, MADE, THROUGH, *INSIDE_MLPS, REACH, WRITE_BACK, PADDED]


def failed(report):
    return [check.name for check in report.checks if check.passed is False]


def with_layout(name, change):
    """A model whose layout was changed after it was found."""
    model = fresh(name)
    layout = change(model.uniform._layout)
    model._known = model._known._replace(layout=layout, layers=layout.layers)
    return model


def with_layer(name, index, change):
    def changed(layout):
        layers = list(layout.layers)
        layers[index] = change(layers[index])
        return replace(layout, layers=tuple(layers))

    return with_layout(name, changed)


def test_it_is_true_of_the_demo_and_prints_a_line_for_each_check():
    report = verify(LanguageModel("nnsight/demo"))
    assert report
    first, *lines = str(report).splitlines()
    assert first == "GPT2LMHeadModel, nnsight/demo"
    assert [check.name for check in report.checks] == EVERY
    assert len(lines) == len(report.checks)
    lacking = [check.name for check in report.checks if check.passed is None]
    assert lacking == INSIDE_MLPS[2:]
    assert all(line.startswith(("ok ", "-  ")) for line in lines)
    assert repr(report) == str(report)


@pytest.mark.parametrize(
    "name", ["granite", "falcon", "bert", "mamba", pytest.param("falcon_h1", marks=pytest.mark.slow), "gemma2"]
)
def test_it_is_true_of_other_families_and_says_what_they_lack(name):
    report = verify(model_of(name))
    assert report, report
    lacks = {check.name for check in report.checks if check.passed is None}
    assert (ADDED in lacks) == (name == "bert")
    assert ({PATTERNS, MIXES, MADE, THROUGH} <= lacks) == (name == "mamba")
    assert REACH not in lacks


def test_a_report_is_false_where_one_check_fails():
    held, lacking = Check("a", True, "1e-7"), Check("b", None, "there is none")
    assert Report("model", (held, lacking))
    assert not Report("model", (held, Check("c", False, "off by 1")))
    assert "FAILED  c" in str(Report("model", (held, Check("c", False, "off by 1"))))


def test_an_output_that_is_not_handed_on_is_told():
    model = with_layer("gpt2", 0, lambda layer: replace(layer, output=layer.mlp[0]))
    assert HAND_ON in failed(verify(model))


def test_a_sum_that_lacks_a_part_is_told():
    assert failed(verify(with_layer("gpt2", 1, lambda layer: replace(layer, made=layer.made[:1])))) == [SUMS]


def test_a_wrong_scale_is_told():
    def unscaled(layer):
        made = tuple(replace(part, scale=1.0) for part in layer.made)
        return replace(layer, made=made, attn=made[:1], mlp=made[1:])

    assert {SUMS, ADDED} <= set(failed(verify(with_layer("granite", 1, unscaled))))


def test_an_mlp_in_the_place_of_attention_is_told():
    assert failed(verify(with_layer("gpt2", 1, lambda layer: replace(layer, attn=layer.mlp)))) == [ADDED, ROLES]


def test_attention_and_mlp_exchanged_are_told():
    exchanged = with_layer("gpt2", 1, lambda layer: replace(layer, attn=layer.mlp, mlp=layer.attn))
    assert ROLES in failed(verify(exchanged))


def test_a_part_that_the_model_changes_in_place_is_told_where_that_was_not_noted():
    def unnoted(layer):
        made = tuple(replace(part, changes=False) for part in layer.made)
        mlp = tuple(replace(part, changes=False) for part in layer.mlp)
        return replace(layer, made=made, mlp=mlp)

    assert SUMS in failed(verify(with_layer("falcon", 1, unnoted)))


@pytest.mark.parametrize(
    ("name", "tail"),
    [
        ("gpt2", lambda tail: tail[1:]),  # without the norm
        ("gemma2", lambda tail: tail[:-1]),  # without the cap
        ("granite", lambda tail: (*tail[:-1], Step(None, scale=0.5))),
    ],
)
def test_a_wrong_way_to_the_logits_is_told(name, tail):
    model = with_layout(name, lambda layout: replace(layout, tail=tail(layout.tail)))
    assert failed(verify(model)) == [PROJECTS]


def with_another(monkeypatch, name, change):
    """What is read of one name inside attention is another value."""
    read = attention.read
    monkeypatch.setattr(
        attention, "read", lambda node, asked: change(read(node, asked)) if asked == name else read(node, asked)
    )


def test_a_pattern_that_does_not_sum_to_one_is_told(monkeypatch):
    with_another(monkeypatch, "pattern", lambda pattern: pattern * 1.01)
    assert {PATTERNS, MIXES} <= set(failed(verify(model_of("gpt2"))))


def test_a_pattern_that_looks_ahead_is_told(monkeypatch):
    with_another(monkeypatch, "pattern", lambda pattern: pattern.flip(-1))
    assert PATTERNS in failed(verify(model_of("gpt2")))


@pytest.mark.parametrize("name", ["v", "z"])
def test_values_that_are_not_mixed_by_the_pattern_are_told(monkeypatch, name):
    with_another(monkeypatch, name, lambda value: value.flip(2))
    assert failed(verify(model_of("gpt2"))) == [MIXES, MADE if name == "v" else THROUGH]


@pytest.mark.parametrize(
    ("name", "letter", "check"),
    [
        ("gpt2", "q", MADE),
        ("llama", "k", MADE),
        ("gpt_neox", "v", MADE),
        ("gpt2", "o", THROUGH),
        ("gemma2", "o", THROUGH),
    ],
)
def test_a_weight_of_another_head_is_told(monkeypatch, name, letter, check):
    weight = Heads.weight
    monkeypatch.setattr(
        Heads, "weight", lambda heads, one: weight(heads, one).flip(0) if one == letter else weight(heads, one)
    )
    assert check in failed(verify(model_of(name)))


@pytest.mark.parametrize("other", [lambda heads: heads[..., :-1, :], torch.clone])
def test_a_weight_of_another_head_is_told_where_a_norm_stands_behind(monkeypatch, other):
    model = model_of("olmo2")
    assert verify(model)
    cut = Heads.cut
    monkeypatch.setattr(Heads, "cut", lambda heads, outputs, letter: other(cut(heads, outputs, letter)))
    assert failed(verify(model)) == [MADE]


def test_results_that_do_not_sum_up_are_told(monkeypatch):
    made = result._Projection.made
    monkeypatch.setattr(result._Projection, "made", lambda *args: made(*args) * 1.01)
    assert failed(verify(model_of("gpt2"))) == [THROUGH]


def test_results_that_round_where_they_are_written_back_are_told(monkeypatch):
    monkeypatch.setattr(names, "write_result", lambda *args: result.write_result(*args[:2], args[2] * 3 / 3))
    assert failed(verify(model_of("gpt2"))) == [WRITE_BACK]


def test_a_write_that_does_not_reach_the_model_is_told(monkeypatch):
    monkeypatch.setattr(layer, "write", lambda *_: None)
    assert failed(verify(model_of("gpt2"))) == [ROLES, REACH]


def test_a_write_that_rounds_is_told(monkeypatch):
    write = layer.write
    monkeypatch.setattr(layer, "write", lambda root, part, value: write(root, part, value * 3 / 3))
    assert failed(verify(model_of("gpt2"))) == [WRITE_BACK]


def test_a_padded_prompt_that_sees_its_padding_is_told():
    model = fresh("bert")  # padding stands on the right, where a causal model never looks

    def unmasked(_, args, kwargs):
        return args, {**kwargs, "attention_mask": None}

    handle = model._module.register_forward_pre_hook(unmasked, with_kwargs=True)
    try:
        assert failed(verify(model)) == [PADDED]
    finally:
        handle.remove()


def test_a_model_that_looks_ahead_where_nothing_is_padded_is_told_to_do_so():
    model = LanguageModel(families.build("llama", "sdpa"))
    for one in model._module.model.layers:
        one.self_attn.is_causal = False  # sdpa is given no mask there, as Doge of transformers 5.2.0 is
    padded = verify(model).checks[-1]
    assert padded.passed is False
    told = r"prompt \d: off by .*; the model looks ahead: its last token changes the logits in front of it, "
    assert re.match(told + r"alone by \d\.\de[+-]\d\d, in the batch by 0.0e\+00", padded.detail)


def test_a_masked_language_model_is_not_blamed_for_looking_ahead():
    model = LanguageModel(families.build("bert", "sdpa"))
    model._module.bert.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
    )
    padded = verify(model).checks[-1]
    assert padded.passed is False
    assert "looks ahead" not in padded.detail


def test_a_model_that_takes_padding_for_tokens_only_without_a_cache_is_told_to_do_so():
    model = LanguageModel(families.build("llama", "sdpa"))

    def take(_, args, kwargs):
        if kwargs["past_key_values"] is None and kwargs["attention_mask"] is not None:
            return (args[0] + torch.ones_like(args[0]).cumsum(1), *args[1:]), kwargs
        return None

    model._module.model.layers[0].register_forward_pre_hook(take, with_kwargs=True)
    padded = verify(model).checks[-1]
    assert padded.passed is False
    assert "; with `use_cache=True` the model makes no difference, to within" in padded.detail


def test_where_nothing_is_found_the_report_says_why():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, input_ids):
            return self.inner(input_ids)

    report = verify(LanguageModel(Other()))
    assert not report
    assert [(check.name, check.passed) for check in report.checks] == [("the layout is found", False)]
    assert "has no config" in str(report)


def test_a_model_in_training_mode_is_told_from_one_with_wrong_names():
    model = LanguageModel(tiny_model(CONFIG_MAPPING["gpt2"]()).train())
    report = verify(model)
    assert not report
    assert [str(check) for check in report.checks] == [
        f"{'FAILED':8}{'Two passes give the same':44}it is in training mode, with dropout: model.eval()"
    ]
    model.eval()
    assert verify(model)


def test_it_is_of_language_models_only():
    with pytest.raises(InputError, match="not of a Linear"):
        verify(nn.Linear(2, 2))


def test_it_leaves_the_model_as_it_was():
    model = model_of("gpt2")
    before = [parameter.clone() for parameter in model._module.parameters()]
    verify(model)
    assert all(torch.equal(one, other) for one, other in zip(before, model._module.parameters(), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model._module.modules())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_a_model_of_one_layer_is_verified(kind):
    config = CONFIG_MAPPING[kind]()
    config.is_decoder = True
    report = verify(LanguageModel(tiny_model(config, n_layers=1)))
    assert report, str(report)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "mixtral", "mamba"])
def test_models_in_half_precision_are_proven(name):
    report = verify(LanguageModel(families.build(name).bfloat16()))
    assert report, report


def test_a_stream_that_is_wider_than_the_weights_is_projected_as_the_model_does():
    """Mamba adds in float32, whatever its weights are."""
    model = LanguageModel(families.build("mamba").bfloat16())
    with torch.no_grad(), model.trace(torch.tensor([[2, 3, 4]])):
        stream = model.layers[-1].output
        logits = model.logits
    assert stream.dtype == torch.float32
    torch.testing.assert_close(model.project(stream).float(), logits.float(), rtol=0, atol=0)
