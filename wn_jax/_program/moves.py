"""Moves: the operations that only move numbers, and what each of them does to a weight on its way.

One table, `MOVES`, with a row for each operation and two rules in it. One says where the axes go (`View` to `View`):
it serves those who follow a program. The other says what becomes of the factors (`Factored` to `Factored`): it serves
those who run one. The rules of an operation stand beside each other, above the table. What a view is and what a
factored weight is, `views` and `factored` say. Products with a scalar move no numbers, but keep a weight a weight; they
come last.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.typing import ArrayLike

from wn_jax._program import jaxpr
from wn_jax._program.factored import Factored, Operand, weight
from wn_jax._program.jaxpr import Equation, outputs, primitive, shapes
from wn_jax._program.views import Axis, Dim, View


def move(eqn: Equation, view: View, operand: int) -> View | None:
    """The view of an equation's result, where operand number `operand` has this one; `None` if it is not understood."""
    row = MOVES.get(eqn.primitive)
    if row is None or not _moves_operand(eqn, operand):
        return None
    return row.axes(eqn, view)


def moved(eqn: Equation, values: Sequence[Operand]) -> Factored | None:
    """The result of an equation that only moves numbers, some of them `Factored`; `None` for any other."""
    row = MOVES.get(eqn.primitive)
    if row is None or row.factors is None:
        return None
    if any(isinstance(value, Factored) and not _moves_operand(eqn, i) for i, value in enumerate(values)):
        return None
    return row.factors(eqn, *values)


def _moves_operand(eqn: Equation, operand: int) -> bool:
    """Whether the numbers of this operand are moved. Those behind the first say where to, or how far."""
    return operand == 0 or eqn.primitive is primitive.concatenate_p


@dataclasses.dataclass(frozen=True)
class Move:
    """A row of the table: the two rules of an operation that moves numbers."""

    axes: Callable[[Equation, View], View | None]
    """Where the axes go: from the view of the operand that is moved to that of the result. `None` where they mix."""
    factors: Callable[..., Factored | None] | None
    """Where the factors go: from `(eqn, *values)`, the moved ones `Factored`, to the result.

    A rule gives `None` where the operation must get the weight. Where there is no rule, it always must.
    """
    why_not: str = ""
    """Why there is no rule for the factors."""


# ---- copy, name, stop_gradient, reduce_precision: each number stays where it is, and remains the weight's.


def _keep_axes(_eqn: Equation, view: View) -> View:
    return view


def _apply_to_v(eqn: Equation, value: Factored) -> Factored:
    return dataclasses.replace(value, v=_bind(eqn, value.v))


def _stop_gradients(eqn: Equation, value: Factored) -> Factored:
    # The scale is a function of the parameters, too.
    return dataclasses.replace(value, v=_bind(eqn, value.v), scale=jax.lax.stop_gradient(value.scale))


# ---- neg: a product with -1, which v takes, as it takes all that keeps its shape. (The scale has fewer numbers.)


def _note_scaling(_eqn: Equation, view: View) -> View:
    return dataclasses.replace(view, scaled=True)


# ---- sharding_constraint


def _constrain_v(eqn: Equation, value: Factored) -> Factored | None:
    # What is rebuilt in any case is so before it moves between devices: a weight may have fewer bytes than `v`.
    return None if value.rebuilt else _apply_to_v(eqn, value)


# ---- convert_element_type


def _keep_axes_of_floats(eqn: Equation, view: View) -> View | None:
    return view if jnp.issubdtype(outputs(eqn)[0].dtype, jnp.floating) else None


def _remember_dtype(eqn: Equation, value: Factored) -> Factored | None:
    # Remembered, not done: the weight is rounded after it is scaled. One dtype is all that can be remembered, and a
    # second conversion would round a second time.
    dtype = outputs(eqn)[0].dtype
    fits = value.dtype == value.v.dtype and jnp.issubdtype(dtype, jnp.floating)
    return dataclasses.replace(value, dtype=dtype) if fits else None


