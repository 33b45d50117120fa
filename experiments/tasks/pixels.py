"""Distributions of pixels, given the number that a decoder computes for each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Check = Callable[[np.ndarray, np.ndarray], str | None]
"""`(pixels to train on, held-out pixels) -> the problem with them`, or None where there is none."""


@dataclasses.dataclass(frozen=True)
class Pixels:
    """One distribution."""

    log_prob: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    """`(output, log_scale, pixels) -> the logarithms of probabilities, or of densities`.

    All have one shape, but `log_scale` may have one number for all.
    """

    mean: Callable[[jax.Array], jax.Array]
    """`output -> pixels`."""

    problem: Check
    """The function that says why pixels are not of this distribution."""

    log_scale: float | None = None
    """The first value of the logarithm of the scale; None where there is no scale."""

    limits: tuple[float, float] | None = None
    """The least and the largest value of a pixel; None where a pixel can be any number."""


_HALF_STEP = 0.5 / 128  # CIFAR-10's pixels are (byte - 127.5) / 128
_LOWEST, _HIGHEST = -127.5 / 128, 127.5 / 128
_BETWEEN = 0.5 / 255  # a number farther from each level, in steps between levels, is none of them


def bernoulli(logits: jax.Array, _: jax.Array, pixels: jax.Array) -> jax.Array:
    """The logarithms of probabilities of pixels that are 0 or 1."""
    return pixels * jax.nn.log_sigmoid(logits) + (1 - pixels) * jax.nn.log_sigmoid(-logits)


def discretized_logistic(mean: jax.Array, log_scale: jax.Array, pixels: jax.Array) -> jax.Array:
    """The logarithms of probabilities of bytes, which are written as `(byte - 127.5) / 128`.

    A byte's probability is that of an interval around its level in a logistic distribution. The lowest level has all
    below it, too, and the highest all above, so that the 256 probabilities sum to 1. With the ends `a < b` of the
    interval in units of the scale, `sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b))`, whose logarithm
    loses nothing where both are close to 0 or to 1.

    Source: Kingma et al. 2016, arXiv 1606.04934, section 5.2, with the open ends of Salimans et al. 2017, arXiv
    1701.05517.
    """
    above = (pixels + _HALF_STEP - mean) * jnp.exp(-log_scale)
    below = (pixels - _HALF_STEP - mean) * jnp.exp(-log_scale)
    inside = jnp.log(-jnp.expm1(-2 * _HALF_STEP * jnp.exp(-log_scale)))
    left = jnp.where(pixels < _LOWEST + _HALF_STEP, -inside, jax.nn.log_sigmoid(-below))
    right = jnp.where(pixels > _HIGHEST - _HALF_STEP, -inside, jax.nn.log_sigmoid(above))
    return left + right + inside


def normal(mean: jax.Array, log_scale: jax.Array, pixels: jax.Array) -> jax.Array:
    """The logarithms of densities of real numbers."""
    deviation = (pixels - mean) * jnp.exp(-log_scale)
    return -0.5 * jnp.square(deviation) - log_scale - 0.5 * math.log(2 * math.pi)


def _not_binary(train: np.ndarray, held_out: np.ndarray) -> str | None:
    if problem := _outside(train, 0, 1):
        return (
            f"{problem}; a grey value is the probability of white: choose likelihood = 'normal', or of bytes 'logistic'"
        )
    if not np.isin(held_out, (0, 1)).all():
        return "pixels are grey, and bernoulli has 0 and 1: set data.binarize = 'fixed' or 'dynamic'"
    return None


def _no_bytes(train: np.ndarray, held_out: np.ndarray) -> str | None:
    for pixels in (train, held_out):
        few = 128 * pixels[:100].astype(np.float64) + 127.5  # a data set is scaled as a whole
        problem = _outside(pixels, _LOWEST, _HIGHEST)
        if problem or (abs(few - few.round()) > _BETWEEN).any():
            return (
                f"{problem or 'pixels are not bytes'}, and bytes are written as (byte - 127.5) / 128: choose data.name "
                "= 'cifar10' without data.whiten, or likelihood = 'normal', or of binary images 'bernoulli'"
            )
    return None


def _anything(_train: np.ndarray, _held_out: np.ndarray) -> str | None:
    return None


def _outside(pixels: np.ndarray, low: float, high: float) -> str | None:
    """The problem of pixels beyond these limits, or None where there are no such pixels."""
    smallest, largest = pixels.min(), pixels.max()
    if smallest >= low and largest <= high:  # false where a pixel is NaN
        return None
    return f"pixels go from {smallest:g} to {largest:g}, outside {low:g} to {high:g}"


PIXELS = {
    "bernoulli": Pixels(bernoulli, jax.nn.sigmoid, _not_binary, limits=(0, 1)),
    "logistic": Pixels(discretized_logistic, lambda mean: mean, _no_bytes, log_scale=-2.0, limits=(_LOWEST, _HIGHEST)),
    "normal": Pixels(normal, lambda mean: mean, _anything, log_scale=0.0),
}
