"""Latent variables, and the lower bound on the log-likelihood that is had by drawing them.

log p(x) >= E_q[log p(x | z)] - KL(q(z | x) || p(z)), with z = mean + scale * noise.

Source: Kingma & Welling 2014, arXiv 1312.6114.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.tasks.pixels import Pixels


class Gaussian(NamedTuple):
    """Independent normal variables."""

    mean: jax.Array
    """The mean of each."""

    scale: jax.Array
    """The standard deviation of each, of the shape of `mean`."""

    def at(self, noise: jax.Array) -> jax.Array:
        """The sample that noise of N(0, 1) becomes. Gradients flow through it to the mean and the scale."""
        return self.mean + self.scale * noise

    def log_density(self, z: jax.Array) -> jax.Array:
        """The logarithm of the density of each variable at `z`."""
        deviation = (z - self.mean) / self.scale
        return -0.5 * jnp.square(deviation) - jnp.log(self.scale) - 0.5 * math.log(2 * math.pi)

    def relative(self, other: Gaussian) -> Gaussian:
        """The variables whose mean and scale `other` gives in units of this one."""
        return Gaussian(self.at(other.mean), self.scale * other.scale)

    def kl(self, other: Gaussian) -> jax.Array:
        """The Kullback-Leibler divergence from `other`, of each variable."""
        ratio = self.scale / other.scale
        distance = (self.mean - other.mean) / other.scale
        return 0.5 * (jnp.square(ratio) + jnp.square(distance) - 1) - jnp.log(ratio)


class Layer(NamedTuple):
    """A layer of latent variables, (examples, ..., groups)."""

    posterior: Gaussian
    """The distribution given the image; without an image, the prior."""

    prior: Gaussian
    """The distribution given the layers above."""

    z: jax.Array
    """The variables, drawn from the posterior."""


class Drawn(NamedTuple):
    """An image's latent variables as drawn, and what a decoder computes of them."""

    output: jax.Array
    """A number for each pixel, which `Pixels` says the meaning of."""

    log_scale: jax.Array
    """The logarithm of the scale of pixels, one a channel."""

    layers: list[Layer]
    """All layers of latent variables, from the top."""


def reconstruction(pixels: Pixels, drawn: Drawn, x: jax.Array) -> jax.Array:
    """-log p(x | z), of each example."""
    return -_sum(pixels.log_prob(drawn.output, drawn.log_scale, at_least_float32(x)))


def divergences(drawn: Drawn) -> jax.Array:
    """The divergences of all layers, (examples, groups).

    A group is one variable of the first layer, and one map of variables of each of the others.
    """
    each = [layer.posterior.kl(layer.prior) for layer in drawn.layers]
    by_group = [kl.reshape(len(kl), -1, kl.shape[-1]).sum(axis=1) for kl in each]
    return jnp.concatenate(by_group, axis=-1)


def log_weight(pixels: Pixels, drawn: Drawn, x: jax.Array) -> jax.Array:
    """The logarithm of p(x, z) / q(z | x), of each example: of a random number whose mean is p(x)."""
    ratios = [_sum(layer.prior.log_density(layer.z) - layer.posterior.log_density(layer.z)) for layer in drawn.layers]
    return sum(ratios, -reconstruction(pixels, drawn, x))


def at_least_float32(x: jax.Array) -> jax.Array:
    """The array, in float32 where its dtype is narrower."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sum(values: jax.Array) -> jax.Array:
    """The sum of each example."""
    return values.reshape(len(values), -1).sum(axis=-1)
