"""What was checked of a model, as a table for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from nnsight.anatomy.proof import Check, Report

_MARKS = {True: ("ok", "green"), False: ("FAILED", "bold red"), None: ("-", "dim")}


class CheckTable:
    """A line for each check of a report: whether it holds, what was checked, and in numbers."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self._report.model, style="bold")
        table = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(3):
            table.add_column(overflow="fold")  # a path is longer than a narrow terminal
        for check in self._report.checks:
            table.add_row(*self._row(check))
        yield table

    @staticmethod
    def _row(check: Check) -> tuple[Text, ...]:
        mark, style = _MARKS[check.passed]
        failed = check.passed is False
        return Text(mark, style=style), Text(check.name), Text(check.detail, style=style if failed else "dim")
