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
    """Independent normal variables, of the same shape."""

    mean: jax.Array
    scale: jax.Array

    def at(self, noise: jax.Array) -> jax.Array:
        """What noise of N(0, 1) becomes in it: a sample through which gradients flow."""
        return self.mean + self.scale * noise

    def log_density(self, z: jax.Array) -> jax.Array:
        """That of each variable."""
        return -0.5 * jnp.square((z - self.mean) / self.scale) - jnp.log(self.scale) - 0.5 * math.log(2 * math.pi)

    def relative(self, other: Gaussian) -> Gaussian:
        """Another, whose mean and scale are given in units of this one."""
        return Gaussian(self.at(other.mean), self.scale * other.scale)

    def kl(self, other: Gaussian) -> jax.Array:
        """The Kullback-Leibler divergence from `other`, of each variable."""
        ratio = self.scale / other.scale
        return 0.5 * (jnp.square(ratio) + jnp.square((self.mean - other.mean) / other.scale) - 1) - jnp.log(ratio)


class Layer(NamedTuple):
    """A layer of latent variables (examples, ..., groups): drawn from the posterior, or without an image, the prior."""

    posterior: Gaussian
    prior: Gaussian
    z: jax.Array


class Drawn(NamedTuple):
    """What a decoder computes for each pixel, the logarithm of the scale of these, and all layers from the top."""

    output: jax.Array
    log_scale: jax.Array
    layers: list[Layer]


def reconstruction(pixels: Pixels, drawn: Drawn, x: jax.Array) -> jax.Array:
    """-log p(x | z), of each example."""
    return -_sum(pixels.log_prob(drawn.output, drawn.log_scale, at_least_float32(x)))


def divergences(drawn: Drawn) -> jax.Array:
    """(examples, groups): of all layers; a group is a variable of the first and a map of variables of the others."""
    each = [layer.posterior.kl(layer.prior) for layer in drawn.layers]
    return jnp.concatenate([kl.reshape(len(kl), -1, kl.shape[-1]).sum(axis=1) for kl in each], axis=-1)


def log_weight(pixels: Pixels, drawn: Drawn, x: jax.Array) -> jax.Array:
    """log p(x, z) - log q(z | x), of each example: the logarithm of a number whose mean is p(x)."""
    ratios = [_sum(layer.prior.log_density(layer.z) - layer.posterior.log_density(layer.z)) for layer in drawn.layers]
    return sum(ratios, -reconstruction(pixels, drawn, x))


def at_least_float32(x: jax.Array) -> jax.Array:
    """Wider where it is narrower."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sum(values: jax.Array) -> jax.Array:
    return values.reshape(len(values), -1).sum(axis=-1)
