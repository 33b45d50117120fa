"""Panels as inline SVG in the colours of the page, and the numbers that the page reads out at the pointer."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import drawing
from experiments.report import curves
from experiments.report.charts import Chart, Line, Panel

_VARIABLES = {colour: f"var(--series-{i})" for i, colour in enumerate(drawing.COLOURS)}
_VARIABLES |= {drawing.INK: "var(--ink-2)", drawing.FAINT: "var(--grid)", "#ffffff": "none"}
_DECIMALS = re.compile(r"(\d\.\d\d)\d+")  # a hundredth of a point is not seen


@dataclasses.dataclass(frozen=True)
class Picture:
    """A panel, ready for the page."""

    title: str
    """The panel's title."""

    svg: str
    """The SVG element."""

    alternative: str
    """The panel in words, for those who do not see it."""

    readout: str
    """The numbers that the page reads out at the pointer, as JSON."""


def pictures(chart: Chart) -> list[Picture]:
    """The chart's panels, each a picture of its own, so that a narrow page can stack them."""
    size = (4.6, 3.1) if len(chart.panels) > 2 else (6.2, 3.9)
    with drawing.styled():
        drawn = []
        for panel in chart.panels:
            axes = Figure(figsize=size, layout="constrained").subplots()
            curves.draw(axes, panel)
            drawn.append(axes)
        if chart.shared:
            curves.share(drawn)
        return [
            _picture(axes, panel, f"{chart.id}-{number}")
            for number, (axes, panel) in enumerate(zip(drawn, chart.panels, strict=True))
        ]


def _picture(axes: Axes, panel: Panel, name: str) -> Picture:
    stream = io.StringIO()
    figure = axes.figure
    assert isinstance(figure, Figure)
    # Its ids are those of no other picture of the page, and the same each time.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Picture(panel.title, _inline(stream.getvalue()), _words(panel), json.dumps(_readout(axes, panel)))


def _inline(document: str) -> str:
    """The SVG element of a document, its colours the page's variables, without what repeats in each picture."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub('<g id="[^"]*"', "<g", svg)  # only clip paths and markers are referred to
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub("#[0-9a-f]{6}", lambda match: _VARIABLES.get(match[0], match[0]), svg)
    svg = re.sub(r"<[^>]*>", lambda tag: _DECIMALS.sub(r"\1", tag[0]), svg)
    return re.sub(r"\n\s*", "\n", svg.replace("xlink:href", "href"))


def _words(panel: Panel) -> str:
    """The text alternative: where each line starts and ends."""
    sentences = [f"{panel.y_label} against {panel.x_label}"]
    sentences += [f"{line.label}: {_course(line, panel.x_label)}" for line in panel.lines]
    return ". ".join(sentences) + "."


def _course(line: Line, x_label: str) -> str:
    """The first and the last finite value of a line, in words."""
    known = np.flatnonzero(np.isfinite(line.mean))
    if not len(known):
        return "no finite value"
    ends = list(dict.fromkeys((known[0], known[-1])))
    return ", then ".join(f"{line.mean[i]:.3g} at {x_label} {line.x[i]:g}" for i in ends)


def _readout(axes: Axes, panel: Panel) -> dict[str, object]:
    """Positions as fractions of the picture; of each line at each place its mean and standard error, or null."""
    places = np.unique(np.concatenate([line.x for line in panel.lines]))
    across = _across(axes, places) if len(places) else ()
    box = axes.get_position()
    return {
        "top": round(1 - box.y1, 4),
        "bottom": round(1 - box.y0, 4),
        "x": [round(float(x), 4) for x in across],
        "at": [f"{panel.x_label} {x:g}" for x in places],
        "lines": [
            {"label": line.label, "style": line.style % len(drawing.COLOURS), "values": _values(line, places)}
            for line in panel.lines
        ],
    }


def _across(axes: Axes, places: np.ndarray) -> np.ndarray:
    """Places on the horizontal axis as fractions of the picture's width."""
    height = axes.get_ylim()[0]  # any value on the axis: only the horizontal place is wanted
    points = axes.transData.transform([(x, height) for x in places])
    return axes.figure.transFigure.inverted().transform(points)[:, 0]


def _values(line: Line, places: np.ndarray) -> Sequence[list[float] | None]:
    """The mean and the standard error at each place, rounded as the page shows them; None where there is none."""
    known = {
        float(x): [float(f"{mean:.4g}"), float(f"{error:.2g}")]
        for x, mean, error in zip(line.x, line.mean, line.error, strict=True)
        if np.isfinite(mean)
    }
    return [known.get(float(x)) for x in places]
