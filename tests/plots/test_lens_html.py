"""The HTML picture: whole by itself, true to its lens, safe with any token, readable by people and machines."""

import re
from html.parser import HTMLParser

import pytest

import lenses
import nnsight
from nnsight.analysis import logit_lens
from nnsight.plots import colours, lens_frame, lens_html

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Reads a page into its elements, and fails on a tag that isn't closed by its own."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag, **attributes):
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [e for e in self.elements if e[0] == tag and wanted.items() <= e[1].items()]

    def texts(self, tag, **attributes):
        return [text for _, _, text in self.all(tag, **attributes)]


@pytest.fixture(scope="module")
def lens():
    return logit_lens(lenses.tiny_gpt2(), lenses.PROMPT, top_k=3)


@pytest.fixture(scope="module")
def page(lens):
    return Page(lens_html(lens))


def test_it_needs_nothing_beside_itself(lens, page):
    text = lens_html(lens)
    assert not re.search(r"https?:|//\w|url\(|@import|@font-face", text)
    names = {name for _, attributes, _ in page.elements for name in attributes}
    assert not names & {"src", "href", "srcset", "data", "action"}
    assert not any(name.startswith("on") for name in names)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _, _ in page.elements}


def test_the_header_says_what_it_is(lens, page):
    assert page.texts("h1") == [lenses.PROMPT]
    assert page.texts("title") == [f"Logit lens: {lenses.PROMPT}"]
    described = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert described == {
        "Logit lens of": "GPT2LMHeadModel",
        "layers": "2",
        "tokens": "8",
        "made with": f"nnsight {nnsight.__version__}",
    }


def test_it_is_a_table_with_headers_for_its_rows_and_columns(lens, page):
    assert page.texts("th", scope="col") == ["prompt", *(token.replace(" ", "·") for token in lens.tokens)]
    # The last layer is on top.
    assert page.texts("th", scope="row") == ["layer 1", "layer 0"]
    assert len(page.all("td")) == 2 * 8
    assert page.all("html")[0][1] == {"lang": "en"}


def test_every_cell_can_be_reached_with_the_keyboard_and_lists_its_candidates(lens, page):
    cells = page.all("td")
    assert all(attributes["tabindex"] == "0" for _, attributes, _ in cells)
    lines = page.texts("li")
    assert len(lines) == 2 * 8 * 3
    # The first cell on the page: the last layer at the first token.
    for line, probability in zip(lines, lens.values[-1, 0].tolist(), strict=False):
        assert line.endswith(f"{100 * probability:.1f} %")


def test_a_cell_has_its_probabilitys_colour_and_agreement_with_the_end_is_bold():
    page = Page(lens_html(lenses.written([["a", "b"], ["b", "b"]], ["x", "y"], probability=0.31)))
    assert [attributes["class"].split()[0] for _, attributes, _ in page.all("td")] == ["p3"] * 4
    finals = ["final" in attributes["class"].split() for _, attributes, _ in page.all("td")]
    assert finals == [True, True, False, True]


@pytest.mark.parametrize(
    "token", ["<script>alert(1)</script>", "</td>", "<!--", "&lt;", '"><b onclick="x">', "{{ 7 * 7 }}", "</style>"]
)
def test_a_token_is_text_and_nothing_else(token):
    lens = lenses.written([[token, "x"]], [token, "y"], prompt=f"{token}y", model=token)
    page = Page(lens_html(lens))
    shown = token.replace(" ", "·")
    assert page.texts("h1") == [f"{token}y"]
    assert page.texts("dd")[0] == token
    assert page.texts("th", scope="col")[1] == shown
    assert page.texts("td")[0].startswith(shown)
    assert not page.all("script")


def test_what_cannot_be_seen_is_marked():
    page = Page(lens_html(lenses.written([["\n\n", ""]], [" a", "\u202e"], prompt="one\ntwo  three")))
    assert page.texts("h1") == ["one↵two  three"]
    assert page.texts("th", scope="col") == ["prompt", "·a", r"\u202e"]
    assert [text.split("\n")[0][:2] for text in page.texts("td")] == ["↵↵", "∅"]


@pytest.mark.parametrize("ramp", [colours.ON_LIGHT, colours.ON_DARK, colours.ON_TERMINAL])
def test_every_shade_is_readable_and_more_is_further(ramp):
    assert all(colours.contrast(shade.back, shade.text) >= 4.5 for shade in ramp)
    distance = [colours.contrast(shade.back, ramp[0].back) for shade in ramp]
    assert distance == sorted(distance)
    assert len(ramp) == colours.N_STEPS


@pytest.mark.parametrize(("probability", "step"), [(0, 0), (0.049, 0), (0.051, 1), (0.98, 10), (1, 10)])
def test_a_probability_takes_the_nearest_step(probability, step):
    assert colours.step(probability) == step


def test_a_notebook_shows_the_whole_picture_in_a_frame_of_its_own(lens):
    (frame,) = Page(lens._repr_html_()).elements
    assert (frame[0], frame[1]["srcdoc"], frame[2]) == ("iframe", lens_html(lens), "")
    assert lens_frame(lens) == lens._repr_html_()
    assert nnsight.plots.lens_frame is lens_frame
    assert nnsight.analysis.logit_lens is logit_lens


def test_a_long_prompt_leaves_the_picture_in_sight():
    style = Page(lens_html(lenses.written([["a"]], ["b"], prompt="many words " * 200))).texts("style")[0]
    assert re.search(r"\bh1 {[^}]*max-height: 3.9em; overflow-y: auto", style)
