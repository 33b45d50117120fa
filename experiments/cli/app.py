"""The program: all commands together. A command is a function in a file of its own, and a line here."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import typer

from experiments.cli.bench import bench
from experiments.cli.conditioning import conditioning
from experiments.cli.fetch import fetch
from experiments.cli.overhead import overhead
from experiments.cli.report import report
from experiments.cli.spread import spread
from experiments.cli.tpu_compile import tpu_compile
from experiments.cli.training import compare, sweep, train
from experiments.cli.vocoder import vocoder

_COMMANDS: dict[str, Callable[..., None]] = {
    "vocoder": vocoder,
    "tpu-compile": tpu_compile,
    "bench": bench,
    "overhead": overhead,
    "compare": compare,
    "train": train,
    "sweep": sweep,
    "conditioning": conditioning,
    "report": report,
    "fetch": fetch,
}

_HELP = (
    "The command line. Errors in what the user gave are one message and exit code 2; a run that had to stop, code 1."
)

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=_HELP)
for _name, _command in _COMMANDS.items():
    app.command(_name)(spread(_command))


def main() -> None:
    """Entry point of `python -m experiments`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack letters, and a path may hold bytes that are none
    app(prog_name="python -m experiments")
