"""The report on runs: a table, pictures, and a page that holds everything that it took."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments import files
from experiments.errors import ConfigError
from experiments.report import charts, curvature, curves, summary
from experiments.report.curvature import Curvature
from experiments.report.page import page
from experiments.report.runs import Run, read_all
from experiments.report.summary import Row, TextTable, summarize
from experiments.schema import shortened


@dataclasses.dataclass(frozen=True)
class Report:
    """The findings, and where they were written."""

    rows: list[Row]
    """A row for each arm and learning rate."""

    table: list[TextTable]
    """The rows as text, for the terminal to draw."""

    summary: Path
    """The rows as JSON."""

    curves: Path
    """The picture of the losses along training."""

    page: Path
    """One file with everything in it."""


def report(paths: Iterable[Path], out: Path | None = None) -> Report:
    """Report on run folders: write `summary.json`, `curves.png` and `report.html`.

    Where curvature was measured or learning rates were swept, also a picture of each figure of these in `figures/`, and
    `curvature.json`.

    Arguments:
        paths: the run folders.
        out: where to write. Default: into the run folder, of several into `report`.

    Raises:
        ConfigError: a run folder cannot be read, or the report not written.
    """
    runs = read_all(paths)
    rows = summarize(runs)
    folder = out or (runs[0].path if len(runs) == 1 else Path("report"))
    written = Report(
        rows=rows,
        table=summary.table(rows, _heading(runs)),
        summary=folder / "summary.json",
        curves=folder / "curves.png",
        page=folder / "report.html",
    )
    try:
        summary.write_summary(rows, written.summary)
        curves.write_png(charts.over_time(runs, rows), _heading(runs), written.curves)
        measured = [found for run in runs if (found := curvature.read(run.path, run.name))]
        _write_further(runs, rows, measured, folder)
        files.write(written.page, page(runs, rows, measured, _heading(runs)))
    except OSError as error:
        raise ConfigError(
            f"{shortened(str(folder))}: the report cannot be written: {files.reason(error)}; make room or change "
            "permissions, or choose another folder with --out"
        ) from None
    return written


def _write_further(runs: Sequence[Run], rows: Sequence[Row], measured: Sequence[Curvature], folder: Path) -> None:
    for found in measured:
        curvature.write_summary(found, folder / (f"curvature-{found.run}.json" if len(runs) > 1 else "curvature.json"))
    of_curvature = [chart for found in measured for chart in curvature.charts(found, named=len(runs) > 1)]
    for chart in [*of_curvature, *charts.sweep(runs, rows)]:
        curves.write_png([chart], chart.title, folder / "figures" / f"{chart.id}.png")


def _heading(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    (run,) = runs
    steps = max(int(curve.metrics["train_loss"].steps[-1]) for curve in run.curves)
    seeds = max(len(curve.nonfinite) for curve in run.curves)
    return f"{run.title}: {steps} steps, {seeds} seed{'s' * (seeds > 1)}"
