"""The command line: what it prints, what it writes, and how it fails."""

import inspect
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import lenses
import nnsight
from nnsight.analysis import logit_lens
from nnsight.cli import app
from nnsight.demo_steps import STEPS
from nnsight.plots import lens_html

PROMPT = lenses.PROMPT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = lenses.tiny_gpt2()
    model._module.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def run(monkeypatch):
    """Runs the command in this process; output is no terminal, unless the test says so."""

    def run(*words, **environment):
        for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return CliRunner().invoke(app, list(map(str, words)))

    return run


def test_the_version(run):
    done = run("--version")
    assert (done.exit_code, done.stdout) == (0, f"nnsight {nnsight.__version__}\n")


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["lens", "-h"], ["verify", "-h"], ["demo", "--help"]])
def test_help(run, words):
    done = run(*words)
    assert done.exit_code == 0
    assert "Usage: " in done.stdout
    assert "\x1b" not in done.stdout


def test_lens_prints_the_table(run, folder):
    done = run("lens", PROMPT, "--model", folder)
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["1", "0", lines[2].strip(), "prompt"]
    assert lines[3].split() == ["prompt", "The", "·Eiffel", "·Tower", "·is", "·in", "·the", "·city", "·of"]


def test_lens_lists_the_next_tokens_below_the_table(run, folder):
    expected = logit_lens(nnsight.LanguageModel(folder), PROMPT, top_k=7).top(-1)
    for options, count in (([], 5), (["--top", 7], 7), (["--top", 1], 1)):
        lines = run("lens", PROMPT, "--model", folder, *options).stdout.splitlines()
        assert lines[4:6] == ["", "next, after the last layer:"]
        assert len(lines) == 6 + count
        assert [line.split()[-1] for line in lines[6:]] == [f"{share:.0%}" for _, share in expected[:count]]
    assert "below the table" in run("lens", "--help", COLUMNS="200").stdout


def test_nothing_is_left_out_where_the_output_is_no_terminal(run, folder):
    prompt = " city" * 20
    whole = run("lens", prompt, "--model", folder).stdout
    assert whole.splitlines()[3].split() == ["prompt", *["·city"] * 20]
    assert max(map(len, whole.splitlines())) > 140
    cut = run("lens", prompt, "--model", folder, FORCE_COLOR="1", COLUMNS="60").stdout
    assert "of 20 tokens don't fit" in cut


def test_colours_are_for_terminals_that_want_them(run, folder):
    assert "\x1b" not in run("lens", PROMPT, "--model", folder).stdout
    assert "\x1b[" in run("lens", PROMPT, "--model", folder, FORCE_COLOR="1").stdout
    assert not re.search(
        r"\x1b\[[\d;]*[34]\dm", run("lens", PROMPT, "--model", folder, FORCE_COLOR="1", NO_COLOR="1").stdout
    )


def test_lens_writes_the_picture(run, folder, tmp_path):
    file = tmp_path / "lens.html"
    done = run("lens", PROMPT, "--model", folder, "--top", 2, "--html", file)
    assert (done.exit_code, done.stderr) == (0, f"written: {file}\n")
    assert file.read_text(encoding="utf-8") == lens_html(logit_lens(nnsight.LanguageModel(folder), PROMPT, top_k=2))


def test_what_to_write_for_a_prompt_that_can_t_be_read_is_said_to_be_python(run, folder):
    for prompt, says in {"": "The prompt is empty", "one two " * 40: "positions for 32"}.items():
        done = run("lens", prompt, "--model", folder)
        assert done.exit_code == 1
        first, *_, heading, _, row = done.stderr.splitlines()
        assert first.startswith("InputError: ")
        assert says in first
        assert heading == "In Python:"
        assert row.startswith("  write   ")


def test_verify_cuts_nothing_in_a_narrow_terminal(run, folder):
    done = run("verify", folder, FORCE_COLOR="1", NO_COLOR="1", COLUMNS="40")
    assert "\u2026" not in done.stdout


