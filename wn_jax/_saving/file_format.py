"""The file format: named arrays in a `.safetensors` file, and in its metadata the facts about them.

This file owns which bytes stand for which array, and that reading them takes the memory of one array at a time. Which
arrays a tree has is `trees`'s; what the metadata may say is `facts`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from wn_jax._saving.facts import Facts, as_text, of_text
from wn_jax._saving.files import check_regular, put_in_place
from wn_jax._saving.kinds import described

_METADATA = "wn_jax"
# What safetensors both writes and reads as NumPy arrays, by its own names.
_DTYPES = {
    **{"BOOL": "bool", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"},
    **{"U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64"},
    **{"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64"},
}


class File:
    """An open file that `write` wrote, whose arrays are read one by one."""

    def __init__(self, path: Path, file: safetensors.safe_open) -> None:
        metadata = (file.metadata() or {}).get(_METADATA)
        if metadata is None:
            raise ValueError(
                f"{path}: a safetensors file, but not one that wn_jax.save wrote: nothing in it says which arrays are "
                "g and v. Read it with safetensors.numpy.load_file"
            )
        self._file = file
        self.shapes = {name: _shape(path, file, name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        """The shapes and dtypes of the arrays, by their names."""
        try:
            self.facts: Facts = of_text(metadata, self.shapes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def read(self, name: str) -> np.ndarray:
        """The array of this name."""
        return self._file.get_tensor(name)


def write(path: Path, facts: Facts, arrays: Mapping[str, np.ndarray]) -> None:
    """Put a file in place once it is complete. It has the mode of the file it replaces, or that of any new file.

    Raises:
        ValueError: an array is of a dtype that the format, or its reader for NumPy, does not know.
        OSError: the file cannot be written, or what is there is no regular file.
    """
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES.values():
            known = ", ".join(_DTYPES.values())
            raise ValueError(f"{name!r} is {array.dtype}; a file can hold {known}. Cast it, or use Orbax")
    if "__metadata__" in arrays:
        raise ValueError("'__metadata__' is a word of the format; rename that leaf")
    metadata = {_METADATA: as_text(facts)}
    with put_in_place(path) as temporary:
        try:
            safetensors.numpy.save_file(dict(arrays), temporary, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[File]:
    """A file that `write` wrote.

    Raises:
        ValueError: the file is cut off, or not one of ours.
        OSError: it cannot be read, or is no regular file.
    """
    with _opened(path) as file:
        yield File(path, file)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that another program wrote.

    Raises:
        ValueError: the file is cut off, is one of ours, or has an array of a dtype that NumPy does not know.
        OSError: it cannot be read, or is no regular file.
    """
    with _opened(path) as file:
        if _METADATA in (file.metadata() or {}):
            raise ValueError(f"{path} was written by wn_jax.save; wn_jax.load reads it, nodes and all")
        names = file.keys()
        return {name: _array(path, file, name) for name in names}


def _shape(path: Path, file: safetensors.safe_open, name: str) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array, without its numbers."""
    found = file.get_slice(name)
    if (dtype := found.get_dtype()) not in _DTYPES:
        raise _unknown(path, name, dtype)
    return jax.ShapeDtypeStruct(found.get_shape(), jnp.dtype(_DTYPES[dtype]))


def _array(path: Path, file: safetensors.safe_open, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (AttributeError, TypeError):  # what safetensors raises where NumPy has no such dtype
        raise _unknown(path, name, file.get_slice(name).get_dtype()) from None


def _unknown(path: Path, name: str, dtype: str) -> ValueError:
    return ValueError(f"{path}: {name!r} is {dtype}, which its reader for NumPy does not know; cast it")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safetensors.safe_open]:
    """A file of the format, with its errors naming the file."""
    check_regular(path)
    try:
        with path.open("rb"):  # safetensors reports a missing file without its name
            pass
        # Not mapped into memory: what was read of a mapped file stays there beside the array that was made of it.
        with safetensors.safe_open(path, framework="numpy", backend="pread") as file:
            yield file
    except safetensors.SafetensorError as error:
        kind = described(path) or "it was cut off or is something else"
        raise ValueError(f"{path}: not a complete safetensors file ({error}); {kind}") from None
