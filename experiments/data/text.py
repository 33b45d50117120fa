"""Text as windows of bytes: the source of Python's standard library on this machine, or a file of the user's own."""

from __future__ import annotations

import functools
import hashlib
import stat
import sysconfig
from pathlib import Path

import numpy as np

from experiments.errors import ConfigError

NAME = "text"
SYMBOLS = 256
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
_REMEDY = "set data.path to a file of text, where it is now, or leave it out for Python's standard library"
_HASHED_WHOLE, _BLOCK = 2**28, 2**12  # bytes


def read(path: str | None, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows to train on, and those to test on, from the last tenth of the text; both (windows, window + 1) in uint8.

    Each begins with the byte that the one before it ends with, so that every byte but the first is predicted once. A
    file is mapped into memory, and read where it is needed.

    Raises:
        ConfigError: the file cannot be read, is empty, or has a part that is shorter than a window.
    """
    text, what = _whole(path), "the standard library" if path is None else f"data.path: {path}"
    held_out = len(text) // 10
    parts = text[: len(text) - held_out], text[len(text) - held_out :]
    if not len(text):
        raise ConfigError(f"{what} is empty; {_REMEDY}")
    if held_out <= window:
        raise ConfigError(
            f"{what}: has {len(text):,} bytes, and its last tenth, which is held out, is shorter than a window of "
            f"data.window + 1 = {window + 1:,} bytes; lower data.window to {held_out - 1:,} or less, or {_REMEDY}"
            if held_out > 1
            else f"{what}: has {len(text):,} bytes, which is too short to train on; {_REMEDY}"
        )
    train, held_out_part = (np.lib.stride_tricks.sliding_window_view(part, window + 1)[::window] for part in parts)
    return train, held_out_part


def digest(path: str | None) -> str:
    """A short text that tells this text from others: of its size and bytes; of a large one's, of a hundred places."""
    text = _whole(path)
    found = hashlib.blake2b(str(len(text)).encode(), digest_size=16)
    if len(text) <= _HASHED_WHOLE:
        found.update(text.tobytes())
    else:
        for start in np.linspace(0, len(text) - _BLOCK, 100).astype(int):
            found.update(text[start : start + _BLOCK].tobytes())
    return found.hexdigest()


def _whole(path: str | None) -> np.ndarray:
    return standard_library() if path is None else _mapped(path)


@functools.cache
def standard_library() -> np.ndarray:
    """The source of Python's standard library as bytes, without its tests and its tables of encodings.

    The files are in an order that is the same everywhere, and has neighbours of a folder apart.

    Raises:
        ConfigError: Python was installed without it.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    names = [name for name in found if _LEFT_OUT.isdisjoint(Path(name).parts)]
    names.sort(key=lambda name: hashlib.md5(name.encode(), usedforsecurity=False).digest())
    try:
        text = np.frombuffer(b"\n".join(found[name].read_bytes() for name in names), np.uint8)
    except OSError as error:
        raise ConfigError(
            f"the source of the standard library cannot be read: {error}; set data.path to a file of text"
        ) from None
    if not names:
        raise ConfigError(f"{folder}: holds no source of the standard library; set data.path to a file of text")
    return text


def _mapped(path: str) -> np.ndarray:
    """The bytes of a file."""
    try:
        file = Path(path).expanduser()
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        return np.memmap(file, np.uint8, mode="r") if status.st_size else np.zeros(0, np.uint8)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no such user
        raise ConfigError(f"data.path: {path} cannot be read: {str(error).rstrip('.')}; {_REMEDY}") from None
