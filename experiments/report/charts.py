"""What each figure shows, as numbers; how it is drawn is for `curves` and `svg`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from experiments.report import spread, summary
from experiments.report.runs import Curve, Run, Series
from experiments.report.summary import Row

Number = Callable[[Row], tuple[float | None, ...]]
"""A mean and its standard error."""

_STEPS = "steps to the target loss"
_LEGIBLE = 8  # lines in one figure; of more, each arm shows one of its learning rates


@dataclasses.dataclass(frozen=True)
class Line:
    """Means over seeds and their standard errors. Lines of one `style` look the same.

    `recorded` is how many points there were before thinning.
    `ends` says that the line stops where no seed is finite any more; `lost` are, in a sweep, the places where seeds
    diverged, with how many; `chosen` is the place that the sweep would choose.
    """

    label: str
    style: int
    x: np.ndarray
    mean: np.ndarray
    error: np.ndarray
    recorded: int = 0
    ends: bool = False
    lost: tuple[tuple[float, str], ...] = ()
    chosen: float | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    log_x: bool = False
    log_y: bool = False
    targets: tuple[float, ...] = ()
    points: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure: one panel or several, which then share their axes where `shared`; its id, heading and caption."""

    id: str
    title: str
    caption: str
    panels: list[Panel]
    shared: bool = False


def over_time(runs: Sequence[Run], rows: Sequence[Row], most: int | None = None) -> list[Chart]:
    """The training loss and the held-out metrics against steps, of about `most` points a figure."""
    curves, which = _shown(runs, rows)
    bands = "Lines are means over seeds, bands one standard error to each side. " if _have_spread(curves) else ""
    caption = bands + which + _seeds_left_out(curves)
    targets = tuple(sorted({target for run in runs for target in run.target_losses}))
    loss = _panel("training loss", "train_loss", curves, most)
    loss = dataclasses.replace(loss, targets=targets, y_label="training loss (minibatch mean)")
    metrics = list(dict.fromkeys(curve.metric for curve in curves if curve.metric))
    held_out = [_panel(summary.title(metric), metric, curves, most) for metric in metrics]
    charts = [Chart("loss", "Training loss", caption + _thinned([loss]), [loss])]
    if held_out:
        names = " and ".join(_quantity(metric) for metric in metrics)
        charts.append(Chart("held-out", names.capitalize(), caption + _thinned(held_out), held_out))
    terms = dict.fromkeys(term for curve in curves for term in curve.terms)
    if terms:
        panels = [_panel(summary.title(term), term, curves, most) for term in terms]
        charts.append(Chart("terms", "The terms of the loss", caption + _thinned(panels), panels))
    return charts


def sweep(runs: Sequence[Run], rows: Sequence[Row]) -> list[Chart]:
    """What the learning rate does to metrics, loss and steps to the target, where an arm has several; else nothing."""
    arms: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        arms.setdefault((row.run, row.arm), []).append(row)
    swept = {arm: own for arm, own in arms.items() if len(own) > 1}
    metrics = dict.fromkeys(row.metric for own in swept.values() for row in own if row.metric)
    panels = []

    def panel(title: str, y_label: str, number: Number, wanted: Callable[[Row], bool]) -> None:
        lines = [
            _sweep_line(own, style, number, named=len(runs) > 1)
            for style, (arm, own) in enumerate(arms.items())  # as over time, where each arm is one line there
            if arm in swept and wanted(own[0])
        ]
        panels.append(Panel(title, "learning rate", y_label, lines, log_x=True, log_y=True, points=True))

    for metric in metrics:
        title, y_label = summary.title(metric), f"last {_with_unit(metric)}"
        panel(title, y_label, functools.partial(_held_out, metric=metric), functools.partial(_has, metric=metric))
    if metrics:
        panel("training loss", "last training loss", lambda row: (row.train_loss, row.train_loss_se), lambda _: True)
    targets = dict.fromkeys(to.loss for own in swept.values() for row in own for to in row.targets if to.reached)
    for target in targets if metrics else ():
        which = f" {target:g}" if len(targets) > 1 else ""
        panel(_STEPS + which, "steps", functools.partial(_steps_of_all, target=target), lambda _: True)
    if not panels:
        return []
    bars = "bars one standard error to each side" if any(row.held_out_se for row in rows) else "one seed each"
    words = " or ".join(map(_quantity, metrics))
    caption = f"Points are means over the seeds that stayed finite, {bars}. "
    caption += f"A star: of the rates at which the fewest seeds diverged, that of the arm's lowest {words}. "
    if any(row.diverged for own in swept.values() for row in own):
        caption += "Open circles above the plot: how many of the seeds diverged there. "
    if any(panel.title.startswith(_STEPS) for panel in panels):
        caption += "Steps are shown where all seeds reached the target. "
    if any(row.chosen == "lowest" for row in rows):
        caption += "These are figures of the test set: a rate chosen by them looks better than it is. "
    return [Chart("learning-rate", "The learning rate", caption, panels)]


