"""The results as a picture: for each row, where the libraries are on one axis of ratios."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import drawing
from experiments.bench.measure import Result
from experiments.bench.table import LIBRARIES

_MARKERS = "osD^vPX"


def png(results: Sequence[Result]) -> bytes:
    """The chart as a PNG."""
    stream = io.BytesIO()
    heights = np.arange(len(results))[::-1]  # the first row on top
    with drawing.styled():
        figure = Figure(figsize=(8, 1.4 + 0.34 * len(results)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(1, color=drawing.INK, linewidth=1)
        _draw_ratios(axes, results, heights)
        bounds = [result.bound for result in results]
        axes.scatter(bounds, heights, marker="|", s=120, color=drawing.INK, label="bound by bytes", zorder=2)
        _set_ticks(axes, results, heights)
        axes.set_xlabel("time of a step over that of the library's own plain model")
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def _draw_ratios(axes: Axes, results: Sequence[Result], heights: np.ndarray) -> None:
    """Draw a marker for each library in each row that it has a cell of."""
    for i, (name, title) in enumerate(LIBRARIES.items()):
        cells = [(result.cells.get(name), y) for result, y in zip(results, heights, strict=True)]
        points = [(cell.ratio, y) for cell, y in cells if cell]
        if points:
            x, y = zip(*points, strict=True)
            size = 60 if name == "wn_jax" else 30
            colour = drawing.COLOURS[i % len(drawing.COLOURS)]
            axes.scatter(x, y, marker=_MARKERS[i], s=size, color=colour, label=title, zorder=3)


def _set_ticks(axes: Axes, results: Sequence[Result], heights: np.ndarray) -> None:
    """Set ratios on a logarithmic axis, and the names of rows on the other."""
    axes.set_xscale("log")
    ticks = (0.9, 1, 1.2, 1.5, 2, 3, 5, 8)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(-0.6, len(results) - 0.4)
    axes.set_yticks(heights, [result.row.title for result in results])
