"""Weights that are not multiplied out: `v` and `g / ||v||`, side by side, among the values of a running program.

Operations that only move numbers move both arrays. This file knows how, for each such operation; `_run` runs programs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wn_jax._program import jaxpr as program
from wn_jax._program.jaxpr import Equation, primitive
from wn_jax._program.views import is_scaling


@functools.partial(jax.tree_util.register_dataclass, data_fields=("v", "scale"), meta_fields=("dtype", "rebuilt"))
@dataclasses.dataclass(frozen=True, eq=False)
class Factored:
    """The array `(v * scale).astype(dtype)`. `scale` has the rank of `v`, and size 1 wherever it does not vary."""

    v: jax.Array
    scale: jax.Array
    dtype: Any
    rebuilt: bool = False
    """Whether contractions get the weight all the same: it is here to be sliced by a loop first, and rebuilt in it."""

    def weight(self) -> jax.Array:
        """The array itself, rounded as it would have been on its way."""
        return self._rebuilt if self.rebuilt else self._product()

    def _product(self) -> jax.Array:
        return (self.v.astype(self.scale.dtype) * self.scale).astype(self.v.dtype).astype(self.dtype)

    @functools.cached_property
    def _rebuilt(self) -> jax.Array:
        """Once for all of a trip's uses, and made before these.

        XLA for TPU would fuse the product into the matmul that follows, and compute it again for each tile of that.
        """
        return jax.lax.optimization_barrier(self._product())

    def sliceable(self) -> Factored:
        """The same, with a scale for each slice along the leading dimension, even where they are all the same."""
        scale = jnp.broadcast_to(self.scale, (self.v.shape[0], *self.scale.shape[1:]))
        return dataclasses.replace(self, scale=scale)

    def varies(self) -> list[bool]:
        """Along which dimensions the scale varies."""
        return [size > 1 for size in self.scale.shape]


def weight(value: Any) -> Any:
    """A value as an array."""
    return value.weight() if isinstance(value, Factored) else value


def moved(eqn: Equation, values: list[Any]) -> Factored | None:
    """The result of an equation that only moves numbers; `None` for any other.

    What is rebuilt in any case is so before it moves between devices: a weight may have fewer bytes than `v`.
    """
    rule = _MOVES.get(eqn.primitive)
    if eqn.primitive is primitive.sharding_constraint_p and values[0].rebuilt:
        return None
    if rule is None or (rule is not _concatenate and any(isinstance(value, Factored) for value in values[1:])):
        return None
    return rule(eqn, values)


def scaled(eqn: Equation, values: list[Any]) -> Factored | None:
    """The result of a multiplication with a scalar, which the scale takes; `None` for any other equation."""
    for i, value in enumerate(values):
        if isinstance(value, Factored) and is_scaling(eqn, i) and value.dtype == value.v.dtype:
            scalar = jnp.asarray(weight(values[1 - i]), value.scale.dtype).reshape((1,) * value.v.ndim)
            divided = eqn.primitive is primitive.div_p
            return dataclasses.replace(value, scale=value.scale / scalar if divided else value.scale * scalar)
    return None


def _same(eqn: Equation, values: list[Any]) -> Factored:
    value = values[0]
    return dataclasses.replace(value, v=program.bind(eqn, [value.v])[0])


def _stop_gradient(eqn: Equation, values: list[Any]) -> Factored:
    value = values[0]
    return dataclasses.replace(value, v=program.bind(eqn, [value.v])[0], scale=jax.lax.stop_gradient(value.scale))


def _convert(eqn: Equation, values: list[Any]) -> Factored | None:
    """Remembered, not done: the weight is rounded after it is scaled."""
    value, dtype = values[0], program.outputs(eqn)[0].dtype
    fits = value.dtype == value.v.dtype and jnp.issubdtype(dtype, jnp.floating)
    return dataclasses.replace(value, dtype=dtype) if fits else None


def _transpose(eqn: Equation, values: list[Any]) -> Factored:
    order = eqn.params["permutation"]
    return _map(values[0], lambda array: jax.lax.transpose(array, order))


def _squeeze(eqn: Equation, values: list[Any]) -> Factored:
    gone = eqn.params["dimensions"]
    return _map(values[0], lambda array: jax.lax.squeeze(array, gone))


def _reverse(eqn: Equation, values: list[Any]) -> Factored:
    along = eqn.params["dimensions"]
    return _map(values[0], lambda array: jax.lax.rev(array, along))


def _broadcast(eqn: Equation, values: list[Any]) -> Factored:
    value, shape, dims = values[0], program.outputs(eqn)[0].shape, eqn.params["broadcast_dimensions"]
    small = [1] * len(shape)
    for dim, target in enumerate(dims):
        small[target] = value.scale.shape[dim]
    scale = jax.lax.broadcast_in_dim(value.scale, small, dims)
    return dataclasses.replace(value, v=program.bind(eqn, [value.v])[0], scale=scale)


def _reshape(eqn: Equation, values: list[Any]) -> Factored | None:
    """Where no dimension along which the scale varies is mixed with one along which it does not."""
    value, shape = values[0], program.outputs(eqn)[0].shape
    if eqn.params.get("dimensions") is not None or value.v.size == 0:
        return None
    small = []
    for before, after in _blocks(value.v.shape, shape):
        varies = {value.scale.shape[dim] > 1 for dim in before if value.v.shape[dim] > 1}
        if len(varies) > 1:
            return None
        small += [shape[dim] if True in varies else 1 for dim in after]
    return dataclasses.replace(value, v=program.bind(eqn, [value.v])[0], scale=value.scale.reshape(small))


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of dimensions of two shapes of equal size that hold equally many numbers, in order."""
    blocks, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        first, second = [], []  # type: list[int], list[int]
        sizes = [1, 1]
        while not (first or second) or sizes[0] != sizes[1]:
            if i < len(before) and (sizes[0] <= sizes[1] or j == len(after)):
                first.append(i)
                sizes[0] *= before[i]
                i += 1
            else:
                second.append(j)
                sizes[1] *= after[j]
                j += 1
        blocks.append((first, second))
    return blocks


