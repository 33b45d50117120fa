"""The command `bench`."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.progress import Progress, TaskID

from experiments import files
from experiments.bench import chart, libraries, measure, memory, rows, table
from experiments.bench.measure import Result
from experiments.cli import interrupt, tables
from experiments.cli.terminal import console, interruptible, progress_bar, user_errors
from experiments.environment import environment
from experiments.errors import ConfigError

_QUICK_SECONDS = 6.0
_PEERS = ("equinox", "paramax", "torch")


def bench(
    only: Annotated[
        list[str] | None,
        typer.Option("--rows", help="Measure these rows; * stands for anything. May be repeated.", metavar="NAME"),
    ] = None,
    library: Annotated[
        list[str] | None,
        typer.Option(
            "--libraries", help="Compare wn_jax with this one. May be repeated. Default: all.", metavar="NAME"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for bench.json, bench.md and bench.png.")] = Path("runs/bench"),
    seconds: Annotated[float, typer.Option(min=1, help="About how long to time each row.")] = 60,
    quick: Annotated[bool, typer.Option("--quick", help="A few rows, briefly, without PyTorch's compiler.")] = False,
) -> None:
    """Measure weight normalization against the plain model, in wn_jax and in every peer that is installed."""
    with user_errors(), interruptible(lambda: f"interrupted; the rows that were done are in {out}"):
        facts = {**environment(_PEERS), "freed_memory_kept": memory.keep()}
        chosen, results = rows.choose(only or (), quick), list[Result]()
        compared = libraries.choose(library or (), quick)
        _check_writable(out)
        jax.config.update("jax_enable_compilation_cache", False)  # whose hits would be taken for the time to compile
        budget = min(seconds, _QUICK_SECONDS) if quick else seconds
        try:
            with progress_bar() as progress:
                task = progress.add_task("", total=len(chosen))
                for row in chosen:
                    on_step = functools.partial(_on_step, progress, task, row.title)
                    results.append(measure.measure(row, budget, compared, on_step))
                    progress.advance(task)
                    _write(out, results, facts)
        finally:  # after a Ctrl-C, what is complete
            if results:
                _print(results, out, facts)


def _on_step(progress: Progress, task: TaskID, title: str, what: str) -> None:
    """Show what is done next of the row with this title, where a Ctrl-C may stop it."""
    interrupt.check()
    progress.update(task, description=f"{title}: {what}")


def _check_writable(out: Path) -> None:
    """Check that the folder can be written: now, not after minutes. What an earlier run left there stays so far.

    Raises:
        ConfigError: it cannot.
    """
    probe = out / ".bench"
    try:
        files.write(probe, "")
        probe.unlink()
    except OSError as error:
        raise _unwritable(out, error) from None


def _print(results: list[Result], out: Path, facts: dict[str, Any]) -> None:
    caption = "time over the library's own plain model: median of rounds (middle half of them); control: plain again"
    console.print(tables.of_cells(table.times(results), caption))
    if table.ways(results):
        console.print(tables.of_cells(table.ways(results), "the ways of wn_jax, over plain Linen"))
    for name, why in sorted({item for result in results for item in result.missing.items()}):
        console.print(f"no {name}: {why}", soft_wrap=True)
    console.print(f"{table.where(facts)}; written to {out}", soft_wrap=True)


def _write(out: Path, results: list[Result], facts: dict[str, Any]) -> None:
    """Write all that is known so far."""
    try:
        files.write(out / "bench.json", json.dumps(_report(results, facts), indent=1) + "\n")
        files.write(out / "bench.md", _page(results, facts))
        files.write(out / "bench.png", chart.png(results))
    except OSError as error:
        raise _unwritable(out, error) from None


def _unwritable(out: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{out}: cannot be written: {error}; choose another folder with --out")


def _report(results: list[Result], facts: dict[str, Any]) -> dict[str, Any]:
    derived = [
        {"bound": result.bound, "plain_ms": result.plain, "examples_per_second": result.examples_per_second}
        for result in results
    ]
    measured = [dataclasses.asdict(result) for result in results]
    return {"environment": facts, "rows": [a | b for a, b in zip(measured, derived, strict=True)]}


def _page(results: list[Result], facts: dict[str, Any]) -> str:
    """All tables as Markdown."""
    found = (table.times(results), table.ways(results), table.costs(results))
    return "\n\n".join([table.where(facts), *(table.markdown(cells) for cells in found if cells)]) + "\n"
