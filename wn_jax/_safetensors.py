"""The file format: named arrays in a `.safetensors` file, and in its metadata what they stand for."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

_METADATA = "wn_jax"
_VERSION = 1
# What safetensors both writes and reads as NumPy arrays.
_INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_DTYPES = (*_INTEGERS, "float16", "bfloat16", "float32", "float64", "complex64")


@dataclasses.dataclass
class Content:
    """What a file holds. `nodes` are axes by the path of a node, whose arrays are `path/g` and `path/v`."""

    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    nodes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of arrays that are the data of random keys, the kind of key."""
    paths: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """The keys that lead to each leaf; joined by '/' they are its path."""


def write(path: Path, content: Content) -> None:
    """Put a file in place once it is complete.

    Raises:
        ValueError: an array is of a dtype that the format, or its reader for NumPy, does not know.
        OSError: the file cannot be written.
    """
    for name, array in content.arrays.items():
        if array.dtype.name not in _DTYPES:
            raise ValueError(f"{name!r} is {array.dtype}; a file can hold {', '.join(_DTYPES)}. Cast it, or use Orbax")
    facts = {"version": _VERSION, "nodes": content.nodes, "keys": content.keys, "paths": content.paths}
    path = Path(os.path.realpath(path))  # a link stays a link
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # in the same folder: renaming is atomic there
    try:
        safetensors.numpy.save_file(content.arrays, temporary, {_METADATA: json.dumps(facts)})
        _flush(temporary)
        os.replace(temporary, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)


def read(path: Path) -> Content:
    """What `write` wrote.

    Raises:
        ValueError: the file is cut off, or not one of ours.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb"):  # safetensors reports a missing file without its name
            pass
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = (file.metadata() or {}).get(_METADATA)
            arrays = {name: file.get_tensor(name) for name in file.keys()} if metadata else {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({error}); it was cut off or is something else"
        ) from None
    if metadata is None:
        raise ValueError(
            f"{path}: a safetensors file, but not one that wn_jax.save wrote: nothing in it says which arrays are g "
            "and v. Read it with safetensors.numpy.load_file"
        )
    facts = _facts(path, metadata)
    content = Content(
        arrays, {name: tuple(axes) for name, axes in facts["nodes"].items()}, facts["keys"], facts["paths"]
    )
    expected = {part for name in content.paths for part in _parts(name, content)}
    if expected != set(arrays):
        raise ValueError(f"{path}: its metadata does not fit its arrays: {sorted(expected ^ set(arrays))[:5]}")
    return content


def _facts(path: Path, metadata: str) -> dict[str, Any]:
    try:
        facts = json.loads(metadata)
        version = facts["version"]
        if version != _VERSION:
            raise ValueError(f"{path}: of format {version}; this wn_jax reads {_VERSION}: install a newer one")
        return {key: dict(facts[key]) for key in ("nodes", "keys", "paths")}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: its metadata is damaged ({error!r})") from None


def _parts(name: str, content: Content) -> list[str]:
    return [f"{name}/g", f"{name}/v"] if name in content.nodes else [name]


def _flush(path: Path) -> None:
    """Have the system put a file or a folder on disk, so that a power cut cannot leave a new name for old content."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # folders cannot be opened on Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
