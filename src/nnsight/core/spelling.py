"""What a misspelt name may have meant, as errors show it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(name: Any, known: Iterable[str], n: int = 2) -> str:
    """The known names that are spelt most like this one, at most `n`; empty where none is."""
    return quoted(difflib.get_close_matches(str(name), [*known], n=n))


def quoted(names: Iterable[str]) -> str:
    """Names in a row."""
    return ", ".join(f"`{name}`" for name in names)
