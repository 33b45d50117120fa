"""The natural gradient, by conjugate gradients.

The loop is one of Python, for the reason that `_lanczos` gives.

Sources: Amari 1998 (the natural gradient); Hestenes & Stiefel 1952 (conjugate gradients).
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from wn_jax._types import Params
from wn_jax.curvature._operators import LinearOperator
from wn_jax.curvature._trees import inner, like, normalized


class NaturalGradient(NamedTuple):
    """A solution of `(F + damping) x = gradient`, as good as it got.

    Attributes:
        value: x, a tree like the parameters.
        residual: `||gradient - (F + damping) x|| / ||gradient||`, of x itself and not of a recurrence.
        steps: the products with F that led to x.
        converged: whether the residual is below the tolerance.
    """

    value: Params
    residual: float
    steps: int
    converged: bool


def natural_gradient(
    operator: LinearOperator, gradient: Params, damping: float, tolerance: float = 1e-4, max_steps: int = 500
) -> NaturalGradient:
    """`(F + damping)^-1 gradient` by conjugate gradients. Where they do not converge, a warning says so.

    Its loop runs in Python, and so not under `jit`.

    Arguments:
        operator: F, a positive semidefinite matrix: `fisher`, `empirical_fisher` or `gauss_newton`.
        gradient: a tree like the parameters.
        damping: added to the diagonal, in the unit of the eigenvalues of F. With 0, a singular F has an answer only
            for a gradient in its range, and the least change in the others brings out its smallest eigenvalues.
        tolerance: of the residual, relative to the gradient. No less than some 1e-6 can be reached in float32, and less
            where F + damping is ill-conditioned.
        max_steps: the most products with F.

    Raises:
        ValueError: the damping is negative, or the gradient is not finite or no tree like the parameters.

    >>> from wn_jax.curvature import fisher
    >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> F = fisher(lambda params, x: x @ params, "normal")(jnp.zeros(2), x)  # diagonal: 1/2, 2
    >>> print(jnp.round(natural_gradient(F, jnp.array([1.0, 1.0]), damping=0.0).value, 4))
    [2.  0.5]
    """
    if not damping >= 0:
        raise ValueError(f"damping must be 0 or more; got {damping}")
    # For a gradient of length 1, as the squares of a very short or long one would leave the range of the dtype.
    unit, length = normalized(like(operator.params, gradient))
    if not jnp.isfinite(length):
        raise ValueError("the gradient is not finite; go back to parameters at which it is")
    if length == 0:
        return NaturalGradient(unit, 0.0, 0, True)

    value, steps, problem = _conjugate_gradients(operator, unit, damping, tolerance, max_steps)
    residual = float(optax.tree.norm(optax.tree.sub(unit, _damped(operator, value, damping))))
    if not residual <= 1:  # as good as it got is then what it began with
        value, residual = jax.tree.map(jnp.zeros_like, unit), 1.0
    converged = residual <= tolerance
    if not converged:
        warnings.warn(
            f"conjugate gradients did not converge: after {steps} steps {residual:.1e} of the gradient is left, and "
            f"not {tolerance:.1e} ({problem}). More damping makes it easier",
            stacklevel=2,
        )
    return NaturalGradient(optax.tree.scale(length, value), residual, steps, converged)


def _conjugate_gradients(
    operator: LinearOperator, unit: Params, damping: float, tolerance: float, max_steps: int
) -> tuple[Params, int, str]:
    """The best solution for a gradient of length 1, the number of products, and why it ended, if not well.

    In exact arithmetic the residual of the recurrence is that of the solution, and every step brings the solution
    nearer. With rounding, the two residuals part; so the caller computes the solution's own.
    """
    value = best = jax.tree.map(jnp.zeros_like, unit)
    residual = direction = unit
    square = least = 1.0  # the squared lengths of this residual and of the shortest so far
    for step in range(max_steps):
        if square**0.5 <= tolerance:
            return value, step, "the rounding of its recurrence"

        image = _damped(operator, direction, damping)
        curvature = float(inner(direction, image))
        if not curvature > 0:  # also where it is not a number
            return best, step + 1, f"the matrix is singular or not positive: p'(F + damping)p is {curvature:.1e}"

        value, residual, following = _advanced(value, residual, direction, image, square / curvature)
        direction = optax.tree.add_scale(residual, float(following) / square, direction)
        square = float(following)
        if not square < float("inf"):
            return best, step + 1, "the numbers overflow"
        # The residual of conjugate gradients goes up and down on its way, so the last may not be the best.
        if square < least:
            best, least = value, square
    return best, max_steps, "max_steps was reached"


def _damped(operator: LinearOperator, vector: Params, damping: float) -> Params:
    """`(F + damping) vector`."""
    return optax.tree.add_scale(operator(vector), damping, vector)


@jax.jit
def _advanced(
    value: Params, residual: Params, direction: Params, image: Params, rate: float
) -> tuple[Params, Params, jax.Array]:
    """The solution and its residual after a step along `direction`, and the residual's squared length."""
    residual = optax.tree.add_scale(residual, -rate, image)
    return optax.tree.add_scale(value, rate, direction), residual, inner(residual, residual)
