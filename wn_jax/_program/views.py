"""Views: which axes of a weight the dimensions of an intermediate array are.

A program transposes, reshapes, slices and converts a weight before it contracts it. A `View` says where the weight's
axes are by then. This file owns what a view is, and which dimensions of an operand a contraction sums over. What each
operation does to a view, `moves` says; parameters, and the program around, are the walk's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterator, Sequence

import jax

from wn_jax._program.jaxpr import Equation, primitive, shapes

Axis = int | None
"""An axis of a view's source, counted from 0; `None` stands for one that the source does not have."""
Dim = tuple[tuple[Axis, int], ...]
"""A dimension, as the axes that were merged into it, outermost first, each with its size. `None`: a broadcast."""


@dataclasses.dataclass(frozen=True)
class View:
    """An array whose dimensions are axes of `source`: a parameter, or the output of a contraction."""

    source: Hashable
    """Its name: the number of an input of the program, or the site of the contraction."""
    dims: tuple[Dim, ...]
    """The axes in each dimension of the array."""
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
        """The part of this array that a trip of a scan gets."""
        return dataclasses.replace(self, dims=self.dims[1:], slices=(*self.slices, (scan, self.dims[0])))

    def stacked(self, scan: Hashable, length: int) -> View:
        """The array that a scan makes of those that its trips give."""
        # Slices that are handed on untouched come together again as the axis that they were slices of.
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
        axes = list(sizes)
        order = sorted(range(len(axes)), key=lambda i: axes[i])
        apart = array.reshape(list(sizes.values()))  # a dimension for each axis, as dimensions may be several
        return apart.transpose(order).reshape([sizes.get(axis, 1) for axis in range(ndim)])

    def from_source(self, array: jax.Array) -> jax.Array:
        """An array of the source's dimensions, of any of which it may have just one, laid out as this view."""
        axes = [axis for dim in self.dims for axis, _ in dim if axis is not None]
        lacking = [axis for axis in range(array.ndim) if axis not in axes]  # of size 1, so that reshape drops them
        shape = [math.prod(array.shape[axis] for axis, _ in dim if axis is not None) for dim in self.dims]
        return array.transpose([*axes, *lacking]).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Contraction:
    """How one operand of a `dot_general` or a convolution takes part: its dimensions, by what becomes of them."""

    operand: int
    """Which of the two it is."""
    contracted: tuple[int, ...]
    """The dimensions that are summed over."""
    kept: tuple[tuple[int, int], ...]
    """(dimension of the operand, dimension of the output) for those that are not summed over."""
    batch: tuple[int, ...] = ()
    """Those of the kept dimensions that the other operand has, too."""


def contractions(eqn: Equation) -> Iterator[Contraction]:
    """The ways to see a `dot_general` or a convolution as a contraction of data with one of its operands."""
    if eqn.primitive is primitive.dot_general_p:
        yield _side_of_dot_general(eqn, 0)
        yield _side_of_dot_general(eqn, 1)
    elif eqn.primitive is primitive.conv_general_dilated_p:
        numbers = eqn.params["dimension_numbers"]
        # JAX keeps the kernel's dimensions in the order O, I, spatial. O are the output's channels and all others are
        # summed over, whatever the groups: this settles grouped, depthwise and transposed convolutions alike.
        feature, *summed = numbers.rhs_spec
        yield Contraction(1, tuple(summed), ((feature, numbers.out_spec[1]),))


def _side_of_dot_general(eqn: Equation, side: int) -> Contraction:
    """One operand of a `dot_general`, whose output has the batch dimensions, then what is left of each operand."""
    contracted, batch = eqn.params["dimension_numbers"]
    free = [
        [dim for dim in range(len(shape)) if dim not in (*contracted[i], *batch[i])]
        for i, shape in enumerate(shapes(eqn))
    ]
    first = len(batch[0]) + (len(free[0]) if side == 1 else 0)
    kept = [(dim, target) for target, dim in enumerate(batch[side])]
    kept += [(dim, target) for target, dim in enumerate(free[side], first)]
    return Contraction(side, tuple(contracted[side]), tuple(sorted(kept)), tuple(batch[side]))
