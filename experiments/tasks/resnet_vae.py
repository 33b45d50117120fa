"""A variational autoencoder of residual convolutions, with one or several layers of latent variables."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.tasks.bound import Drawn, Gaussian, Layer, at_least_float32


class _Sizes(nn.Module):
    """The sizes by which the whole network and its decoder are made."""

    image: tuple[int, int, int]
    """Height, width and channels."""

    widths: tuple[int, ...]
    """The feature maps of each stage, the finest first."""

    blocks: int
    """The residual blocks of each stage."""

    dense: int
    """The units of the dense layer on top; 0 for none."""

    latents: tuple[int, ...]
    """The variables on top, and the maps of variables of each further layer, the coarsest first."""

    log_scale: float | None
    """The first value of the logarithm of the scale of pixels, one a channel; None where pixels have no scale."""

    dtype: Any
    """The dtype of the computation, except that of distributions: these are computed in float32 or more."""


class VAE(_Sizes):
    """Images through latent variables, and from these alone.

    The encoder has a stage for each of `widths`: at first a 3 x 3 convolution, later one of 4 x 4 with stride 2, and
    `blocks` residual blocks. On top there is a dense layer of `dense` units, and the posterior of `latents[0]`
    variables. The decoder is its mirror image, where a 3 x 3 convolution makes four times as many maps, and of four of
    these one of twice the height and width (Shi et al. 2016, arXiv 1609.05158). Each further number in `latents` is of
    maps of variables that enter the decoder's next stage, the coarsest first: their prior comes from what the decoder
    computed so far, and their posterior, in units of the prior (Vahdat & Kautz 2020, arXiv 2007.03898), from that and
    the encoder's stage of the same size. All nonlinearities are ELU, and scales are softplus. Without widths, the image
    goes in as a vector; with neither widths nor `dense`, all is linear (with normal pixels, probabilistic PCA).
    """

    def setup(self) -> None:
        self.encoder = Encoder(self.widths, self.blocks, self.dense, self.dtype)
        self.decoder = Decoder(
            self.image, self.widths, self.blocks, self.dense, self.latents, self.log_scale, self.dtype
        )

    def __call__(self, x: jax.Array, noise: Sequence[jax.Array]) -> Drawn:
        """Latent variables of images (examples, height, width, channels), and the images decoded from them.

        `noise` is N(0, 1) of `noise_shapes`, each with a leading axis of examples.
        """
        return self.decoder(noise, *self.encoder(x))

    def generate(self, noise: Sequence[jax.Array], top: jax.Array | None = None) -> Drawn:
        """Images of the prior. Where `top` is given, it stands in place of the first layer's variables."""
        return self.decoder(noise, top=top)

    def noise_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of one example's noise: of the variables on top, then of each layer of maps."""
        height, width, _ = self.image
        coarsest_first = range(len(self.widths) - 1, -1, -1)
        # Not strict: where there are fewer layers of variables than stages, the finest stages have none.
        pairs = zip(coarsest_first, self.latents[1:], strict=False)
        maps = [(height >> stage, width >> stage, size) for stage, size in pairs]
        return [(self.latents[0],), *maps]


