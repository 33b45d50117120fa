"""The results of runs in a table: a row for each arm and learning rate.

Tables are plain text here. The command line draws them for the terminal, and `page` for a browser.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from experiments import files
from experiments.report import spread, targets
from experiments.report.runs import Curve, Run
from experiments.report.targets import Target


@dataclasses.dataclass(frozen=True)
class Figure:
    """The mean of a metric over seeds, and its standard error; and whether the loss is made of it."""

    metric: str
    is_term: bool
    mean: float | None
    se: float | None


@dataclasses.dataclass(frozen=True)
class Row:
    """The results of one arm at one learning rate; `*_se` are standard errors over seeds. `None`: there is no number.

    `diverged` counts the seeds whose loss was not finite at some step; all else is about the others. `held_out` is the
    last value of `metric`, `others` those of other metrics on held-out examples, where the loss is the main one, and
    `train_loss` that of the last record, at `step`. `relative_time` is the median over records of the
    arm's time over that of its run's first arm in the same round, where both train as many members. `chosen` marks,
    of an arm at several rates, that of the lowest `held_out`: the "best" one, or only the "lowest", where the set that
    chose it was the test set.
    """

    run: str
    arm: str
    learning_rate: float
    label: str
    seeds: int
    diverged: int
    step: int
    metric: str | None
    held_out: float | None
    held_out_se: float | None
    train_loss: float | None
    train_loss_se: float | None
    others: tuple[Figure, ...]
    targets: tuple[Target, ...]
    relative_time: float | None
    chosen: Literal["best", "lowest"] | None = None


class Column(NamedTuple):
    """A column of the table, for people."""

    title: str
    cells: list[str]
    is_text: bool = False


class TextTable(NamedTuple):
    """A table for people. The first of its columns says the arm."""

    heading: str
    """The line above it."""

    columns: list[Column]
    """The columns, all of one length."""

    caption: str
    """The sentences below it."""


def summarize(runs: Sequence[Run]) -> list[Row]:
    """A row for each curve, in their order."""
    return [row for run in runs for row in _choose([_row(curve, run) for curve in run.curves])]


def write_summary(rows: Sequence[Row], path: Path) -> None:
    """The rows as JSON, for other programs."""
    files.write(path, json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")


def columns(rows: Sequence[Row], terms: bool = True) -> list[Column]:
    """The table for people: only columns in which something stands, and those of the loss's terms where asked for."""
    view = _names(rows)
    for metric in dict.fromkeys(row.metric for row in rows if row.metric):
        view.append(Column(title(metric), [_held_out(row) if row.metric == metric else "-" for row in rows]))
    others = [figure for row in rows for figure in row.others if terms or not figure.is_term]
    for metric in dict.fromkeys(figure.metric for figure in others):
        view.append(Column(title(metric), [_other(row, metric) for row in rows]))
    view.append(Column("train loss", [_loss(row.train_loss) for row in rows]))
    if any(row.targets for row in rows) and not has_several_targets(rows):
        losses = {row.targets[0].loss for row in rows if row.targets}
        heading = f"steps to {losses.pop():g}" if len(losses) == 1 else "steps to target"
        view.append(Column(heading, [_steps(row, *row.targets) for row in rows]))
    if any(row.relative_time is not None for row in rows):
        times = ["-" if row.relative_time is None else f"{row.relative_time:.2f}" for row in rows]
        view.append(Column("time / step", times))
    if any(row.diverged for row in rows):
        view.append(Column("diverged", [f"{row.diverged}/{row.seeds}" if row.diverged else "-" for row in rows]))
    return view


def caption(rows: Sequence[Row]) -> list[str]:
    """The meaning of the table's figures, a sentence each."""
    seeds = sorted({row.seeds for row in rows})
    over = f"{' or '.join(map(str, seeds))} seeds" if seeds[-1] > 1 else "one seed"
    sentences = [f"Mean ± standard error over {over}" if seeds[-1] > 1 else "One seed"]
    if any(row.diverged for row in rows):
        sentences[0] += ", without those that diverged (their loss was not finite)"
    if any(row.relative_time is not None for row in rows):
        sentences.append("Time: over that of the run's first arm, measured side by side")
    kinds = {row.chosen for row in rows}
    if "best" in kinds:
        sentences.append("*: the arm's best rate, chosen on the validation set")
    if "lowest" in kinds:
        sentences.append("*: the arm's lowest (chosen on the test set, so its figure flatters)")
    return [f"{sentence}." for sentence in sentences]


def table(rows: Sequence[Row], heading: str) -> list[TextTable]:
    """The tables for the terminal, which come out at most about 100 characters wide."""
    results = TextTable(heading, columns(rows, terms=False), " ".join(caption(rows)))
    if not has_several_targets(rows):
        return [results]
    return [results, TextTable("Steps to training losses", steps_columns(rows), steps_caption(rows))]


def has_several_targets(rows: Sequence[Row]) -> bool:
    """Whether steps to targets have a table of their own."""
    return any(len(row.targets) > 1 for row in rows)


