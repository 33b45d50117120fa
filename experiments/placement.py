"""A data set on the devices: whole on each of them, while a batch is shared out among them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.config import ArmConfig
from experiments.data import Dataset
from experiments.errors import ConfigError
from experiments.tasks import Examples

_EVALUATION_BATCH = 500


class Placement:
    """Where the arrays of one or several arms lie. The numbers are the same on any, to rounding."""

    def __init__(self, dataset: Dataset, devices: int):
        self.dataset = dataset
        self.mesh = Mesh(np.array(jax.local_devices()[:devices]), ("data",))
        self.everywhere = NamedSharding(self.mesh, PartitionSpec())

    def on_cpu(self) -> bool:
        """Whether the devices are CPUs."""
        return self.mesh.devices.flat[0].platform == "cpu"

    def replicate(self, tree: Any) -> Any:
        """The arrays on every device."""
        return jax.device_put(tree, self.everywhere)

    def share(self, examples: Examples) -> Examples:
        """In a compiled function: a batch, a part of it on each device."""
        sharding = NamedSharding(self.mesh, PartitionSpec("data"))
        return {name: jax.lax.with_sharding_constraint(array, sharding) for name, array in examples.items()}

    @functools.cached_property
    def train(self) -> Examples:
        """The training examples."""
        return self.replicate(self.dataset.train)

    @functools.cached_property
    def held_out(self) -> list[tuple[Examples, jax.Array]]:
        """The held-out examples in parts of one size, and for each a mask without what fills up the last."""
        count = len(next(iter(self.dataset.held_out.values())))
        size = min(_EVALUATION_BATCH, count)
        size += -size % self.mesh.size
        parts = []
        for start in range(0, count, size):
            rows = np.arange(start, start + size)
            part = {name: array[np.minimum(rows, count - 1)] for name, array in self.dataset.held_out.items()}
            parts.append((self.replicate(part), self.replicate(rows < count)))
        return parts


def device_count(config: ArmConfig) -> int:
    """How many devices share a batch: all that `train.devices` asks for, or as many as divide it.

    Raises:
        ConfigError: there are not so many, or they do not divide the batch.
    """
    available, size, wanted = jax.local_device_count(), config.data.batch_size, config.train.devices
    if wanted is None:
        return max(count for count in range(1, available + 1) if size % count == 0)
    if wanted > available:
        raise ConfigError(
            f"train.devices: {wanted} are wanted, and JAX sees {available} here; lower it, or leave it out"
        )
    if size % wanted:
        raise ConfigError(
            f"data.batch_size: {size} examples cannot be shared out evenly among {wanted} devices; "
            "change it or train.devices"
        )
    return wanted
