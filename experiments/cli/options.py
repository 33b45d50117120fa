"""What commands take: arguments and options that several of them share."""

from __future__ import annotations

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


Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="Train together with other processes that are started alike, on all their devices: those of a TPU pod, a "
        "SLURM step or a Kubernetes job, or those that --coordinator, --processes and --process name.",
    ),
]
Coordinator = Annotated[str | None, typer.Option(help="Where process 0 is to be met.", metavar="ADDRESS:PORT")]
Processes = Annotated[int | None, typer.Option(help="How many processes there are.", min=1)]
Process = Annotated[int | None, typer.Option(help="Which of them this is, from 0.", min=0)]
JoinTimeout = Annotated[int, typer.Option(help="Seconds to wait for the others to join.", min=1)]


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
