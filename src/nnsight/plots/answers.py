"""A short list of what a model said, for a terminal."""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from .colours import terminal_style
from .pieces import pieces, visible


class Answer(NamedTuple):
    """What a model said, and when.

    Args:
        label: When.
        text: A token or a text.
        probability: 0 to 1; None where the text is no single token.
    """

    label: str
    text: str
    probability: float | None = None


class AnswerTable:
    """Answers one below the other, the tokens coloured by their probability.

    Args:
        answers: What to show.
    """

    def __init__(self, answers: list[Answer]) -> None:
        self.answers = answers

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(justify="right", style="dim", no_wrap=True)
        for answer in self.answers:
            if answer.probability is None:
                table.add_row(answer.label, Text(visible(answer.text)))
                continue
            token = "".join(piece.text for piece in pieces(answer.text))
            style = terminal_style(answer.probability, console)
            table.add_row(answer.label, Text(f" {token} ", style=style), f"{answer.probability:.0%}")
        yield table
