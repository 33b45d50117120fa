"""Linear regression: half the mean square of the errors, a loss whose curvature is known in closed form."""

from __future__ import annotations

from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.data import Dataset
from experiments.errors import ConfigError
from experiments.tasks.task import Examples, Gather, ModelConfig, ModelState, Params, Task


class LinearConfig(ModelConfig):
    """A single linear neuron with a bias."""

    name: Literal["linear"]


CONFIGS = (LinearConfig,)


def build(config: LinearConfig, dataset: Dataset, _gather: Gather) -> Task:
    """The task of predicting the targets of a data set, or the labels as numbers.

    Raises:
        ConfigError: the examples have none.
    """
    if "y" not in dataset.train:
        raise ConfigError("model.name: linear predicts numbers, and the examples are text; choose 'gpt'")
    neuron = nn.Dense(1, dtype=jnp.dtype(config.dtype))

    def init(key: jax.Array, examples: Examples) -> tuple[Params, ModelState]:
        return neuron.init(key, _flat(examples["x"][:1]))["params"], {}

    def predict(params: Params, state: ModelState, examples: Examples, _: Any) -> tuple[jax.Array, ModelState]:
        return cast(jax.Array, neuron.apply({"params": params}, _flat(examples["x"]))), state

    def losses(outputs: jax.Array, examples: Examples) -> jax.Array:
        return 0.5 * jnp.square(outputs[:, 0].astype(jnp.float32) - examples["y"])

    def evaluate(params: Params, state: ModelState, examples: Examples, _: Any) -> dict[str, jax.Array]:
        return {"loss": losses(predict(params, state, examples, None)[0], examples)}

    return Task(init, predict, losses, evaluate, likelihood="normal")


def _flat(x: jax.Array) -> jax.Array:
    """Examples as vectors."""
    return x.reshape(len(x), -1)
