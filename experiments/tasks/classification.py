"""Classification: cross-entropy and the fraction of errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pydantic
from pydantic import NonNegativeFloat

from experiments.data import Dataset
from experiments.errors import ConfigError
from experiments.tables import Count, Fraction, sequence
from experiments.tasks import networks
from experiments.tasks.task import Examples, ModelConfig, ModelState, Params, Task

Norm = Literal["none", "batch", "mean_only"]


class MLPConfig(ModelConfig):
    """Dense layers of the widths `hidden` with ReLU between; `norm` acts on each hidden layer's pre-activation."""

    name: Literal["mlp"]
    hidden: Annotated[tuple[Count, ...], pydantic.BeforeValidator(sequence)]
    norm: Norm = "none"


class ConvPoolConfig(ModelConfig):
    """The paper's network for CIFAR-10, `width` feature maps in its first stage and twice as many after it."""

    name: Literal["conv_pool"]
    width: Count = 96
    noise: NonNegativeFloat = 0.15
    dropout: Fraction = 0.5
    norm: Norm = "none"


CONFIGS = (MLPConfig, ConvPoolConfig)


def build(config: MLPConfig | ConvPoolConfig, dataset: Dataset) -> Task:
    """The task for one of these networks."""
    network = _network(config, dataset)

    def init(key: jax.Array, examples: Examples) -> tuple[Params, ModelState]:
        variables = network.init(key, examples["x"][:1], train=False)
        return variables["params"], variables.get("batch_stats", {})

    def loss(params: Params, state: ModelState, examples: Examples, key: jax.Array) -> tuple[jax.Array, ModelState]:
        variables = {"params": params, "batch_stats": state}
        noise, dropout = jax.random.split(key)
        rngs = {"noise": noise, "dropout": dropout}
        logits, updates = network.apply(variables, examples["x"], train=True, mutable=["batch_stats"], rngs=rngs)
        return _cross_entropy(logits, examples["y"]).mean(), updates.get("batch_stats", {})

    def evaluate(params: Params, state: ModelState, examples: Examples) -> dict[str, jax.Array]:
        logits = network.apply({"params": params, "batch_stats": state}, examples["x"], train=False)
        return {"loss": _cross_entropy(logits, examples["y"]), "error": logits.argmax(-1) != examples["y"]}

    return Task(init, loss, evaluate)


def _network(config: MLPConfig | ConvPoolConfig, dataset: Dataset) -> nn.Module:
    common: dict[str, Any] = {"classes": dataset.classes, "norm": config.norm, "dtype": jnp.dtype(config.dtype)}
    if isinstance(config, MLPConfig):
        return networks.MLP(hidden=config.hidden, **common)
    shape = dataset.train["x"].shape[1:]
    if len(shape) != 3 or min(shape[:2]) < 12:
        raise ConfigError(
            f"model.name: conv_pool needs images of 12 x 12 pixels or more with channels, and the examples have the "
            f"shape {shape}; choose model.name = 'mlp'"
        )
    return networks.ConvPool(width=config.width, noise=config.noise, dropout=config.dropout, **common)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
