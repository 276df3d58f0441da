"""Tokens as they can be shown: what has no glyph, or steers a terminal, is written out."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

_MARKS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
_NOTHING = "∅"


class Piece(NamedTuple):
    """A stretch of a token.

    Args:
        text: What to show.
        is_mark: It stands for characters that would not be seen.
    """

    text: str
    is_mark: bool


def pieces(token: str) -> list[Piece]:
    r"""A token in stretches that can be seen, each either text or marks; never empty.

    >>> pieces(" Paris")
    [Piece(text='·', is_mark=True), Piece(text='Paris', is_mark=False)]
    >>> pieces("\x1b[2J")
    [Piece(text='\\x1b', is_mark=True), Piece(text='[2J', is_mark=False)]
    """
    shown = [
        (_MARKS.get(c) or c.encode("unicode_escape").decode(), True) if _is_unseen(c) else (c, False) for c in token
    ]
    joined = [Piece("".join(text for text, _ in run), mark) for mark, run in groupby(shown, key=lambda pair: pair[1])]
    return joined or [Piece(_NOTHING, True)]


def visible(text: str) -> str:
    """A prompt on one line: spaces as they are, everything else that can't be seen as a mark."""
    return "".join("".join(p.text for p in pieces(c)) if c != " " else c for c in text)


def _is_unseen(character: str) -> bool:
    return character in _MARKS or not character.isprintable()
