"""Models of one's own: configs with names that nobody else uses, and layers that multiply by what they have learned."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import nnsight
from nnsight import LanguageModel
from nnsight.errors import AnatomyError, WriteError

IDS = torch.tensor([[3, 14, 15, 9, 26], [5, 3, 5, 8, 9]])
NAMES = {  # of the width, the heads, the layers, the neurons and the vocabulary
    "width": ("width", "heads", "depth", "hidden", "vocab_size"),
    "dim": ("dim", "n_heads", "n_layers", "ffn", "vocab_size"),
    "emb": ("emb", "nheads", "nlayers", "nhid", "ntoken"),
}
GATES = {
    "none": lambda gate, value: value,
    "times": lambda gate, value: gate * value,
    "sigmoid": lambda gate, value: gate.sigmoid() * value,
    "less": lambda gate, value: -gate.sigmoid() * value,
}


class Separate(nn.Module):
    """Attention with a matrix each for q, k and v, by torch's function."""

    def __init__(self, width, heads):
        super().__init__()
        self.h = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (one(x).unflatten(-1, (self.h, -1)).transpose(1, 2) for one in (self.wq, self.wk, self.wv))
        return self.wo(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """Attention with one matrix, in which each head has its q, k and v beside one another, by hand."""

    def __init__(self, width, heads):
        super().__init__()
        self.h = heads
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (self.h, -1)).transpose(1, 2).chunk(3, -1)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return self.o((scores.masked_fill(~causal, -1e9).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Torchs(nn.MultiheadAttention):
    """torch's own, whose inside is one function to a mode that watches functions."""

    def __init__(self, width, heads, need_weights=False):
        super().__init__(width, heads, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        options = {"need_weights": self.need_weights, "average_attn_weights": False}
        return super().forward(x, x, x, attn_mask=mask, **options)[0]


class Block(nn.Module):
    def __init__(self, config, width, heads, neurons):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor([-0.7]))
        self.mix = config.attention(width, heads)
        self.ff = nn.Sequential(nn.Linear(width, neurons), nn.GELU(), nn.Linear(neurons, width))
        self.n, self.m = nn.LayerNorm(width), nn.LayerNorm(width)
        self.gate, self.parallel = GATES[config.gate], config.parallel

    def forward(self, x):
        attn = self.gate(self.a, self.mix(self.n(x)))
        if self.parallel:
            return x + attn + self.gate(self.b, self.ff(self.n(x)))
        x = x + attn
        return x + self.gate(self.b, self.ff(self.m(x)))


class Config(PreTrainedConfig):
    model_type = "own"

    def __init__(self, names="width", attention="Separate", gate="none", parallel=False, **sizes):
        for name, size in zip(NAMES[names], (48, 6, 3, 100, 64), strict=True):
            setattr(self, name, sizes.pop(name, size))
        self.names, self.attention_kind, self.gate, self.parallel = names, attention, gate, parallel
        super().__init__(**sizes)

    @property
    def attention(self):
        kinds = {"Separate": Separate, "Fused": Fused, "Torchs": Torchs, "Weighed": partial(Torchs, need_weights=True)}
        return kinds[self.attention_kind]


class Own(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        width, heads, layers, neurons, vocabulary = (getattr(config, name) for name in NAMES[config.names])
        self.tok, self.norm = nn.Embedding(vocabulary, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(config, width, heads, neurons) for _ in range(layers))
        self.out = nn.Linear(width, vocabulary, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.tok

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids, **_):
        x = self.tok(input_ids)
        for block in self.blocks:
            x = block(x)
        return CausalLMOutput(logits=self.out(self.norm(x)))


def own(**config):
    return LanguageModel(Own(Config(**config)).eval())


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("attention", ["Separate", "Fused"])
def test_names_are_found_whatever_the_config_calls_its_numbers(names, attention):
    model = own(names=names, attention=attention)
    report = nnsight.verify(model)
    assert report, report
    assert {check.name for check in report.checks if check.passed} >= {
        "Weights W_Q, W_K, W_V make q, k and v",
        "z through W_O is the attention's output",
        "Act through down projection is mlp.output",
    }
    assert (model.n_layers, model.n_heads, model.n_kv_heads) == (3, 6, 6)
    assert (model.d_model, model.d_head, model.d_mlp, model.n_vocab) == (48, 8, 100, 64)
    with torch.no_grad(), model.trace(IDS):
        assert model.layers[1].attn.q.shape == (2, 5, 6, 8)
        assert model.layers[1].attn.result.shape == (2, 5, 6, 48)


def by_hook(model, name, change):
    """The logits of plain torch, where what one module of a layer returns is changed."""
    with model._module.blocks[1].get_submodule(name).register_forward_hook(lambda _, __, output: change(output)):
        return model._module(IDS).logits


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("name", "module", "number"), [("attn", "mix", "a"), ("mlp", "ff", "b")])
def test_what_is_added_is_multiplied_by_the_number_that_the_layer_has_learned(parallel, name, module, number):
    model = own(gate="times", parallel=parallel)
    assert nnsight.verify(model)
    block, seen = model._module.blocks[1], []
    with torch.no_grad():
        by_hook(model, module, lambda output: seen.append(output))
        with model.trace(IDS):
            layer = model.layers[1]
            before, attn, mlp, after = layer.input, layer.attn.output, layer.mlp.output, layer.output
        assert torch.equal({"attn": attn, "mlp": mlp}[name], seen[0] * getattr(block, number))
        torch.testing.assert_close(before + attn + mlp, after, rtol=0, atol=1e-6)
        wanted = by_hook(model, module, lambda output: 2 * output + 3 / getattr(block, number))
        with model.trace(IDS):
            getattr(model.layers[1], name).output = getattr(model.layers[1], name).output * 2 + 3
            logits = model.logits
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
        with model.trace(IDS) as (_, row):
            getattr(row.layers[1], name).output *= 2
            own_row = row.logits
        torch.testing.assert_close(own_row, by_hook(model, module, lambda output: 2 * output)[1:], rtol=0, atol=1e-5)


def test_a_write_where_the_number_is_0_would_be_lost():
    model = own(gate="times")
    with torch.no_grad():
        model._module.blocks[1].b.zero_()
        with model.trace(IDS):
            assert not model.layers[1].mlp.output.any()
        with pytest.raises(WriteError, match=r"multiplies 48 channels of this by 0, in `blocks\.1\.b`"):
            with model.trace(IDS):
                model.layers[1].mlp.output = torch.ones(2, 5, 48)


@pytest.mark.parametrize(
    ("gate", "text"),
    [
        ("sigmoid", r"(?s)no sum.*each times a number.*were learned"),
        ("less", r"(?s)no sum.*is multiplied by -0\.\d+, which"),
    ],
)
def test_what_is_made_of_a_learned_number_is_not_taken_for_a_constant(gate, text):
    with pytest.raises(AnatomyError, match=text):
        own(gate=gate).layers


class Tempered(Own):
    """Logits times a number that was learned, or times what is made of it."""

    def __init__(self, config, made=lambda number: number):
        super().__init__(config)
        self.temperature, self.made = nn.Parameter(torch.tensor([1.7])), made

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=super().forward(input_ids).logits * self.made(self.temperature))


def test_logits_may_be_multiplied_by_a_number_that_was_learned():
    model = LanguageModel(Tempered(Config()).eval())
    assert "-> `out` -> * `temperature`" in str(model.uniform)
    with torch.no_grad(), model.trace(IDS):
        assert torch.equal(model.project(model.layers[-1].output), model.logits)


class Exponential(Tempered):
    def __init__(self, config):
        super().__init__(config, torch.exp)


def test_and_not_by_what_is_made_of_one():
    with pytest.raises(AnatomyError, match=r"(?s)between the last layer and the logits.*were learned"):
        LanguageModel(Exponential(Config()).eval()).layers


class InOneRow(Own):
    """Embedding, layers, norm and unembedding in one `Sequential`."""

    def __init__(self, config):
        super().__init__(config)
        self.all = nn.Sequential(self.tok, *self.blocks, self.norm, self.out)
        del self.tok, self.blocks, self.norm, self.out

    def get_input_embeddings(self):
        return self.all[0]

    def get_output_embeddings(self):
        return self.all[-1]

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=self.all(input_ids))


