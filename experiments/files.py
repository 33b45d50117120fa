"""Files: writing one whole or not at all, and reading TOML, JSON and JSON lines, whatever stands in them.

What is read may have been written by anything. Only regular files are read, as a FIFO would be waited for, and a device
may never end; and what is nested too deep or has too many digits to be meant is an error of one sentence.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from experiments.errors import ConfigError
from experiments.schema import shortened

_DEEPEST = 30
_BOMS = {b"\xff\xfe": "UTF-16 or UTF-32", b"\xfe\xff": "UTF-16", b"\0\0\xfe\xff": "UTF-32"}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Content = TypeVar("Content")


class NoTOMLError(ValueError):
    """Content that is not TOML at all."""


class NoJSONError(ValueError):
    """Content that is not JSON at all, as where a file was cut off."""


def write(path: Path, content: bytes | str) -> None:
    """Put a file in place when it is complete, so that nobody ever reads half of one; make its folder.

    What is not complete has a name that begins with a dot. A link stays a link, and its target is written.

    Raises:
        OSError: it cannot be written, or something that is no regular file is there. What is there stays as it is.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    path = Path(os.path.realpath(path))
    temporary = None
    try:
        if os.path.lexists(path):
            _check_regular(path.stat())
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, as only there a file can take another's place at once.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
        temporary.chmod(0o644)  # a temporary file is private, a report is not
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise


def read(path: Path) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    # Without waiting for whoever would write to a FIFO.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        _check_regular(os.fstat(descriptor))
        return file.read()


def load(path: Path, parse: Callable[[bytes], Content]) -> Content:
    """The content of a file, as `parse` reads it, which is `text`, `toml` or `json_object`.

    Raises:
        ConfigError: the file cannot be read, or `parse` raises a ValueError.
    """
    try:
        return parse(read(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise ConfigError(f"{shortened(str(path))}: {error}") from None


def reason(error: OSError) -> str:
    """Why a file cannot be used, without its name, which the message has already."""
    return error.strerror or str(error)


def text(content: bytes) -> str:
    """UTF-8 as text, with or without the byte-order mark that some editors begin it with.

    Raises:
        ValueError: it is in another encoding.
    """
    for mark, encoding in _BOMS.items():
        if content.startswith(mark):
            raise ValueError(f"is in {encoding}, as its byte-order mark says; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"is not in UTF-8: {error.reason} (at line {line}); save it as UTF-8") from None


def toml(content: bytes | str) -> dict[str, Any]:
    """The tables of TOML.

    Raises:
        NoTOMLError: it is no TOML.
        ValueError: it is too large to be meant: see `check_size`.
    """
    whole = text(content) if isinstance(content, bytes) else content
    try:
        return _of_sensible_size(lambda: tomllib.loads(whole))
    except tomllib.TOMLDecodeError as error:
        raise NoTOMLError(f"not valid TOML: {error}") from None


def json_object(content: bytes) -> dict[str, Any]:
    """The object of JSON.

    Raises:
        NoJSONError: it is no JSON.
        ValueError: it is another value, or too large to be meant: see `check_size`.
    """
    whole = text(content)
    try:
        value = _of_sensible_size(lambda: json.loads(whole))
    except json.JSONDecodeError as error:
        raise NoJSONError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object; got {shortened(repr(value))}")
    if _SURROGATE.search(whole):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("has half a letter, a surrogate without its other one, which no text may have") from None
    return value


def read_lines(path: Path, strict: bool = True) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, with their numbers from 1.

    A last line that was cut off while it was written is left out.

    Arguments:
        path: the file.
        strict: whether a line that is something else is an error. If not, it is left out, too.

    Raises:
        ConfigError: the file cannot be read, or a line of it is something else.
    """
    lines = load(path, lambda content: content.split(b"\n"))
    objects = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line's end is torn, or nothing
        try:
            objects.append((number, json_object(line)))
        except ValueError as error:
            if strict:
                raise ConfigError(f"{path}, line {number}: {error}; remove or mend the line") from None
    return objects


def check_size(content: Any) -> None:
    """Check that tables and lists are nested no deeper than any file's are, and that ints have 64 bits, as in TOML.

    Raises:
        ValueError: they are.
    """
    level: list[Any] = [content]
    for _ in range(_DEEPEST + 1):
        inner = [list(value.values()) if isinstance(value, dict) else value for value in level]
        level = [each for values in inner if isinstance(values, list) for each in values]
        if any(isinstance(each, int) and not -(2**63) <= each < 2**63 for each in level):
            raise ValueError("an int has more than 64 bits")
    if level:
        raise ValueError(f"tables and lists are nested more than {_DEEPEST} deep")


def _of_sensible_size(parse: Callable[[], Any]) -> Any:
    """The value that `parse` returns, if it is not too large to be meant. Other errors are its own."""
    try:
        value = parse()
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError):
        raise
    except ValueError as error:  # of Python's own limit on digits
        raise ValueError(f"a number cannot be read: {error}") from None
    check_size(value)
    return value


def _check_regular(status: os.stat_result) -> None:
    """Check that it is a file's.

    Raises:
        OSError: it is a folder's, or one of a FIFO, a socket or a device.
    """
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is no regular file")
