"""Eigenvalues, and their density, of a matrix of which only products are known: by the Lanczos process.

The loop is one of Python around compiled steps. A compiled one, as other libraries have it, would be no faster, as each
step is a product with the matrix, and on CPU many times slower, as XLA takes a slow path for convolutions in loops.

Sources: Golub & Meurant 2010, *Matrices, Moments and Quadrature*; Ubaru, Chen & Saad 2017 (the density).
"""

from __future__ import annotations

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from numpy.typing import ArrayLike

from wn_jax._types import Params
from wn_jax.curvature._operators import NOT_FINITE, LinearOperator
from wn_jax.curvature._trees import inner, normalized

_CHECK_EVERY = 10  # steps, as to diagonalize the tridiagonal matrix takes time, too
_PRECISION = jax.lax.Precision.HIGHEST  # accelerators else round the factors, and the basis is orthogonal no more


@dataclasses.dataclass(frozen=True)
class Eigenvalues:
    """Eigenvalues of a symmetric matrix, or of its projection on a Krylov space, ascending.

    Attributes:
        values: the eigenvalues. Of a projection, the outermost are close to the matrix' own, those inside rarely.
        errors: for each value, a distance within which the matrix has an eigenvalue, rounding included. That it is
            the outermost is probable, and no more than that.
        exact: whether these are all eigenvalues, as often as they occur.
    """

    values: np.ndarray
    errors: np.ndarray
    exact: bool


