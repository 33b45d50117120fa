"""Parameter trees as vectors: which of their leaves can be differentiated, and arithmetic that does not overflow.

This file owns the way from a parameter tree to its arrays and back, and what counts as a vector beside them. Paths are
`wn_jax._tree`'s, and what is computed with vectors is for the other files here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wn_jax._tree import is_array, leaf_path
from wn_jax._types import Leaf, Params, TreeDef


class _Array:
    """Stands for an array."""


@dataclasses.dataclass(frozen=True)
class Rest:
    """A tree without its arrays. It can be hashed, and so be a static argument of a function under `jit`."""

    leaves: tuple[Any, ...]
    """The leaves that are no arrays, such as an Equinox model's functions; `_Array` where an array stood."""

    treedef: TreeDef
    """The structure of the whole tree."""


def partition(params: Params) -> tuple[Params, Rest]:
    """The arrays of a tree, with None in place of all else, and the rest.

    Raises:
        ValueError: an array holds no real numbers, or numbers of less than 32 bits, or there is none at all.
    """
    pairs, treedef = jax.tree.flatten_with_path(params)
    for path, leaf in pairs:
        if _holds_numbers(leaf):
            _check_differentiable(leaf_path(path), leaf)

    arrays = [jnp.asarray(leaf) if _holds_numbers(leaf) else None for _, leaf in pairs]
    if not any(array is not None for array in arrays):
        raise ValueError("params holds no array, so there is nothing to differentiate by")

    rest = Rest(tuple(_Array if _holds_numbers(leaf) else leaf for _, leaf in pairs), treedef)
    try:
        hash(rest)
    except TypeError as error:
        raise ValueError(f"params holds a leaf that is no array and cannot be hashed ({error}); take it out") from None
    return jax.tree.unflatten(treedef, arrays), rest


def combine(arrays: Params, rest: Rest) -> Params:
    """The whole tree again, of what `partition` made of it."""
    left = iter(jax.tree.leaves(arrays))
    return jax.tree.unflatten(rest.treedef, [next(left) if leaf is _Array else leaf for leaf in rest.leaves])


def like(arrays: Params, vector: Params) -> Params:
    """A vector with None where `arrays` has it, and in the dtypes of these.

    Raises:
        ValueError: it is no tree like `arrays`.
    """
    # None counts as a leaf: where the parameters hold a function, in an Equinox model, the vector may hold anything.
    expected, treedef = jax.tree.flatten(arrays, is_leaf=lambda x: x is None)
    try:
        entries = treedef.flatten_up_to(vector)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the vector is no tree like the parameters: {error}") from None
    return jax.tree.unflatten(treedef, [_entry(*both) for both in zip(expected, entries, strict=True)])


def inner(first: Params, second: Params) -> jax.Array:
    """The inner product of two vectors."""
    return jnp.asarray(optax.tree.vdot(first, second))


def normalized(vector: Params) -> tuple[Params, jax.Array]:
    """A vector at length 1, and its length; a vector of zeros stays as it is."""
    # First by the largest entry, in units of which no square leaves the range of the dtype.
    largest = jnp.stack([jnp.max(abs(leaf), initial=0) for leaf in jax.tree.leaves(vector)]).max()
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    vector = jax.tree.map(lambda leaf: leaf / unit.astype(leaf.dtype), vector)

    length = optax.tree.norm(vector)

    def of_length_1(leaf: jax.Array) -> jax.Array:
        return leaf / jnp.where(length > 0, length, 1).astype(leaf.dtype)

    return jax.tree.map(of_length_1, vector), length * unit


def _holds_numbers(leaf: Leaf) -> bool:
    """Whether a leaf is an array to differentiate by. The mere shape of one is not: it belongs to the rest."""
    return is_array(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct)


def _entry(expected: jax.Array | None, entry: Leaf) -> jax.Array | None:
    """The entry of a vector where `arrays` has `expected`, in its dtype."""
    if expected is None:
        return None
    if jnp.shape(entry) != expected.shape:
        raise ValueError(
            f"the vector is no tree like the parameters: an array has shape {jnp.shape(entry)}, not {expected.shape}"
        )
    return jnp.asarray(entry, expected.dtype)


def _check_differentiable(path: str, leaf: jax.Array | np.ndarray | np.generic) -> None:
    """Raises ValueError where a leaf holds no real numbers, or too short ones."""
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