# ---- transpose


def _transpose_axes(eqn: Equation, view: View) -> View:
    return dataclasses.replace(view, dims=tuple(view.dims[i] for i in eqn.params["permutation"]))


def _transpose_factors(eqn: Equation, value: Factored) -> Factored:
    order = eqn.params["permutation"]
    return _do_to_both(value, lambda array: jax.lax.transpose(array, order))


# ---- squeeze


def _squeeze_axes(eqn: Equation, view: View) -> View:
    gone = {dim % len(view.dims) for dim in eqn.params["dimensions"]}
    return dataclasses.replace(view, dims=tuple(dim for i, dim in enumerate(view.dims) if i not in gone))


def _squeeze_factors(eqn: Equation, value: Factored) -> Factored:
    gone = eqn.params["dimensions"]
    return _do_to_both(value, lambda array: jax.lax.squeeze(array, gone))


# ---- rev


def _reverse_axes(eqn: Equation, view: View) -> View:
    return dataclasses.replace(view, flipped=view.flipped | view.axes(eqn.params["dimensions"]))


def _reverse_factors(eqn: Equation, value: Factored) -> Factored:
    # Where the scale does not vary it has size 1, and its reversal changes nothing.
    along = eqn.params["dimensions"]
    return _do_to_both(value, lambda array: jax.lax.rev(array, along))


# ---- broadcast_in_dim


def _broadcast_axes(eqn: Equation, view: View) -> View:
    shape = outputs(eqn)[0].shape
    dims: list[Dim] = [((None, size),) for size in shape]
    for dim, target in enumerate(eqn.params["broadcast_dimensions"]):
        if shapes(eqn)[0][dim] == shape[target]:
            dims[target] = view.dims[dim]
    return dataclasses.replace(view, dims=tuple(dims))


def _broadcast_factors(eqn: Equation, value: Factored) -> Factored:
    # The scale stays small: what is repeated does not vary.
    small = [1] * len(outputs(eqn)[0].shape)
    where = eqn.params["broadcast_dimensions"]
    for size, target in zip(value.scale.shape, where, strict=True):
        small[target] = size
    scale = jax.lax.broadcast_in_dim(value.scale, small, where)
    return dataclasses.replace(value, v=_bind(eqn, value.v), scale=scale)


# ---- reshape


def _reshape_axes(eqn: Equation, view: View) -> View | None:
    if eqn.params.get("dimensions") is not None:
        return None
    dims = _regrouped([atom for dim in view.dims for atom in dim], outputs(eqn)[0].shape)
    return None if dims is None else dataclasses.replace(view, dims=dims)


def _regrouped(atoms: Sequence[tuple[Axis, int]], shape: Sequence[int]) -> tuple[Dim, ...] | None:
    """Consecutive axes gathered into dimensions of these sizes, or `None` where an axis would have to be split."""
    dims: list[Dim] = []
    rest = list(atoms)
    for size in shape:
        dim: list[tuple[Axis, int]] = []
        # An axis of size 1 would fit anywhere; it goes into a dimension of size 1, if one comes when it is next.
        if size == 1 and rest and rest[0][1] == 1:
            dim.append(rest.pop(0))
        while rest and math.prod(n for _, n in dim) < size:
            dim.append(rest.pop(0))
        if math.prod(n for _, n in dim) != size:
            return None
        dims.append(tuple(dim) or ((None, 1),))
    return tuple(dims)


