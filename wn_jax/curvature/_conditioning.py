"""Condition numbers, each by its definition: there is no one of them for a matrix that is singular or indefinite.

This file owns the numbers that eigenvalues give; finding eigenvalues is for `_lanczos`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from wn_jax.curvature._lanczos import Eigenvalues


class ConditionNumbers(NamedTuple):
    """Condition numbers of a symmetric matrix with eigenvalues `lambda`, in magnitudes `|lambda|`.

    Magnitudes of no more than `cutoff * max|lambda|` cannot be told from 0, and count as 0.

    Attributes:
        damped: `(max|lambda| + d) / (min|lambda| + d)`: the condition number of a positive semidefinite matrix to
            which d times the identity was added; infinite for a singular one with `d = 0`.
        numerical_range: `max|lambda| / min|lambda|` over those that are not 0.
        to: By k, `lambda_1 / lambda_k`, the largest over the k-th largest; infinite where that is not positive.
        to_mean: `max|lambda|` over the mean of all `|lambda|`: how much slower than the fastest direction the mean
            one is.
    """

    damped: float
    numerical_range: float
    to: dict[int, float]
    to_mean: float


def condition_numbers(
    eigenvalues: Eigenvalues | ArrayLike,
    damping: float = 0.0,
    ks: Iterable[int] = (10,),
    cutoff: float | None = None,
) -> ConditionNumbers:
    """Condition numbers from eigenvalues.

    Where the eigenvalues are not all of the matrix, only `to` (for small k) and the largest magnitude are the matrix'
    own: `damped` and `numerical_range` are then lower bounds, and `to_mean` means nothing and is NaN.

    Arguments:
        eigenvalues: those of `wn_jax.curvature.eigenvalues`, or an array of them.
        damping: d, absolute, in the unit of the eigenvalues.
        ks: for which k `to` is wanted; those beyond the number of eigenvalues are left out.
        cutoff: relative; default: the number of eigenvalues times the rounding unit of their dtype.

    Raises:
        ValueError: no eigenvalues, some are not finite, or the damping is negative.

    >>> condition_numbers([1.0, 2.0, 4.0], damping=1.0, ks=(2,))
    ConditionNumbers(damped=2.5, numerical_range=4.0, to={2: 2.0}, to_mean=1.7142857142857142)
    """
    if isinstance(eigenvalues, Eigenvalues):
        values, exact = np.asarray(eigenvalues.values), eigenvalues.exact
    else:
        values, exact = np.asarray(eigenvalues), True
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"condition numbers need finite eigenvalues, at least one; got {values}")
    if not damping >= 0:
        raise ValueError(f"damping must be 0 or more; got {damping}")

    if cutoff is None:
        cutoff = values.size * _rounding_unit(values)
    values = np.sort(values.astype(np.float64))[::-1]
    largest = abs(values).max()
    values = np.where(abs(values) > cutoff * largest, values, 0)
    sizes = abs(values)
    nonzero = sizes[sizes > 0]
    return ConditionNumbers(
        damped=_ratio(largest + damping, sizes.min() + damping),
        numerical_range=_ratio(largest, nonzero.min()) if nonzero.size else float("nan"),
        to={k: _ratio(values[0], values[k - 1]) for k in ks if 1 <= k <= values.size},
        to_mean=_ratio(largest, sizes.mean()) if exact else float("nan"),
    )


def _rounding_unit(values: np.ndarray) -> float:
    """The rounding unit of the dtype that the eigenvalues came in; of whole numbers, that of Python's floats."""
    real = np.issubdtype(values.dtype, np.floating)
    return np.finfo(values.dtype if real else float).eps


def _ratio(above: float, below: float) -> float:
    return float(above / below) if below > 0 else float("inf")
