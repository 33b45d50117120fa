"""The command line. Errors in what the user gave are one message and exit code 2; a run that had to stop, code 1."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import jax
import typer

from experiments import data, report
from experiments.cli import interrupt
from experiments.cli.bench import bench
from experiments.cli.options import (
    ArmName,
    ConfigFile,
    Coordinator,
    Distributed,
    JoinTimeout,
    Out,
    Process,
    Processes,
    Settings,
    new_folder,
    one_arm,
)
from experiments.cli.overhead import measure_overhead
from experiments.cli.terminal import about_config, console, interruptible, progress_bar, user_errors
from experiments.cli.tpu_compile import tpu_compile
from experiments.cli.vocoder import vocoder
from experiments.conditioning.along import Along
from experiments.config import toml_file
from experiments.config.experiment import Experiment
from experiments.data.fetch import fetch
from experiments.engine import arm, run
from experiments.errors import ConfigError, RunError
from experiments.processes import Join, first, joined, together
from experiments.run_folder.folder import RunFolder, check

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.command("vocoder")(vocoder)
app.command("tpu-compile")(tpu_compile)
app.command("bench")(bench)
app.command("overhead")(measure_overhead)

Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in --out from its newest checkpoint, or begin it.")
]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Write event files for TensorBoard, too.")]


@app.callback()
def about() -> None:
    """Experiments with wn_jax: train arms of one config and see who wins."""


@app.command()
def compare(
    config_file: ConfigFile,
    set_: Settings = None,
    out: Out = None,
    resume: Resume = False,
    tensorboard: TensorBoard = False,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
    join_timeout: JoinTimeout = 300,
) -> None:
    """Train all arms of CONFIG side by side and report: a table, curves, a page, metrics and the resolved config."""
    with joined(Join(distributed, coordinator, processes, process, join_timeout), out):
        _execute(config_file, toml_file.load(config_file, set_ or ()), out, resume, tensorboard)


@app.command()
def train(
    config_file: ConfigFile,
    arm: ArmName = None,
    set_: Settings = None,
    out: Out = None,
    resume: Resume = False,
    tensorboard: TensorBoard = False,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
    join_timeout: JoinTimeout = 300,
) -> None:
    """Train one arm of CONFIG."""
    with joined(Join(distributed, coordinator, processes, process, join_timeout), out):
        experiment = toml_file.load(config_file, set_ or ())
        _execute(config_file, one_arm(experiment, arm, config_file), out, resume, tensorboard)


@app.command()
def sweep(
    config_file: ConfigFile,
    learning_rates: Annotated[
        str | None, typer.Option(help="Rates with commas between. Default: those of CONFIG.", metavar="RATE,RATE,...")
    ] = None,
    set_: Settings = None,
    out: Out = None,
    resume: Resume = False,
    tensorboard: TensorBoard = False,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process: Process = None,
    join_timeout: JoinTimeout = 300,
) -> None:
    """Train all arms of CONFIG at several learning rates; where that is fast, all of an arm's in one program."""
    with joined(Join(distributed, coordinator, processes, process, join_timeout), out):
        experiment = toml_file.load(config_file, set_ or ())
        if learning_rates is not None:  # also to arms that have rates of their own
            keys = [
                "optimizer",
                *(f"arms.{name}.optimizer" for name in experiment.arms if list(experiment.arms) != ["base"]),
            ]
            rates = [f"{key}.learning_rate=[{learning_rates}]" for key in keys]
            experiment = toml_file.load(config_file, [*(set_ or ()), *rates])
        if any(len(arm.optimizer.learning_rate) == 1 for arm in experiment.arms.values()):
            raise ConfigError(
                f"{config_file}: a sweep needs several learning rates in each arm; give --learning-rates 0.001,0.01 or "
                "a list in optimizer.learning_rate"
            )
        _execute(config_file, experiment, out, resume, tensorboard)


