"""The terminal: its console, bars of progress, and errors as one message."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.cli import interrupt
from experiments.errors import ConfigError, RunError

console = Console()


def progress_bar() -> Progress:
    """A bar with a description, a count and the time that is left."""
    columns = (
        TextColumn("{task.description:<58}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn an error in the input into a message and exit code 2, and a run that had to stop into code 1."""
    try:
        yield
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


@contextlib.contextmanager
def about_config(config_file: Path) -> Iterator[None]:
    """Let errors in here name the config file."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{config_file}: {error}") from None


@contextlib.contextmanager
def interruptible(message: Callable[[], str]) -> Iterator[None]:
    """Let a Ctrl-C end the program with this message."""
    try:
        yield
    except KeyboardInterrupt:
        print(message(), file=sys.stderr)
        raise typer.Exit(interrupt.EXIT_CODE) from None
