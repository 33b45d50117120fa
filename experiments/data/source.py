"""What a data set is: its files and their checksums, where they are had, and how they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.errors import ConfigError

Scale = Callable[[np.ndarray], np.ndarray]


def as_they_are(inputs: np.ndarray) -> np.ndarray:
    """Inputs that are in float32 and need no scaling."""
    return inputs


class Raw(NamedTuple):
    """A whole data set: inputs (examples, ...), and labels (examples,) in int32 from 0 to `classes - 1`, or targets
    (examples,) in float32, where `classes` is 1.

    `scale` makes float32 of the inputs, once it is known which of them are used.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    classes: int
    scale: Scale = as_they_are


@dataclass(frozen=True)
class File:
    """A file by name, size and md5: all three of the content, where the file itself may be `name` or `name.gz`."""

    name: str
    size: int
    md5: str


@dataclass(frozen=True)
class Download:
    """What one address serves: a file as it is or gzipped, or a .tar.gz with `files` in the set's folder.

    `urls` are mirrors in the order in which they are tried; `md5` is of the bytes served.
    """

    urls: tuple[str, ...]
    md5: str
    files: tuple[File, ...]

    @property
    def name(self) -> str:
        return self.urls[0].rpartition("/")[2]


@dataclass(frozen=True)
class Content:
    """The decompressed bytes of one file, and what to say when they are not what the format allows."""

    source: str
    path: Path
    data: bytes

    def wrong(self, found: str, expected: str) -> ConfigError:
        return ConfigError(f"{self.path}: {found}; expected {expected}; {fetch_again(self.source)}")


def fetch_again(source: str) -> str:
    """The remedy for a damaged file."""
    return f"run `python -m experiments fetch {source}`, or set data.dir to a folder with a whole copy"


Open = Callable[[str], Content]
"""The checked content of the file with this name."""


@dataclass(frozen=True)
class Source:
    """A data set. `folder` is the set's own folder below any folder of data sets; `read` opens its files by name."""

    name: str
    read: Callable[[Open], Raw]
    folder: str = ""
    downloads: tuple[Download, ...] = ()

    @property
    def files(self) -> tuple[File, ...]:
        return tuple(file for download in self.downloads for file in download.files)
