"""Estimates of a matrix' trace and diagonal from products with random vectors.

`trace` is the matrix' trace here, and no tracing of a program.

Sources: Hutchinson 1989 (trace); Bekas, Kokiopoulou & Saad 2007 (diagonal).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from wn_jax._types import Params
from wn_jax.curvature._operators import NOT_FINITE, LinearOperator
from wn_jax.curvature._trees import inner


class Estimate(NamedTuple):
    """A mean over random vectors, and how far it may be off.

    Attributes:
        value: the mean: a scalar for a trace, a tree like the parameters for a diagonal.
        standard_error: its standard error, of the same structure: 0 where the mean is exact, NaN where there was
            one vector.
    """

    value: Params
    standard_error: Params


def trace(operator: LinearOperator, key: jax.Array, probes: int = 100) -> Estimate:
    """The trace of a matrix: the mean of `z'A z` over random vectors z of signs.

    Exact, from its diagonal, where there are as many probes as the matrix has rows.

    Raises:
        ValueError: `probes` is not positive, or a product is not finite.

    >>> from wn_jax.curvature import hessian
    >>> H = hessian(lambda x, h: jnp.sum(h * x**2) / 2)(jnp.ones(3), jnp.array([1.0, 2.0, 3.0]))
    >>> print(trace(H, jax.random.key(0)).value)
    6.0
    """
    _check_probes(probes)
    if probes >= operator.size:
        return Estimate(optax.tree.sum(diagonal(operator, key, probes).value), jnp.zeros(()))
    samples = jnp.stack([inner(z, operator(z)) for z in _signs(operator, key, probes)])
    estimate = Estimate(jnp.mean(samples), _standard_error(samples))
    _check_finite(estimate)
    return estimate


def diagonal(operator: LinearOperator, key: jax.Array, probes: int = 100) -> Estimate:
    """The diagonal of a matrix, as a tree like the parameters: the mean of `z * A z` over random vectors z of signs.

    Exact where there are as many probes as the matrix has rows.

    Raises:
        ValueError: `probes` is not positive, or a product is not finite.

    >>> from wn_jax.curvature import hessian
    >>> H = hessian(lambda x, h: jnp.sum(h * x**2) / 2)(jnp.ones(3), jnp.array([1.0, 2.0, 3.0]))
    >>> print(diagonal(H, jax.random.key(0)).value)
    [1. 2. 3.]
    """
    _check_probes(probes)
    if probes >= operator.size:
        value = operator.unravel(jnp.diagonal(operator.dense()))
        estimate = Estimate(value, jax.tree.map(jnp.zeros_like, value))
    else:
        estimate = _estimated_diagonal(operator, key, probes)
    _check_finite(estimate)
    return estimate


def _estimated_diagonal(operator: LinearOperator, key: jax.Array, probes: int) -> Estimate:
    """The mean of `z * A z` over random vectors z, with its standard error."""
    # Sums, and not a stack, which would take the memory of all probes. Shifted by the first, as squares cancel.
    samples = (jax.tree.map(jnp.multiply, z, operator(z)) for z in _signs(operator, key, probes))
    first = next(samples)
    total = squares = jax.tree.map(jnp.zeros_like, first)
    for sample in samples:
        change = optax.tree.sub(sample, first)
        total = optax.tree.add(total, change)
        squares = optax.tree.add(squares, jax.tree.map(jnp.square, change))

    def mean(first: jax.Array, total: jax.Array) -> jax.Array:
        return first + total / probes

    def standard_error(total: jax.Array, squares: jax.Array) -> jax.Array:
        variance = jnp.maximum(squares - jnp.square(total) / probes, 0) / (probes - 1 or jnp.nan)
        return jnp.sqrt(variance / probes)

    return Estimate(jax.tree.map(mean, first, total), jax.tree.map(standard_error, total, squares))


def _signs(operator: LinearOperator, key: jax.Array, probes: int) -> Iterator[Params]:
    """Random vectors of 1 and -1: of independent entries, these give the trace of least variance (Hutchinson 1989)."""
    for own in jax.random.split(key, probes):
        yield optax.tree.random_like(own, operator.params, jax.random.rademacher)


def _standard_error(samples: jax.Array) -> jax.Array:
    return jnp.std(samples, ddof=1) / jnp.sqrt(len(samples)) if len(samples) > 1 else jnp.full((), jnp.nan)


def _check_finite(estimate: Estimate) -> None:
    """Raises ValueError where an estimate is not finite; under `jit` nobody can know."""
    for leaf in jax.tree.leaves(estimate.value):
        if not isinstance(leaf, jax.core.Tracer) and not jnp.isfinite(leaf).all():
            raise ValueError(NOT_FINITE)


def _check_probes(probes: int) -> None:
    if probes < 1:
        raise ValueError(f"probes must be 1 or more; got {probes}")