def layers(runs: Sequence[Run], rows: Sequence[Row], most: int | None = None) -> list[Chart]:
    """The size of the weight vectors and the effective step in each layer, a panel an arm; nothing where none is."""
    curves, which = _shown(runs, rows)
    kinds: list[tuple[str, str, str, str, bool, Callable[[Curve], dict[str, Series]]]] = [
        (
            "norms", "Size of the weight vectors", "mean ‖v‖",
            "The mean Euclidean norm of each layer's weight vectors v. ", False, lambda curve: curve.norms,
        ),
        (
            "effective-step", "Effective step", "effective step",
            "The learning rate times g/‖v‖², in the mean over each layer's vectors: what a step of SGD turns them by, "
            "for the gradient of the weight. It falls as ‖v‖ grows. ", True, lambda curve: curve.effective_step,
        ),
    ]  # fmt: skip
    charts = []
    for id_, heading, y_label, what, log_y, series in kinds:
        own = [curve for curve in curves if series(curve)]
        styles = {layer: style for style, layer in enumerate(dict.fromkeys(name for c in own for name in series(c)))}
        count = sum(len(series(curve)) for curve in own)
        panels = []
        for curve in own:
            lines = [
                _line(layer, styles[layer], curve, values, 1, most, count) for layer, values in series(curve).items()
            ]
            panels.append(Panel(_label(curve), "step", y_label, lines, log_y=log_y))
        if panels:
            bands = "Lines are means over seeds, bands one standard error to each side. " if _have_spread(own) else ""
            caption = what + bands + which + _seeds_left_out(own) + _thinned(panels)
            charts.append(Chart(id_, heading, caption, panels, shared=True))
    return charts


def _shown(runs: Sequence[Run], rows: Sequence[Row]) -> tuple[list[Curve], str]:
    """The curves that figures over time show, and a sentence on which these are."""
    curves = [curve for run in runs for curve in run.curves]
    if len(curves) <= _LEGIBLE:
        return curves, ""
    pairs = list(zip(curves, rows, strict=True))
    arms = dict.fromkeys((curve.run, curve.arm) for curve in curves)
    if len(arms) == len(curves):
        return curves, ""
    one_each = []
    for arm in arms:
        own = [(curve, row) for curve, row in pairs if (curve.run, curve.arm) == arm]
        one_each.append(next((curve for curve, row in own if row.chosen), own[0][0]))
    return (
        one_each,
        "Each arm is shown at one of its learning rates: the one that the table marks, or else its lowest. ",
    )


def _panel(heading: str, metric: str, curves: list[Curve], most: int | None) -> Panel:
    with_metric = [(style, curve) for style, curve in enumerate(curves) if metric in curve.metrics]
    lines = [
        _line(_label(curve), style, curve, curve.metrics[metric], summary.scale(metric), most, len(with_metric))
        for style, curve in with_metric
    ]
    return Panel(heading, "step", _with_unit(metric), lines, log_y=True)


def _line(label: str, style: int, curve: Curve, series: Series, scale: int, most: int | None, lines: int) -> Line:
    """The mean over the seeds that stayed finite; where none did, over all, before the first diverged."""
    finite = curve.stayed_finite
    values, steps = scale * series.values[:, finite], series.steps
    if not finite.any():
        until = np.flatnonzero(steps < min(step for step in curve.nonfinite if step is not None))
        values, steps = scale * series.values[until], steps[until]
    kept = _evenly(len(steps), most // lines if most else None)
    values = values[kept]
    mean, error = values.mean(axis=1), spread.over_seeds(values)
    return Line(label, style, steps[kept], mean, error, recorded=len(steps), ends=not finite.any())


def _sweep_line(rows: list[Row], style: int, number: Number, named: bool) -> Line:
    means, errors = zip(*map(number, rows), strict=True)
    return Line(
        label=f"{rows[0].run}: {rows[0].arm}" if named else rows[0].arm,
        style=style,
        x=np.array([row.learning_rate for row in rows]),
        mean=np.array(means, float),  # None reads as NaN
        error=np.array([error or 0 for error in errors], float),
        lost=tuple((row.learning_rate, f"{row.diverged}/{row.seeds}") for row in rows if row.diverged),
        chosen=next((row.learning_rate for row in rows if row.chosen), None),
    )


def _has(row: Row, metric: str) -> bool:
    return row.metric == metric


def _held_out(row: Row, metric: str) -> tuple[float | None, ...]:
    return tuple(None if value is None else summary.scale(metric) * value for value in (row.held_out, row.held_out_se))


def _steps_of_all(row: Row, target: float) -> tuple[float | None, ...]:
    """The steps to the target, where no seed missed it: a mean over those that did not would flatter."""
    of_all = (to for to in row.targets if to.loss == target and to.reached == row.seeds)
    return next(((to.steps, to.steps_se) for to in of_all), (None, None))


def _evenly(count: int, most: int | None) -> np.ndarray:
    """Indices of at most about `most` of `count` points, the first and the last among them."""
    if most is None or count <= max(most, 2):
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, max(most, 2)).round().astype(int))


def _label(curve: Curve) -> str:
    lost = summary.diverged(int((~curve.stayed_finite).sum()), len(curve.nonfinite))
    return f"{curve.label} ({lost})" if lost else curve.label


def _quantity(metric: str) -> str:
    return metric.replace("_", " ")


def _with_unit(metric: str) -> str:
    return _quantity(metric) + " (%)" * (summary.scale(metric) == 100)


def _have_spread(curves: list[Curve]) -> bool:
    return any(curve.stayed_finite.sum() > 1 for curve in curves)


def _seeds_left_out(curves: list[Curve]) -> str:
    if all(curve.stayed_finite.all() for curve in curves):
        return ""
    return "Seeds that diverged are left out; where all did, the line ends in a cross at the last finite record. "


def _thinned(panels: list[Panel]) -> str:
    thinned = [line for panel in panels for line in panel.lines if len(line.x) < line.recorded]
    if not thinned:
        return ""
    most = max(thinned, key=lambda line: line.recorded)
    return f"Drawn at {len(most.x)} of the {most.recorded} records, evenly spaced. "