@app.command()
def conditioning(
    config_file: ConfigFile,
    set_: Settings = None,
    out: Out = None,
    resume: Resume = False,
) -> None:
    """Train the arms of CONFIG, and measure the loss's curvature along the weights of one, in many parametrizations."""
    with user_errors():
        experiment = toml_file.load(config_file, set_ or ())
        _execute(config_file, experiment, out, resume, tensorboard=False, then_measure=True)


@app.command("report")
def report_(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN...")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write. Default: the run folder, or ./report for several.")
    ] = None,
) -> None:
    """Make the table, the curves and the page of one run, or of several together."""
    interrupt.at_once()
    with user_errors(), interruptible(lambda: "interrupted"):
        _report(runs, out)


@app.command("fetch")
def fetch_(
    name: Annotated[str, typer.Argument(help=f"A data set: {', '.join(data.SOURCES)}.")],
    to: Annotated[Path | None, typer.Option(help="Where to. Default: WN_JAX_DATA, or the cache folder.")] = None,
) -> None:
    """Download a data set and check it."""
    interrupt.at_once()
    with user_errors(), interruptible(lambda: "interrupted"):
        fetch(name, to)


def main() -> None:
    """Entry point of `python -m experiments`."""
    app(prog_name="python -m experiments")


def _execute(
    config_file: Path,
    experiment: Experiment,
    out: Path | None,
    resume: bool,
    tensorboard: bool,
    then_measure: bool = False,
) -> None:
    if resume and out is None:
        raise ConfigError("--resume needs the run folder: --out FOLDER")
    path = out or new_folder(experiment.name)
    with together():
        check(path, experiment, resume)  # before what takes long
    with together(), about_config(config_file):
        along = Along(experiment) if then_measure else None
        arms = arm.build(experiment)
    if jax.device_count() > 1:
        for line in dict.fromkeys(own.placement.describe() for own in arms.values()):
            console.print(line)
    problem = None
    with (
        interruptible(lambda: f"interrupted; to go on: --out {path} --resume"),
        RunFolder(path, experiment, resume, tensorboard, _digests(arms)) as folder,
    ):
        step, notes = run.begin(arms, folder)
        for note in notes:
            console.print(f"warning: {note}", soft_wrap=True, markup=False)
        if resume:
            console.print(f"going on after step {step} of {experiment.train.steps}")
        _train(experiment, arms, folder, step)
        try:
            if along:
                _measure_along(along, folder)
        except RunError as error:  # there is something to report all the same
            problem = error
    with together():
        if first():
            _report([path], path)
    if problem:
        raise problem


def _digests(arms: dict[str, arm.Arm]) -> dict[str, str]:
    found = {name: own.placement.dataset.digest for name, own in arms.items()}
    return {name: digest for name, digest in found.items() if digest}


def _train(experiment: Experiment, arms: dict[str, arm.Arm], folder: RunFolder, step: int) -> None:
    per_arm = experiment.train.steps // experiment.train.record_every
    with progress_bar() as progress:
        done = step // experiment.train.record_every * len(arms)
        task = progress.add_task("", total=len(arms) * per_arm, completed=done)

        def on_compile(name: str) -> None:
            interrupt.check()
            progress.update(task, description=f"compiling {name}")

        for event in run.execute(experiment, arms, folder, step, on_compile, interrupt.check):
            rate = f"{event.examples_per_second:,.0f} examples/s"
            progress.update(task, advance=1, description=f"{event.arm}: loss {event.train_loss:.4f}, {rate}")
            interrupt.check()


def _measure_along(along: Along, folder: RunFolder) -> None:
    left = along.left(folder.measured())
    with progress_bar() as progress:
        task = progress.add_task("curvature: compiling", total=len(left))
        for records in along.records(left):
            folder.write_measured(records)
            where = f"seed {records[0]['seed']}, step {records[0]['step']}: loss {records[0]['loss']:.4f}"
            progress.update(task, advance=1, description=f"curvature: {where}")
            interrupt.check()


def _report(paths: list[Path], out: Path | None) -> None:
    result = report.report(paths, out)
    console.print(result.table)
    console.print(f"report: {result.page}\nall of it: {result.page.parent}", soft_wrap=True, markup=False)
