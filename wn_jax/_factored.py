"""Running a program on weights that are not multiplied out: `v` and `g / ||v||`, side by side.

`x @ (v * s)` is `(x @ v) * s`. A `Factored` stands for `v * s` among the values of a running program. Operations that
only move numbers move both of its arrays; a matmul or convolution takes `v` and scales its output; before any other
operation it becomes the weight. So a run is right by construction, and fast where it is understood.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wn_jax import _program as program
from wn_jax._program import Body, Equation, Site, primitive
from wn_jax._views import Contraction, contractions, is_scaling


@functools.partial(jax.tree_util.register_dataclass, data_fields=("v", "scale"), meta_fields=("dtype",))
@dataclasses.dataclass(frozen=True, eq=False)
class Factored:
    """The array `(v * scale).astype(dtype)`. `scale` has the rank of `v`, and size 1 wherever it does not vary."""

    v: jax.Array
    scale: jax.Array
    dtype: Any

    def weight(self) -> jax.Array:
        """The array itself, rounded as it would have been on its way."""
        return (self.v.astype(self.scale.dtype) * self.scale).astype(self.v.dtype).astype(self.dtype)

    def varies(self) -> list[bool]:
        """Along which dimensions the scale varies."""
        return [size > 1 for size in self.scale.shape]


Contract = Callable[[Equation, list[Any], Contraction, Site], Any]
"""What to do at a contraction of a `Factored` operand with an array; `None` leaves it to the weight."""


def run(body: Body, values: Sequence[Any], contract: Contract | None = None, site: Site = ()) -> list[Any]:
    """The results of a program of which some inputs are `Factored`; some of the results may be."""
    return program.interpret(body, values, functools.partial(step, contract or scale_output), site)


def step(contract: Contract, eqn: Equation, values: list[Any], site: Site) -> Sequence[Any]:
    """The results of one equation."""
    if not any(isinstance(value, Factored) for value in values):
        return program.bind(eqn, values)
    for attempt in (_contraction, _moved, _scaled, _called, _scanned, _switched):
        results = attempt(contract, eqn, values, site)
        if results is not None:
            return results
    return program.bind(eqn, [weight(value) for value in values])


def weight(value: Any) -> Any:
    """A value as an array."""
    return value.weight() if isinstance(value, Factored) else value


def scale_output(eqn: Equation, values: list[Any], contraction: Contraction, site: Site) -> Any:
    """The contraction of `v`, times the scale; `None` where the scale varies along what is summed over."""
    parts = contract_v(eqn, values, contraction)
    if parts is None:
        return None
    output, scale = parts
    return (output.astype(jnp.promote_types(scale.dtype, output.dtype)) * scale).astype(output.dtype)


def contract_v(eqn: Equation, values: list[Any], contraction: Contraction) -> tuple[jax.Array, jax.Array] | None:
    """The contraction of `v`, and the scale laid out as its output is."""
    factored = values[contraction.operand]
    varies = factored.varies()
    operands = [value.v.astype(value.dtype) if value is factored else value for value in values]
    out = program.outputs(eqn)[0]
    if jnp.float16 in (factored.dtype, out.dtype) or any(varies[dim] for dim in contraction.contracted):
        return None  # in float16 the output of a direction with large entries would overflow
    kept = dict(contraction.kept)
    shape = [1] * out.ndim
    for dim, target in kept.items():
        shape[target] = factored.scale.shape[dim]
    order = sorted(kept, key=lambda dim: kept[dim])
    scale = jnp.squeeze(factored.scale, tuple(contraction.contracted))
    left = [dim for dim in range(len(varies)) if dim not in contraction.contracted]
    scale = scale.transpose([left.index(dim) for dim in order]).reshape(shape)
    return program.bind(eqn, operands)[0], scale


def _contraction(contract: Contract, eqn: Equation, values: list[Any], site: Site) -> list[Any] | None:
    for contraction in contractions(eqn):
        if isinstance(values[contraction.operand], Factored):
            operands = [value if i == contraction.operand else weight(value) for i, value in enumerate(values)]
            result = contract(eqn, operands, contraction, site)
            if result is not None:
                return [result]
    return None


def _moved(contract: Contract, eqn: Equation, values: list[Any], site: Site) -> list[Any] | None:
    rule = _MOVES.get(eqn.primitive)
    if rule is None or (any(isinstance(value, Factored) for value in values[1:]) and rule is not _concatenate):
        return None
    moved = rule(eqn, values)
    return None if moved is None else [moved]


def _scaled(contract: Contract, eqn: Equation, values: list[Any], site: Site) -> list[Any] | None:
    """A product with a scalar: the scale takes it."""
    for i, value in enumerate(values):
        if isinstance(value, Factored) and is_scaling(eqn, i) and value.dtype == value.v.dtype:
            scalar = jnp.asarray(weight(values[1 - i]), value.scale.dtype).reshape((1,) * value.v.ndim)
            divided = eqn.primitive is primitive.div_p
            scale = value.scale / scalar if divided else value.scale * scalar
            return [dataclasses.replace(value, scale=scale)]
    return None


def _called(contract: Contract, eqn: Equation, values: list[Any], site: Site) -> list[Any] | None:
    """A `jit` is run through, a `remat` stays one. Custom derivative rules hold for the weight only."""
    body = program.call(eqn)
    if body is None or _is_eager(values):
        return None

    def inside(*values: Any) -> list[Any]:
        return run(body, values, contract, site)

    if program.is_plain_jit(eqn):
        return inside(*values)
    again = program.again(eqn, inside)
    return again(*values) if again else None


def _scanned(contract: Contract, eqn: Equation, values: list[Any], site: Site) -> list[Any] | None:
    """A `scan` stays one: its body takes constants and slices as they are."""
    scan = program.scan(eqn)
    if scan is None or _is_eager(values):
        return None
    consts, carry, xs = scan.split(values)

    def trip(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        results = [weight(value) for value in run(scan.body, [*consts, *carry, *xs], contract, site)]
        return results[: scan.num_carry], results[scan.num_carry :]

    carry, ys = scan.run(trip, [weight(value) for value in carry], xs)
    return [*carry, *ys]


def _switched(contract: Contract, eqn: Equation, values: list[Any], site: Site) -> list[Any] | None:
    """A `cond` or `switch` stays one: its branches give arrays."""
    bodies = program.branches(eqn)
    if bodies is None or _is_eager(values):
        return None
    index, *operands = values

    def branch(i: int) -> Callable[..., list[Any]]:
        return lambda *values: [weight(value) for value in run(bodies[i], values, contract, (*site, i))]

    return jax.lax.switch(index, [branch(i) for i in range(len(bodies))], *operands)


def _is_eager(values: Sequence[Any]) -> bool:
    """Outside of any transformation, where the equation as it is runs compiled, and a rewritten one would not."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(list(values)))


