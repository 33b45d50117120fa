"""Downloading data sets: whole and checked, or not at all. Who shows how far a download is, is the caller's to say."""

from __future__ import annotations

import logging
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pooch
import requests

from experiments.data import files, text
from experiments.data.names import SOURCES
from experiments.data.source import Download, Source
from experiments.errors import ConfigError
from experiments.schema import unknown

_TIMEOUT = 30  # seconds without a byte
_HEADERS = {"Accept-Encoding": "identity"}  # the file as it is, not unpacked on the way

Say = Callable[[str], None]
"""Is told what happens, a line at a time."""

ProgressBar = Callable[[str], AbstractContextManager[Any]]
"""Opens a bar for the download of this name, as pooch asks for one: with `total`, `update`, `reset` and `close`."""


def no_bar(_name: str) -> AbstractContextManager[Any]:
    """Nothing in place of a progress bar."""
    return nullcontext(False)


def fetch(name: str, folder: Path | None = None, say: Say = print, bar: ProgressBar = no_bar) -> Path | None:
    """Download the files of a data set that are missing or damaged.

    Arguments:
        name: a key of `SOURCES`.
        folder: the folder of data sets, in which the set gets its own. By default `WN_JAX_DATA`, else the user's cache.
        say: is told what happens. By default, it is printed.
        bar: shows how far each download is.

    Returns:
        The folder that has the files. None, if the set needs none.

    Raises:
        ConfigError: there is no such data set, no mirror serves a whole file, or the folder cannot be written.
    """
    source = _source(name)
    if not source.downloads:
        say(f"{name} needs no download")
        return None
    base = folder or files.folders(None)[0]
    target = base / source.folder
    for place in (target, base):
        if all(_whole(source, download, place) for download in source.downloads):
            say(f"{name} is already there: {place}")
            return place
    try:
        base.mkdir(parents=True, exist_ok=True)
        for download in source.downloads:
            if _whole(source, download, target):
                continue
            # On the target's file system, where a move is all or nothing.
            with tempfile.TemporaryDirectory(dir=base, prefix=".fetch-") as temporary:
                _install(_obtain(source, download, Path(temporary), say, bar), target)
    except OSError as error:
        raise ConfigError(
            f"{target}: cannot be written: {error}; make room or get permission, or choose another folder, "
            "such as by setting WN_JAX_DATA"
        ) from None
    say(f"{name} is in {target}")
    return target


def _source(name: str) -> Source:
    """The data set of this name.

    Raises:
        ConfigError: there is none, or it is text, which nobody serves. A set that needs no download is no error.
    """
    if name == text.NAME:
        raise ConfigError("text is not fetched: it is the source of Python's standard library, or what data.path names")
    if name not in SOURCES:
        raise ConfigError(unknown("data set", name, SOURCES))
    return SOURCES[name]


def _whole(source: Source, download: Download, folder: Path) -> bool:
    """Whether the folder has all files of the download, and none is damaged."""
    try:
        for file in download.files:
            files.read(source, folder, file)
    except ConfigError:
        return False
    return True


def _obtain(source: Source, download: Download, folder: Path, say: Say, bar: ProgressBar) -> list[Path]:
    """The checked files of `download`, below `folder`, from the first mirror that serves them whole."""
    failures = []
    for url in download.urls:
        say(f"downloading {url}")
        try:
            content = _retrieve(url, source, download, folder, bar)
            return [files.read(source, content, file).path for file in download.files]
        except requests.RequestException as error:  # one of OSError's, but of the mirror, not of the disk
            failures.append(f"  {url}: {_cause(error)}")
        except (ValueError, EOFError, tarfile.TarError) as error:
            failures.append(f"  {url}: damaged: {error}")
    raise ConfigError(
        f"{source.name}: {download.name} cannot be downloaded:\n"
        + "\n".join(failures)
        + "\ntry again later, or get the file by other means and set data.dir to the folder with "
        + ", ".join(file.name for file in download.files)
    )


def _retrieve(url: str, source: Source, download: Download, folder: Path, bar: ProgressBar) -> Path:
    """The folder with the files, downloaded and unpacked. A file without the known checksum, pooch removes."""
    unpack = None
    if download.name.endswith(".tar.gz"):
        unpack = pooch.Untar(members=[f"{source.folder}/{file.name}" for file in download.files], extract_dir=".")
    pooch.get_logger().setLevel(logging.WARNING)  # `say` has said it
    with bar(download.name) as progress:
        downloader = pooch.HTTPDownloader(progressbar=progress, chunk_size=2**16, timeout=_TIMEOUT, headers=_HEADERS)
        pooch.retrieve(url, f"md5:{download.md5}", download.name, folder, unpack, downloader)  # pyright: ignore[reportArgumentType] (its own)
    return folder / source.folder if unpack else folder


def _cause(error: requests.RequestException) -> str:
    """The reason in a few words."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"HTTP {error.response.status_code} {error.response.reason}"
    # urllib3's own error, and below the pool of connections that it tells of, the reason.
    inner = error.args[0] if error.args else error
    reason = getattr(inner, "reason", None) or inner
    return str(reason.args[0] if isinstance(reason, Exception) and reason.args else reason)


def _install(paths: list[Path], target: Path) -> None:
    """Move whole files to their place."""
    target.mkdir(exist_ok=True)
    for path in paths:
        path.chmod(0o644)  # a download is private to its user, and the folder may be shared
        path.replace(target / path.name)
        plain = path.name.removesuffix(".gz")
        for damaged in {plain, f"{plain}.gz"} - {path.name}:  # which would be read in place of the new one
            (target / damaged).unlink(missing_ok=True)
