"""What of a parameter tree can be differentiated, apart from the rest of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wn_jax._tree import leaf_path


@dataclasses.dataclass(frozen=True)
class Rest:
    """The leaves of a tree that are no arrays, such as an Equinox model's functions, and where they stand."""

    leaves: tuple[Any, ...]
    treedef: Any


class _Array:
    """Stands for an array."""


def split(params: Any) -> tuple[Any, Rest]:
    """The arrays of a tree, with None in place of all else, and the rest.

    Raises:
        ValueError: an array holds no real numbers, or numbers of less than 32 bits, or there is none at all.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in pairs:
        if _is_array(leaf):
            _check(leaf_path(path), leaf)
    leaves = [leaf for _, leaf in pairs]
    arrays = [jnp.asarray(leaf) if _is_array(leaf) else None for leaf in leaves]
    if not any(array is not None for array in arrays):
        raise ValueError("params holds no array, so there is nothing to differentiate by")
    rest = Rest(tuple(_Array if _is_array(leaf) else leaf for leaf in leaves), treedef)
    try:
        hash(rest)
    except TypeError as error:
        raise ValueError(f"params holds a leaf that is no array and cannot be hashed ({error}); take it out") from None
    return jax.tree_util.tree_unflatten(treedef, arrays), rest


def combine(arrays: Any, rest: Rest) -> Any:
    """The whole tree again."""
    left = iter(jax.tree.leaves(arrays))
    return rest.treedef.unflatten(next(left) if leaf is _Array else leaf for leaf in rest.leaves)


def like(arrays: Any, vector: Any) -> Any:
    """A vector with None where `arrays` has it, and in the dtypes of these.

    Raises:
        ValueError: it is no tree like `arrays`.
    """
    leaves, treedef = jax.tree_util.tree_flatten(arrays, is_leaf=lambda x: x is None)
    try:
        own = treedef.flatten_up_to(vector)  # type: ignore[attr-defined]
    except (ValueError, TypeError) as error:
        raise ValueError(f"the vector is no tree like the parameters: {error}") from None
    shapes = [None if leaf is None else jnp.shape(entry) for leaf, entry in zip(leaves, own, strict=True)]
    for leaf, shape in zip(leaves, shapes, strict=True):
        if leaf is not None and leaf.shape != shape:
            raise ValueError(f"the vector is no tree like the parameters: an array has shape {shape}, not {leaf.shape}")
    kept = [None if leaf is None else jnp.asarray(x, leaf.dtype) for leaf, x in zip(leaves, own, strict=True)]
    return jax.tree_util.tree_unflatten(treedef, kept)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _check(path: str, leaf: Any) -> None:
    where = f"{path!r} has shape {leaf.shape} and dtype {leaf.dtype}"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"{where}, and there is no derivative by other than real numbers: pass it in the batch, close over it, or "
            "split it off (nnx.split(model, nnx.Param, ...), equinox.partition(model, equinox.is_inexact_array))"
        )
    if jnp.finfo(leaf.dtype).bits < 32:
        raise ValueError(
            f"{where}, in which second derivatives are noise; take them in float32 or float64 "
            "(jax.tree.map(lambda x: x.astype('float32'), params))"
        )
