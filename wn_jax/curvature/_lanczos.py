"""Eigenvalues, and their density, of a matrix of which only products are known: by the Lanczos process.

The loop is one of Python around compiled steps. A compiled one, as other libraries have it, would be no faster, as each
step is a product with the matrix, and on CPU many times slower, as XLA takes a slow path for convolutions in loops.

Sources: Golub & Meurant 2010, *Matrices, Moments and Quadrature*; Ubaru, Chen & Saad 2017 (the density).
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg

from wn_jax.curvature._operators import NOT_FINITE, LinearOperator
from wn_jax.curvature._vectors import normalized

_CHECK_EVERY = 10
_PRECISION = jax.lax.Precision.HIGHEST  # accelerators else round the factors, and the basis is orthogonal no more


@dataclasses.dataclass(frozen=True)
class Eigenvalues:
    """Eigenvalues of a symmetric matrix, or of its projection on a Krylov space, ascending.

    Attributes:
        values: NumPy array. Of a projection, the outermost are close to the matrix' own, those inside rarely.
        errors: for each value, a distance within which the matrix has an eigenvalue, rounding included. That it is the
            outermost is probable, and no more than that.
        exact: whether these are all eigenvalues, as often as they occur.
    """

    values: np.ndarray
    errors: np.ndarray
    exact: bool


@dataclasses.dataclass(frozen=True)
class SpectralDensity:
    """How eigenvalues are distributed: for each probe, points and their weights, which sum to 1.

    Attributes:
        values: (probes, points) NumPy array.
        weights: (probes, points) NumPy array.
        exact: whether these are the eigenvalues themselves. Standard errors are then 0; of a single probe, NaN.
    """

    values: np.ndarray
    weights: np.ndarray
    exact: bool = False

    def cumulative(self, at: Any) -> tuple[np.ndarray, np.ndarray]:
        """The fraction of eigenvalues below each of `at`, and its standard error over probes."""
        at = np.atleast_1d(at)[:, None, None]
        below = np.sum(np.where(self.values < at, self.weights, 0), axis=-1, dtype=float)
        return below.mean(axis=1), self._standard_error(below)

    def density(self, at: Any, width: float) -> tuple[np.ndarray, np.ndarray]:
        """The density at each of `at`, smoothed by a Gaussian of this standard deviation, and its standard error."""
        z = (np.atleast_1d(at)[:, None, None] - self.values) / width
        each = np.sum(self.weights * np.exp(-np.square(z) / 2), axis=-1) / (width * np.sqrt(2 * np.pi))
        return each.mean(axis=1), self._standard_error(each)

    def _standard_error(self, each: np.ndarray) -> np.ndarray:
        """Of means over probes."""
        if self.exact or each.shape[1] < 2:
            return np.full(len(each), 0.0 if self.exact else np.nan)
        return np.asarray(each.std(axis=1, ddof=1) / np.sqrt(each.shape[1]))


def eigenvalues(
    operator: LinearOperator, key: jax.Array, steps: int = 100, count: int | None = 1, tolerance: float = 1e-3
) -> Eigenvalues:
    """The outermost eigenvalues, by the Lanczos process with full reorthogonalization. Not under `jit`.

    It needs memory for `steps` vectors. Where there are as many steps as the matrix has rows, the whole matrix is made
    and diagonalized: exact, for matrices of up to a few thousand rows.

    Arguments:
        operator: the matrix.
        key: draws the first vector.
        steps: the most products.
        count: it ends before, where the errors of that many of the largest and of the smallest values are below
            `tolerance` times the largest magnitude; where they never are, a warning says so. None: always all steps.
            Of an eigenvalue that occurs several times, only one copy may be found.
        tolerance: relative. No less than 1e-6 can be reached in float32, and 2e-15 in float64.

    Raises:
        ValueError: `steps` or `count` is not positive, or a product is not finite.

    >>> from wn_jax.curvature import hessian
    >>> H = hessian(lambda x, scale: jnp.sum(scale * x**2) / 2)(jnp.ones(4), jnp.array([1.0, 2.0, 3.0, 9.0]))
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
        if step == steps or (count is not None and step % _CHECK_EVERY == 0 and step > 2 * count):
            values, vectors = process.diagonalized()
            errors = abs(process.beta * vectors[-1]) + _rounding(values)
            if count is not None and _converged(values, errors, count, tolerance):
                return Eigenvalues(values, errors, exact=False)
    if count is not None:
        worst = _outer(errors, count).max() / abs(values).max()
        warnings.warn(
            f"the {count} outermost eigenvalues at each end are known to {worst:.1e} of the largest magnitude after "
            f"{steps} steps, and not to {tolerance:.1e}; give it more steps",
            stacklevel=2,
        )
    return Eigenvalues(values, errors, exact=False)


