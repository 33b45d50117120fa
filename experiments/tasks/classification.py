"""Classification: its configs, the cross-entropy and the fraction of errors. `networks` has the networks."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pydantic
from pydantic import NonNegativeFloat

from experiments.data import Dataset
from experiments.errors import ConfigError
from experiments.schema import Count, Fraction, sequence
from experiments.tasks import networks
from experiments.tasks.images import image_shape
from experiments.tasks.task import Examples, Gather, ModelConfig, ModelState, Params, Task

Norm = Literal["none", "batch", "mean_only"]


class MLPConfig(ModelConfig):
    """Dense layers with ReLU between."""

    name: Literal["mlp"]
    hidden: Annotated[tuple[Count, ...], pydantic.BeforeValidator(sequence)]
    """The widths of the hidden layers."""

    norm: Norm = "none"
    """The normalization of each hidden layer's pre-activation."""


class ConvConfig(ModelConfig):
    """3 x 3 convolutions with ReLU and 2 x 2 mean pooling after each, and a dense layer on top."""

    name: Literal["conv"]
    widths: Annotated[tuple[Count, ...], pydantic.BeforeValidator(sequence)]
    """The feature maps of each convolution."""

    norm: Norm = "none"
    """The normalization of each convolution's pre-activation."""


class ConvPoolConfig(ModelConfig):
    """The paper's network for CIFAR-10."""

    name: Literal["conv_pool"]
    width: Count = 96
    """The feature maps of the first stage; there are twice as many after it."""

    noise: NonNegativeFloat = 0.15
    """The standard deviation of the noise that is added to images in training."""

    dropout: Fraction = 0.5
    """The fraction of features that is dropped after each pooling in training."""

    norm: Norm = "none"
    """The normalization of each layer's pre-activation."""


Config = MLPConfig | ConvConfig | ConvPoolConfig
CONFIGS = (MLPConfig, ConvConfig, ConvPoolConfig)


def build(config: Config, dataset: Dataset, _gather: Gather) -> Task:
    """The task for one of these networks.

    Raises:
        ConfigError: the network does not fit the data.
    """
    if "y" not in dataset.train or not np.issubdtype(dataset.train["y"].dtype, np.integer):
        other = "linear" if "y" in dataset.train else "gpt"
        raise ConfigError(f"model.name: {config.name} classifies, and the examples have no labels; choose {other!r}")
    network = _network(config, dataset)

    def init(key: jax.Array, examples: Examples) -> tuple[Params, ModelState]:
        variables = network.init(key, examples["x"][:1], train=False)
        return variables["params"], variables.get("batch_stats", {})

    def predict(params: Params, state: ModelState, examples: Examples, key: jax.Array) -> tuple[jax.Array, ModelState]:
        variables = {"params": params, "batch_stats": state}
        noise_key, dropout_key = jax.random.split(key)
        rngs = {"noise": noise_key, "dropout": dropout_key}
        logits, updates = network.apply(variables, examples["x"], train=True, mutable=["batch_stats"], rngs=rngs)
        return logits, updates.get("batch_stats", {})

    def evaluate(params: Params, state: ModelState, examples: Examples, _: Any) -> dict[str, jax.Array]:
        logits = cast(jax.Array, network.apply({"params": params, "batch_stats": state}, examples["x"], train=False))
        return {"loss": _cross_entropy(logits, examples), "error": logits.argmax(-1) != examples["y"]}

    return Task(init, predict, _cross_entropy, evaluate, likelihood="categorical")


def _network(config: Config, dataset: Dataset) -> nn.Module:
    common: dict[str, Any] = {"classes": dataset.classes, "norm": config.norm, "dtype": jnp.dtype(config.dtype)}
    if isinstance(config, MLPConfig):
        return networks.MLP(hidden=config.hidden, **common)

    shape = dataset.train["x"].shape[1:]
    if isinstance(config, ConvConfig):
        smallest = 2 ** len(config.widths)  # each pooling halves the sides, and one pixel must be left
        return networks.Conv(widths=config.widths, image=_image(shape, smallest), **common)

    # Two poolings and a 3 x 3 convolution without padding: of 12 pixels a side, one is left.
    if len(shape) != 3 or min(shape[:2]) < 12:
        raise ConfigError(
            f"model.name: conv_pool needs images of 12 x 12 pixels or more with channels, and the examples have the "
            f"shape {shape}; choose model.name = 'mlp'"
        )
    return networks.ConvPool(width=config.width, noise=config.noise, dropout=config.dropout, **common)


def _image(shape: tuple[int, ...], smallest: int) -> tuple[int, ...]:
    """The shape of examples as images, of at least `smallest` pixels a side."""
    image = image_shape(shape)
    if image is None or min(image[:2]) < smallest:
        raise ConfigError(
            f"model.name: conv with {smallest.bit_length() - 1} widths needs images of {smallest} x {smallest} pixels "
            f"or more, and the examples have the shape {shape}; choose fewer widths or model.name = 'mlp'"
        )
    return image


def _cross_entropy(logits: jax.Array, examples: Examples) -> jax.Array:
    """The loss of each example in nats, in float32 whatever the dtype of the computation is."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), examples["y"])
