"""What commands take: arguments and options that several of them share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(help="The experiment's TOML file.", metavar="CONFIG")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key of the file: a.b=value. May be repeated.", metavar="KEY=VALUE"),
]
Out = Annotated[Path | None, typer.Option(help="The run folder. Default: runs/NAME-DATE-TIME.", metavar="FOLDER")]


def new_folder(name: str) -> Path:
    """The folder of a run that was given none."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
