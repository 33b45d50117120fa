"""What a run showed: a table, and curves with a band over seeds."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import rich.box
from matplotlib.axes import Axes
from rich.markup import escape
from rich.table import Table

from experiments.run import Record

# Okabe & Ito's palette, which people with any colour vision can tell apart.
_COLOURS = ["#000000", "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#CC79A7"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One arm's results; `*_se` are standard errors over seeds. `None` where there is no number.

    `reached` counts the seeds whose training loss reached the target, and `steps_to_target` is their mean.
    `relative_time` is the median over records of the arm's time over the first arm's time in the same round.
    """

    arm: str
    seeds: int
    test_error: float | None
    test_error_se: float | None
    train_loss: float | None
    reached: int
    steps_to_target: float | None
    steps_to_target_se: float | None
    relative_time: float


def read_metrics(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summarize(records: Iterable[Record], target_loss: float) -> list[Row]:
    """A row an arm, in the order in which the arms first appear."""
    by_arm: dict[str, list[Record]] = {}
    for record in records:
        by_arm.setdefault(record["arm"], []).append(record)
    reference = next(iter(by_arm.values()), [])
    return [_row(arm, own, reference, target_loss) for arm, own in by_arm.items()]


def write_summary(rows: list[Row], path: Path) -> None:
    """The table as JSON."""
    path.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


def table(rows: list[Row], title: str, target_loss: float) -> Table:
    """The table for the terminal, under 80 columns wide."""
    over = f"mean ± standard error over {rows[0].seeds} seeds" if rows[0].seeds > 1 else "one seed"
    caption = f"{over}; time over that of {rows[0].arm}"
    view = Table(title=escape(title), caption=caption, box=rich.box.SIMPLE_HEAD, show_edge=False, collapse_padding=True)
    columns = ("arm", "test error %", "train loss", f"steps to {target_loss:g}", "time / step")
    for column in columns:
        view.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for row in rows:
        error = _plus_minus(row.test_error, row.test_error_se, scale=100, digits=2)
        loss = "diverged" if row.train_loss is None else f"{row.train_loss:.1e}"
        steps = _plus_minus(row.steps_to_target, row.steps_to_target_se, digits=0)
        if row.reached < row.seeds:
            steps += f" ({row.reached}/{row.seeds})"
        view.add_row(row.arm, error, loss, steps, f"{row.relative_time:.2f}")
    return view


def plot(records: list[Record], rows: list[Row], target_loss: float, title: str, path: Path) -> None:
    """Training loss and test error against steps: a line an arm (the mean), a band (the standard error over seeds)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for row, colour in zip(rows, _COLOURS * len(rows), strict=False):
        own = [record for record in records if record["arm"] == row.arm]
        for axes, key, scale in ((left, "train_loss", 1), (right, "test_error", 100)):
            _draw_curve(axes, own, key, scale, colour, row.arm.replace("_", " "))
    left.axhline(target_loss, color="grey", linestyle=":", linewidth=1)
    style = {"ha": "right", "va": "bottom", "color": "grey", "size": 8}
    left.annotate(f"target {target_loss:g}", (1, target_loss), xycoords=("axes fraction", "data"), **style)
    left.set(ylabel="training loss (minibatch mean)")
    right.set(ylabel="test error (%)")
    right.yaxis.set_minor_locator(matplotlib.ticker.LogLocator(subs=(2, 5)))
    for formatter in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
        formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to set identical low and high")  # of a diverged arm, alone
        for axes in (left, right):
            axes.set(xlabel="step", xlim=(0, None))
            axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    figure.suptitle(f"{title} (lines: mean; bands: standard error)" if rows[0].seeds > 1 else title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_curve(axes: Axes, records: list[Record], key: str, scale: float, colour: str, label: str) -> None:
    steps = [record["step"] for record in records]
    values = scale * np.array([record[key] for record in records], float)  # (records, seeds); null reads as NaN
    mean = values.mean(axis=1)
    error = values.std(axis=1, ddof=1) / math.sqrt(values.shape[1]) if values.shape[1] > 1 else np.zeros_like(mean)
    axes.set_yscale("log")
    marker = "o" if len(steps) == 1 or not np.isfinite(mean[1:]).any() else None  # a line needs two points
    axes.plot(steps, mean, color=colour, label=label, linewidth=1.6, marker=marker)
    lower = np.maximum(mean - error, mean / 10)  # on a log axis a band must stay above 0
    axes.fill_between(steps, lower, mean + error, color=colour, alpha=0.18, linewidth=0)


def _row(arm: str, records: list[Record], reference: list[Record], target_loss: float) -> Row:
    losses = np.array([record["train_loss"] for record in records], float)  # (records, seeds); null reads as NaN
    steps = np.array([record["step"] for record in records])
    below = losses <= target_loss
    reached = steps[below.argmax(axis=0)][below.any(axis=0)]
    error = np.array(records[-1]["test_error"], float)
    pairs = [
        own["seconds_per_step"] / other["seconds_per_step"]
        for own, other in zip(records, reference, strict=False)
    ]  # fmt: skip
    return Row(
        arm=arm,
        seeds=losses.shape[1],
        test_error=_mean(error),
        test_error_se=_standard_error(error),
        train_loss=_mean(losses[-1]),
        reached=len(reached),
        steps_to_target=_mean(reached),
        steps_to_target_se=_standard_error(reached),
        relative_time=float(np.median(pairs)),
    )


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) and np.isfinite(values).all() else None


def _standard_error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 and np.isfinite(values).all() else None


def _plus_minus(value: float | None, error: float | None, scale: float = 1, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{scale * value:.{digits}f}" + (f" ± {scale * error:.{digits}f}" if error is not None else "")
