"""The description of a data set: its files and their checksums, where they are had, and how they are read.

Looking for files is the subject of `files`, downloading them that of `fetch`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.errors import ConfigError

Scale = Callable[[np.ndarray], np.ndarray]
"""Makes float32 of inputs."""


def as_they_are(inputs: np.ndarray) -> np.ndarray:
    """Inputs that are in float32 and need no scaling."""
    return inputs


class Raw(NamedTuple):
    """A whole data set."""

    train_x: np.ndarray
    """Inputs to train on (examples, ...)."""

    train_y: np.ndarray
    """Their labels (examples,) in int32 from 0 to `classes - 1`, or targets (examples,) in float32."""

    test_x: np.ndarray
    """Inputs to test on."""

    test_y: np.ndarray
    """Their labels or targets."""

    classes: int
    """How many labels there are. Where `train_y` and `test_y` are targets, 1."""

    scale: Scale = as_they_are
    """Makes float32 of the inputs, once it is known which of them are used."""


@dataclass(frozen=True)
class File:
    """A file and what identifies its content. On disk it may be `name`, or gzipped `name.gz`."""

    name: str
    """The name of the decompressed file."""

    size: int
    """Its size in bytes."""

    md5: str
    """The checksum of its content."""


@dataclass(frozen=True)
class Download:
    """A thing to download: a file as it is or gzipped, or a .tar.gz with `files` in the set's folder."""

    urls: tuple[str, ...]
    """The mirrors, in the order in which they are tried."""

    md5: str
    """The checksum of the bytes that are served."""

    files: tuple[File, ...]
    """The files that come of it."""

    @property
    def name(self) -> str:
        """The name that is served, which is the same on all mirrors."""
        return self.urls[0].rpartition("/")[2]


@dataclass(frozen=True)
class Content:
    """The content of one file, and the error to raise where the format does not allow it."""

    source: str
    """The name of the data set."""

    path: Path
    """The file."""

    data: bytes
    """Its decompressed bytes."""

    def wrong(self, found: str, expected: str) -> ConfigError:
        """The error that says what was found, what the format asks for, and the remedy."""
        return ConfigError(f"{self.path}: {found}; expected {expected}; {fetch_again(self.source)}")


def fetch_again(source: str) -> str:
    """The remedy for a damaged file."""
    return f"run `python -m experiments fetch {source}`, or set data.dir to a folder with a whole copy"


Open = Callable[[str], Content]
"""Opens the file of this name, and checks its content."""


@dataclass(frozen=True)
class Source:
    """A data set."""

    name: str
    """Its name in `data.name`."""

    read: Callable[[Open], Raw]
    """Reads the whole set, and opens its files by name."""

    folder: str = ""
    """The set's own folder, below any folder of data sets."""

    downloads: tuple[Download, ...] = ()
    """Where its files are had. None, where it needs none."""

    @property
    def files(self) -> tuple[File, ...]:
        """All its files."""
        return tuple(file for download in self.downloads for file in download.files)
