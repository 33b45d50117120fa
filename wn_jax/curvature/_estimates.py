"""Estimates of a matrix' trace and diagonal from products with random vectors.

Sources: Hutchinson 1989 (trace); Bekas, Kokiopoulou & Saad 2007 (diagonal).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wn_jax.curvature._operators import NOT_FINITE, LinearOperator


class Estimate(NamedTuple):
    """A mean over random vectors and its standard error (0 where it is exact, NaN where there was one vector)."""

    value: Any
    standard_error: Any


def trace(operator: LinearOperator, key: jax.Array, probes: int = 100) -> Estimate:
    """The trace of a matrix: the mean of `z'A z` over random vectors z of signs.

    Exact, from its diagonal, where there are as many probes as the matrix has rows.

    Raises:
        ValueError: `probes` is not positive, or a product is not finite.

    >>> from wn_jax.curvature import hessian
    >>> H = hessian(lambda x, scale: jnp.sum(scale * x**2) / 2)(jnp.ones(3), jnp.array([1.0, 2.0, 3.0]))
    >>> print(trace(H, jax.random.key(0)).value)
    6.0
    """
    _check(probes)
    if probes >= operator.size:
        return Estimate(optax.tree.sum(diagonal(operator, key, probes).value), jnp.zeros(()))
    samples = [optax.tree.vdot(z, operator(z)) for z in _signs(operator, key, probes)]
    return _checked(Estimate(jnp.mean(jnp.stack(samples)), _standard_error(jnp.stack(samples))))


def diagonal(operator: LinearOperator, key: jax.Array, probes: int = 100) -> Estimate:
    """The diagonal of a matrix, as a tree like the parameters: the mean of `z * A z` over random vectors z of signs.

    Exact where there are as many probes as the matrix has rows.

    Raises:
        ValueError: `probes` is not positive, or a product is not finite.

    >>> from wn_jax.curvature import hessian
    >>> H = hessian(lambda x, scale: jnp.sum(scale * x**2) / 2)(jnp.ones(3), jnp.array([1.0, 2.0, 3.0]))
    >>> print(diagonal(H, jax.random.key(0)).value)
    [1. 2. 3.]
    """
    _check(probes)
    if probes >= operator.size:
        value = operator.unravel(jnp.diagonal(operator.dense()))
        return _checked(Estimate(value, jax.tree.map(jnp.zeros_like, value)))
    # Sums, and not a stack, which would take the memory of all probes. Shifted by the first, as squares cancel.
    first, total, squares = None, None, None
    for z in _signs(operator, key, probes):
        sample = jax.tree.map(jnp.multiply, z, operator(z))
        first = sample if first is None else first
        change = optax.tree.sub(sample, first)
        total = change if total is None else optax.tree.add(total, change)
        square = jax.tree.map(jnp.square, change)
        squares = square if squares is None else optax.tree.add(squares, square)

    def error(total: jax.Array, squares: jax.Array) -> jax.Array:
        variance = jnp.maximum(squares - jnp.square(total) / probes, 0) / (probes - 1 or jnp.nan)
        return jnp.sqrt(variance / probes)

    value = jax.tree.map(lambda first, total: first + total / probes, first, total)
    return _checked(Estimate(value, jax.tree.map(error, total, squares)))


def _signs(operator: LinearOperator, key: jax.Array, probes: int) -> Any:
    for own in jax.random.split(key, probes):
        yield optax.tree.random_like(own, operator.params, jax.random.rademacher)


def _standard_error(samples: jax.Array) -> jax.Array:
    return jnp.std(samples, ddof=1) / jnp.sqrt(len(samples)) if len(samples) > 1 else jnp.full((), jnp.nan)


def _checked(estimate: Estimate) -> Estimate:
    for leaf in jax.tree.leaves(estimate.value):
        if not isinstance(leaf, jax.core.Tracer) and not jnp.isfinite(leaf).all():
            raise ValueError(NOT_FINITE)
    return estimate


def _check(probes: int) -> None:
    if probes < 1:
        raise ValueError(f"probes must be 1 or more; got {probes}")
