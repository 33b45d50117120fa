"""Arithmetic on trees as vectors that neither overflows nor vanishes in squares."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def normalized(vector: Any) -> tuple[Any, jax.Array]:
    """A vector at length 1, and its length; a vector of zeros stays as it is."""
    leaves = jax.tree.leaves(vector)
    largest = jnp.stack([jnp.max(abs(own), initial=0) for own in leaves]).max()
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)  # in which squares are numbers of ordinary size
    vector = jax.tree.map(lambda own: own / unit.astype(own.dtype), vector)
    length = optax.tree.norm(vector)
    return jax.tree.map(lambda own: own / jnp.where(length > 0, length, 1).astype(own.dtype), vector), length * unit
