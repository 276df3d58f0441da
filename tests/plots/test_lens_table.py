"""The lens in a terminal: what is shown in which width, with colours and without."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

import lenses
from nnsight.plots import Answer, AnswerTable, LensTable, python_text


def drawn(renderable, *, width=80, **options):
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(renderable)
    return console.file.getvalue()


def plain(renderable, width=80):
    return "\n".join(line.rstrip() for line in drawn(renderable, width=width).splitlines())


SMALL = lenses.written([["a", " of"], [" b", " Paris"]], ["The", " city"], probability=0.987)


def test_without_colours_the_probability_stands_beside_the_token():
    assert plain(LensTable(SMALL)) == (
        "     1  ·b 99%  ·Paris 99%\n     0  a 99%   ·of 99%\n       ────────────────────\nprompt  The     ·city"
    )


def test_with_colours_it_is_the_background():
    text = drawn(LensTable(SMALL), force_terminal=True, color_system="truecolor")
    assert "48;2;253;231;37m ·Paris " in text
    assert "99%" not in text
    assert "probability 0" in text


def test_what_agrees_with_the_end_is_bold():
    lens = lenses.written([["a", "b"], ["a", "c"]], ["x", "y"], probability=0.01)
    text = drawn(LensTable(lens), force_terminal=True, color_system="truecolor")
    assert text.splitlines()[:2] == [
        "\x1b[2m     1 \x1b[0m\x1b[1m a \x1b[0m\x1b[1m c \x1b[0m",
        "\x1b[2m     0 \x1b[0m\x1b[1m a \x1b[0m b ",
    ]


@pytest.mark.parametrize("system", ["standard", "256", "truecolor"])
def test_every_colour_system_has_a_background_for_the_probable_and_none_for_the_rest(system):
    unlikely = lenses.written([["a"]], ["x"], probability=0.04)
    likely = lenses.written([["a"]], ["x"], probability=0.5)
    first = [
        drawn(LensTable(lens), force_terminal=True, color_system=system).splitlines()[0] for lens in (unlikely, likely)
    ]
    assert "m a " in first[0]
    assert first[0] != first[1]


def test_what_does_not_fit_is_left_out_from_the_left_and_counted():
    lens = lenses.written([[f"t{i}" for i in range(40)]], [f"{i}" for i in range(40)])
    text = plain(LensTable(lens), width=54)
    assert max(map(len, text.splitlines())) <= 54
    assert text.splitlines()[0].split() == ["0", "t35", "50%", "t36", "50%", "t37", "50%", "t38", "50%", "t39", "50%"]
    assert text.splitlines()[2].split() == ["prompt", *map(str, range(35, 40))]
    assert text.endswith("The first 35 of 40 tokens don't fit into this width.")


@pytest.mark.parametrize("width", [1, 8, 12, 20, 33, 47, 60, 79])
def test_no_line_is_wider_than_the_terminal(width):
    words = ["日本語", "🙂", "é", "a" * 50, "\t", "\x1b[2J", "b"]
    lens = lenses.written([words, words[::-1]], words)
    lines = drawn(LensTable(lens), width=width).splitlines()
    assert max(map(cell_len, lines)) <= width


def test_a_token_can_not_steer_the_terminal():
    text = drawn(LensTable(lenses.written([["\x1b[2J", "\r"]], ["[red]x", "\x07"])))
    assert "\x1b" not in text
    assert "\r" not in text
    assert "\x07" not in text
    assert r"\x1b[2J" in text
    assert "[red]x" in text


def test_a_long_token_is_cut():
    text = plain(LensTable(lenses.written([["a" * 50]], ["x"])))
    assert f" {'a' * 13}… 50%" in text


def test_answers_stand_below_each_other():
    table = AnswerTable([Answer("first", " Paris", 0.5), Answer("second one", "two\nlines")])
    assert plain(table) == "     first   ·Paris    50%\nsecond one  two↵lines"


def test_source_is_shown_as_it_stands():
    source = 'def f(x):\n    """Text."""\n    return [x] + ["' + "a" * 100 + '"]  # [red]why'
    console = Console(file=io.StringIO(), width=40)
    console.print(python_text(source), soft_wrap=True)
    assert console.file.getvalue() == source + "\n"
