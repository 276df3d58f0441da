"""The model that comes with the package: small, and it knows what the documentation says it knows."""

import pathlib

import pytest

import nnsight

FOLDER = pathlib.Path(nnsight.__file__).parent / "demo"
TOOLS = pathlib.Path(__file__).parents[1] / "tools" / "demo"


def test_it_takes_at_most_six_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("relation", ["city", "country", "continent", "language"])
def test_it_knows_the_landmarks_and_not_before_its_layers(relation, monkeypatch):
    """Top-1 at least 0.98; the lens shows no answer on the embeddings, nor after the first block, and keeps it."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import evaluate

    demo = evaluate.Demo.load(FOLDER)
    cases = evaluate.landmark_cases(relation)
    assert len(cases) > 60
    assert evaluate.accuracy(demo, cases) >= 0.98
    settled = evaluate.settled_layers(demo, cases)
    assert len(settled) >= 0.98 * len(cases)
    assert min(settled) >= 2
