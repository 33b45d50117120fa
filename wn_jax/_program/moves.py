"""Moves: the operations that only move numbers, and what each of them does to a weight on its way.

One table, `MOVES`, with a row for each operation and two rules in it. One says where the axes go (`View` to `View`):
it serves those who follow a program. The other says what becomes of the factors (`Factored` to `Factored`): it serves
those who run one. The rules of an operation stand beside each other, above the table. What a view is and what a
factored weight is, `views` and `factored` say. Products with a scalar or a mask move no numbers, but keep a weight a
weight: they are `products`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.typing import ArrayLike

from wn_jax._program import jaxpr
from wn_jax._program.cuts import (
    concatenate_axes,
    concatenate_factors,
    dynamic_slice_axes,
    dynamic_slice_factors,
    slice_axes,
    slice_factors,
    split_axes,
    split_factors,
    stack_axes,
    stack_factors,
    unstack_axes,
    unstack_factors,
)
from wn_jax._program.factored import Factored, Operand
from wn_jax._program.jaxpr import Equation, outputs, primitive, shapes
from wn_jax._program.views import Atom, Dim, Place, View, regrouped


def move(eqn: Equation, view: View, place: Place = Place()) -> View | None:  # noqa: B008, as it is frozen
    """The view of a result, where an operand has this one; `None` if it is not understood."""
    row = MOVES.get(eqn.primitive)
    if row is None or not _moves_operand(eqn, place.operand):
        return None
    return row.axes(eqn, view, place)


def moved(eqn: Equation, values: Sequence[Operand]) -> list[Operand] | None:
    """The results of an equation that only moves numbers, some of them `Factored`; `None` for any other."""
    row = MOVES.get(eqn.primitive)
    if row is None or row.factors is None:
        return None
    if any(isinstance(value, Factored) and not _moves_operand(eqn, i) for i, value in enumerate(values)):
        return None
    result = row.factors(eqn, *values)
    return [result] if isinstance(result, Factored) else result


def _moves_operand(eqn: Equation, operand: int) -> bool:
    """Whether the numbers of this operand are moved. Those behind the first say where to, or how far."""
    return operand == 0 or eqn.primitive in (primitive.concatenate_p, jaxpr.stack_p)


Moved: TypeAlias = Factored | list[Operand] | None


@dataclasses.dataclass(frozen=True)
class Move:
    """A row of the table: the two rules of an operation that moves numbers."""

    axes: Callable[[Equation, View, Place], View | None]
    """Where the axes go: from the view of an operand that is moved to that of a result. `None` where they mix."""
    factors: Callable[..., Moved] | None
    """Where the factors go: from `(eqn, *values)`, the moved ones `Factored`, to the result, or a list of results.

    A rule gives `None` where the operation must get the weight. Where there is no rule, it always must.
    """
    why_not: str = ""
    """Why there is no rule for the factors."""


# ---- copy, name, stop_gradient, reduce_precision: each number stays where it is, and remains the weight's.


def _keep_axes(_eqn: Equation, view: View, _place: Place) -> View:
    return view


def _freeze(_eqn: Equation, view: View, _place: Place) -> View:
    return dataclasses.replace(view, frozen=True)


def _apply_to_v(eqn: Equation, value: Factored) -> Factored:
    return dataclasses.replace(value, v=_bind(eqn, value.v))


def _stop_gradients(eqn: Equation, value: Factored) -> Factored:
    # The scale is a function of the parameters, too.
    return dataclasses.replace(value, v=_bind(eqn, value.v), scale=jax.lax.stop_gradient(value.scale))


# ---- neg: a product with -1, which v takes, as it takes all that keeps its shape. (The scale has fewer numbers.)


def _note_scaling(_eqn: Equation, view: View, _place: Place) -> View:
    return dataclasses.replace(view, scaled=True)


# ---- sharding_constraint


def _constrain_v(eqn: Equation, value: Factored) -> Factored | None:
    # What is rebuilt in any case is so before it moves between devices: a weight may have fewer bytes than `v`.
    return None if value.rebuilt else _apply_to_v(eqn, value)


# ---- convert_element_type


def _keep_axes_of_floats(eqn: Equation, view: View, _place: Place) -> View | None:
    return view if jnp.issubdtype(outputs(eqn)[0].dtype, jnp.floating) else None


def _remember_dtype(eqn: Equation, value: Factored) -> Factored | None:
    # Remembered, not done: the weight is rounded after it is scaled. One dtype is all that can be remembered, and a
    # second conversion would round a second time.
    dtype = outputs(eqn)[0].dtype
    fits = value.dtype == value.v.dtype and jnp.issubdtype(dtype, jnp.floating)
    return dataclasses.replace(value, dtype=dtype) if fits else None


# ---- transpose


def _transpose_axes(eqn: Equation, view: View, _place: Place) -> View:
    return dataclasses.replace(view, dims=tuple(view.dims[i] for i in eqn.params["permutation"]))


def _transpose_factors(eqn: Equation, value: Factored) -> Factored:
    order = eqn.params["permutation"]
    return value.both(lambda array: jax.lax.transpose(array, order))


# ---- squeeze


def _squeeze_axes(eqn: Equation, view: View, _place: Place) -> View:
    gone = {dim % len(view.dims) for dim in eqn.params["dimensions"]}
    return dataclasses.replace(view, dims=tuple(dim for i, dim in enumerate(view.dims) if i not in gone))


def _squeeze_factors(eqn: Equation, value: Factored) -> Factored:
    gone = eqn.params["dimensions"]
    return value.both(lambda array: jax.lax.squeeze(array, gone))


# ---- rev


def _reverse_axes(eqn: Equation, view: View, _place: Place) -> View:
    dims, starts = list(view.dims), list(view.starts)
    for i in eqn.params["dimensions"]:
        for axis, size, stride in dims[i].atoms:
            if axis is not None:
                starts[axis] += (size - 1) * stride
        atoms = tuple(atom._replace(stride=-atom.stride) for atom in dims[i].atoms)
        dims[i] = Dim(atoms, dims[i].after, dims[i].before)
    return dataclasses.replace(view, dims=tuple(dims), starts=tuple(starts))


def _reverse_factors(eqn: Equation, value: Factored) -> Factored:
    # Where the scale does not vary it has size 1, and its reversal changes nothing.
    along = eqn.params["dimensions"]
    return value.both(lambda array: jax.lax.rev(array, along))


# ---- broadcast_in_dim


def _broadcast_axes(eqn: Equation, view: View, _place: Place) -> View:
    shape = outputs(eqn)[0].shape
    dims = [Dim.broadcast(size) for size in shape]
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


def _reshape_axes(eqn: Equation, view: View, _place: Place) -> View | None:
    order = eqn.params.get("dimensions") or range(len(view.dims))  # in which it reads them: it may transpose first
    dims = regrouped([view.dims[i] for i in order], outputs(eqn)[0].shape)
    return None if dims is None else dataclasses.replace(view, dims=dims)


def _reshape_factors(eqn: Equation, value: Factored) -> Factored | None:
    """Where no dimension along which the scale varies is mixed with one along which it does not."""
    shape, order = outputs(eqn)[0].shape, eqn.params.get("dimensions")
    if value.v.size == 0:
        return None  # where a dimension is 0, runs of dimensions hold equally many numbers whatever else they are
    turned = value if order is None else value.both(lambda array: jax.lax.transpose(array, order))
    small: list[int] = []
    for before, after in _blocks(turned.v.shape, shape):
        varies = {turned.scale.shape[dim] > 1 for dim in before if turned.v.shape[dim] > 1}
        if len(varies) > 1:
            return None
        small += [shape[dim] if True in varies else 1 for dim in after]
    return dataclasses.replace(value, v=_bind(eqn, value.v), scale=turned.scale.reshape(small))


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


# ---- tile


def _tile_axes(eqn: Equation, view: View, _place: Place) -> View | None:
    dims = list(view.dims)
    for i, times in enumerate(eqn.params["reps"]):
        if times != 1:
            if dims[i].is_beside_others or times == 0:
                return None
            dims[i] = Dim.of((Atom(None, times, 0), *dims[i].atoms))
    return dataclasses.replace(view, dims=tuple(dims))


def _tile_factors(eqn: Equation, value: Factored) -> Factored:
    # The scale stays small: what is repeated does not vary, unless a dimension along which it does is.
    times = [n if varies else 1 for n, varies in zip(eqn.params["reps"], value.varies(), strict=True)]
    return dataclasses.replace(value, v=_bind(eqn, value.v), scale=jnp.tile(value.scale, times))


# ---- reshard


def _reshard_factors(eqn: Equation, value: Factored) -> Factored | None:
    """As of a constraint on the sharding; the scale follows where it varies."""
    if value.rebuilt:
        return None
    v = _bind(eqn, value.v)
    sharding = jax.typeof(v).sharding
    names = [name if varies else None for name, varies in zip(sharding.spec, value.varies(), strict=True)]
    scale = jax.sharding.reshard(
        value.scale, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*names))
    )
    return dataclasses.replace(value, v=v, scale=scale)


def _bind(eqn: Equation, v: jax.Array, *others: ArrayLike) -> jax.Array:
    """The operation itself, done to `v`."""
    return jaxpr.bind(eqn, [v, *others])[0]


MOVES: dict[jex.Primitive, Move] = {
    primitive.copy_p: Move(_keep_axes, _apply_to_v),
    primitive.name_p: Move(
        _keep_axes,
        None,
        "the name is for a remat policy, which may save what bears it: the weight, so that it is not rebuilt again; "
        "with the name on v, v would be saved and the weight still be rebuilt",
    ),
    primitive.stop_gradient_p: Move(_freeze, _stop_gradients),
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
    primitive.slice_p: Move(slice_axes, slice_factors),
    primitive.dynamic_slice_p: Move(dynamic_slice_axes, dynamic_slice_factors),
    primitive.concatenate_p: Move(concatenate_axes, concatenate_factors),
    jaxpr.stack_p: Move(stack_axes, stack_factors),
    jaxpr.split_p: Move(split_axes, split_factors),
    jaxpr.unstack_p: Move(unstack_axes, unstack_factors),
    jaxpr.tile_p: Move(_tile_axes, _tile_factors),
    jaxpr.reshard_p: Move(_keep_axes, _reshard_factors),
}
"""The two rules of each operation that only moves numbers."""
