"""Weights that are not multiplied out: `v` and `g / ||v||`, side by side, among the values of a running program.

This file owns what such a pair is, and how it becomes the weight. What the operations of a program do to it, `moves`
says, and `run` runs programs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from wn_jax._norms import norm_dtype


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("v", "scale"), meta_fields=("dtype", "rebuilt", "path")
)
@dataclasses.dataclass(frozen=True, eq=False)
class Factored:
    """The array `(v * scale).astype(dtype)`."""

    v: jax.Array
    """The directions, in the dtype that the node stores them in."""
    scale: jax.Array
    """`g / ||v||`, of the rank of `v`, and of size 1 wherever it does not vary."""
    dtype: np.dtype
    """The dtype to which the program converted the weight."""
    rebuilt: bool = False
    """Whether contractions get the weight all the same: it is here to be sliced by a loop first, and rebuilt in it."""
    path: str = ""
    """The weight's path in its tree, for a message; of weights that were concatenated, all of theirs."""

    def weight(self) -> jax.Array:
        """The array itself, rounded as it would have been on its way."""
        return self._rebuilt if self.rebuilt else self._product()

    def _product(self) -> jax.Array:
        stored = (self.v.astype(self.scale.dtype) * self.scale).astype(self.v.dtype)
        return stored.astype(self.dtype)  # a rounding of its own, as in the program

    @functools.cached_property
    def _rebuilt(self) -> jax.Array:
        """Once for all of a trip's uses, and made before these.

        XLA for TPU would fuse the product into the matmul that follows, and compute it again for each tile of that.
        """
        return jax.lax.optimization_barrier(self._product())

    def sliceable(self) -> Factored:
        """The same for a `scan`: with a scale for each slice along the leading dimension, even if all are the same."""
        scale = jnp.broadcast_to(self.scale, (self.v.shape[0], *self.scale.shape[1:]))
        return dataclasses.replace(self, scale=scale)

    def both(self, operation: Callable[[jax.Array], jax.Array]) -> Factored:
        """The same operation done to `v` and to the scale."""
        return dataclasses.replace(self, v=operation(self.v), scale=operation(self.scale))

    def varies(self) -> list[bool]:
        """Of each dimension: whether the scale varies along it."""
        return [size > 1 for size in self.scale.shape]


def can_hold_directions(stored: DTypeLike, *dtypes: DTypeLike) -> bool:
    """Whether a contraction may get `v`, stored in the first of these dtypes, in place of the weight.

    The others are those that the operand and the output have. A direction is of any length, and the scale is what
    brings it to the weight's: before that, its numbers need the scale's range in each of these dtypes. In float16 or
    float8 they would overflow or vanish, in float32 those of float64.
    """
    scale = norm_dtype(stored)
    return all(jnp.issubdtype(dtype, jnp.floating) and _has_range(dtype, scale) for dtype in (stored, *dtypes))


def _has_range(dtype: DTypeLike, other: DTypeLike) -> bool:
    """Whether a dtype has the range of another, on both sides of 0 (one of the 8-bit dtypes has no sign)."""
    limits, needed = jnp.finfo(dtype), jnp.finfo(other)
    return limits.minexp <= needed.minexp and limits.maxexp >= needed.maxexp and float(limits.min) < 0


Operand: TypeAlias = ArrayLike | Factored
"""A value of a running program: an array, a number that the program holds, or a weight that is not multiplied out."""


def weight(value: Operand) -> ArrayLike:
    """A value as an array (or a number), the weight of a `Factored`."""
    return value.weight() if isinstance(value, Factored) else value
