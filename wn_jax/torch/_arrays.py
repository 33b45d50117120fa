"""The values of a state dict as NumPy arrays: tensors, arrays, or a `.safetensors` file. PyTorch is never imported.

This file owns numbers and their dtypes. Which arrays belong together is `_pairs`'s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from wn_jax._node import WeightNorm
from wn_jax._tree import check_has_numbers
from wn_jax._types import Leaf
from wn_jax.torch._files import read_checkpoint

ArrayOrNode: TypeAlias = np.ndarray | WeightNorm
"""A leaf of a tree in PyTorch's layout: an array, or a weight in two halves that are such arrays."""

_NO_STATE_DICT = (
    "pass a state dict (model.state_dict()), or the path of a .safetensors file. A .pt or .bin file is a pickle, which "
    "can run code: load it with torch.load(path, weights_only=True) and pass the dict of tensors that is in it"
)


def arrays_of(state: Mapping[str, Leaf] | str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a state dict by name. They share memory with tensors on the CPU, and with arrays.

    Raises:
        ValueError: there are none; a value is no array; the file is cut off, or something else.
        TypeError: it is neither a mapping of names nor a path.
        OSError: the file cannot be read.
    """
    if isinstance(state, str | os.PathLike):
        arrays = read_checkpoint(Path(state))
    elif isinstance(state, Mapping):
        arrays = {_name(name): _array(name, value) for name, value in state.items()}
    else:
        raise TypeError(f"got a {type(state).__name__}; {_NO_STATE_DICT}")
    if not arrays:
        raise ValueError("the state dict is empty")
    return arrays


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"the keys of a state dict are strings; got {name!r}")
    return name


def _array(name: str, value: Leaf) -> np.ndarray:
    if isinstance(value, Mapping):
        raise ValueError(
            f"{name!r} is a {type(value).__name__}, not an array. If this is a checkpoint with a state dict in it, "
            f"pass that: checkpoint[{name!r}]"
        )
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        check_has_numbers(name, value)
        array = np.asarray(value)
    elif callable(getattr(value, "numpy", None)):
        array = _of_tensor(name, value)
    else:
        raise ValueError(f"{name!r} is no array or tensor, but of type {type(value).__name__}; leave it out")
    if not (jnp.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise ValueError(f"{name!r} is an array of {array.dtype}, not of numbers; leave it out")
    return native(array)


def native(array: np.ndarray) -> np.ndarray:
    """The array in this machine's byte order, as JAX and PyTorch take no other; itself where it is in that."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _of_tensor(name: str, tensor: Leaf) -> np.ndarray:
    """The numbers of a torch tensor, wherever it is."""
    try:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype == "bfloat16" or dtype.startswith("float8"):  # NumPy has none of its own; float32 holds each exactly
            return tensor.float().numpy().astype(jnp.dtype(dtype))
        return tensor.numpy()
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # sparse, lazy, on `meta`, of 4 bits ...
        raise ValueError(f"{name!r} does not become a NumPy array ({type(error).__name__}: {error})") from error


def cast(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy of an array in another dtype of its kind.

    Rounding is allowed, and losing a number is not.

    Raises:
        ValueError: the dtype is of another kind (an integer for a floating-point array), or cannot hold the numbers.
    """
    if value.dtype == dtype:
        return value.astype(dtype, order="C")
    kinds = [kind for kind in (jnp.floating, jnp.integer) if all(jnp.issubdtype(x, kind) for x in (value.dtype, dtype))]
    if not kinds:
        raise ValueError(f"is {value.dtype}, and cannot become {dtype}; cast it yourself")
    with np.errstate(over="ignore"):  # what overflows is looked for below
        array = value.astype(dtype, order="C")
    lost = np.isfinite(value) & ~np.isfinite(array) if jnp.floating in kinds else array != value
    if lost.any():
        raise ValueError(f"has numbers that {np.dtype(dtype)} cannot hold, such as {value[lost][0]}")
    return array