@dataclasses.dataclass(frozen=True)
class SpectralDensity:
    """How eigenvalues are distributed: for each probe, points and their weights, which sum to 1.

    Attributes:
        values: the points, (probes, points).
        weights: the weight of each point, (probes, points).
        exact: whether these are the eigenvalues themselves. Standard errors are then 0; of a single probe, NaN.
    """

    values: np.ndarray
    weights: np.ndarray
    exact: bool = False

    def cumulative(self, at: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """The fraction of eigenvalues below each of `at`, and its standard error over probes."""
        limits = np.atleast_1d(at)[:, None, None]
        below = np.sum(np.where(self.values < limits, self.weights, 0), axis=-1, dtype=float)
        return below.mean(axis=1), self._standard_error(below)

    def density(self, at: ArrayLike, width: float) -> tuple[np.ndarray, np.ndarray]:
        """The density at each of `at`, smoothed by a Gaussian of this standard deviation, and its standard error."""
        z = (np.atleast_1d(at)[:, None, None] - self.values) / width
        bells = np.exp(-np.square(z) / 2)
        each = np.sum(self.weights * bells, axis=-1) / (width * np.sqrt(2 * np.pi))
        return each.mean(axis=1), self._standard_error(each)

    def _standard_error(self, each: np.ndarray) -> np.ndarray:
        """The standard error of means over probes, from (points, probes)."""
        if self.exact or each.shape[1] < 2:
            return np.full(len(each), 0.0 if self.exact else np.nan)
        return np.asarray(each.std(axis=1, ddof=1) / np.sqrt(each.shape[1]))


def eigenvalues(
    operator: LinearOperator, key: jax.Array, steps: int = 100, count: int | None = 1, tolerance: float = 1e-3
) -> Eigenvalues:
    """The outermost eigenvalues, by the Lanczos process with full reorthogonalization. Not under `jit`.

    It needs memory for `steps` vectors. Where there are as many steps as the matrix has rows, the whole matrix is made
    and diagonalized: exact, for matrices of up to a few thousand rows.

    The process ends early where the errors of the `count` largest and `count` smallest values are below `tolerance`
    times the largest magnitude. Where they never are, a warning says so. Of an eigenvalue that occurs several times,
    only one copy may be found.

    Arguments:
        operator: the matrix.
        key: draws the first vector.
        steps: the most products.
        count: how many of the largest and of the smallest values are wanted; None: all steps are always taken.
        tolerance: relative. No less than 1e-6 can be reached in float32, and 2e-15 in float64.

    Raises:
        ValueError: `steps` or `count` is not positive, or a product is not finite.

    >>> from wn_jax.curvature import hessian
    >>> H = hessian(lambda x, h: jnp.sum(h * x**2) / 2)(jnp.ones(4), jnp.array([1.0, 2.0, 3.0, 9.0]))
    >>> eigenvalues(H, jax.random.key(0)).values
    array([1., 2., 3., 9.], dtype=float32)
    """
    if steps < 1 or (count is not None and count < 1):
        raise ValueError(f"steps ({steps}) and count ({count}) must be 1 or more")
    if steps >= operator.size:
        values = _dense_eigenvalues(operator)
        return Eigenvalues(values, np.zeros_like(values) + _rounding(values), exact=True)

    process = _Lanczos(operator, key, steps)
    for step in range(1, steps + 1):
        process.step()
        # With more than twice as many values, the largest and the smallest ones are not the same.
        if count is not None and step % _CHECK_EVERY == 0 and 2 * count < step < steps:
            found = process.eigenvalues()
            if _converged(found, count, tolerance):
                return found

    found = process.eigenvalues()
    if count is not None and not _converged(found, count, tolerance):
        worst = _outer(found.errors, count).max() / abs(found.values).max()
        warnings.warn(
            f"the {count} outermost eigenvalues at each end are known to {worst:.1e} of the largest magnitude after "
            f"{steps} steps, and not to {tolerance:.1e}; give it more steps",
            stacklevel=2,
        )
    return found


def spectral_density(operator: LinearOperator, key: jax.Array, probes: int = 4, steps: int = 60) -> SpectralDensity:
    """The density of eigenvalues, by stochastic Lanczos quadrature.

    For each of the random probes z, the moments of the weighted points up to order `2 steps - 1` are those of the
    matrix seen from z: `sum(weights * values**k) = z'A^k z / z'z`. The mean over many probes is the density of all
    eigenvalues. Where there are as many steps as the matrix has rows, its eigenvalues themselves are returned.

    Raises:
        ValueError: `probes` or `steps` is not positive, or a product is not finite.

    >>> from wn_jax.curvature import hessian
    >>> H = hessian(lambda x, h: jnp.sum(h * x**2) / 2)(jnp.ones(4), jnp.array([1.0, 2.0, 3.0, 9.0]))
    >>> spectral_density(H, jax.random.key(0)).cumulative([2.5, 10.0])[0]
    array([0.5, 1. ])
    """
    if probes < 1 or steps < 1:
        raise ValueError(f"probes ({probes}) and steps ({steps}) must be 1 or more")
    if steps >= operator.size:
        values = _dense_eigenvalues(operator)[None]
        return SpectralDensity(values, np.full(values.shape, 1 / values.size), exact=True)

    points = [_weighted_points(operator, own, steps) for own in jax.random.split(key, probes)]
    values, weights = (np.stack(parts) for parts in zip(*points, strict=True))
    return SpectralDensity(values, weights)


def _weighted_points(operator: LinearOperator, key: jax.Array, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The points and weights of the Gauss quadrature for a random probe (Golub & Meurant 2010)."""
    process = _Lanczos(operator, key, steps)
    for _ in range(steps):
        process.step()
    values, vectors = process.diagonalized()
    return values, np.square(vectors[0])


class _Lanczos:
    """The process: after k steps, `operator` is tridiagonal on the first k vectors of an orthonormal basis."""

    def __init__(self, operator: LinearOperator, key: jax.Array, steps: int) -> None:
        self.operator = operator
        self._keys = iter(jax.random.split(key, steps + 1))  # a fresh vector may be needed after every step
        # Rows that are not there yet are zero, so that a projection on the basis is compiled once, for all of them.
        self._basis = jax.tree.map(lambda leaf: jnp.zeros((steps, *leaf.shape), leaf.dtype), operator.params)
        self._alphas: list[float] = []  # the diagonal of the tridiagonal matrix
        self._betas: list[float] = []  # beside it; the last is the length of what lies outside of the basis
        self._vector = self._fresh()

    def step(self) -> None:
        """One product, and the next vector of the basis."""
        image = self.operator(self._vector)
        self._basis = _with_row(self._basis, len(self._alphas), self._vector)
        alpha = float(inner(self._vector, image))
        following, length = _outside(self._basis, image)
        beta = float(length)
        if not np.isfinite(alpha + beta):
            raise ValueError(NOT_FINITE)

        self._alphas.append(alpha)
        spanned = self._is_rounding(beta)
        self._betas.append(0.0 if spanned else beta)
        if len(self._alphas) < self.operator.size:
            # Where nothing is left outside, the basis spans an invariant space; a fresh vector goes on with the rest.
            self._vector = self._fresh() if spanned else following

    def eigenvalues(self) -> Eigenvalues:
        """Those of the tridiagonal matrix, with their distances from the operator's."""
        values, vectors = self.diagonalized()
        # For an eigenvector y of the tridiagonal matrix, the residual of the operator is beta times y's last entry.
        errors = abs(self._betas[-1] * vectors[-1]) + _rounding(values)
        return Eigenvalues(values, errors, exact=False)

    def diagonalized(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues and eigenvectors of the tridiagonal matrix."""
        values, vectors = scipy.linalg.eigh_tridiagonal(np.array(self._alphas), np.array(self._betas[:-1]))
        return values.astype(self._dtype), vectors

    @property
    def _dtype(self) -> np.dtype:
        return jax.tree.leaves(self._vector)[0].dtype

    def _is_rounding(self, beta: float) -> bool:
        """Whether what a product has outside of the basis is no more than rounding."""
        limits = jnp.finfo(self._dtype)
        largest = max(beta, *(abs(entry) for entry in self._alphas), *self._betas)
        return bool(beta <= limits.eps * largest or largest < limits.tiny)

    def _fresh(self) -> Params:
        """A random unit vector that is orthogonal to the basis."""
        normal = optax.tree.random_like(next(self._keys), self.operator.params, jax.random.normal)
        return _outside(self._basis, normal)[0]


@functools.partial(jax.jit, donate_argnums=0)  # in place: the basis is by far the largest array
def _with_row(basis: Params, row: int, vector: Params) -> Params:
    return jax.tree.map(lambda rows, own: rows.at[row].set(own), basis, vector)


@jax.jit
def _outside(basis: Params, vector: Params) -> tuple[Params, jax.Array]:
    """The part of a vector that is orthogonal to the basis, at length 1, and its length. Rows may be zero."""
    return normalized(_without(basis, _without(basis, vector)))  # twice is enough (Giraud et al. 2005)


def _without(basis: Params, vector: Params) -> Params:
    """A vector less its projection on the basis, as far as rounding lets it."""

    def products(rows: jax.Array, own: jax.Array) -> jax.Array:
        return jnp.tensordot(rows, own, own.ndim, precision=_PRECISION)

    coefficients = sum(jax.tree.leaves(jax.tree.map(products, basis, vector)))

    def less(rows: jax.Array, own: jax.Array) -> jax.Array:
        return own - jnp.tensordot(coefficients, rows, 1, precision=_PRECISION).astype(own.dtype)

    return jax.tree.map(less, basis, vector)


def _rounding(values: np.ndarray) -> float:
    """How far rounding alone may have moved eigenvalues."""
    return float(8 * np.finfo(values.dtype).eps * abs(values).max())


def _dense_eigenvalues(operator: LinearOperator) -> np.ndarray:
    """All eigenvalues, by making the whole matrix."""
    dense = np.asarray(operator.dense())
    if not np.isfinite(dense).all():
        raise ValueError(NOT_FINITE)
    return np.linalg.eigvalsh((dense + dense.T) / 2)  # symmetric but for rounding


def _converged(found: Eigenvalues, count: int, tolerance: float) -> bool:
    return bool((_outer(found.errors, count) <= tolerance * abs(found.values).max()).all())


def _outer(errors: np.ndarray, count: int) -> np.ndarray:
    """The errors of the `count` smallest and the `count` largest eigenvalues."""
    return np.concatenate([errors[:count], errors[-count:]])
