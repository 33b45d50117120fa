"""Where the files of data sets are looked for, and their content: decompressed and checked at each read."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import pooch

from experiments.data.source import Content, File, Open, Source, fetch_again
from experiments.errors import ConfigError

_GZIP = b"\x1f\x8b"
_MORE = 2**20  # bytes that a file may be too long by, and still be told its size and checksum


def cache_folder() -> Path:
    """The folder that `WN_JAX_CACHE` names, else the user's cache."""
    return _folder(os.environ.get("WN_JAX_CACHE") or str(pooch.os_cache("wn_jax")))


def folders(directory: str | None) -> tuple[Path, ...]:
    """The folders of data sets: `directory` alone if it is given, else `WN_JAX_DATA`, then the cache."""
    if directory is not None:
        return (_folder(directory),)
    named = os.environ.get("WN_JAX_DATA")
    return (_folder(named), cache_folder()) if named else (cache_folder(),)


def opener(source: Source, among: Sequence[Path]) -> Open:
    """A function that opens and checks the files of `source`, all from the first folder that has every one of them.

    Raises:
        ConfigError: no folder has every file; or, at opening, a file cannot be read or is damaged.
    """
    places = [place for folder in among for place in dict.fromkeys((folder / source.folder, folder))]
    found = next((place for place in places if not _missing(place, source.files)), None)
    if found is None:
        raise _not_found(source, places)
    folder, files = found, {file.name: file for file in source.files}
    return lambda name: read(source, folder, files[name])


def read(source: Source, folder: Path, file: File) -> Content:
    """The content of `file` in `folder`, plain or gzipped.

    Raises:
        ConfigError: the file is missing, cannot be read, is no whole gzip stream, unpacks to more than it should or has
            another checksum.
    """
    path = _path(folder, file)
    if path is None:
        raise ConfigError(f"{folder / file.name}: no such file; {fetch_again(source.name)}")
    # As much as the largest of the set, as of two files that are swapped the name is told, and a little more.
    most = max(other.size for other in source.files) + _MORE
    content = Content(source.name, path, _decompressed(path, source.name, most))
    digest = hashlib.md5(content.data, usedforsecurity=False).hexdigest()
    if digest != file.md5:
        hint = _hint(source, file, len(content.data), digest)
        raise content.wrong(f"its content has md5 {digest}{hint}", f"{file.size:,} bytes with md5 {file.md5}")
    return content


def _folder(name: str) -> Path:
    return Path(os.path.expanduser(name))


def _path(folder: Path, file: File) -> Path | None:
    """Where the file lies in the folder, plain or gzipped, or None."""
    paths = (folder / file.name, folder / f"{file.name}.gz")
    return next((path for path in paths if os.path.isfile(path)), None)


def _missing(folder: Path, files: Iterable[File]) -> list[str]:
    """The names of the files that the folder lacks."""
    return [file.name for file in files if _path(folder, file) is None]


def _not_found(source: Source, places: Iterable[Path]) -> ConfigError:
    """The error that says what each place lacks."""
    lines = [
        f"  {place}: " + (f"lacks {', '.join(_missing(place, source.files))}" if place.is_dir() else "no such folder")
        for place in places
    ]
    return ConfigError(
        f"data.name = {source.name!r}: no folder has all of its files; looked in\n"
        + "\n".join(lines)
        + f"\nrun `python -m experiments fetch {source.name}` and leave data.dir out, or set data.dir (or the "
        "environment variable WN_JAX_DATA) to the folder that has them, plain or as .gz"
    )


def _decompressed(path: Path, source: str, most: int) -> bytes:
    """The bytes of a file, unpacked where they are gzipped, and never more than `most` of them in memory.

    Whether they are, their first bytes say and not the name: some clients unpack what they download and keep the name.
    """
    try:
        with path.open("rb") as file:
            gzipped = file.read(len(_GZIP)) == _GZIP
            file.seek(0)
            with gzip.GzipFile(fileobj=file) if gzipped else contextlib.nullcontext(file) as content:
                data = content.read(most + 1)
    except EOFError:
        raise ConfigError(f"{path}: the gzip stream is truncated; {fetch_again(source)}") from None
    except (gzip.BadGzipFile, zlib.error) as error:  # the first is an OSError, too
        raise ConfigError(f"{path}: the gzip stream is damaged: {error}; {fetch_again(source)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}; {fetch_again(source)}") from None
    if len(data) > most:
        holds = "unpacks to" if gzipped else "holds"
        raise ConfigError(
            f"{path}: {holds} more than {most:,} bytes, which no file of {source} does; {fetch_again(source)}"
        )
    return data


def _hint(source: Source, file: File, size: int, md5: str) -> str:
    """The likeliest reason of another checksum."""
    same = [other.name for other in source.files if other.md5 == md5]
    if same:
        return f" and is that of {same[0]}"
    return f" and is truncated to {size:,} bytes" if size < file.size else f" and {size:,} bytes"
