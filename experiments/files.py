"""Writing a file whole or not at all, and reading files of JSON lines."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from experiments.errors import ConfigError


def write(path: Path, content: bytes | str) -> None:
    """Put a file in place when it is complete, so that nobody ever reads half of one; make its folder.

    What is not complete has a name that begins with a dot.

    Raises:
        OSError: it cannot be written.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = None
    try:
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


def read_lines(path: Path, strict: bool = True) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, with their numbers from 1.

    A last line that was cut off while it was written is left out.

    Arguments:
        path: the file.
        strict: whether a line that is something else is an error. If not, it is left out, too.

    Raises:
        ConfigError: the file cannot be read, or a line of it is something else.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    objects = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line's end is torn, or nothing
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"must be a JSON object; got {value!r}")
        except (RecursionError, ValueError) as error:
            if strict:
                what = f"not valid JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
                raise ConfigError(f"{path}, line {number}: {what}; remove or mend the line") from None
            continue
        objects.append((number, value))
    return objects
