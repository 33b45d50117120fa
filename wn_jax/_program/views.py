"""Views: which axes of a weight the dimensions of an intermediate array are.

A program transposes, reshapes, slices and converts a weight before it contracts it. A `View` follows the weight's axes
through these operations. This file knows what each of them does to axes, and nothing of parameters or programs around.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wn_jax._program.jaxpr import Equation, outputs, primitive, shapes

Axis = int | None
Dim = tuple[tuple[Axis, int], ...]
"""A dimension, as the axes that were merged into it, outermost first, each with its size. `None`: a broadcast."""


@dataclasses.dataclass(frozen=True)
class View:
    """An array whose dimensions are axes of `source`: a parameter, or the output of a contraction."""

    source: Hashable
    dims: tuple[Dim, ...]
    partial: frozenset[int] = frozenset()
    """Axes of which the array holds only a slice, or which others were concatenated to."""
    shared: bool = False
    """Whether other arrays were concatenated to it."""
    scaled: bool = False
    """Whether its numbers were negated or multiplied by a scalar."""
    flipped: frozenset[int] = frozenset()
    """Axes whose order was reversed."""
    slices: tuple[tuple[Hashable, Dim], ...] = ()
    """The scans around that give each of their trips a slice of its own, and the dimension that they slice."""

    @classmethod
    def of(cls, source: Hashable, shape: Sequence[int]) -> View:
        """The whole array, its axes counted from 0."""
        return cls(source, tuple(((axis, size),) for axis, size in enumerate(shape)))

    def sliced(self, scan: Hashable) -> View:
        """What a trip of a scan gets of this array."""
        return dataclasses.replace(self, dims=self.dims[1:], slices=(*self.slices, (scan, self.dims[0])))

    def stacked(self, scan: Hashable, length: int) -> View:
        """What a scan makes of the arrays that its trips give."""
        if self.slices and self.slices[-1][0] == scan:
            return dataclasses.replace(self, dims=(self.slices[-1][1], *self.dims), slices=self.slices[:-1])
        return dataclasses.replace(self, dims=(((None, length),), *self.dims))

    def axes(self, dims: Sequence[int]) -> frozenset[int]:
        """The source's axes in these dimensions."""
        return frozenset(axis for dim in dims for axis, _ in self.dims[dim] if axis is not None)

    def broadcasts(self, dims: Sequence[int]) -> bool:
        """Whether one of these dimensions repeats the array."""
        return any(axis is None and size > 1 for dim in dims for axis, size in self.dims[dim])

    def to_source(self, array: jax.Array, ndim: int, reduced: frozenset[int] = frozenset()) -> jax.Array:
        """An array of this view's dimensions, of size 1 in `reduced` axes, laid out as its source of rank `ndim`.

        Axes of the source that the view lacks get size 1.
        """
        sizes = {axis: 1 if axis in reduced else size for dim in self.dims for axis, size in dim if axis is not None}
        order = sorted(range(len(sizes)), key=list(sizes).__getitem__)
        return array.reshape(list(sizes.values())).transpose(order).reshape([sizes.get(i, 1) for i in range(ndim)])

    def from_source(self, array: jax.Array) -> jax.Array:
        """An array of the source's dimensions, of any of which it may have just one, laid out as this view."""
        axes = [axis for dim in self.dims for axis, _ in dim if axis is not None]
        shape = [math.prod(array.shape[axis] for axis, _ in dim if axis is not None) for dim in self.dims]
        return array.transpose([*axes, *(i for i in range(array.ndim) if i not in axes)]).reshape(shape)


def move(eqn: Equation, view: View, operand: int) -> View | None:
    """The view of an equation's result, where operand number `operand` has this one; `None` if it is not understood."""
    rule = MOVES.get(eqn.primitive)
    return rule(eqn, view, operand) if rule else None


def is_scaling(eqn: Equation, operand: int) -> bool:
    """Whether the equation multiplies this operand by a scalar, or divides it by one."""
    if (eqn.primitive is primitive.div_p and operand != 0) or eqn.primitive not in (primitive.mul_p, primitive.div_p):
        return False
    return math.prod(shapes(eqn)[1 - operand]) == 1 and outputs(eqn)[0].shape == shapes(eqn)[operand]


def _same(eqn: Equation, view: View, operand: int) -> View:
    return view


def _negate(eqn: Equation, view: View, operand: int) -> View:
    return dataclasses.replace(view, scaled=True)


def _reverse(eqn: Equation, view: View, operand: int) -> View:
    return dataclasses.replace(view, flipped=view.flipped | view.axes(eqn.params["dimensions"]))


def _convert(eqn: Equation, view: View, operand: int) -> View | None:
    return view if jnp.issubdtype(outputs(eqn)[0].dtype, jnp.floating) else None


def _transpose(eqn: Equation, view: View, operand: int) -> View:
    return dataclasses.replace(view, dims=tuple(view.dims[i] for i in eqn.params["permutation"]))