def _reshape_factors(eqn: Equation, value: Factored) -> Factored | None:
    """Where no dimension along which the scale varies is mixed with one along which it does not."""
    shape = outputs(eqn)[0].shape
    if eqn.params.get("dimensions") is not None or value.v.size == 0:
        return None  # where a dimension is 0, runs of dimensions hold equally many numbers whatever else they are
    small: list[int] = []
    for before, after in _blocks(value.v.shape, shape):
        varies = {value.scale.shape[dim] > 1 for dim in before if value.v.shape[dim] > 1}
        if len(varies) > 1:
            return None
        small += [shape[dim] if True in varies else 1 for dim in after]
    return dataclasses.replace(value, v=_bind(eqn, value.v), scale=value.scale.reshape(small))


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of dimensions of two shapes of equal size that hold equally many numbers, in order.

    Here an axis may be split, which a view cannot say: a scale that does not vary along it is none the worse.
    """
    blocks: list[tuple[list[int], list[int]]] = []
    i, j = 0, 0
    while i < len(before) or j < len(after):
        first: list[int] = []
        second: list[int] = []
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


# ---- slice and dynamic_slice


def _slice_axes(eqn: Equation, view: View) -> View | None:
    """Of both. Of `dynamic_slice`, the caller has seen to it that data does not choose what is sliced."""
    dims, partial = list(view.dims), set(view.partial)
    for i, (before, after) in enumerate(zip(shapes(eqn)[0], outputs(eqn)[0].shape, strict=True)):
        if before == after:
            continue
        if len(dims[i]) != 1:
            return None  # a slice of merged axes may be no slice of any one of them
        ((axis, _),) = dims[i]
        dims[i] = ((axis, after),)
        if axis is not None:
            partial.add(axis)
    return dataclasses.replace(view, dims=tuple(dims), partial=frozenset(partial))


def _slice_factors(eqn: Equation, value: Factored) -> Factored:
    """The scale is sliced as `v` is where it varies; its one number is kept where it does not."""
    params, keep = eqn.params, value.varies()
    strides = params["strides"] or [1] * len(keep)
    scale = jax.lax.slice(
        value.scale,
        [start if varies else 0 for start, varies in zip(params["start_indices"], keep, strict=True)],
        [limit if varies else 1 for limit, varies in zip(params["limit_indices"], keep, strict=True)],
        [stride if varies else 1 for stride, varies in zip(strides, keep, strict=True)],
    )
    return dataclasses.replace(value, v=_bind(eqn, value.v), scale=scale)


def _dynamic_slice_factors(eqn: Equation, value: Factored, *starts: ArrayLike) -> Factored:
    """As of `slice`, only that a run says where to start."""
    keep = value.varies()
    sizes = [size if varies else 1 for size, varies in zip(eqn.params["slice_sizes"], keep, strict=True)]
    small = [start if varies else jnp.zeros_like(start) for start, varies in zip(starts, keep, strict=True)]
    scale = jax.lax.dynamic_slice(value.scale, small, sizes)
    return dataclasses.replace(value, v=_bind(eqn, value.v, *starts), scale=scale)


# ---- concatenate


def _concatenate_axes(eqn: Equation, view: View) -> View | None:
    along = eqn.params["dimension"]
    if len(view.dims[along]) != 1:
        return None
    ((axis, _),) = view.dims[along]
    dims = list(view.dims)
    dims[along] = ((axis, outputs(eqn)[0].shape[along]),)
    # Others' numbers stand along this axis now, so that the array holds a part of it at most.
    partial = view.partial | view.axes([along])
    return dataclasses.replace(view, dims=tuple(dims), partial=partial, shared=view.shared or len(eqn.invars) > 1)


def _concatenate_factors(eqn: Equation, *values: Operand) -> Factored | None:
    """With a scale that varies along the dimension. Plain arrays among the operands get a scale of 1."""
    along, dtype = eqn.params["dimension"], outputs(eqn)[0].dtype
    parts = [value for value in values if isinstance(value, Factored)]
    first = parts[0]
    if any(part.v.dtype != first.v.dtype or part.dtype != dtype for part in parts):
        return None
    if first.v.dtype != dtype and len(parts) < len(values):
        return None  # plain arrays are of the dtype that the weights are still to be rounded to
    small = [max(sizes) for sizes in zip(*(part.scale.shape for part in parts), strict=True)]
    if small[:along] + small[along + 1 :] == [n for dim, n in enumerate(first.v.shape) if dim != along]:
        return None  # the scale would be as large as the weight

    vs = [value.v if isinstance(value, Factored) else jnp.asarray(value) for value in values]
    one = jnp.ones((1,) * first.v.ndim, first.scale.dtype)
    scales = [
        jnp.broadcast_to(value.scale if isinstance(value, Factored) else one, [*small[:along], n, *small[along + 1 :]])
        for value, n in zip(values, [v.shape[along] for v in vs], strict=True)
    ]
    return dataclasses.replace(
        first,
        v=jnp.concatenate(vs, along),
        scale=jnp.concatenate(scales, along),
        rebuilt=any(part.rebuilt for part in parts),
    )


def _bind(eqn: Equation, v: jax.Array, *others: ArrayLike) -> jax.Array:
    """The operation itself, done to `v`."""
    return jaxpr.bind(eqn, [v, *others])[0]


def _do_to_both(value: Factored, operation: Callable[[jax.Array], jax.Array]) -> Factored:
    return dataclasses.replace(value, v=operation(value.v), scale=operation(value.scale))


MOVES: dict[jex.Primitive, Move] = {
    primitive.copy_p: Move(_keep_axes, _apply_to_v),
    primitive.name_p: Move(
        _keep_axes,
        None,
        "the name is for a remat policy, which may save what bears it: the weight, so that it is not rebuilt again; "
        "with the name on v, v would be saved and the weight still be rebuilt",
    ),
    primitive.stop_gradient_p: Move(_keep_axes, _stop_gradients),
    primitive.reduce_precision_p: Move(
        _keep_axes,
        None,
        "it rounds, and rounding does not commute with a product: the weight must be rounded, and not v. What is to be "
        "rounded later is remembered as a dtype, and this precision may be none of a dtype",
    ),
    primitive.neg_p: Move(_note_scaling, _apply_to_v),
    primitive.sharding_constraint_p: Move(_keep_axes, _constrain_v),
    primitive.convert_element_type_p: Move(_keep_axes_of_floats, _remember_dtype),
    primitive.transpose_p: Move(_transpose_axes, _transpose_factors),
    primitive.squeeze_p: Move(_squeeze_axes, _squeeze_factors),
    primitive.rev_p: Move(_reverse_axes, _reverse_factors),
    primitive.broadcast_in_dim_p: Move(_broadcast_axes, _broadcast_factors),
    primitive.reshape_p: Move(_reshape_axes, _reshape_factors),
    primitive.slice_p: Move(_slice_axes, _slice_factors),
    primitive.dynamic_slice_p: Move(_slice_axes, _dynamic_slice_factors),
    primitive.concatenate_p: Move(_concatenate_axes, _concatenate_factors),
}
"""The two rules of each operation that only moves numbers."""


def is_scaling(eqn: Equation, operand: int) -> bool:
    """Whether the equation multiplies this operand by a scalar, or divides it by one."""
    if eqn.primitive is primitive.div_p:
        if operand != 0:
            return False
    elif eqn.primitive is not primitive.mul_p:
        return False
    # A scalar of shape (1, 1, 1) would give a matrix one more dimension, which is more than a product.
    return math.prod(shapes(eqn)[1 - operand]) == 1 and outputs(eqn)[0].shape == shapes(eqn)[operand]


def scaled(eqn: Equation, values: Sequence[Operand]) -> Factored | None:
    """The result of a multiplication with a scalar, which the scale takes; `None` for any other equation."""
    for i, value in enumerate(values):
        # A weight that was rounded to another dtype must not be scaled before that.
        if isinstance(value, Factored) and is_scaling(eqn, i) and value.dtype == value.v.dtype:
            scalar = jnp.asarray(weight(values[1 - i]), value.scale.dtype).reshape((1,) * value.v.ndim)
            divides = eqn.primitive is primitive.div_p
            return dataclasses.replace(value, scale=value.scale / scalar if divides else value.scale * scalar)
    return None
