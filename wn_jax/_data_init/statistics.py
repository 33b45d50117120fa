"""Statistics of pre-activations: mean and deviation of each feature, over a batch or over the rows of a group.

Source: Salimans & Kingma (2016), section 3. The groups are those of `lax.ragged_dot`: a mixture of experts, each of
which sees rows of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wn_jax._program.contractions import Contraction
from wn_jax._program.factored import Factored
from wn_jax._program.run import scale_of_output


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Numbers of each feature, with size 1 along the dimensions that are samples."""

    mean: jax.Array
    std: jax.Array
    constant: jax.Array
    """Whether the feature is."""

    @property
    def finite(self) -> jax.Array:
        """Whether the numbers are."""
        return jnp.isfinite(self.mean) & jnp.isfinite(self.std)


def of_batch(y: jax.Array, samples: Sequence[int]) -> Statistics:
    """The statistics over some dimensions of an array."""
    over = tuple(samples)
    mean = jnp.mean(y, over, keepdims=True)
    std = jnp.sqrt(jnp.mean(jnp.square(y - mean), over, keepdims=True))
    return Statistics(mean, std, _is_rounding(std, jnp.max(jnp.abs(y), over, keepdims=True)))


def _is_rounding(std: jax.Array, largest: jax.Array) -> jax.Array:
    """Whether a deviation is that of equal numbers: of some roundings of their size, not of exactly 0."""
    return std <= 8 * jnp.finfo(std.dtype).eps * largest


@dataclasses.dataclass(frozen=True)
class Groups:
    """The groups of rows in the output of a `ragged_dot`. What is of each group has a leading axis more."""

    sizes: jax.Array
    """How many rows each has; they follow one another."""
    rows: int
    """The dimension of the output that has the rows."""
    length: int
    """How many rows there are."""

    @classmethod
    def of(cls, sizes: ArrayLike, rows: int, output: jax.Array) -> Groups:
        """Those of the output of a `ragged_dot`."""
        return cls(jnp.asarray(sizes), rows, output.shape[rows])

    @property
    def _group_of_row(self) -> jax.Array:
        return jnp.searchsorted(jnp.cumsum(self.sizes), jnp.arange(self.length), side="right")

    def of_each_row(self, numbers: jax.Array) -> jax.Array:
        """Numbers of each group, of size 1 along the rows, as numbers of each row."""
        last = self.sizes.shape[0] - 1
        each = jnp.squeeze(numbers, 1 + self.rows)[jnp.minimum(self._group_of_row, last)]
        return jnp.moveaxis(each, 0, self.rows)

    def scale_of_output(self, factored: Factored, contraction: Contraction, ndim: int) -> jax.Array:
        """The scale of each group, laid out as the output."""
        group = contraction.group or 0
        alone = dataclasses.replace(
            contraction,
            group=None,
            contracted=tuple(dim - (dim > group) for dim in contraction.contracted),
            kept=tuple((dim - (dim > group), target) for dim, target in contraction.kept),
        )

        def of_one(scale: jax.Array) -> jax.Array:
            return scale_of_output(dataclasses.replace(factored, scale=scale), alone, ndim)

        return jax.vmap(of_one, group)(jnp.broadcast_to(factored.scale, self._with_all_groups(factored, group)))

    def _with_all_groups(self, factored: Factored, group: int) -> list[int]:
        shape = list(factored.scale.shape)
        shape[group] = self.sizes.shape[0]
        return shape

    def statistics(self, y: jax.Array, samples: Sequence[int], rows: int) -> Statistics:
        """Those of the rows of each group. A group of fewer than two numbers has no deviation, and counts as constant.

        `rows` is the dimension of `y` that has the rows.
        """
        member = self._group_of_row == jnp.arange(self.sizes.shape[0])[:, None]
        over = tuple(1 + dim for dim in samples if dim != rows)

        def mean(y: jax.Array) -> jax.Array:
            sums = jnp.tensordot(member.astype(y.dtype), y, (1, rows))
            sums = jnp.mean(jnp.expand_dims(sums, 1 + rows), over, keepdims=True)
            return sums / jnp.maximum(jnp.sum(member, 1), 1).reshape([-1] + [1] * y.ndim)

        average = mean(y)
        centred = y - dataclasses.replace(self, rows=rows).of_each_row(average)
        std = jnp.sqrt(mean(jnp.square(centred)))
        largest = jnp.sqrt(mean(jnp.square(y)))
        few = jnp.sum(member, 1) < 2
        return Statistics(average, std, _is_rounding(std, largest) | few.reshape([-1] + [1] * y.ndim))