def _same(eqn: Equation, values: list[Any]) -> Factored:
    value = values[0]
    return dataclasses.replace(value, v=program.bind(eqn, [value.v])[0])


def _both(eqn: Equation, values: list[Any]) -> Factored:
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
    if math.prod(size for dim, size in enumerate(small) if dim != along) * program.outputs(eqn)[0].shape[along] == (
        program.outputs(eqn)[0].size
    ):
        return None  # the scale would be as large as the weight
    vs = [value.v if isinstance(value, Factored) else value for value in values]
    ones = jnp.ones((1,) * vs[0].ndim, parts[0].scale.dtype)
    scales = [
        jnp.broadcast_to(value.scale if isinstance(value, Factored) else ones, [*small[:along], n, *small[along + 1 :]])
        for value, n in zip(values, [v.shape[along] for v in vs], strict=True)
    ]
    scale = jnp.concatenate(scales, along)
    return dataclasses.replace(parts[0], v=jnp.concatenate(vs, along), scale=scale)


def _map(value: Factored, move: Callable[[jax.Array], jax.Array]) -> Factored:
    return dataclasses.replace(value, v=move(value.v), scale=move(value.scale))


_MOVES: dict[Any, Callable[[Equation, list[Any]], Factored | None]] = {
    primitive.copy_p: _same,
    primitive.neg_p: _same,
    primitive.sharding_constraint_p: _same,
    primitive.stop_gradient_p: _both,
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
