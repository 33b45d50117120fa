"""What a run showed, in a table: a row for each arm and learning rate."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import rich.box
from rich.markup import escape
from rich.table import Table

from experiments import files
from experiments.report import spread
from experiments.report.runs import Curve, Run


@dataclasses.dataclass(frozen=True)
class Row:
    """The results of one arm at one learning rate; `*_se` are standard errors over seeds. `None`: there is no number.

    `diverged` counts the seeds whose loss was not finite at some step; all else is about the others. `held_out` is the
    last value of `metric`, `train_loss` that of the last record, at `step`. `reached` counts the seeds whose training
    loss reached the target, and `steps_to_target` is their mean. `relative_time` is the median over records of the
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
    target_loss: float | None
    reached: int
    steps_to_target: float | None
    steps_to_target_se: float | None
    relative_time: float | None
    chosen: Literal["best", "lowest"] | None = None


class Column(NamedTuple):
    """A column of the table, for people."""

    title: str
    cells: list[str]
    is_text: bool = False


def summarize(runs: Sequence[Run]) -> list[Row]:
    """A row for each curve, in their order."""
    return [row for run in runs for row in _choose([_row(curve, run) for curve in run.curves])]


def write_summary(rows: Sequence[Row], path: Path) -> None:
    """The rows as JSON, for other programs."""
    files.write(path, json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")


def columns(rows: Sequence[Row]) -> list[Column]:
    """The table for people: only columns in which something stands."""
    several_runs = len({row.run for row in rows}) > 1
    view = [Column("arm", [f"{row.run}: {row.arm}" if several_runs else row.arm for row in rows], is_text=True)]
    if len({row.learning_rate for row in rows}) > 1:
        view.append(Column("rate", [f"{row.learning_rate:g}" + " *" * bool(row.chosen) for row in rows]))
    for metric in dict.fromkeys(row.metric for row in rows if row.metric):
        view.append(Column(title(metric), [_held_out(row) if row.metric == metric else "-" for row in rows]))
    view.append(Column("train loss", ["-" if row.train_loss is None else f"{row.train_loss:.1e}" for row in rows]))
    targets = {row.target_loss for row in rows} - {None}
    if targets:
        view.append(Column(f"steps to {targets.pop():g}" if len(targets) == 1 else "steps to target", _to_target(rows)))
    if any(row.relative_time is not None for row in rows):
        times = ["-" if row.relative_time is None else f"{row.relative_time:.2f}" for row in rows]
        view.append(Column("time / step", times))
    if any(row.diverged for row in rows):
        view.append(Column("diverged", [f"{row.diverged}/{row.seeds}" if row.diverged else "-" for row in rows]))
    return view


def caption(rows: Sequence[Row]) -> list[str]:
    """What the table's figures are, a sentence each."""
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


def table(rows: Sequence[Row], heading: str) -> Table:
    """The table for the terminal, at most about 100 columns wide."""
    text = escape(" ".join(caption(rows)))
    view = Table(title=escape(heading), caption=text, box=rich.box.SIMPLE_HEAD, show_edge=False, collapse_padding=True)
    for column in columns(rows):
        if column.is_text:
            view.add_column(escape(column.title), min_width=14, max_width=32, overflow="fold")
        else:
            view.add_column(escape(textwrap.fill(column.title, 10)), justify="right", no_wrap=True)
    above = ""
    for arm, *cells in zip(*(column.cells for column in columns(rows)), strict=True):
        view.add_row(*map(escape, ("" if arm == above else arm, *cells)))
        above = arm
    return view


def title(metric: str) -> str:
    """The name of a metric, with its unit."""
    return metric.replace("_", " ") + " %" * metric.endswith("_error")


def scale(metric: str) -> int:
    """What a metric is multiplied by for people."""
    return 100 if metric.endswith("_error") else 1


def diverged(count: int, seeds: int) -> str:
    """How many seeds diverged, in words; nothing where none did."""
    return f"{count}/{seeds} diverged" if count else ""


def _row(curve: Curve, run: Run) -> Row:
    finite, losses = curve.stayed_finite, curve.metrics["train_loss"]
    held_out = curve.metrics[curve.metric].values[-1, finite] if curve.metric else np.empty(0)
    target = -np.inf if run.target_loss is None else run.target_loss
    below = losses.values[:, finite] <= target
    reached = losses.steps[below.argmax(axis=0)][below.any(axis=0)]
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
        target_loss=run.target_loss,
        reached=len(reached),
        steps_to_target=spread.mean(reached),
        steps_to_target_se=spread.standard_error(reached),
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


def _held_out(row: Row) -> str:
    digits = 2 if scale(row.metric or "") == 100 else 4
    return plus_minus(row.held_out, row.held_out_se, scale(row.metric or ""), digits)


def _to_target(rows: Sequence[Row]) -> list[str]:
    return [
        plus_minus(row.steps_to_target, row.steps_to_target_se, digits=0)
        + (f" ({row.reached}/{row.seeds})" if row.reached < row.seeds and row.target_loss is not None else "")
        for row in rows
    ]


def plus_minus(value: float | None, error: float | None, scale: float = 1, digits: int = 2) -> str:
    """A mean and its standard error, multiplied by `scale`; "-" where there is none."""
    if value is None:
        return "-"
    return f"{scale * value:.{digits}f}" + (f" ± {scale * error:.{digits}f}" if error is not None else "")
