"""Arguments and options that several commands share, each said once.

A command may take a dataclass of options, and `app` gives it one option for each field.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_type_hints

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


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer needs it: in place of a dataclass, it takes each of its fields as an option.

    The options stand where the dataclass stood, in the order of its fields.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    taken = [part for parameter in parameters.values() for part in _parts(parameter)]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        def value(parameter: inspect.Parameter) -> Any:
            if not _is_options(parameter):
                return given[parameter.name]
            return parameter.annotation(**{part.name: given[part.name] for part in _parts(parameter)})

        command(**{name: value(parameter) for name, parameter in parameters.items()})

    # Typer reads the one for names and defaults, and the other for types.
    with_options.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    with_options.__annotations__ = {part.name: part.annotation for part in taken}
    return with_options


def _parts(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    """The parameters in the place of one, all of them given by name."""
    by_name = inspect.Parameter.KEYWORD_ONLY
    if not _is_options(parameter):
        yield parameter.replace(kind=by_name)
        return
    types = get_type_hints(parameter.annotation, include_extras=True)
    for field in dataclasses.fields(parameter.annotation):
        yield inspect.Parameter(field.name, by_name, default=field.default, annotation=types[field.name])


def _is_options(parameter: inspect.Parameter) -> bool:
    """Whether the parameter stands for several options."""
    return dataclasses.is_dataclass(parameter.annotation)


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
