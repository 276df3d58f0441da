"""The page that the project starts from runs as written, but for the model's name, on its own transformers, 5.2.0.

On newer ones a GPT-2 block returns the hidden state itself, so there it runs without its `[0]`.
"""

import contextlib
import io
import pathlib
import re

import pytest
import torch

import documents

PAGE = pathlib.Path(__file__).parent / "data" / "module_access.md"
PROMPT = "The Eiffel Tower is in the city of"


def returns_tuples(model):
    with model.trace(PROMPT):
        output = model.transformer.h[0].output
    return isinstance(output, tuple)


@pytest.fixture(scope="module")
def page():
    """The namespace after the page's blocks, and what each of them printed."""
    opening, *blocks = [
        example.code.replace("openai-community/gpt2", "nnsight/demo") for example in documents.examples_of(PAGE)
    ]
    names, printed = documents.namespace(), []
    exec(compile(opening, str(PAGE), "exec"), names)
    for block in blocks:
        code = block if returns_tuples(names["model"]) else block.replace(".output[0]", ".output")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, str(PAGE), "exec"), names)
        printed.append(out.getvalue())
    return names, printed


def test_the_last_layer_decodes_to_paris(page):
    assert page[1][0] == "Decoded:  Paris\n"


def test_the_lens_reads_a_token_at_each_layer_and_converges(page):
    lines = page[1][1].splitlines()
    assert [re.match(r"Layer ( ?\d+): ", line)[1] for line in lines] == [f"{i:2d}" for i in range(12)]
    assert lines[-1] == "Layer 11:  Paris"
    assert lines[0] != "Layer  0:  Paris"


def test_module_calls_mix_with_torch_operations(page):
    names, printed = page
    n_tokens = len(names["model"].tokenizer(PROMPT)["input_ids"])
    assert names["similarity"].shape == (1, n_tokens - 1)
    assert printed[2].startswith("tensor([")
    assert "grad_fn=<SelectBackward0>" in printed[2]


def test_the_page_agrees_with_the_module_by_hand(page):
    """The lens of the page, from the hidden states that transformers itself reports."""
    model = page[0]["model"]
    module = model._module
    ids = torch.as_tensor(model.tokenizer(PROMPT)["input_ids"], device=module.device).unsqueeze(0)
    hidden = module(ids, output_hidden_states=True).hidden_states
    # The last of them has been through the final norm already.
    by_hand = [module.lm_head(module.transformer.ln_f(state))[0, -1].argmax() for state in hidden[1:-1]]
    by_hand.append(module.lm_head(hidden[-1])[0, -1].argmax())
    torch.testing.assert_close(torch.stack(page[0]["predictions"]), torch.stack(by_hand))
