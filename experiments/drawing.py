"""The look of all figures: colours, dashes, and matplotlib's settings. What they show is not decided here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import matplotlib

# Okabe & Ito's palette, which people with any colour vision can tell apart; with as many dashes, 28 looks.
COLOURS = ("#111111", "#0072b2", "#56b4e9", "#e69f00", "#d55e00", "#009e73", "#cc79a7")
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1, 1.5), (6, 2, 1, 2))
INK, FAINT = "#444444", "#dddddd"


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw in this look inside of the context.

    Colours are exact: `report.svg` looks for them, and turns them into those of the page.
    """
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    spines: dict[str, Any] = {"axes.spines.top": False, "axes.spines.right": False}
    settings: Any = {
        **dict.fromkeys(inked, INK),
        **spines,
        "axes.linewidth": 0.8,
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.6,
        "font.size": 10,
        "svg.fonttype": "none",  # text stays text
        "text.parse_math": False,  # a $ in a name stays a $
    }
    with matplotlib.rc_context(settings):
        yield


def look(style: int) -> tuple[str, tuple[float, ...]]:
    """The colour and the dashes of a line. Each style has its own, up to the number of looks."""
    return COLOURS[style % len(COLOURS)], DASHES[style // len(COLOURS) % len(DASHES)]
