"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from experiments.errors import ConfigError


def write(path: Path, content: bytes | str) -> None:
    """Put a file in place when it is complete, so that nobody ever reads half of one; make its folder.

    Raises:
        ConfigError: it cannot be written.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
        temporary.chmod(0o644)  # a temporary file is private, a report is not
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written: {error}; choose another folder with --out") from None
