"""Charts against steps: loss, metrics and terms; and in each layer, the weight vectors and the effective step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.report import spread, summary
from experiments.report.charts.shapes import Chart, Line, Panel
from experiments.report.charts.words import quantity, with_unit
from experiments.report.runs import Curve, Run, Series
from experiments.report.summary import Row

_LEGIBLE = 8  # lines in one figure; of more, each arm shows one of its learning rates


def over_time(runs: Sequence[Run], rows: Sequence[Row], most: int | None = None) -> list[Chart]:
    """The training loss, the held-out metrics and the terms of the loss against steps.

    Arguments:
        runs: the runs.
        rows: a row for each curve of the runs.
        most: the most points of a figure, about. Default: all.
    """
    curves, which = _shown(runs, rows)
    caption = _bands(curves) + which + _seeds_left_out(curves)
    targets = tuple(sorted({target for run in runs for target in run.target_losses}))
    loss = _panel("training loss", "train_loss", curves, most)
    loss = dataclasses.replace(loss, targets=targets, y_label="training loss (minibatch mean)")
    charts = [Chart("loss", "Training loss", caption + _thinned([loss]), [loss])]

    metrics = list(dict.fromkeys(curve.metric for curve in curves if curve.metric))
    if metrics:
        held_out = [_panel(summary.title(metric), metric, curves, most) for metric in metrics]
        names = " and ".join(quantity(metric) for metric in metrics)
        charts.append(Chart("held-out", names.capitalize(), caption + _thinned(held_out), held_out))

    terms = dict.fromkeys(term for curve in curves for term in curve.terms)
    if terms:
        panels = [_panel(summary.title(term), term, curves, most) for term in terms]
        charts.append(Chart("terms", "The terms of the loss", caption + _thinned(panels), panels))
    return charts


def layers(runs: Sequence[Run], rows: Sequence[Row], most: int | None = None) -> list[Chart]:
    """The size of the weight vectors and the effective step in each layer, a panel an arm; nothing where none is."""
    curves, which = _shown(runs, rows)
    charts = (_by_layer(kind, curves, which, most) for kind in _KINDS)
    return [chart for chart in charts if chart is not None]


class _Kind(NamedTuple):
    """A figure of a quantity that each layer has."""

    id: str
    """The name of the figure."""

    title: str
    """Its heading."""

    y_label: str
    """The label of the vertical axis."""

    caption: str
    """A sentence on what it shows."""

    log_y: bool
    """Whether the vertical axis is logarithmic."""

    series: Callable[[Curve], dict[str, Series]]
    """The quantity of a curve, by layer."""


_KINDS = (
    _Kind(
        id="norms",
        title="Size of the weight vectors",
        y_label="mean ‖v‖",
        caption="The mean Euclidean norm of each layer's weight vectors v. ",
        log_y=False,
        series=lambda curve: curve.norms,
    ),
    _Kind(
        id="effective-step",
        title="Effective step",
        y_label="effective step",
        caption="The learning rate times g/‖v‖², in the mean over each layer's vectors: what a step of SGD turns them "
        "by, for the gradient of the weight. It falls as ‖v‖ grows. ",
        log_y=True,
        series=lambda curve: curve.effective_step,
    ),
)


def _by_layer(kind: _Kind, curves: list[Curve], which: str, most: int | None) -> Chart | None:
    """The figure of one quantity, or None where no curve has it."""
    own = [curve for curve in curves if kind.series(curve)]
    if not own:
        return None
    layers = dict.fromkeys(layer for curve in own for layer in kind.series(curve))
    styles = {layer: style for style, layer in enumerate(layers)}  # a layer looks the same in each panel
    count = sum(len(kind.series(curve)) for curve in own)
    panels = []
    for curve in own:
        lines = [
            _line(layer, styles[layer], curve, values, 1, most, count) for layer, values in kind.series(curve).items()
        ]
        panels.append(Panel(_label(curve), "step", kind.y_label, lines, log_y=kind.log_y))
    caption = kind.caption + _bands(own) + which + _seeds_left_out(own) + _thinned(panels)
    return Chart(kind.id, kind.title, caption, panels, shared=True)


def _shown(runs: Sequence[Run], rows: Sequence[Row]) -> tuple[list[Curve], str]:
    """The curves that figures over time show, and a sentence on which these are."""
    curves = [curve for run in runs for curve in run.curves]
    if len(curves) <= _LEGIBLE:
        return curves, ""
    arms: dict[tuple[str, str], list[tuple[Curve, Row]]] = {}
    for curve, row in zip(curves, rows, strict=True):
        arms.setdefault((curve.run, curve.arm), []).append((curve, row))
    if len(arms) == len(curves):
        return curves, ""
    one_each = [next((curve for curve, row in own if row.chosen), own[0][0]) for own in arms.values()]
    which = "Each arm is shown at one of its learning rates: the one that the table marks, or else its lowest. "
    return one_each, which


def _panel(heading: str, metric: str, curves: list[Curve], most: int | None) -> Panel:
    """A metric against steps, a line for each curve that has it."""
    with_metric = [(style, curve) for style, curve in enumerate(curves) if metric in curve.metrics]
    lines = [
        _line(_label(curve), style, curve, curve.metrics[metric], summary.scale(metric), most, len(with_metric))
        for style, curve in with_metric
    ]
    return Panel(heading, "step", with_unit(metric), lines, log_y=True)


def _line(label: str, style: int, curve: Curve, series: Series, scale: int, most: int | None, lines: int) -> Line:
    """The mean over the seeds that stayed finite; where none did, over all, before the first diverged.

    Arguments:
        label: the name in the legend.
        style: the number of the look.
        curve: the curve that the series belongs to.
        series: the quantity.
        scale: a factor on it.
        most: the most points of the figure, about, or None.
        lines: the number of lines that share them.
    """
    finite = curve.stayed_finite
    values, steps = scale * series.values[:, finite], series.steps
    if not finite.any():
        until = np.flatnonzero(steps < min(step for step in curve.nonfinite if step is not None))
        values, steps = scale * series.values[until], steps[until]
    kept = _evenly(len(steps), most // lines if most else None)
    values = values[kept]
    mean, error = values.mean(axis=1), spread.over_seeds(values)
    return Line(label, style, steps[kept], mean, error, recorded=len(steps), ends=not finite.any())


def _evenly(count: int, most: int | None) -> np.ndarray:
    """Indices of at most about `most` of `count` points, the first and the last among them."""
    if most is None or count <= max(most, 2):
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, max(most, 2)).round().astype(int))


def _label(curve: Curve) -> str:
    """The name of a curve, with how many of its seeds diverged."""
    lost = summary.diverged(int((~curve.stayed_finite).sum()), len(curve.nonfinite))
    return f"{curve.label} ({lost})" if lost else curve.label


def _bands(curves: list[Curve]) -> str:
    """A sentence on bands, where several seeds stayed finite."""
    if not any(curve.stayed_finite.sum() > 1 for curve in curves):
        return ""
    return "Lines are means over seeds, bands one standard error to each side. "


def _seeds_left_out(curves: list[Curve]) -> str:
    """A sentence on seeds that diverged, where any did."""
    if all(curve.stayed_finite.all() for curve in curves):
        return ""
    return "Seeds that diverged are left out; where all did, the line ends in a cross at the last finite record. "


def _thinned(panels: list[Panel]) -> str:
    """A sentence on how many points are drawn, where these are not all."""
    thinned = [line for panel in panels for line in panel.lines if len(line.x) < line.recorded]
    if not thinned:
        return ""
    most = max(thinned, key=lambda line: line.recorded)
    return f"Drawn at {len(most.x)} of the {most.recorded} records, evenly spaced. "