def test_verify_prints_a_line_for_each_check(run, folder):
    report = nnsight.verify(nnsight.LanguageModel(folder))
    done = run("verify", folder)
    assert (done.exit_code, done.stderr) == (0, "")
    first, *lines = done.stdout.splitlines()
    assert first == report.model
    assert [line.split()[0] for line in lines] == ["ok" if check.passed else "-" for check in report.checks]
    assert [check.name for check in report.checks if check.passed is None] == [
        "Experts and shared add up to mlp.output",
        "An expert's act makes its output",
        "Chosen experts have the largest logits",
    ]
    for line, check in zip(lines, report.checks, strict=True):
        assert check.name in line
        assert line.rstrip().endswith(check.detail)


def test_verify_takes_a_model_that_says_no_tokens_with_its_own_head(run, tmp_path):
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    done = run("verify", tmp_path)
    assert done.stdout.startswith("ViTForImageClassification, ")
    assert done.exit_code == 0
    assert "It makes no logits of each token" in done.stdout


def test_verify_fails_where_a_check_does(run, folder, monkeypatch):
    monkeypatch.setattr("nnsight.anatomy.uniform.Uniform.project", lambda self, hidden: self.unembed(hidden))
    done = run("verify", folder)
    assert (done.exit_code, done.stderr) == (1, "")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1
    assert "The last output projects to the logits" in failed[0]
    assert "off by" in failed[0]
    coloured = run("verify", folder, FORCE_COLOR="1", COLUMNS="200").stdout
    assert "\x1b[1;31mFAILED" in coloured
    assert "\x1b[32mok" in coloured


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lens", "", "--model", "FOLDER"], "InputError: The prompt is empty"),
        (["lens", "a", "--model", "FOLDER", "--top", "321"], "InputError: Top 321 of 320 tokens"),
        (["verify", "./nowhere"], "HubError: `./nowhere` can't be loaded: there is no such folder"),
        (["lens", "a", "--model", "./nowhere"], "HubError: `./nowhere` can't be loaded: there is no such folder"),
    ],
)
def test_a_mistake_is_a_message_and_exit_code_1(run, folder, words, says):
    done = run(*(str(folder) if word == "FOLDER" else word for word in words))
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith(says)
    assert isinstance(done.exception, SystemExit)  # anything else has a traceback outside of this runner


@pytest.mark.parametrize(
    "words",
    [
        ["lens"],
        ["lens", "a", "--top", "0"],
        ["lens", "a", "--tpo", "3"],
        ["lens", "a", "--html", "no/such/x.html"],
        ["lnes", "a"],
    ],
)
def test_a_wrong_option_is_a_usage_error(run, words):
    done = run(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Usage: " in done.stderr


def test_a_file_that_cannot_be_written_is_a_message(run, folder, tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    done = run("lens", PROMPT, "--model", folder, "--html", tmp_path / "x.html")
    assert done.exit_code == 1
    assert done.stderr == f"{tmp_path / 'x.html'} can't be written: No space left on device.\n"


@pytest.mark.slow
def test_demo_shows_the_source_of_what_it_runs(run):
    done = run("demo")
    assert (done.exit_code, done.stderr) == (0, "")
    for step, shown in STEPS:
        assert step in shown
        for function in shown:
            assert inspect.getsource(function).rstrip() in done.stdout


def by_step():
    model = nnsight.LanguageModel("nnsight/demo")
    return {step.__name__: step(model) for step, _ in STEPS}


@pytest.mark.slow
def test_the_demo_shows_what_it_says():
    answers = by_step()
    said = {name: [answer.text for answer in rows] for name, rows in answers.items()}
    # The answer comes up over the layers, and is not there at the first.
    assert said["read"][0] != " Paris"
    assert said["read"][-1] == " Paris"
    # Patched early, the city is still Rome's; patched late, it is Paris.
    assert said["patch"][0] == " Rome"
    assert said["patch"][-1] == " Paris"
    # Pushed from John towards Mary, the friend changes.
    assert (said["steer"][0], said["steer"][-1]) == (" he", " she")
    assert said["generate"][0].startswith(f"{PROMPT} Paris")
    assert said["generate"][1].startswith(f"{PROMPT} Rome")


@pytest.mark.slow
def test_it_is_a_module_too():
    done = subprocess.run(
        [sys.executable, "-m", "nnsight", "--version"], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert done.stdout == f"nnsight {nnsight.__version__}\n"


@pytest.mark.slow
def test_help_does_not_wait_for_transformers():
    code = "import sys, nnsight.cli; print([m for m in ('transformers', 'jinja2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
