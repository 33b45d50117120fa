"""The command `report`, and the report that ends a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments import report as reports
from experiments.cli import interrupt, tables
from experiments.cli.terminal import console, interruptible, user_errors


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN...")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write. Default: the run folder, or ./report for several.")
    ] = None,
) -> None:
    """Make the table, the curves and the page of one run, or of several together."""
    interrupt.at_once()
    with user_errors(), interruptible(lambda: "interrupted"):
        show_report(runs, out)


def show_report(runs: list[Path], out: Path | None) -> None:
    """Write the report on run folders, and show its tables."""
    found = reports.report(runs, out)
    console.print(tables.of_report(found.table))
    console.print(f"report: {found.page}\nall of it: {found.page.parent}", soft_wrap=True, markup=False)
