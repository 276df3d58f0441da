"""A part of docs/support.md that is made anew in each run of the tests: forty kinds of model, verified whole."""

import pathlib

import pytest
from architectures import NEWEST

import nnsight
from nnsight.anatomy import tiny
from nnsight.anatomy.verify import verify
from nnsight.errors import AnatomyError

SUPPORT = pathlib.Path(__file__).parents[2] / "tools" / "support"
KINDS = """
    afmoe arcee bamba bart bert biogpt bloom codegen cohere cohere2 ctrl dbrx deepseek_v3 diffllama exaone4 falcon
    falcon_h1 falcon_mamba gemma gemma2 gemma3_text glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite
    granitemoehybrid jamba lfm2 llama mamba mamba2 minimax mixtral mpt nemotron_h olmo2 olmoe openai-gpt opt persimmon
    phi phi3 qwen2_moe qwen3 qwen3_next recurrent_gemma roberta rwkv smollm3 stablelm starcoder2 xglm zamba cpmant
""".split()
NOT_THEN = {"dbrx"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # older transformers
@pytest.mark.filterwarnings("ignore:The model attends with 'sdpa', which takes no notice of softcap")  # the same
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_model_is_verified_whole(kind, monkeypatch):
    monkeypatch.syspath_prepend(str(SUPPORT))
    from build import build
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        pytest.skip("this transformers doesn't have it")
    if not NEWEST and kind in NOT_THEN:
        pytest.skip("not whole with this transformers, as docs/support.md says")
    try:
        model = build(kind, n_layers=4)[0]
    except ValueError:
        model = build(kind, n_layers=8)[0]  # Zamba's eighth layer shares a block with its third
    report = verify(nnsight.LanguageModel(model))
    assert report, str(report)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # older transformers
@pytest.mark.filterwarnings("ignore:The model attends with 'sdpa', which takes no notice of softcap")  # the same
@pytest.mark.parametrize("kind", "bamba bloom gemma2 gpt_oss llama mamba2 mistral mixtral qwen3_moe".split())
def test_a_longer_prompt_is_verified_too(kind, monkeypatch):
    """Longer than a window, than a chunk, and with more tokens for an expert than are sorted in order."""
    monkeypatch.syspath_prepend(str(SUPPORT))
    from build import build

    model = nnsight.LanguageModel(build(kind, n_layers=3)[0])
    model.uniform  # found on a short one
    monkeypatch.setattr(tiny.inputs, "LENGTH", 60)
    report = verify(model)
    assert report, str(report)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "kind"),
    [("fill-mask", "albert"), ("fill-mask", "longformer"), ("automatic-speech-recognition", "canary")],
)
def test_a_kind_with_another_head_is_verified_whole(task, kind, monkeypatch):
    monkeypatch.syspath_prepend(str(SUPPORT))
    import transformers
    from others import made

    from nnsight.models.tasks import CLASSES

    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip("this transformers doesn't have it")
    module = made(transformers.CONFIG_MAPPING[kind](), getattr(transformers, CLASSES[task][0]), n_layers=3)
    report = verify(nnsight.LanguageModel(module))
    assert report, str(report)


@pytest.mark.slow
def test_a_model_that_mixes_several_streams_side_by_side_says_so(monkeypatch):
    kind, said = "qwen4_exp_text", r"(?s)no sum of what its modules return\..*hands 4 residual streams on, side by side"
    monkeypatch.syspath_prepend(str(SUPPORT))
    from build import build
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        pytest.skip("this transformers doesn't have it")
    with pytest.raises(AnatomyError, match=said):
        nnsight.LanguageModel(build(kind)[0]).layers


def test_the_page_has_a_row_for_each_kind_and_counts_them():
    page = (SUPPORT.parents[1] / "docs" / "support.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| kind")]
    for kind in KINDS:
        assert any(line.startswith(f"| {kind} |") for line in rows), kind
    assert f" of {len(rows)} kinds verified whole" in page
