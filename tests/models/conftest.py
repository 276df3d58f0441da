"""Folders and modules of the tiny models in `tiny.py`."""

import copy
import pathlib
import sys

import pytest
import torch

HERE = str(pathlib.Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)

import tiny  # noqa: E402

from nnsight import LanguageModel  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer():
    """Shared by all tests, which also shows that none of them changes it."""
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def gpt2():
    """Shared by all tests, none of which may change it: what comes behind would be told of another model."""
    module = tiny.build("gpt2")
    attention, weights = module.config._attn_implementation, copy.deepcopy(module.state_dict())
    yield module
    assert module.config._attn_implementation == attention
    assert all(torch.equal(now, weights[name]) for name, now in module.state_dict().items())


@pytest.fixture(scope="session")
def folder(tmp_path_factory, gpt2, tokenizer):
    """A folder as `save_pretrained` writes it."""
    path = tmp_path_factory.mktemp("models") / "gpt2"
    gpt2.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def model(gpt2, tokenizer):
    """A loaded GPT-2 with its tokenizer."""
    return LanguageModel(gpt2, tokenizer=tokenizer)
