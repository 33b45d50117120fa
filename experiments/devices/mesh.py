"""The mesh of devices that an arm trains on: `[mesh]` of a config, and what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from experiments.errors import ConfigError
from experiments.schema import Count, Table


class MeshConfig(Table):
    """How many devices share what; their product is how many are used.

    Each step has the same numbers on any mesh, to rounding.
    """

    data: Count | None = None
    """So many share each batch; by default, as many as there are devices for and divide the batch."""

    fsdp: Count = 1
    """So many share each batch, and the parameters with their optimizer state, along axes that layers sum over."""

    model: Count = 1
    """So many share the features of each layer."""


class Shape(NamedTuple):
    """How many devices there are along each axis of a mesh."""

    data: int
    """Devices that share each batch."""

    fsdp: int
    """Devices that share each batch and the parameters."""

    model: int
    """Devices that share the features of each layer."""

    @property
    def batch(self) -> int:
        """In how many parts a batch is."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return " x ".join(f"{name} {count}" for name, count in self._asdict().items())


BATCH = ("data", "fsdp")
"""The axes that share a batch."""


def shape(config: MeshConfig, batch_size: int, devices: Sequence[Any] | None = None) -> Shape:
    """The shape of the mesh for batches of this size.

    Arguments:
        config: how many devices are wanted along each axis.
        batch_size: examples in a batch.
        devices: those to use, and then all of them; by default, as many as are wanted of those that there are.

    Raises:
        ConfigError: there are not so many, they do not divide the batch, or they leave a process without any.
    """
    available = jax.device_count() if devices is None else len(devices)
    data = config.data or _most(available // (config.fsdp * config.model), batch_size, config.fsdp)
    found = Shape(data, config.fsdp, config.model)
    count = found.batch * found.model
    if count > available:
        raise ConfigError(f"mesh: {found} = {count} devices are wanted, and {_too_few(available, devices is None)}")
    if batch_size % found.batch:
        raise ConfigError(
            f"data.batch_size: {batch_size} examples cannot be shared out evenly among {found.batch} devices (mesh: "
            f"data {found.data} x fsdp {found.fsdp}); change it or [mesh]"
        )
    if devices is not None and count < available:
        raise ConfigError(
            f"mesh: {found} = {count} of the {available} chips would be used, and it must be all of them; change "
            f"[mesh], data.batch_size ({batch_size}) or the topology"
        )
    if devices is None and jax.process_count() > 1 and count < available:
        raise ConfigError(
            f"mesh: {found} = {count} of the {available} devices of {jax.process_count()} processes would be "
            f"used, and with several processes it must be all of them; change [mesh] or data.batch_size ({batch_size})"
        )
    return found


def build(shape: Shape, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh, neighbours along an axis close to each other where the hardware has a topology."""
    chosen = (jax.devices() if devices is None else devices)[: int(np.prod(shape))]
    return jax.make_mesh(tuple(shape), Shape._fields, axis_types=(AxisType.Auto,) * 3, devices=chosen)


def _too_few(available: int, here: bool) -> str:
    """The end of the message where more devices are wanted than there are, on this machine or in a topology."""
    if here:
        start = "start more (on CPU: XLA_FLAGS=--xla_force_host_platform_device_count=8)"
        return f"JAX sees {available} here; lower them, or {start}"
    return f"there are {available} chips; lower them, or take a larger topology"


def _most(available: int, batch_size: int, fsdp: int) -> int:
    """As many as divide the batch."""
    return max((count for count in range(1, available + 1) if batch_size % (count * fsdp) == 0), default=1)
