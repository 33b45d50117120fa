"""Images by a variational autoencoder. The loss is minus the lower bound on their log-likelihood, in nats an image.

The network is in `resnet_vae`, the bound in `bound`, and the distributions of pixels in `pixels`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from pydantic import Field, NonNegativeFloat

from experiments.data import Dataset
from experiments.errors import ConfigError
from experiments.schema import Count, CountOrZero, sequence, several
from experiments.tasks.bound import Drawn, divergences, log_weight, reconstruction
from experiments.tasks.images import image_shape
from experiments.tasks.pixels import PIXELS, Pixels
from experiments.tasks.resnet_vae import VAE
from experiments.tasks.task import Examples, Gather, ModelConfig, ModelState, Params, Task

_COLUMNS, _ROWS = 12, 4  # of images in a picture
_PAIRS = 4  # of images that are interpolated between
_PICTURED = 2 * _COLUMNS  # two rows of images, each above the row of its reconstructions


class VAEConfig(ModelConfig):
    """A convolutional residual network in both directions: see `resnet_vae.VAE`.

    The loss in training is the reconstruction plus the weighted divergence; evaluation has minus the bound itself.
    """

    name: Literal["vae"]
    widths: Annotated[tuple[Count, ...], pydantic.BeforeValidator(sequence)] = (16, 32, 32)
    """The feature maps of each stage, the finest first."""

    blocks: Count = 2
    """The residual blocks of each stage."""

    dense: CountOrZero = 450
    """The units of the dense layer on top; 0 for none."""

    latents: Annotated[tuple[Count, ...], pydantic.BeforeValidator(several), Field(min_length=1)]
    """The variables on top, and the maps of variables of each further layer, the coarsest first."""

    likelihood: Literal["bernoulli", "logistic", "normal"] = "bernoulli"
    """The distribution of a pixel: of binary ones, of bytes (the logistic, discretized), or of real numbers."""

    kl_weight: NonNegativeFloat = 1.0
    """The factor on the divergence, in training."""

    free_bits: NonNegativeFloat = 0.0
    """The nats that each variable on top and each map below counts at least, in the mean over the batch, in training.

    Source: Kingma et al. 2016, arXiv 1606.04934, section C.8.
    """

    importance_samples: Count = 100
    """The draws with which log p(x) is estimated at the end."""

    @pydantic.model_validator(mode="after")
    def _latents_have_stages(self) -> VAEConfig:
        if len(self.latents) > 1 + len(self.widths):
            raise ValueError(
                f"latents has {len(self.latents)} layers, and the decoder places for {1 + len(self.widths)}: one on "
                f"top and one at each of its {len(self.widths)} widths; leave some out, or add widths"
            )
        return self


CONFIGS = (VAEConfig,)


def build(config: VAEConfig, dataset: Dataset, _gather: Gather) -> Task:
    """The task of modelling the images of a data set.

    Raises:
        ConfigError: the examples are no images, their size does not fit the strides, or their pixels the likelihood.
    """
    model = _Model(config, _network(config, dataset), *_limits(config, dataset))
    return Task(
        init=model.init,
        predict=model.predict,
        losses=model.losses,
        evaluate=model.evaluate,
        likelihood=None,
        terms=model.terms,
        pictures=model.pictures,
        pictured=_PICTURED,
        log_weight=model.log_weight,
        draws=config.importance_samples,
    )


class _Model(NamedTuple):
    """The functions of the task."""

    config: VAEConfig
    """The config of the network."""

    network: VAE
    """The network."""

    low: float
    """The value of a pixel that is black in a picture."""

    high: float
    """The value of a pixel that is white in a picture."""

    def init(self, key: jax.Array, examples: Examples) -> tuple[Params, ModelState]:
        return self.network.init(key, self._images(examples)[:1], self._no_noise(1))["params"], {}

    def predict(self, params: Params, state: ModelState, examples: Examples, key: jax.Array) -> tuple[Any, ModelState]:
        noise_key, pixel_key = jax.random.split(key)
        x = self._images(examples)
        if self.config.likelihood == "bernoulli":
            # Grey pixels are drawn anew each time. Binary ones stay as they are: their probabilities are 0 and 1.
            x = jax.random.bernoulli(pixel_key, x).astype(x.dtype)
        drawn = self._drawn(params, x, self._noise(noise_key, len(x)))
        return {"reconstruction": reconstruction(self._pixels, drawn, x), "kl": divergences(drawn)}, state

    def losses(self, outputs: Any, _: Examples) -> jax.Array:
        """The loss of each image. With free bits, every image has the mean divergence of the batch."""
        kl = outputs["kl"]
        if self.config.free_bits:
            at_least = jnp.maximum(kl.mean(axis=0), self.config.free_bits)
            kl = jnp.broadcast_to(at_least, kl.shape)
        return outputs["reconstruction"] + self.config.kl_weight * kl.sum(axis=-1)

    def terms(self, outputs: Any, _: Examples) -> dict[str, jax.Array]:
        return {"reconstruction": outputs["reconstruction"], "kl": outputs["kl"].sum(axis=-1)}

    def evaluate(self, params: Params, _: ModelState, examples: Examples, keys: jax.Array) -> dict[str, jax.Array]:
        x = self._images(examples)
        drawn = self._drawn(params, x, jax.vmap(self._noise)(keys))
        figures = {"reconstruction": reconstruction(self._pixels, drawn, x), "kl": divergences(drawn).sum(axis=-1)}
        loss = figures["reconstruction"] + figures["kl"]
        if self.config.likelihood == "logistic":
            figures["bits_per_dim"] = loss / (math.prod(self.network.image) * math.log(2))
        return {"loss": loss, **figures}

    def log_weight(self, params: Params, _: ModelState, examples: Examples, keys: jax.Array) -> jax.Array:
        x = self._images(examples)
        return log_weight(self._pixels, self._drawn(params, x, jax.vmap(self._noise)(keys)), x)

    def pictures(self, params: Params, _: ModelState, examples: Examples, key: jax.Array) -> dict[str, jax.Array]:
        """Pictures of images, whose pixels are means.

        They are of draws from the prior ("samples"), of draws from the posteriors of images, each below its image
        ("reconstructions"), and on the way from the posterior mean of one image to that of another ("interpolations").
        """
        x = self._images(examples)
        sample_key, noise_key = jax.random.split(key)
        samples = self._generated(params, self._noise(sample_key, _ROWS * _COLUMNS))
        again = self._drawn(params, x, self._noise(noise_key, len(x)))
        top = again.layers[0].posterior.mean
        between = _on_the_way(top[: 2 * _PAIRS : 2], top[1 : 2 * _PAIRS : 2])
        interpolations = self._generated(params, self._no_noise(len(between)), between)
        return {
            "samples": self._grid(samples),
            "reconstructions": _in_turn(_grid(self._bytes(x)), self._grid(again)),
            "interpolations": self._grid(interpolations),
        }

    @property
    def _pixels(self) -> Pixels:
        return PIXELS[self.config.likelihood]

    def _images(self, examples: Examples) -> jax.Array:
        return examples["x"].reshape(-1, *self.network.image)

    def _drawn(self, params: Params, x: jax.Array, noise: list[jax.Array]) -> Drawn:
        return cast(Drawn, self.network.apply({"params": params}, x, noise))

    def _generated(self, params: Params, noise: list[jax.Array], top: jax.Array | None = None) -> Drawn:
        return cast(Drawn, self.network.apply({"params": params}, noise, top, method="generate"))

    def _noise(self, key: jax.Array, *count: int) -> list[jax.Array]:
        """Noise for so many examples; without a count, for one example without an axis of examples."""
        shapes = self.network.noise_shapes()
        return [jax.random.normal(jax.random.fold_in(key, i), (*count, *shape)) for i, shape in enumerate(shapes)]

    def _no_noise(self, count: int) -> list[jax.Array]:
        return [jnp.zeros((count, *shape)) for shape in self.network.noise_shapes()]

    def _grid(self, drawn: Drawn) -> jax.Array:
        return _grid(self._bytes(self._pixels.mean(drawn.output)))

    def _bytes(self, x: jax.Array) -> jax.Array:
        share = jnp.clip((x - self.low) / (self.high - self.low), 0, 1)
        return jnp.round(255 * share).astype(jnp.uint8)


def _network(config: VAEConfig, dataset: Dataset) -> VAE:
    """The network that the config describes, after a check that the data fits it."""
    if "x" not in dataset.train:
        raise ConfigError("model.name: vae models images, and the examples are text; choose 'gpt'")
    shape = dataset.train["x"].shape[1:]
    image = image_shape(shape)
    if image is None:
        raise ConfigError(
            f"model.name: vae models images, and the examples have the shape {shape}; choose data.name = 'mnist' or "
            "'cifar10'"
        )
    halvings = max(len(config.widths) - 1, 0)
    if any(side % 2**halvings for side in image[:2]):
        raise ConfigError(
            f"model.widths: {len(config.widths)} stages halve images {halvings} times, and {image[0]} x {image[1]} "
            f"pixels cannot be divided by {2**halvings}; leave out some of the widths"
        )
    if problem := PIXELS[config.likelihood].problem(dataset.train["x"], dataset.held_out["x"]):
        raise ConfigError(f"model.likelihood: {config.likelihood!r}: {problem}")
    return VAE(
        image=image,
        widths=config.widths,
        blocks=config.blocks,
        dense=config.dense,
        latents=config.latents,
        log_scale=PIXELS[config.likelihood].log_scale,
        dtype=jnp.dtype(config.dtype),
    )


def _limits(config: VAEConfig, dataset: Dataset) -> tuple[float, float]:
    """The values of pixels that are black and white in pictures."""
    known = PIXELS[config.likelihood].limits
    if known is not None:
        return known
    x = dataset.held_out["x"]
    above_black = np.nextafter(x.min(), np.inf)  # white must be another value than black, also where all pixels are one
    return float(x.min()), float(max(x.max(), above_black))


def _on_the_way(start: jax.Array, end: jax.Array) -> jax.Array:
    """Rows of vectors, in equal steps from each of `start` to that of `end`."""
    share = jnp.linspace(0, 1, _COLUMNS)[:, None]
    return (start[:, None] * (1 - share) + end[:, None] * share).reshape(-1, start.shape[-1])


def _grid(images: jax.Array) -> jax.Array:
    """Images as rows of a picture."""
    return images.reshape(-1, _COLUMNS, *images.shape[1:])


def _in_turn(above: jax.Array, below: jax.Array) -> jax.Array:
    """Rows of pictures, one of `above` and one of `below` in turn."""
    return jnp.stack([above, below], axis=1).reshape(-1, *above.shape[1:])
