"""A run from its config to its report, with what the terminal shows on the way. What a run does, the engine says."""

from __future__ import annotations

from pathlib import Path

import jax

from experiments.cli import interrupt
from experiments.cli.options import RunOptions, TrainingOptions, new_folder
from experiments.cli.report import show_report
from experiments.cli.terminal import about_config, console, interruptible, progress_bar
from experiments.conditioning.along import Along
from experiments.config.experiment import Experiment
from experiments.engine import arm, run
from experiments.errors import ConfigError, RunError
from experiments.processes import first, together
from experiments.run_folder.folder import RunFolder, check

Arms = dict[str, arm.Arm]


def execute(config_file: Path, experiment: Experiment, options: RunOptions, *, then_measure: bool = False) -> None:
    """Train the arms of an experiment in its run folder, and report.

    Arguments:
        config_file: the file of the experiment, named in errors.
        experiment: what to train.
        options: which folder, whether to go on with the run in it, and whether to write event files, too.
        then_measure: whether to measure curvature along what was trained.

    Raises:
        ConfigError: the experiment cannot run, or not in this folder.
        RunError: the run had to stop. If only measuring had to, the report is made all the same.
    """
    path = _folder(experiment, options)
    arms, along = _built(config_file, experiment, then_measure)
    _show_devices(arms)
    tensorboard = isinstance(options, TrainingOptions) and options.tensorboard

    with (
        interruptible(lambda: f"interrupted; to go on: --out {path} --resume"),
        RunFolder(path, experiment, options.resume, tensorboard, _digests(arms)) as folder,
    ):
        _train(experiment, arms, folder, _begun(experiment, arms, folder, options.resume))
        problem = _measure(along, folder) if along else None

    with together():
        if first():
            show_report([path], path)
    if problem:
        raise problem


def _folder(experiment: Experiment, options: RunOptions) -> Path:
    """The run folder, checked before anything that takes long."""
    if options.resume and options.out is None:
        raise ConfigError("--resume needs the run folder: --out FOLDER")
    path = options.out or new_folder(experiment.name)
    with together():
        check(path, experiment, options.resume)
    return path


def _built(config_file: Path, experiment: Experiment, then_measure: bool) -> tuple[Arms, Along | None]:
    """The arms, and if curvature is to be measured, what measures it."""
    with together(), about_config(config_file):
        along = Along(experiment) if then_measure else None
        return arm.build(experiment), along


def _show_devices(arms: Arms) -> None:
    """Say how arrays lie on the devices, where there are several."""
    if jax.device_count() > 1:
        for line in dict.fromkeys(own.placement.describe() for own in arms.values()):
            console.print(line)


def _digests(arms: Arms) -> dict[str, str]:
    """The digests of what the arms train on, where there are any."""
    found = {name: own.placement.dataset.digest for name, own in arms.items()}
    return {name: digest for name, digest in found.items() if digest}


def _begun(experiment: Experiment, arms: Arms, folder: RunFolder, resume: bool) -> int:
    """The step after which the run goes on. From here on the arms have their states."""
    step, notes = run.begin(arms, folder)
    for note in notes:
        console.print(f"warning: {note}", soft_wrap=True, markup=False)
    if resume:
        console.print(f"going on after step {step} of {experiment.train.steps}")
    return step


def _train(experiment: Experiment, arms: Arms, folder: RunFolder, step: int) -> None:
    """Train from this step on, with a bar that counts the records of all arms."""
    record_every = experiment.train.record_every
    with progress_bar() as progress:
        total = experiment.train.steps // record_every * len(arms)
        task = progress.add_task("", total=total, completed=step // record_every * len(arms))

        def on_compile(name: str) -> None:
            interrupt.check()
            progress.update(task, description=f"compiling {name}")

        for event in run.execute(experiment, arms, folder, step, on_compile, interrupt.check):
            rate = f"{event.examples_per_second:,.0f} examples/s"
            progress.update(task, advance=1, description=f"{event.arm}: loss {event.train_loss:.4f}, {rate}")
            interrupt.check()


def _measure(along: Along, folder: RunFolder) -> RunError | None:
    """Measure curvature where that was not yet done. A problem is returned, as there is something to report anyway."""
    try:
        left = along.left(folder.measured())
        with progress_bar() as progress:
            task = progress.add_task("curvature: compiling", total=len(left))
            for records in along.records(left):
                folder.write_measured(records)
                where = f"seed {records[0]['seed']}, step {records[0]['step']}: loss {records[0]['loss']:.4f}"
                progress.update(task, advance=1, description=f"curvature: {where}")
                interrupt.check()
    except RunError as problem:
        return problem
    return None
