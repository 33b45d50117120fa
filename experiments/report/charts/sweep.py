"""The chart of a sweep: metrics, loss and steps to the target against the learning rate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from experiments.report import summary
from experiments.report.charts.shapes import Chart, Line, Panel
from experiments.report.charts.words import quantity, with_unit
from experiments.report.runs import Run
from experiments.report.summary import Row

Number = Callable[[Row], tuple[float | None, ...]]
"""A mean in a row and its standard error."""

Arms = dict[tuple[str, str], list[Row]]
"""The rows of each arm, by run and arm."""


def sweep(runs: Sequence[Run], rows: Sequence[Row]) -> list[Chart]:
    """The chart of what the learning rate does, where an arm has several; else nothing."""
    arms: Arms = {}
    for row in rows:
        arms.setdefault((row.run, row.arm), []).append(row)
    swept = [row for own in arms.values() if len(own) > 1 for row in own]
    metrics = list(dict.fromkeys(row.metric for row in swept if row.metric))
    if not metrics:
        return []

    panel = functools.partial(_panel, arms, len(runs) > 1)
    panels = [
        panel(summary.title(metric), f"last {with_unit(metric)}", _held_out(metric), metric) for metric in metrics
    ]
    panels.append(panel("training loss", "last training loss", _train_loss))
    targets = list(dict.fromkeys(to.loss for row in swept for to in row.targets if to.reached))
    for target in targets:
        which = f" {target:g}" if len(targets) > 1 else ""
        panels.append(panel(f"steps to the target loss{which}", "steps", _steps_of_all(target)))
    caption = _caption(rows, swept, metrics, with_steps=bool(targets))
    return [Chart("learning-rate", "The learning rate", caption, panels)]


def _caption(rows: Sequence[Row], swept: Sequence[Row], metrics: Sequence[str], with_steps: bool) -> str:
    bars = "bars one standard error to each side" if any(row.held_out_se for row in rows) else "one seed each"
    words = " or ".join(map(quantity, metrics))
    caption = f"Points are means over the seeds that stayed finite, {bars}. "
    caption += f"A star: of the rates at which the fewest seeds diverged, that of the arm's lowest {words}. "
    if any(row.diverged for row in swept):
        caption += "Open circles above the plot: how many of the seeds diverged there. "
    if with_steps:
        caption += "Steps are shown where all seeds reached the target. "
    if any(row.chosen == "lowest" for row in rows):
        caption += "These are figures of the test set: a rate chosen by them looks better than it is. "
    return caption


def _panel(arms: Arms, named: bool, title: str, y_label: str, number: Number, metric: str | None = None) -> Panel:
    """A number against the learning rate, a line for each arm that has several rates.

    Arguments:
        arms: all arms, also those with one rate, so that each looks as it does in the charts against steps.
        named: whether labels name the run.
        title: the panel's title.
        y_label: the label of the number.
        number: the number.
        metric: the main metric of the arms that are shown. Default: any.
    """
    lines = [
        _line(own, style, number, named)
        for style, own in enumerate(arms.values())
        if len(own) > 1 and metric in (None, own[0].metric)
    ]
    return Panel(title, "learning rate", y_label, lines, log_x=True, log_y=True, points=True)


def _line(rows: list[Row], style: int, number: Number, named: bool) -> Line:
    """A number of an arm at each of its learning rates."""
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


def _held_out(metric: str) -> Number:
    """The main metric on held-out examples, as people read it."""
    scale = summary.scale(metric)
    return lambda row: tuple(None if value is None else scale * value for value in (row.held_out, row.held_out_se))


def _train_loss(row: Row) -> tuple[float | None, ...]:
    """The last training loss."""
    return row.train_loss, row.train_loss_se


def _steps_of_all(target: float) -> Number:
    """The steps to the target, where no seed missed it: a mean over those that did not would flatter."""

    def number(row: Row) -> tuple[float | None, ...]:
        of_all = (to for to in row.targets if to.loss == target and to.reached == row.seeds)
        return next(((to.steps, to.steps_se) for to in of_all), (None, None))

    return number
