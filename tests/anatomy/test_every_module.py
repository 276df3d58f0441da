"""Every module of a model of many kinds, by its own name: what hooks hear, and in a row what the prompt has alone."""

import pathlib
from functools import partial

import pytest
import torch
from architectures import NEWEST

import nnsight
from comparing import same
from nnsight.core.values import tensors_in
from nnsight.errors import RowError

SUPPORT = pathlib.Path(__file__).parents[2] / "tools" / "support"
KINDS = """
    bart bert dbrx deepseek_v2 falcon_h1 gemma3_text gpt2 granitemoe jamba jetmoe llama longcat_flash mamba2 mixtral
    qwen3_next reformer rwkv
""".split()
PROMPTS = [[5, 9, 3, 12, 7, 4, 8], [6, 11, 13, 14, 9, 3, 10]]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),  # older transformers
]


@pytest.fixture(params=KINDS)
def module(request, monkeypatch):
    monkeypatch.syspath_prepend(str(SUPPORT))
    from build import build
    from transformers import CONFIG_MAPPING

    if request.param not in CONFIG_MAPPING:
        pytest.skip("this transformers doesn't have it")
    if request.param == "dbrx" and not NEWEST:
        pytest.skip("it doesn't run, as docs/support.md says")
    return build(request.param, n_layers=2)[0].eval()


def hooked(module, ids):
    """What each module first returned, by its path, in the order of their ends."""
    heard = {}

    def hear(path, _, __, output):
        heard.setdefault(path, copied(output))

    hooks = [part.register_forward_hook(partial(hear, path)) for path, part in module.named_modules() if path]
    try:
        with torch.no_grad():
            module(torch.tensor(ids), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return heard


def copied(value):
    return {path: tensor.clone() for path, tensor in tensors_in(value)}


def test_every_module_is_read_as_hooks_hear_it(module):
    heard = hooked(module, PROMPTS)
    model = nnsight.NNsight(module)
    with torch.no_grad(), model.trace(torch.tensor(PROMPTS), use_cache=False):
        for path, expected in heard.items():
            same(copied(model.get(path).output), expected)


def test_a_row_of_every_module_is_what_the_prompt_has_alone_or_is_refused(module):
    alone = [hooked(module, [prompt]) for prompt in PROMPTS]
    cut = []
    with torch.no_grad(), nnsight.LanguageModel(module).trace(PROMPTS, use_cache=False) as rows:
        for path in alone[0]:
            for row, expected in zip(rows, alone, strict=True):
                try:
                    value = copied(row.get(path).output)
                except RowError:
                    continue
                for at, tensor in value.items():  # what is refused of a tuple is no tensor there
                    torch.testing.assert_close(tensor, expected[path][at], rtol=1e-3, atol=1e-4)
                    cut.append(path)
    assert len(cut) > len(alone[0]) / 2  # of two rows