def spectral_density(operator: LinearOperator, key: jax.Array, probes: int = 4, steps: int = 60) -> SpectralDensity:
    """The density of eigenvalues, by stochastic Lanczos quadrature.

    For each of the random probes z, the moments of the weighted points up to order `2 steps - 1` are those of the
    matrix seen from z: `sum(weights * values**k) = z'A^k z / z'z`. The mean over many probes is the density of all
    eigenvalues. Where there are as many steps as the matrix has rows, its eigenvalues themselves are returned.

    Raises:
        ValueError: `probes` or `steps` is not positive, or a product is not finite.

    >>> from wn_jax.curvature import hessian
    >>> H = hessian(lambda x, scale: jnp.sum(scale * x**2) / 2)(jnp.ones(4), jnp.array([1.0, 2.0, 3.0, 9.0]))
    >>> spectral_density(H, jax.random.key(0)).cumulative([2.5, 10.0])[0]
    array([0.5, 1. ])
    """
    if probes < 1 or steps < 1:
        raise ValueError(f"probes ({probes}) and steps ({steps}) must be 1 or more")
    if steps >= operator.size:
        values = _dense_eigenvalues(operator)[None]
        return SpectralDensity(values, np.full(values.shape, 1 / values.size), exact=True)
    points = []
    for own in jax.random.split(key, probes):
        process = _Lanczos(operator, own, steps)
        for _ in range(steps):
            process.step()
        values, vectors = process.diagonalized()
        points.append((values, np.square(vectors[0])))
    values, weights = (np.stack(parts) for parts in zip(*points, strict=True))
    return SpectralDensity(values, weights)


class _Lanczos:
    """The process: after k steps, `operator` is tridiagonal on the first k vectors of an orthonormal basis."""

    def __init__(self, operator: LinearOperator, key: jax.Array, steps: int) -> None:
        self.operator = operator
        self._keys = iter(jax.random.split(key, steps + 1))
        self._basis = jax.tree.map(lambda leaf: jnp.zeros((steps, *leaf.shape), leaf.dtype), operator.params)
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self._vector = self._fresh()

    @property
    def beta(self) -> float:
        """The length of what the last product has outside of the basis."""
        return self._betas[-1]

    def step(self) -> None:
        """One product, and the next vector of the basis."""
        image = self.operator(self._vector)
        self._basis = _with_row(self._basis, len(self._alphas), self._vector)
        alpha = float(optax.tree.vdot(self._vector, image))
        following, beta = _outside(self._basis, image)
        if not np.isfinite(alpha + float(beta)):
            raise ValueError(NOT_FINITE)
        self._alphas.append(alpha)
        # Where nothing but rounding is left outside, the basis spans an invariant space, and a fresh vector goes on
        # with the rest.
        limits = jnp.finfo(jax.tree.leaves(image)[0].dtype)
        scale = max(abs(alpha), float(beta), *(abs(other) for other in self._alphas), *self._betas)
        spanned = float(beta) <= limits.eps * scale or scale < limits.tiny
        self._betas.append(0.0 if spanned else float(beta))
        if len(self._alphas) < self.operator.size:
            self._vector = self._fresh() if spanned else following

    def diagonalized(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues and eigenvectors of the tridiagonal matrix."""
        values, vectors = scipy.linalg.eigh_tridiagonal(np.array(self._alphas), np.array(self._betas[:-1]))
        dtype = jax.tree.leaves(self._vector)[0].dtype
        return values.astype(dtype), vectors

    def _fresh(self) -> Any:
        """A random unit vector that is orthogonal to the basis."""
        normal = optax.tree.random_like(next(self._keys), self.operator.params, jax.random.normal)
        return _outside(self._basis, normal)[0]


@functools.partial(jax.jit, donate_argnums=0)
def _with_row(basis: Any, row: int, vector: Any) -> Any:
    return jax.tree.map(lambda rows, own: rows.at[row].set(own), basis, vector)


@jax.jit
def _outside(basis: Any, vector: Any) -> tuple[Any, jax.Array]:
    """The part of a vector that is orthogonal to the basis, at length 1, and its length. Rows may be zero."""
    return normalized(_without(basis, _without(basis, vector)))  # twice is enough (Giraud et al. 2005)


def _without(basis: Any, vector: Any) -> Any:
    """A vector less its projection on the basis, as far as rounding lets it."""
    inner = jax.tree.map(lambda rows, own: jnp.tensordot(rows, own, own.ndim, precision=_PRECISION), basis, vector)
    coefficients = sum(jax.tree.leaves(inner))
    return jax.tree.map(
        lambda rows, own: own - jnp.tensordot(coefficients, rows, 1, precision=_PRECISION).astype(own.dtype),
        basis,
        vector,
    )


def _rounding(values: np.ndarray) -> float:
    """How far rounding alone may have moved eigenvalues."""
    return float(8 * np.finfo(values.dtype).eps * abs(values).max())


def _dense_eigenvalues(operator: LinearOperator) -> np.ndarray:
    dense = np.asarray(operator.dense())
    if not np.isfinite(dense).all():
        raise ValueError(NOT_FINITE)
    return np.linalg.eigvalsh((dense + dense.T) / 2)


def _converged(values: np.ndarray, errors: np.ndarray, count: int, tolerance: float) -> bool:
    return bool((_outer(errors, count) <= tolerance * abs(values).max()).all())


def _outer(errors: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([errors[:count], errors[-count:]])
