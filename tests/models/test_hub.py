"""Where a model comes from when there is no network, or not that model: one line, at once, with the way out."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from nnsight import LanguageModel, errors

BUNDLED = r'`LanguageModel\("nnsight/demo"\)` is bundled and needs no network'


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "nowhere/", pathlib.Path("gpt2")]
)
def test_a_path_that_leads_nowhere_is_never_asked_for_on_the_hub(name):
    with pytest.raises(errors.HubError, match=rf"can't be loaded: there is no such folder. {BUNDLED}") as caught:
        LanguageModel(name)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, OSError)


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(errors.HubError, match=r"has no config\.json"):
        LanguageModel(tmp_path)


def test_a_folder_without_weights_is_found_out_when_they_are_needed(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = LanguageModel(tmp_path)
    with pytest.raises(errors.HubError, match="its weights can't be read") as caught:
        model.dispatch()
    assert "safetensors" in str(caught.value)
    assert caught.value.__cause__ is None
    assert not model.dispatched


def test_a_broken_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(errors.HubError, match="its config can't be read"):
        LanguageModel(tmp_path)


def test_a_file_of_weights_that_was_cut_off_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    model = LanguageModel(tmp_path)
    with pytest.raises(errors.HubError, match=r"(?s)its weights can't be read.*because +SafetensorError"):
        model.dispatch()
    assert not model.dispatched


@pytest.mark.parametrize("options", [{}, {"local_files_only": True}], ids=["online", "from the cache"])
def test_what_is_no_name_at_all_is_not_asked_for(options):
    with pytest.raises(errors.HubError, match="it is no folder, and can't be a name on the hub"):
        LanguageModel("my model", **options)


ON_THE_HUB = pathlib.Path(__file__).parent / "on_the_hub.py"


@pytest.fixture(scope="module")
def answers(folder, tmp_path_factory):
    """What `on_the_hub.py` met: in a process of its own, since the client reads the hub's address at import."""
    home = tmp_path_factory.mktemp("hub")
    cached = home / "models--tiny--cached"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("0" * 40)).symlink_to(folder)
    environ = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environ |= {"HF_HUB_CACHE": str(home), "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, str(ON_THE_HUB)], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line and not line.startswith("Loading weights")] == []
    return json.loads(done.stdout)


REFUSALS = {
    "tiny/unknown": "there is no such folder, and the hub has no \\(public\\) model of this name",
    "tiny/gated": "the hub wants an account that has access to it",
    "tiny/no-revision": "the hub has it, but not this revision",
    "tiny/no-config": "the hub has it, but without a config.json",
    "tiny/silent": "there is no such folder, the hub isn't in reach, and its cache has no copy",
    "tiny/ill": "there is no such folder, the hub isn't in reach, and its cache has no copy",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSALS)
def test_the_hub_is_asked_once_and_its_answer_is_told_in_a_line(answers, name):
    import re

    told = answers[name]
    assert told["error"] == "HubError"
    assert re.fullmatch(
        rf"`{name}` can't be loaded: {REFUSALS[name]}.*\. {BUNDLED}\.\n\n  because   \w+: .+", told["text"]
    )
    assert told["requests"] == 1
    assert told["seconds"] < 6
    assert told["cause"] is None
    assert told["lines"] < 25


@pytest.mark.slow
def test_a_model_in_the_cache_loads_without_the_hub(answers):
    told = answers["tiny/cached"]
    assert told["error"] is None
    assert told["requests"] == 1
    assert told["seconds"] < 10


@pytest.mark.slow
def test_in_offline_mode_nobody_is_asked(answers):
    assert answers["offline"]["requests"] == 0
    assert "offline mode" in answers["offline"]["text"]
