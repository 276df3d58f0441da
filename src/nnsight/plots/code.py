"""Python source in a terminal's own colours, the ones that are readable on black and on white."""

from __future__ import annotations

from pygments.token import Comment, Keyword, Name, Number, String, Token  # type: ignore[import-untyped]
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.text import Text

_THEME = ANSISyntaxTheme(
    {
        Token: Style(),
        Keyword: Style(color="magenta"),
        Name.Function: Style(bold=True),
        String: Style(color="green"),
        Number: Style(color="cyan"),
        Comment: Style(italic=True),
    }
)


def python_text(source: str) -> Text:
    """Source as it stands, coloured; longer lines than the terminal's are not broken."""
    text = Syntax("", "python", theme=_THEME, background_color="default").highlight(source)
    text.rstrip()
    return text