def _squeeze(eqn: Equation, view: View, operand: int) -> View:
    gone = {dim % len(view.dims) for dim in eqn.params["dimensions"]}
    return dataclasses.replace(view, dims=tuple(dim for i, dim in enumerate(view.dims) if i not in gone))


def _broadcast(eqn: Equation, view: View, operand: int) -> View | None:
    if operand != 0:
        return None
    shape = outputs(eqn)[0].shape
    dims: list[Dim] = [((None, size),) for size in shape]
    for i, target in enumerate(eqn.params["broadcast_dimensions"]):
        if shapes(eqn)[0][i] == shape[target]:
            dims[target] = view.dims[i]
    return dataclasses.replace(view, dims=tuple(dims))


def _reshape(eqn: Equation, view: View, operand: int) -> View | None:
    if operand != 0 or eqn.params.get("dimensions") is not None:
        return None
    dims = _regroup([atom for dim in view.dims for atom in dim], outputs(eqn)[0].shape)
    return None if dims is None else dataclasses.replace(view, dims=dims)


def _regroup(atoms: list[tuple[Axis, int]], shape: Sequence[int]) -> tuple[Dim, ...] | None:
    """Consecutive axes gathered into dimensions of these sizes, or `None` where an axis would have to be split."""
    dims, rest = [], list(atoms)
    for size in shape:
        dim: list[tuple[Axis, int]] = []
        if size == 1 and rest and rest[0][1] == 1:
            dim.append(rest.pop(0))
        while rest and math.prod(n for _, n in dim) < size:
            dim.append(rest.pop(0))
        if math.prod(n for _, n in dim) != size:
            return None
        dims.append(tuple(dim) or ((None, 1),))
    return tuple(dims)


def _slice(eqn: Equation, view: View, operand: int) -> View | None:
    """Of `slice`, and of `dynamic_slice` where the caller has seen to it that data does not choose what is sliced."""
    if operand != 0:
        return None
    dims, partial = list(view.dims), set(view.partial)
    for i, (before, after) in enumerate(zip(shapes(eqn)[0], outputs(eqn)[0].shape, strict=True)):
        if before != after:
            if len(dims[i]) != 1:
                return None
            axis = dims[i][0][0]
            dims[i] = ((axis, after),)
            if axis is not None:
                partial.add(axis)
    return dataclasses.replace(view, dims=tuple(dims), partial=frozenset(partial))


def _concatenate(eqn: Equation, view: View, operand: int) -> View | None:
    along = eqn.params["dimension"]
    if len(view.dims[along]) != 1:
        return None
    axis = view.dims[along][0][0]
    dims = list(view.dims)
    dims[along] = ((axis, outputs(eqn)[0].shape[along]),)
    partial = view.partial | view.axes([along])
    return dataclasses.replace(view, dims=tuple(dims), partial=partial, shared=view.shared or len(eqn.invars) > 1)


MOVES: dict[Any, Callable[[Equation, View, int], View | None]] = {
    primitive.copy_p: _same,
    primitive.name_p: _same,
    primitive.neg_p: _negate,
    primitive.reduce_precision_p: _same,
    primitive.rev_p: _reverse,
    primitive.sharding_constraint_p: _same,
    primitive.stop_gradient_p: _same,
    primitive.convert_element_type_p: _convert,
    primitive.transpose_p: _transpose,
    primitive.squeeze_p: _squeeze,
    primitive.broadcast_in_dim_p: _broadcast,
    primitive.reshape_p: _reshape,
    primitive.slice_p: _slice,
    primitive.dynamic_slice_p: _slice,
    primitive.concatenate_p: _concatenate,
}


@dataclasses.dataclass(frozen=True)
class Contraction:
    """How one operand of a `dot_general` or a convolution takes part: its dimensions, by what becomes of them."""

    operand: int
    contracted: tuple[int, ...]
    kept: tuple[tuple[int, int], ...]
    """(dimension of the operand, dimension of the output) for those that are not summed over."""
    batch: tuple[int, ...] = ()
    """Those of the kept dimensions that the other operand has, too."""


def contractions(eqn: Equation) -> Iterator[Contraction]:
    """The ways to see a `dot_general` or a convolution as a contraction of data with one of its operands."""
    if eqn.primitive is primitive.dot_general_p:
        (contract, batch) = eqn.params["dimension_numbers"]
        free = [
            [i for i in range(len(shapes(eqn)[side])) if i not in (*contract[side], *batch[side])] for side in (0, 1)
        ]
        for side in (0, 1):
            first = len(batch[0]) + (len(free[0]) if side else 0)
            kept = [*zip(batch[side], range(len(batch[side])), strict=True)]
            kept += [(dim, first + i) for i, dim in enumerate(free[side])]
            yield Contraction(side, tuple(contract[side]), tuple(sorted(kept)), tuple(batch[side]))
    elif eqn.primitive is primitive.conv_general_dilated_p:
        numbers = eqn.params["dimension_numbers"]
        feature, *summed = numbers.rhs_spec  # this settles groups, depthwise and transposed kernels alike
        yield Contraction(1, tuple(summed), ((feature, numbers.out_spec[1]),))