def _slice(eqn: Equation, values: list[Any]) -> Factored:
    value, params = values[0], eqn.params
    keep = value.varies()
    start = [first if varies else 0 for first, varies in zip(params["start_indices"], keep, strict=True)]
    limit = [last if varies else 1 for last, varies in zip(params["limit_indices"], keep, strict=True)]
    strides = [n if varies else 1 for n, varies in zip(params["strides"] or [1] * len(keep), keep, strict=True)]
    scale = jax.lax.slice(value.scale, start, limit, strides)
    return dataclasses.replace(value, v=program.bind(eqn, [value.v])[0], scale=scale)


def _dynamic_slice(eqn: Equation, values: list[Any]) -> Factored:
    value, *starts = values
    keep = value.varies()
    sizes = [size if varies else 1 for size, varies in zip(eqn.params["slice_sizes"], keep, strict=True)]
    starts = [start if varies else jnp.zeros_like(start) for start, varies in zip(starts, keep, strict=True)]
    scale = jax.lax.dynamic_slice(value.scale, starts, sizes)
    return dataclasses.replace(value, v=program.bind(eqn, [value.v, *values[1:]])[0], scale=scale)


def _concatenate(eqn: Equation, values: list[Any]) -> Factored | None:
    """Along a dimension in which the scale varies. Plain arrays among the operands have a scale of 1."""
    along, dtype = eqn.params["dimension"], program.outputs(eqn)[0].dtype
    parts = [value for value in values if isinstance(value, Factored)]
    if any(part.v.dtype != parts[0].v.dtype or part.dtype != dtype for part in parts):
        return None
    if parts[0].v.dtype != dtype and len(parts) < len(values):
        return None
    small = [max(sizes) for sizes in zip(*(part.scale.shape for part in parts), strict=True)]
    if small[:along] + small[along + 1 :] == [n for dim, n in enumerate(parts[0].v.shape) if dim != along]:
        return None  # the scale would be as large as the weight
    vs = [value.v if isinstance(value, Factored) else value for value in values]
    ones = jnp.ones((1,) * vs[0].ndim, parts[0].scale.dtype)
    scales = [
        jnp.broadcast_to(value.scale if isinstance(value, Factored) else ones, [*small[:along], n, *small[along + 1 :]])
        for value, n in zip(values, [v.shape[along] for v in vs], strict=True)
    ]
    scale = jnp.concatenate(scales, along)
    rebuilt = any(part.rebuilt for part in parts)
    return dataclasses.replace(parts[0], v=jnp.concatenate(vs, along), scale=scale, rebuilt=rebuilt)


def _map(value: Factored, move: Callable[[jax.Array], jax.Array]) -> Factored:
    return dataclasses.replace(value, v=move(value.v), scale=move(value.scale))


_MOVES: dict[Any, Callable[[Equation, list[Any]], Factored | None]] = {
    primitive.copy_p: _same,
    primitive.neg_p: _same,
    primitive.sharding_constraint_p: _same,
    primitive.stop_gradient_p: _stop_gradient,
    primitive.convert_element_type_p: _convert,
    primitive.transpose_p: _transpose,
    primitive.squeeze_p: _squeeze,
    primitive.rev_p: _reverse,
    primitive.broadcast_in_dim_p: _broadcast,
    primitive.reshape_p: _reshape,
    primitive.slice_p: _slice,
    primitive.dynamic_slice_p: _dynamic_slice,
    primitive.concatenate_p: _concatenate,
}
