"""A logit lens as a table for the terminal, and as an HTML file.

Both have the first layer at the bottom, above the prompt's tokens, and the last one, which is the model's answer, on
top, as in the published pictures (nostalgebraist 2020).
"""

from __future__ import annotations

from functools import cache
from html import escape
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from nnsight.analysis.lens import Lens

from .colours import N_STEPS, ON_DARK, ON_LIGHT, has_colours, step, terminal_style
from .pieces import Piece, pieces, visible

_WIDEST = 14  # columns of the terminal that one token may take


class LensTable:
    """A lens for a rich console: the most probable token after each layer at each token, coloured by its probability.

    Where the console has no colours, the probability stands beside the token in percent. Tokens that don't fit are left
    out from the first on, since the last one is what is asked about most.

    Args:
        lens: What to show.
    """

    def __init__(self, lens: Lens) -> None:
        self.lens = lens

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [_column(self.lens, token, console) for token in range(len(self.lens.tokens))]
        labels = [*reversed(self.lens.axes["layer"]), "", "prompt"]
        widest = max(map(len, labels))
        first = _first_that_fits([column[0].cell_len for column in columns], options.max_width - widest - 1)
        table = Table.grid(padding=0)
        for _ in [labels, *columns[first:]]:
            table.add_column(no_wrap=True)
        for row, label in enumerate(labels):
            table.add_row(Text(f"{label:>{widest}} ", style="dim"), *(column[row] for column in columns[first:]))
        yield table
        if first:
            yield Text(f"The first {first} of {len(columns)} tokens don't fit into this width.", style="dim")
        if has_colours(console):
            yield _legend(console)


def _column(lens: Lens, token: int, console: Console) -> list[Text]:
    """One token's cells, all of one width: a candidate a layer, the last layer's first, a rule, and the token."""
    tops = [lens.top(layer, token)[0] for layer in reversed(range(lens.n_layers))]
    texts = [_shown(word) + ("" if has_colours(console) else f" {probability:.0%}") for word, probability in tops]
    texts.append(_shown(lens.tokens[token]))
    width = max(map(cell_len, texts))
    cells = [Text(f" {text}{' ' * (width - cell_len(text))} ") for text in texts]
    for cell, (word, probability) in zip(cells, tops, strict=False):
        cell.stylize(terminal_style(probability, console))
        if word == tops[0][0]:
            cell.stylize("bold")
    return [*cells[:-1], Text("─" * (width + 2), style="dim"), cells[-1]]


def _shown(token: str) -> str:
    """A token, no wider than `_WIDEST`."""
    text = "".join(piece.text for piece in pieces(token))
    return text if cell_len(text) <= _WIDEST else set_cell_size(text, _WIDEST - 1) + "…"


def _first_that_fits(widths: list[int], room: int) -> int:
    """The first of the last columns that fit into the room together; at least one is shown."""
    first = len(widths) - 1
    room -= widths[first]
    while first > 0 and widths[first - 1] <= room:
        first -= 1
        room -= widths[first]
    return first


def _legend(console: Console) -> Text:
    text = Text("probability 0 ")
    for at in range(N_STEPS):
        text.append("  ", style=terminal_style(at / (N_STEPS - 1), console))
    return text.append(" 1, bold: what the last layer says")


class _Candidate(NamedTuple):
    pieces: list[Piece]
    probability: float


class _Cell(NamedTuple):
    """What stands at one layer and token of the HTML table."""

    candidates: list[_Candidate]
    step: int
    is_final: bool


def lens_html(lens: Lens) -> str:
    """A lens as an HTML file that needs nothing beside itself: no script, no font, no address.

    Each cell shows the most probable token; the others appear with their probabilities when it is pointed at or has the
    keyboard's focus. Light and dark as the reader's system is; on paper light, and without the lists.

    Args:
        lens: What to show.
    """
    from nnsight import __version__  # the package, once it is whole

    return _template().render(
        lens=lens,
        prompt=visible(lens.prompt),
        version=__version__,
        tokens=[pieces(token) for token in lens.tokens],
        rows=[
            (layer, [_cell(lens, layer, token) for token in range(len(lens.tokens))])
            for layer in reversed(range(lens.n_layers))
        ],
        shades=list(zip(ON_LIGHT, ON_DARK, strict=True)),
    )


def lens_frame(lens: Lens) -> str:
    """The same picture as a part of another page, a notebook's: an `iframe`, so that neither's styles reach the other.

    Args:
        lens: What to show.
    """
    height = _AROUND + _ROW * (lens.n_layers + 1)
    style = f"width: 100%; height: {height}px; border: 0"
    return f'<iframe title="Logit lens" style="{style}" srcdoc="{escape(lens_html(lens))}"></iframe>'


_ROW, _AROUND = 33, 330  # pixels: a row of the table; heading of three lines, legend and notes, scroll bar


def _cell(lens: Lens, layer: int, token: int) -> _Cell:
    top = lens.top(layer, token)
    return _Cell(
        candidates=[_Candidate(pieces(word), probability) for word, probability in top],
        step=step(top[0][1]),
        is_final=top[0][0] == lens.words[-1][token][0],
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("nnsight", "plots"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("lens.html.jinja")
