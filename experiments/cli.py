"""The command line. Errors in what the user gave are one message and exit code 2."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import config, data, interrupt, report, run, step_time

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()

ConfigFile = Annotated[Path, typer.Argument(help="The experiment's TOML file.", metavar="CONFIG")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key of the file: a.b=value. May be repeated.", metavar="KEY=VALUE"),
]
Out = Annotated[Path | None, typer.Option(help="The run folder. Default: runs/NAME-DATE-TIME.")]


@app.callback()
def about() -> None:
    """Experiments with wn_jax: train arms of one config and see who wins."""


@app.command()
def compare(config_file: ConfigFile, set_: Settings = None, out: Out = None) -> None:
    """Train all arms of CONFIG side by side; print a table, and write curves, metrics and the resolved config."""
    with _user_errors():
        _execute(_load(config_file, set_), out)


@app.command()
def train(
    config_file: ConfigFile,
    arm: Annotated[str | None, typer.Option(help="Which arm. Default: the first one.")] = None,
    set_: Settings = None,
    out: Out = None,
) -> None:
    """Train one arm of CONFIG."""
    with _user_errors():
        _execute(_load(config_file, set_, lambda arms: arms[0] if arm is None else arm), out)


@app.command("step-time")
def step_time_(
    only: Annotated[
        list[str] | None, typer.Option(help="Measure this model. May be repeated. Default: all.", metavar="NAME")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds over which the median is taken.")] = 31,
    json: Annotated[Path | None, typer.Option(help="Write everything that was measured to this file.")] = None,
) -> None:
    """Measure a training step with weight normalization against the plain model's; print a table of the ratios."""
    with _user_errors():
        cases, rows = step_time.choose(only or ()), list[step_time.Row]()
        if json:
            step_time.write([], json)  # one that cannot be written is an error now, not after minutes
        try:
            for row in _measure(cases, rounds):
                rows.append(row)
                if json:
                    step_time.write(rows, json)
        finally:  # after a Ctrl-C, what is complete
            if rows:
                console.print(step_time.table(rows))
                console.print(step_time.machine(), soft_wrap=True)


def main() -> None:
    """Entry point of `python -m experiments`."""
    app(prog_name="python -m experiments")


def _load(
    config_file: Path, settings: list[str] | None, choose: Callable[[list[str]], str] | None = None
) -> config.Experiment:
    """The experiment, or the one arm of it that `choose` names; with data that fits it."""
    experiment = config.load(config_file, settings or ())
    try:
        if choose is not None:
            experiment = config.select(experiment, [choose(list(experiment.arms))])
        for arm in experiment.arms.values():
            data.load(arm.data)
    except config.ConfigError as error:
        raise config.ConfigError(f"{config_file}: {error}") from None
    return experiment


def _execute(experiment: config.Experiment, out: Path | None) -> None:
    path = out or Path("runs") / f"{experiment.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    run.check_free(path)
    train_config = next(iter(experiment.arms.values())).train
    records: list[run.Record] = []
    with _interruptible(lambda: _where_the_metrics_are(path, records)), _progress() as progress:
        total = len(experiment.arms) * train_config.steps // train_config.steps_per_record
        task = progress.add_task("", total=total)

        def on_compile(arm: str) -> None:
            interrupt.check()
            progress.update(task, description=f"compiling {arm}")

        runners = run.prepare(experiment, on_compile)
        with run.RunFolder(path, experiment) as folder:  # only now, so that what cannot run leaves none behind
            for record in run.execute(runners, train_config):
                folder.write(record)
                records.append(record)
                loss = sum(record["train_loss"]) / len(record["train_loss"])
                progress.update(task, advance=1, description=f"{record['arm']}: loss {loss:.4f}")
                interrupt.check()
    _report(experiment, train_config, records, path)


def _measure(cases: list[step_time.Case], rounds: int) -> Iterator[step_time.Row]:
    with _interruptible(lambda: "interrupted"), _progress() as progress:
        task = progress.add_task("", total=len(cases) * rounds)

        def on_round() -> None:
            interrupt.check()
            progress.advance(task)

        for case in cases:
            progress.update(task, description=case.name)
            yield step_time.measure(case, rounds, on_round)


def _progress() -> Progress:
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _report(
    experiment: config.Experiment, train_config: config.TrainConfig, records: list[run.Record], path: Path
) -> None:
    target = train_config.target_loss
    rows = report.summarize(records, target)
    title = f"{experiment.name}: {train_config.steps} steps, {train_config.seeds} seed{'s' * (train_config.seeds > 1)}"
    report.write_summary(rows, path / "summary.json")
    report.plot(records, rows, target, title, path / "curves.png")
    console.print(report.table(rows, title, target))
    console.print(f"curves: {path / 'curves.png'}\nall of the run: {path}", soft_wrap=True)


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except config.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@contextlib.contextmanager
def _interruptible(message: Callable[[], str]) -> Iterator[None]:
    """A Ctrl-C ends the program, with this message."""
    try:
        yield
    except KeyboardInterrupt:
        print(message(), file=sys.stderr)
        raise typer.Exit(interrupt.EXIT_CODE) from None


def _where_the_metrics_are(path: Path, records: list[run.Record]) -> str:
    if records:
        return f"interrupted at step {records[-1]['step']}; the metrics: {path / 'metrics.jsonl'}"
    return "interrupted before the first record; nothing was written"
