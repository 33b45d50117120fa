"""The file format: named arrays in a `.safetensors` file, and in its metadata what they stand for.

This file owns bytes on disk, and that they are there whole or not at all. Which arrays a tree has is `_saving`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import safetensors
import safetensors.numpy

from wn_jax._node import canonical_axes

_METADATA = "wn_jax"
_VERSION = 1
# What safetensors both writes and reads as NumPy arrays.
_INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_DTYPES = (*_INTEGERS, "float16", "bfloat16", "float32", "float64", "complex64")


@dataclasses.dataclass
class Content:
    """The content of a file. Every leaf of the saved tree is in `paths`."""

    paths: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """The keys that lead to a leaf, by its name: these keys joined by '/'."""
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """The arrays, by their names in the file: the leaf's name, or those that `of_node` gives."""
    nodes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """The reduction axes of the leaves that are nodes."""
    numbers: dict[str, int | float] = dataclasses.field(default_factory=dict)
    """The leaves that are numbers of Python."""
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of arrays that are the data of random keys, the kind of key."""


_FACTS = ("paths", "nodes", "numbers", "keys")  # of the fields, those in the metadata


def of_node(name: str) -> tuple[str, str]:
    """The names of the arrays `g` and `v` of a node."""
    return (f"{name}/g", f"{name}/v") if name else ("g", "v")


def write(path: Path, content: Content) -> None:
    """Put a file in place once it is complete. It has the mode of the file it replaces, or that of any new file.

    Raises:
        ValueError: an array is of a dtype that the format, or its reader for NumPy, does not know.
        OSError: the file cannot be written.
    """
    for name, array in content.arrays.items():
        if array.dtype.name not in _DTYPES:
            raise ValueError(f"{name!r} is {array.dtype}; a file can hold {', '.join(_DTYPES)}. Cast it, or use Orbax")
    if "__metadata__" in content.arrays:
        raise ValueError("'__metadata__' is a word of the format; rename that leaf")
    path = Path(os.path.realpath(path))  # a link stays a link
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    facts = {"version": _VERSION, **{key: getattr(content, key) for key in _FACTS}}
    _put_in_place(path, content.arrays, {_METADATA: json.dumps(facts)})


def _put_in_place(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a file in a folder beside it, and move it when it is complete."""
    # A folder of our own, as safetensors makes further files; beside the file, as renaming is atomic there.
    workshop = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary = workshop / path.name
    try:
        workshop.mkdir()
        temporary.touch()
        mode = (path if path.exists() else temporary).stat().st_mode
        safetensors.numpy.save_file(arrays, temporary, metadata)
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    _flush(path.parent)


def read(path: Path) -> Content:
    """The content that `write` wrote.

    Raises:
        ValueError: the file is cut off, or not one of ours.
        OSError: it cannot be read.
    """
    with _opened(path) as file:
        metadata = (file.metadata() or {}).get(_METADATA)
        names = file.keys() if metadata else ()
        arrays = {name: file.get_tensor(name) for name in names}
    if metadata is None:
        raise ValueError(
            f"{path}: a safetensors file, but not one that wn_jax.save wrote: nothing in it says which arrays are g "
            "and v. Read it with safetensors.numpy.load_file"
        )
    try:
        facts = json.loads(metadata)
        version = facts["version"]
        if version == _VERSION:
            facts["nodes"] = {name: tuple(axes) for name, axes in facts["nodes"].items()}  # JSON has no tuples
            content = Content(arrays=arrays, **{key: dict(facts[key]) for key in _FACTS})
            _check_content(content)
            return content
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON of another form than ours raises any
        raise ValueError(f"{path}: its metadata is damaged ({type(error).__name__}: {error})") from None
    raise ValueError(f"{path}: of format {version}; this wn_jax reads {_VERSION}: install a newer one")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that another program wrote.

    Raises:
        ValueError: the file is cut off, is one of ours, or has an array of a dtype that NumPy does not know.
        OSError: it cannot be read.
    """
    with _opened(path) as file:
        if _METADATA in (file.metadata() or {}):
            raise ValueError(f"{path} was written by wn_jax.save; wn_jax.load reads it, nodes and all")
        names = file.keys()
        return {name: _array(path, file, name) for name in names}


def _array(path: Path, file: safetensors.safe_open, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (AttributeError, TypeError):  # what safetensors raises where NumPy has no such dtype
        dtype = file.get_slice(name).get_dtype()
        raise ValueError(f"{path}: {name!r} is {dtype}, which its reader for NumPy does not know; cast it") from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safetensors.safe_open]:
    """A file of the format, with its errors naming the file."""
    try:
        with path.open("rb"):  # safetensors reports a missing file without its name
            pass
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({error}); it was cut off or is something else"
        ) from None


def _check_content(content: Content) -> None:
    """Raises where names, axes, shapes and kinds do not belong together."""
    expected: set[str] = set()
    for name, keys in content.paths.items():
        if "/".join(keys) != name:
            raise ValueError(f"the keys of {name!r} are {keys}")
        if name not in content.numbers:
            expected |= set(of_node(name) if name in content.nodes else [name])
    if (wrong := expected ^ set(content.arrays)) or not {*content.nodes, *content.numbers} <= set(content.paths):
        raise ValueError(f"names do not fit the arrays: {sorted(wrong)[:5]}")
    for name, axes in content.nodes.items():
        g, v = (content.arrays[part] for part in of_node(name))
        if canonical_axes(axes, v.shape) != axes:
            raise ValueError(f"the node {name!r} has axes {axes} and a v of shape {v.shape}")
        if g.shape != tuple(1 if i - v.ndim in axes else size for i, size in enumerate(v.shape)):
            raise ValueError(f"the node {name!r} has a g of shape {g.shape}, a v of shape {v.shape} and axes {axes}")
    for name, impl in content.keys.items():  # raises where data of this shape are no keys of this kind
        jax.eval_shape(lambda data, impl=impl: jax.random.wrap_key_data(data, impl=impl), content.arrays[name])


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