def steps_columns(rows: Sequence[Row]) -> list[Column]:
    """The table of the steps to each target, and of what they are over those of the run's first arm."""
    pairs = [(row, target) for row in rows for target in row.targets]
    view = [
        *_names([row for row, _ in pairs]),
        Column("training loss", [f"{target.loss:g}" for _, target in pairs]),
        Column("steps", [_steps(row, target) for row, target in pairs]),
    ]
    if any(target.ratio is not None for _, target in pairs):
        ratios = [plus_minus(target.ratio, target.ratio_se) for _, target in pairs]
        view.append(Column("over the first arm's", ratios))
    return view


def steps_caption(rows: Sequence[Row]) -> str:
    """The meaning of the steps to a loss."""
    steps = "Steps of training until the mean training loss since the last record was at most that."
    if all(target.ratio is None for row in rows for target in row.targets):
        return steps
    return (
        f"{steps} Over the first arm's: the mean over seeds of their ratio to those of the run's first arm from the "
        "same seed, where all came so far."
    )


def title(metric: str) -> str:
    """The name of a metric, with its unit."""
    return metric.replace("_", " ") + " %" * metric.endswith("_error")


def scale(metric: str) -> int:
    """The factor that a metric gets for people."""
    return 100 if metric.endswith("_error") else 1


def diverged(count: int, seeds: int) -> str:
    """How many seeds diverged, in words; nothing where none did."""
    return f"{count}/{seeds} diverged" if count else ""


def _names(rows: Sequence[Row]) -> list[Column]:
    """The columns that tell the rows apart."""
    several_runs = len({row.run for row in rows}) > 1
    view = [Column("arm", [f"{row.run}: {row.arm}" if several_runs else row.arm for row in rows], is_text=True)]
    if len({row.learning_rate for row in rows}) > 1:
        view.append(Column("rate", [f"{row.learning_rate:g}" + " *" * bool(row.chosen) for row in rows]))
    return view


def _row(curve: Curve, run: Run) -> Row:
    finite, losses = curve.stayed_finite, curve.metrics["train_loss"]
    held_out = curve.metrics[curve.metric].values[-1, finite] if curve.metric else np.empty(0)
    others = curve.held_out[1:] if curve.metric and not curve.metric.endswith("_error") else []
    return Row(
        run=curve.run,
        arm=curve.arm,
        learning_rate=curve.learning_rate,
        label=curve.label,
        seeds=len(finite),
        diverged=int((~finite).sum()),
        step=int(losses.steps[-1]),
        metric=curve.metric,
        held_out=spread.mean(held_out),
        held_out_se=spread.standard_error(held_out),
        train_loss=spread.mean(losses.values[-1, finite]),
        train_loss_se=spread.standard_error(losses.values[-1, finite]),
        others=tuple(_last(curve, metric) for metric in others),
        targets=tuple(targets.reached(curve, run, loss) for loss in run.target_losses),
        relative_time=_relative_time(curve, run),
    )


def _relative_time(curve: Curve, run: Run) -> float | None:
    """Paired by record: the arms took turns, so that a loaded machine slowed both."""
    first = run.curves[0]
    members = [sum(len(other.nonfinite) for other in run.curves if other.arm == arm) for arm in (curve.arm, first.arm)]
    ratios = [curve.seconds[step] / first.seconds[step] for step in curve.seconds if first.seconds.get(step)]
    return float(np.median(ratios)) if ratios and members[0] == members[1] else None


def _choose(rows: list[Row]) -> list[Row]:
    """Mark the lowest held-out metric of each arm that has several rates, where the fewest seeds diverged."""
    lowest = set()
    for arm in {row.arm for row in rows}:
        own = [row for row in rows if row.arm == arm]
        candidates = [row for row in own if row.held_out is not None]
        if len(own) > 1 and candidates:
            lowest.add(min(candidates, key=lambda row: (row.diverged, row.held_out)))
    return [dataclasses.replace(row, chosen=_word(row)) if row in lowest else row for row in rows]


def _word(row: Row) -> Literal["best", "lowest"]:
    return "best" if (row.metric or "").startswith("validation") else "lowest"


def _last(curve: Curve, metric: str) -> Figure:
    values = curve.metrics[metric].values[-1, curve.stayed_finite]
    return Figure(metric, metric in curve.terms, spread.mean(values), spread.standard_error(values))


def _held_out(row: Row) -> str:
    factor = scale(row.metric or "")
    return plus_minus(row.held_out, row.held_out_se, factor, 2 if factor == 100 else _digits(row.held_out))


def _loss(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if abs(value) < 0.1 else f"{value:.4g}"


def _other(row: Row, metric: str) -> str:
    own = (figure for figure in row.others if figure.metric == metric)
    return next((plus_minus(figure.mean, figure.se, digits=_digits(figure.mean)) for figure in own), "-")


def _digits(value: float | None) -> int:
    return 2 if value is not None and abs(value) >= 10 else 4


def _steps(row: Row, target: Target | None = None) -> str:
    if target is None:
        return "-"
    missed = f" ({target.reached}/{row.seeds})" if target.reached < row.seeds else ""
    return plus_minus(target.steps, target.steps_se, digits=0) + missed


def plus_minus(value: float | None, error: float | None, scale: float = 1, digits: int = 2) -> str:
    """A mean and its standard error, multiplied by `scale`; "-" where there is none."""
    if value is None:
        return "-"
    return f"{scale * value:.{digits}f}" + (f" ± {scale * error:.{digits}f}" if error is not None else "")