class Encoder(nn.Module):
    """From images to a vector, and to the maps of each stage."""

    widths: tuple[int, ...]
    """The feature maps of each stage, the finest first."""

    blocks: int
    """The residual blocks of each stage."""

    dense: int
    """The units of the dense layer on top; 0 for none."""

    dtype: Any
    """The dtype of the computation."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """The maps, the coarsest last, and the vector (examples, features)."""
        maps = []
        for stage, width in enumerate(self.widths):
            if stage == 0:
                x = nn.Conv(width, (3, 3), dtype=self.dtype)(x)
            else:
                x = nn.Conv(width, (4, 4), strides=(2, 2), dtype=self.dtype)(nn.elu(x))
            for _ in range(self.blocks):
                x = Block(self.dtype)(x)
            maps.append(x)

        x = x.reshape(len(x), -1)
        if self.widths:
            x = nn.elu(x)
        if self.dense:
            x = nn.elu(nn.Dense(self.dense, dtype=self.dtype)(x))
        return maps, x


class Decoder(_Sizes):
    """From latent variables to images."""

    @nn.compact
    def __call__(
        self,
        noise: Sequence[jax.Array],
        maps: Sequence[jax.Array] | None = None,
        vector: jax.Array | None = None,
        top: jax.Array | None = None,
    ) -> Drawn:
        """Images of noise: through the posterior, given the encoder's `maps` and `vector`, else through the prior."""
        height, width, channels = self.image
        layers = [self._top(noise[0], vector, top)]
        x = layers[0].z
        if self.dense:
            x = nn.elu(nn.Dense(self.dense, dtype=self.dtype)(x))

        stages = list(range(len(self.widths)))[::-1]  # the coarsest first, as the decoder goes up to the image
        first = (height >> stages[0], width >> stages[0], self.widths[-1]) if stages else self.image
        x = nn.Dense(math.prod(first), dtype=self.dtype, name="unfold")(x).reshape(-1, *first)

        for number, stage in enumerate(stages, 1):
            if number < len(self.latents):
                layer = self._maps(number, noise[number], x, None if maps is None else maps[stage])
                layers.append(layer)
                x = x + nn.Conv(self.widths[stage], (1, 1), dtype=self.dtype, name=f"enter_{number}")(layer.z)
            for _ in range(self.blocks):
                x = Block(self.dtype)(x)
            if stage:
                x = nn.Conv(4 * self.widths[stage - 1], (3, 3), dtype=self.dtype)(nn.elu(x))
                x = einops.rearrange(x, "n y x (i j c) -> n (y i) (x j) c", i=2, j=2)

        if stages:
            x = nn.Conv(channels, (3, 3), dtype=self.dtype, name="out")(nn.elu(x))
        return Drawn(at_least_float32(x), self._log_scale(channels), layers)

    def _top(self, noise: jax.Array, vector: jax.Array | None, top: jax.Array | None) -> Layer:
        """The first layer: of the posterior where the encoder's vector is given, of the prior N(0, 1) where not."""
        prior = Gaussian(jnp.zeros_like(noise), jnp.ones_like(noise))
        posterior = prior
        if vector is not None:
            numbers = nn.Dense(2 * self.latents[0], dtype=self.dtype, name="posterior")(vector)
            posterior = prior.relative(_gaussian(numbers))
        return Layer(posterior, prior, posterior.at(noise) if top is None else top)

    def _maps(self, number: int, noise: jax.Array, x: jax.Array, seen: jax.Array | None) -> Layer:
        """A further layer, from what the decoder computed so far, and the encoder's maps where they are given."""
        conv = functools.partial(nn.Conv, 2 * self.latents[number], (3, 3), dtype=self.dtype)
        prior = posterior = _gaussian(conv(name=f"prior_{number}")(nn.elu(x)))
        if seen is not None:
            both = jnp.concatenate([nn.elu(x), nn.elu(seen)], axis=-1)
            posterior = prior.relative(_gaussian(conv(name=f"posterior_{number}")(both)))
        return Layer(posterior, prior, posterior.at(noise))

    def _log_scale(self, channels: int) -> jax.Array:
        if self.log_scale is None:
            return jnp.zeros(channels)
        return self.param("log_scale", nn.initializers.constant(self.log_scale), (channels,))


class Block(nn.Module):
    """Two 3 x 3 convolutions, each after an ELU, added to what goes in."""

    dtype: Any
    """The dtype of the computation."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """An array of the same shape."""
        y = x
        for _ in range(2):
            y = nn.Conv(x.shape[-1], (3, 3), dtype=self.dtype)(nn.elu(y))
        return x + y


def _gaussian(numbers: jax.Array) -> Gaussian:
    """Normal variables of numbers: half of the features are means, and softplus makes scales of the other half."""
    mean, raw = jnp.split(at_least_float32(numbers), 2, axis=-1)
    return Gaussian(mean, nn.softplus(raw))
