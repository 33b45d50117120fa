"""The shapes of a figure: lines in panels, panels in a chart. Numbers and words only: `curves` and `svg` draw them."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Line:
    """Means over seeds and their standard errors."""

    label: str
    """The name of the line in the legend."""

    style: int
    """The number of its look. Lines of one style look the same."""

    x: np.ndarray
    """The places."""

    mean: np.ndarray
    """The mean at each place, NaN where there is none."""

    error: np.ndarray
    """The standard error of each mean; 0 of one seed."""

    recorded: int = 0
    """The number of points before thinning."""

    ends: bool = False
    """Whether the line stops where no seed is finite any more."""

    lost: tuple[tuple[float, str], ...] = ()
    """In a sweep, the places where seeds diverged, each with a note on how many."""

    chosen: float | None = None
    """In a sweep, the place that it would choose."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    """The title above it."""

    x_label: str
    """The label of the horizontal axis."""

    y_label: str
    """The label of the vertical axis."""

    lines: list[Line]
    """The lines, in the order of the legend."""

    log_x: bool = False
    """Whether the horizontal axis is logarithmic."""

    log_y: bool = False
    """Whether the vertical axis is logarithmic, if all finite numbers are above 0."""

    targets: tuple[float, ...] = ()
    """Values that are marked on the vertical axis."""

    points: bool = False
    """Whether lines are drawn as points with bars, and not with bands."""


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure."""

    id: str
    """Its name on the page and as a file."""

    title: str
    """Its heading."""

    caption: str
    """Sentences on what it shows."""

    panels: list[Panel]
    """Its panels, one or several."""

    shared: bool = False
    """Whether all panels have the same limits."""