def test_layers_are_found_in_one_row_with_what_stands_around_them():
    model = LanguageModel(InOneRow(Config()).eval())
    assert nnsight.verify(model)
    assert [layer.raw.path.removeprefix("model.") for layer in model.uniform.layers] == ["all.1", "all.2", "all.3"]
    assert (model.norm.path, model.unembed.path) == ("model.all.4", "model.all.5")


@pytest.mark.parametrize("kind", ["Torchs", "Weighed"])
def test_the_inside_of_torchs_own_attention(kind):
    model = own(attention=kind)
    assert nnsight.verify(model)
    mix = model._module.blocks[1].mix
    with torch.no_grad():
        untouched = model._module(IDS).logits
        with model.trace(IDS):
            attn = model.layers[1].attn
            normed, q, k = model.blocks[1].n.output, attn.q, attn.k
            pattern, v, z, added = attn.pattern, attn.v, attn.z, attn.output
        made = functional.linear(normed, mix.in_proj_weight, mix.in_proj_bias).unflatten(-1, (3, 6, 8))
        scale = 8**-0.5 if kind == "Weighed" else 1.0  # there, torch divides q before it multiplies
        for array, wanted in zip((q, k, v), (made[:, :, 0] * scale, made[:, :, 1], made[:, :, 2]), strict=True):
            torch.testing.assert_close(array, wanted, rtol=0, atol=1e-6)
        _, weights = nn.MultiheadAttention.forward(
            mix,
            normed,
            normed,
            normed,
            average_attn_weights=False,
            attn_mask=nn.Transformer.generate_square_subsequent_mask(5),
        )
        torch.testing.assert_close(pattern, weights, rtol=0, atol=1e-6)
        torch.testing.assert_close(mix.out_proj(z.flatten(2)), added, rtol=0, atol=1e-6)
        kept = z.clone()
        kept[:, :, 2] = 0
        wanted = by_hook(model, "mix", lambda _: mix.out_proj(kept.flatten(2)))
        with model.trace(IDS):
            model.layers[1].attn.z[:, :, 2] = 0
            ablated = model.logits
        torch.testing.assert_close(ablated, wanted, rtol=0, atol=1e-5)
        assert not torch.allclose(ablated, untouched, atol=1e-3)
