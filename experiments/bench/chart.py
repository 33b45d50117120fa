"""The results as a picture: for each row, where the libraries are on one axis of ratios."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.bench.measure import Result
from experiments.bench.table import LIBRARIES
from experiments.report import curves

_MARKERS = "osD^vPX"


def png(results: Sequence[Result]) -> bytes:
    """The chart as a PNG."""
    stream = io.BytesIO()
    places = np.arange(len(results))[::-1]
    with curves.styled():
        figure = Figure(figsize=(8, 1.4 + 0.34 * len(results)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(1, color=curves.INK, linewidth=1)
        for i, (name, title) in enumerate(LIBRARIES.items()):
            cells = ((result.cells.get(name), y) for result, y in zip(results, places, strict=True))
            at = [(cell.ratio, y) for cell, y in cells if cell]
            if at:
                x, y = zip(*at, strict=True)
                size, colour = 60 if name == "wn_jax" else 30, curves.COLOURS[i % len(curves.COLOURS)]
                axes.scatter(x, y, marker=_MARKERS[i], s=size, color=colour, label=title, zorder=3)
        bounds = [result.bound for result in results]
        axes.scatter(bounds, places, marker="|", s=120, color=curves.INK, label="bound by bytes", zorder=2)
        axes.set_xscale("log")
        ticks = (0.9, 1, 1.2, 1.5, 2, 3, 5, 8)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(-0.6, len(results) - 0.4)
        axes.set_yticks(places, [result.row.title for result in results])
        axes.set_xlabel("time of a step over that of the library's own plain model")
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()
