"""The command `fetch`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from experiments import data
from experiments.cli import interrupt
from experiments.cli.terminal import interruptible, user_errors
from experiments.data import fetch as fetching


def fetch(
    name: Annotated[str, typer.Argument(help=f"A data set: {', '.join(data.SOURCES)}.")],
    to: Annotated[Path | None, typer.Option(help="Where to. Default: WN_JAX_DATA, or the cache folder.")] = None,
) -> None:
    """Download a data set and check it."""
    interrupt.at_once()
    with user_errors(), interruptible(lambda: "interrupted"):
        fetching.fetch(name, to, print, download_bar)


@contextlib.contextmanager
def download_bar(name: str) -> Iterator[DownloadBar]:
    """A bar for the download of this name, where there is a terminal to show it."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        yield DownloadBar(progress, name)


class DownloadBar:
    """A progress bar with the methods that pooch calls."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._task = progress, progress.add_task(name, total=None)

    @property
    def total(self) -> float | None:
        """The size of the download in bytes, if the server says it."""
        return self._progress.tasks[0].total

    @total.setter
    def total(self, size: int) -> None:
        self._progress.update(self._task, total=size or None)

    def update(self, size: int) -> None:
        """Add so many bytes."""
        self._progress.advance(self._task, size)

    def reset(self) -> None:
        """Begin anew."""
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        """Do nothing: the context that made the bar ends it."""
