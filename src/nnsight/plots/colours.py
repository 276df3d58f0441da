"""Probability as colour: eleven steps on a light page, a dark page and a terminal, each with the text colour for it."""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Console

N_STEPS = 11
Rgb = tuple[int, int, int]


class Shade(NamedTuple):
    """A background and the text colour that reads best on it, as `#rrggbb`."""

    back: str
    text: str


def step(probability: float) -> int:
    """The nearest of the eleven steps, 0 to 10."""
    return round(probability * (N_STEPS - 1))


def terminal_style(probability: float, console: Console) -> str:
    """The rich style of a cell; empty below one part in twenty, and where the console has no colours."""
    at = step(probability)
    if not has_colours(console) or at == 0:
        return ""
    if console.color_system in ("standard", "windows"):
        return _SIXTEEN[at]
    return f"{ON_TERMINAL[at].text} on {ON_TERMINAL[at].back}"


def has_colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def contrast(a: str, b: str) -> float:
    """How well one colour reads on the other: 1 (not at all) to 21, by the WCAG 2 formula. Text wants 4.5."""
    dark, light = sorted([_luminance(_rgb(a)), _luminance(_rgb(b))])
    return (light + 0.05) / (dark + 0.05)


def _ramp(*stops: str) -> tuple[Shade, ...]:
    """Eleven colours, equally far apart between the stops."""
    colours = [_rgb(stop) for stop in stops]
    backs = []
    for i in range(N_STEPS):
        at = i / (N_STEPS - 1) * (len(colours) - 1)
        left = min(int(at), len(colours) - 2)
        mixed = [round(a + (b - a) * (at - left)) for a, b in zip(colours[left], colours[left + 1], strict=True)]
        backs.append("#" + "".join(f"{channel:02x}" for channel in mixed))
    return tuple(Shade(back, max(("#000000", "#ffffff"), key=lambda text: contrast(back, text))) for back in backs)


def _rgb(colour: str) -> Rgb:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _luminance(colour: Rgb) -> float:
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


ON_LIGHT = _ramp("#f5f7fa", "#d3e4f3", "#9ecae1", "#4f9bcb", "#1764ab", "#083370")
ON_DARK = _ramp("#1b2028", "#1d3349", "#1f5277", "#2380a8", "#4cbcc0", "#d5f2b0")
# On a terminal nobody knows what is behind: the first step is left to it, and the others carry their own background.
ON_TERMINAL = _ramp("#2b3a55", "#3b528b", "#2c728e", "#21918c", "#5ec962", "#fde725")
# Terminals with sixteen colours have these pairs readable in every theme.
_SIXTEEN = ("", *["white on blue"] * 3, *["black on cyan"] * 3, *["black on green"] * 2, *["black on yellow"] * 2)
