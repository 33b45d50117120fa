"""Arguments and options that several commands share, each said once.

A command may take a dataclass of options; how its fields become options of the command, `spread` says.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import typer

from experiments.cli.terminal import about_config
from experiments.config import toml_file
from experiments.config.experiment import Experiment

ConfigFile = Annotated[Path, typer.Argument(help="The experiment's TOML file.", metavar="CONFIG")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key of the file: a.b=value. May be repeated.", metavar="KEY=VALUE"),
]
ArmName = Annotated[str | None, typer.Option("--arm", help="Which arm. Default: the first one.")]
Out = Annotated[Path | None, typer.Option(help="The run folder. Default: runs/NAME-DATE-TIME.", metavar="FOLDER")]


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The options of a command that trains in a run folder."""

    set_: Settings = None
    out: Out = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out from its newest checkpoint, or begin it.")
    ] = False

    @property
    def settings(self) -> list[str]:
        """The changes to keys of the config file."""
        return self.set_ or []


@dataclasses.dataclass(frozen=True)
class TrainingOptions(RunOptions):
    """The options of a command that trains, in one process or several."""

    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write event files for TensorBoard, too.")] = False
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="Train together with other processes that are started alike, on all their devices: those of a TPU "
            "pod, a SLURM step or a Kubernetes job, or those that --coordinator, --processes and --process name.",
        ),
    ] = False
    coordinator: Annotated[str | None, typer.Option(help="Where process 0 is to be met.", metavar="ADDRESS:PORT")] = (
        None
    )
    processes: Annotated[int | None, typer.Option(help="How many processes there are.", min=1)] = None
    process: Annotated[int | None, typer.Option(help="Which of them this is, from 0.", min=0)] = None
    join_timeout: Annotated[int, typer.Option(help="Seconds to wait for the others to join.", min=1)] = 300


def one_arm(experiment: Experiment, arm: str | None, config_file: Path) -> Experiment:
    """The experiment with only this arm, or its first.

    Raises:
        ConfigError: there is no such arm.
    """
    with about_config(config_file):
        return toml_file.select(experiment, [next(iter(experiment.arms)) if arm is None else arm])


def new_folder(name: str) -> Path:
    """The folder of a run that was given none."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
