"""A data set on the devices of a mesh, and each batch shared out among them.

In one process the examples lie whole on each device, where a compiled step takes its own. Several processes keep them
in the host's memory, and each feeds its devices with their part of each batch; so does one whose examples are in a
file that is mapped into memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.data import Dataset
from experiments.devices import sharding
from experiments.devices.layout import Layout
from experiments.devices.mesh import BATCH, Shape
from experiments.tasks import Examples

Rows = jax.Array
Batch = Rows | Examples
"""The examples of a batch: their rows, or where the process feeds them, the examples themselves."""


def placed(array: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
    """The shape of an array, and where it lies."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)


class Placement(Layout):
    """Where the arrays of one or several arms lie. The numbers are the same on any mesh, to rounding.

    Attributes:
        dataset: in the host's memory, or in a file.
        mesh: the devices.
        everywhere: whole on each of them.
        fed: whether this process feeds each batch, in place of the rows of its examples; by default, where several
            processes train together or the examples are in a mapped file.
    """

    def __init__(self, dataset: Dataset, mesh: Mesh, fed: bool | None = None) -> None:
        self.dataset = dataset
        self.mesh = mesh
        self.everywhere = self.at(PartitionSpec())
        self.fed = (dataset.mapped or jax.process_count() > 1) if fed is None else fed
        self._parts = int(np.prod([mesh.shape[axis] for axis in BATCH]))

    def describe(self) -> str:
        """The mesh, in a line."""
        return f"mesh: {Shape(**self.mesh.shape)}, {self.mesh.size} of {jax.device_count()} devices"

    def at(self, spec: PartitionSpec) -> NamedSharding:
        """On this mesh."""
        return NamedSharding(self.mesh, spec)

    def on_cpu(self) -> bool:
        """Whether the devices are CPUs."""
        return self.mesh.devices.flat[0].platform == "cpu"

    def put(self, tree: Any, spec: PartitionSpec | None = None) -> Any:
        """Arrays of the host on the devices (default: whole on each); each process gives what its own devices need."""
        place = self.everywhere if spec is None else self.at(spec)

        def put(array: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(array.shape, place, lambda index: array[index])

        return jax.tree.map(lambda array: put(np.asarray(array)), tree)

    @functools.cached_property
    def train(self) -> Examples:
        """The training examples that batches are taken from; nothing where each batch is fed."""
        return {} if self.fed else self.put(self.dataset.train)

    @functools.cached_property
    def train_like(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of `train`."""
        if self.fed:
            return {}
        return {name: placed(array, self.everywhere) for name, array in self.dataset.train.items()}

    def feed(self, rows: Rows) -> Batch:
        """Batches, for `take`: rows of shape (members, ..., batch)."""
        if not self.fed:
            return rows
        wanted, place = np.asarray(rows), self.at(self._batch(rows.ndim, rows.shape[-1]))

        def fed(array: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                # Of a mapped file, only these rows are read.
                return array[wanted[index[: wanted.ndim]]]

            return jax.make_array_from_callback(wanted.shape + array.shape[1:], place, part)

        return {name: fed(array) for name, array in self.dataset.train.items()}

    def feed_like(self, rows: Any) -> Any:
        """The shapes of what `feed` makes of rows."""
        if not self.fed:
            return placed(rows, self.everywhere)
        place = self.at(self._batch(len(rows.shape), rows.shape[-1]))

        def fed(array: np.ndarray) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(rows.shape + array.shape[1:], array.dtype, sharding=place)

        return {name: fed(array) for name, array in self.dataset.train.items()}

    def take(self, examples: Examples, batch: Batch, /) -> Examples:
        """In a compiled function: the examples of one batch, a part of them on each device."""
        return self.share(batch if isinstance(batch, dict) else {name: x[batch] for name, x in examples.items()})

    def share(self, examples: Examples, /) -> Examples:
        """In a compiled function: a batch, a part of it on each device, if they divide it."""
        place = self.at(self._batch(1, len(next(iter(examples.values())))))
        return {name: jax.lax.with_sharding_constraint(array, place) for name, array in examples.items()}

    def gather(self, params: Any, uses: Any, /) -> Any:
        """In a compiled function: plain parameters, whole along the axis that shares them out."""
        return sharding.gathered(params, sharding.of_parameters(uses, self.mesh), self.mesh)

    def gather_layer(self, stack: str, params: Any, uses: Any, /) -> Any:
        """The same, of one layer of a stack."""
        specs = sharding.of_parameters(uses, self.mesh).items()
        # Their first axis counts the layers.
        own = {
            path.removeprefix(f"{stack}/"): PartitionSpec(*spec[1:])
            for path, spec in specs
            if path.startswith(f"{stack}/")
        }
        return sharding.gathered(params, own, self.mesh)

    def held_out(self) -> Iterable[tuple[Examples, jax.Array]]:
        """The held-out examples in parts of one size, and for each a mask without what fills up the last.

        They stay on the devices, unless there may be more of them than fit.
        """
        return self._parts_of_held_out() if self.dataset.mapped else self._kept

    @functools.cached_property
    def _kept(self) -> list[tuple[Examples, jax.Array]]:
        return list(self._parts_of_held_out())

    def _parts_of_held_out(self) -> Iterator[tuple[Examples, jax.Array]]:
        count = len(next(iter(self.dataset.held_out.values())))
        size = min(self.dataset.at_a_time, count)
        size += -size % self._parts
        for start in range(0, count, size):
            rows = np.arange(start, start + size)
            part = {name: array[np.minimum(rows, count - 1)] for name, array in self.dataset.held_out.items()}
            yield self.put((part, rows < count), self._batch(1, size))

    def _batch(self, ndim: int, size: int) -> PartitionSpec:
        """The spec of an array whose axis number `ndim`, the last of these, counts the examples of a batch."""
        return PartitionSpec() if size % self._parts else PartitionSpec(*(None,) * (ndim - 1), BATCH)
