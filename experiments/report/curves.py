"""Drawing panels with matplotlib, and `curves.png`. The look is that of `drawing`."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments import drawing, files
from experiments.drawing import INK
from experiments.report.charts import Chart, Line, Panel

_FRAMED = 6  # characters: the width of a sample of a line in the legend
_ACROSS = 85  # characters of the legend that go across a panel


def write_png(charts: Sequence[Chart], heading: str, path: Path) -> None:
    """Write one picture with all panels of the charts side by side."""
    panels = [panel for chart in charts for panel in chart.panels]
    with drawing.styled():
        lost = max(sum(bool(line.lost) for line in panel.lines) for panel in panels)  # rows of circles above the axes
        figure = Figure(figsize=(5.5 * len(panels), 4.4 + 0.2 * lost), layout="constrained")
        drawn = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(drawn, panels, strict=True):
            draw(axes, panel)
            axes.set_title(panel.title if len(panels) > 1 else " ", fontsize=10, pad=6 + 13 * lost)
        if all(chart.shared for chart in charts):
            share(drawn)
        figure.suptitle(heading)
        _draw_legend(figure, panels)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150)
    files.write(path, picture.getvalue())


def _draw_legend(figure: Figure, panels: Sequence[Panel]) -> None:
    """One legend below all panels, each label once."""
    handles = {line.label: _handle(line) for panel in panels for line in panel.lines}
    widest = max(map(len, handles)) + _FRAMED
    per_row = max(1, min(len(handles), _ACROSS * len(panels) // widest))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=per_row, frameon=False)


def draw(axes: Axes, panel: Panel) -> None:
    """Draw a panel on axes."""
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    axes.grid(True)
    finite = np.concatenate([line.mean[np.isfinite(line.mean)] for line in panel.lines])
    _set_scales(axes, panel, finite)

    for line in panel.lines:
        (_draw_points if panel.points else _draw_line)(axes, line)
    for row, line in enumerate(line for line in panel.lines if line.lost):
        _draw_lost(axes, line, row)
    for target in panel.targets if len(finite) else ():
        axes.axhline(target, color=INK, linestyle=(0, (1, 2)), linewidth=1)
        beside = axes.get_yaxis_transform()  # where no curve is
        axes.text(1.01, target, f"target {target:g}", transform=beside, fontsize=8, va="center", clip_on=False)
    _plain_ticks(axes)


def _set_scales(axes: Axes, panel: Panel, finite: np.ndarray) -> None:
    """Logarithmic axes where the panel wants them and its finite numbers allow it, and the range of steps."""
    if not len(finite):
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center")
    elif panel.log_y and (finite > 0).all():
        axes.set_yscale("log")

    if panel.log_x:
        axes.set_xscale("log")
    else:
        last = max((line.x.max() for line in panel.lines if len(line.x)), default=0)
        axes.set_xlim(0, last or 1)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))


def share(figures: Sequence[Axes]) -> None:
    """Give all axes the same limits; in height, those of axes that show something."""
    logarithmic = [axes for axes in figures if axes.get_yscale() == "log"]
    for limits, set_, own in (("get_xlim", "set_xlim", figures), ("get_ylim", "set_ylim", logarithmic or figures)):
        low, high = zip(*(getattr(axes, limits)() for axes in own), strict=True)
        for axes in own:
            getattr(axes, set_)(min(low), max(high))
    for axes in figures:
        _plain_ticks(axes)


def _draw_line(axes: Axes, line: Line) -> None:
    """Draw the means as a line, a band of standard errors around it, and a cross where it ends too early."""
    colour, dashes = look(line)
    axes.plot(line.x, line.mean, color=colour, dashes=dashes or (None, None), linewidth=1.6)
    if len(line.x) == 1:  # a line needs two points
        axes.plot(line.x, line.mean, color=colour, marker="o", markersize=5, clip_on=False)
    if line.ends and len(line.x):
        axes.plot(line.x[-1:], line.mean[-1:], color=colour, marker="x", markersize=8, markeredgewidth=2, clip_on=False)
    if line.error.any():
        lower = line.mean - line.error
        if axes.get_yscale() == "log":
            lower = np.maximum(lower, line.mean / 10)  # a band must stay above 0
        axes.fill_between(line.x, lower, line.mean + line.error, color=colour, alpha=0.18, linewidth=0)


def _draw_points(axes: Axes, line: Line) -> None:
    """Draw the means as points with bars of standard errors, and a star at the chosen one."""
    colour, dashes = look(line)
    error = np.array([line.error, line.error])
    if axes.get_yscale() == "log":
        error[0] = np.minimum(error[0], 0.9 * line.mean)  # a bar must stay above 0
    bars: dict[str, Any] = {"elinewidth": 1.2, "capsize": 2.5, "marker": "o", "markersize": 4.5, "linewidth": 1.4}
    axes.errorbar(line.x, line.mean, error, color=colour, dashes=dashes or (None, None), **bars)
    if line.chosen is not None:
        star = line.mean[line.x == line.chosen]
        axes.plot(
            [line.chosen], star, color=colour, marker="*", markersize=14, markeredgecolor=INK, markeredgewidth=0.6
        )


def _draw_lost(axes: Axes, line: Line, row: int) -> None:
    """Draw open circles above the axes, a row for each line, with how many seeds diverged."""
    height = 1.03 + 0.055 * row
    across = axes.get_xaxis_transform()  # data along the axis, a fraction of the axes in height
    circle: dict[str, Any] = {"marker": "o", "markersize": 5, "markerfacecolor": "none", "clip_on": False}
    note: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False, "va": "center", "size": 8}
    for x, count in line.lost:
        axes.plot([x], [height], color=look(line)[0], transform=across, **circle)
        axes.annotate(count, (x, height), xytext=(5, 0), xycoords=across, **note)


def _plain_ticks(axes: Axes) -> None:
    """Write ticks as plain numbers, at 1, 2 and 5 where the logarithmic axis has room for them."""
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() != "log":
            continue
        low, high = axis.get_view_interval()
        decades = math.log10(high / low)
        subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0)
        axis.set_major_locator(ticker.LogLocator(subs=subs) if decades > 0.7 else ticker.MaxNLocator(5))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(ticker.NullFormatter())


def look(line: Line) -> tuple[str, tuple[float, ...]]:
    """The colour and the dashes of a line."""
    return drawing.look(line.style)


def _handle(line: Line) -> Line2D:
    """The sample of a line in the legend."""
    colour, dashes = look(line)
    handle = Line2D([], [], color=colour, linewidth=2)
    if dashes:
        handle.set_dashes(dashes)
    return handle
