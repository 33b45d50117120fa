"""The commands that train: `compare`, `train` and `sweep`. How a run goes, `execution` says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.cli.execution import execute
from experiments.cli.joined import joined
from experiments.cli.options import ArmName, ConfigFile, TrainingOptions, one_arm
from experiments.config import toml_file
from experiments.config.experiment import Experiment
from experiments.errors import ConfigError

LearningRates = Annotated[
    str | None, typer.Option(help="Rates with commas between. Default: those of CONFIG.", metavar="RATE,RATE,...")
]


def compare(config_file: ConfigFile, *, options: TrainingOptions) -> None:
    """Train all arms of CONFIG side by side and report: a table, curves, a page, metrics and the resolved config."""
    with joined(options):
        experiment = toml_file.load(config_file, options.settings)
        execute(config_file, experiment, options)


def train(config_file: ConfigFile, arm: ArmName = None, *, options: TrainingOptions) -> None:
    """Train one arm of CONFIG."""
    with joined(options):
        experiment = one_arm(toml_file.load(config_file, options.settings), arm, config_file)
        execute(config_file, experiment, options)


def sweep(config_file: ConfigFile, learning_rates: LearningRates = None, *, options: TrainingOptions) -> None:
    """Train all arms of CONFIG at several learning rates; where that is fast, all of an arm's in one program."""
    with joined(options):
        experiment = _with_rates(config_file, options.settings, learning_rates)
        if any(len(arm.optimizer.learning_rate) == 1 for arm in experiment.arms.values()):
            raise ConfigError(
                f"{config_file}: a sweep needs several learning rates in each arm; give --learning-rates 0.001,0.01 or "
                "a list in optimizer.learning_rate"
            )
        execute(config_file, experiment, options)


def _with_rates(config_file: Path, settings: list[str], learning_rates: str | None) -> Experiment:
    """The experiment of a config file, with these learning rates if they are given."""
    experiment = toml_file.load(config_file, settings)
    if learning_rates is None:
        return experiment
    tables = ["optimizer"]
    if list(experiment.arms) != ["base"]:  # the name of the one arm of a file without arms
        tables += [f"arms.{name}.optimizer" for name in experiment.arms]  # which may have rates of their own
    rates = [f"{table}.learning_rate=[{learning_rates}]" for table in tables]
    return toml_file.load(config_file, [*settings, *rates])
