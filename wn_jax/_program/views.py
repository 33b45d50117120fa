"""Views: where the numbers of an intermediate array come from in a weight.

A program transposes, reshapes, slices and converts a weight before it contracts it. A `View` says where the weight's
axes are by then, and which of their numbers are there. This file owns what a view is. What each operation does to one,
`moves` says; what a contraction sums over, `contractions`; parameters, and the program around, are the walk's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import numpy as np

from wn_jax._program.facts import Fact
from wn_jax._types import Shape

Axis: TypeAlias = int | None
"""An axis of a view's source, counted from 0; `None` stands for one that the source does not have."""


class Atom(NamedTuple):
    """Numbers at equal distances along one axis of a source. An axis that a reshape splits becomes several."""

    axis: Axis
    """The axis; `None` of a broadcast, which repeats what is there."""
    size: int
    """How many numbers."""
    stride: int = 1
    """How far apart they are along the axis; negative where the order is reversed, and 0 in a broadcast."""


@dataclasses.dataclass(frozen=True)
class Dim:
    """A dimension of an array: the atoms that were merged into it, outermost first, and what stands beside them."""

    atoms: tuple[Atom, ...]
    before: int = 0
    """How many numbers of other arrays, which were concatenated, come first."""
    after: int = 0
    """How many come last."""

    @property
    def content(self) -> int:
        """How many numbers the atoms make."""
        return math.prod(atom.size for atom in self.atoms)

    @property
    def size(self) -> int:
        """How many numbers there are along the dimension."""
        return self.before + self.content + self.after

    @property
    def is_beside_others(self) -> bool:
        """Whether other arrays stand along this dimension."""
        return bool(self.before or self.after)

    @classmethod
    def of(cls, atoms: Sequence[Atom]) -> Dim:
        """The dimension that these atoms make, those that are one run of an axis in one piece."""
        merged: list[Atom] = []
        for atom in atoms:
            last = merged[-1] if merged else None
            if last and _are_one_run(last, atom):
                merged[-1] = Atom(atom.axis, last.size * atom.size, atom.stride)
            else:
                merged.append(atom)
        return cls(tuple(merged))

    @classmethod
    def broadcast(cls, size: int) -> Dim:
        """A dimension along which everything is repeated."""
        return cls((Atom(None, size, 0),))


def _are_one_run(outer: Atom, inner: Atom) -> bool:
    return outer.axis == inner.axis and outer.stride == inner.stride * inner.size and 1 not in (outer.size, inner.size)


@dataclasses.dataclass(frozen=True)
class View:
    """An array whose numbers are those of `source`: a parameter, or the output of a contraction."""

    source: Hashable
    """Its name: the number of an input of the program, or the site of the contraction."""
    shape: Shape
    """The source's shape."""
    dims: tuple[Dim, ...]
    """The dimensions of the array."""
    starts: tuple[int, ...]
    """Of each axis of the source: where the first number of the array is along it."""
    unplaced: frozenset[int] = frozenset()
    """Axes that were sliced at a place that only a run of the program knows."""
    scaled: bool = False
    """Whether its numbers were negated or multiplied by a scalar."""
    masked: bool = False
    """Whether they were multiplied by an array of constants, or replaced by zeros in places."""
    frozen: bool = False
    """Whether no gradient passes."""
    slices: tuple[tuple[Hashable, Dim], ...] = ()
    """The scans around that give each of their trips a slice of its own, and the dimension that they slice."""

    @classmethod
    def of(cls, source: Hashable, shape: Sequence[int]) -> View:
        """The whole array, its axes counted from 0."""
        dims = tuple(Dim((Atom(axis, size),)) for axis, size in enumerate(shape))
        return cls(source, tuple(shape), dims, (0,) * len(shape))

    def sliced(self, scan: Hashable) -> View:
        """The part of this array that a trip of a scan gets."""
        return dataclasses.replace(self, dims=self.dims[1:], slices=(*self.slices, (scan, self.dims[0])))

    def stacked(self, scan: Hashable, length: int) -> View:
        """The array that a scan makes of those that its trips give."""
        # Slices that are handed on untouched come together again as the axis that they were slices of.
        if self.slices and self.slices[-1][0] == scan:
            return dataclasses.replace(self, dims=(self.slices[-1][1], *self.dims), slices=self.slices[:-1])
        return dataclasses.replace(self, dims=(Dim.broadcast(length), *self.dims))

    @property
    def atoms(self) -> list[Atom]:
        """The atoms of the dimensions that scans around slice, the outermost scan first, then of the array's own."""
        sliced = sorted(self.slices, key=lambda pair: len(pair[0]) if isinstance(pair[0], tuple) else 0)
        return [atom for dim in (*(dim for _, dim in sliced), *self.dims) for atom in dim.atoms]

    @property
    def partial(self) -> frozenset[int]:
        """Axes of which the array, or all the slices that a scan makes of one, hold a part only."""
        held = [1] * len(self.shape)
        for atom in self.atoms:
            if atom.axis is not None:
                held[atom.axis] *= atom.size
        return frozenset(axis for axis, size in enumerate(self.shape) if held[axis] != size)

    @property
    def sliced_axes(self) -> frozenset[int]:
        """The axes of which scans around take a slice in each trip."""
        atoms = [atom for _, dim in self.slices for atom in dim.atoms]
        return frozenset(atom.axis for atom in atoms if atom.axis is not None and atom.size > 1)

    @property
    def is_whole(self) -> bool:
        """Whether it is the source as it was, as far as places go."""
        return self.dims == View.of(self.source, self.shape).dims

    @property
    def is_empty(self) -> bool:
        """Whether nothing of the source is in the array."""
        return any(dim.content == 0 for dim in self.dims) and 0 not in self.shape

    def axes(self, dims: Sequence[int]) -> frozenset[int]:
        """The source's axes in these dimensions."""
        return frozenset(atom.axis for dim in dims for atom in self.dims[dim].atoms if atom.axis is not None)

    def broadcasts(self, dims: Sequence[int]) -> bool:
        """Whether one of these dimensions repeats the array."""
        return any(atom.axis is None and atom.size > 1 for dim in dims for atom in self.dims[dim].atoms)

    def places(self, atoms: Sequence[Atom]) -> list[np.ndarray]:
        """Of each axis of the source: where along it the numbers of a grid of these atoms are.

        The arrays broadcast to the grid, which has a dimension for each atom.
        """
        found = [np.full((1,) * len(atoms), start) for start in self.starts]
        for i, atom in enumerate(atoms):
            if atom.axis is not None:
                steps = atom.stride * np.arange(atom.size)
                found[atom.axis] = found[atom.axis] + steps.reshape([-1 if i == j else 1 for j in range(len(atoms))])
        return found

    def take(self, source: jax.Array, reduced: frozenset[int]) -> jax.Array:
        """The numbers of `source`, which has size 1 in `reduced` axes, on the grid of `atoms`: the inverse of `put`."""
        atoms = [Atom(atom.axis, 1) if atom.axis is None or atom.axis in reduced else atom for atom in self.atoms]
        places = [np.zeros_like(place) if axis in reduced else place for axis, place in enumerate(self.places(atoms))]
        if self.partial - reduced or any(atom.stride < 0 for atom in atoms):
            return source[tuple(places)]
        order = _by_axis(atoms)
        apart = source.reshape([atoms[i].size for i in order])
        return apart.transpose([order.index(i) for i in range(len(order))])

    def put(self, into: jax.Array, grid: jax.Array, reduced: frozenset[int]) -> jax.Array:
        """`into`, laid out as the source with size 1 in `reduced` axes, with the numbers of a grid where they belong.

        The grid has a dimension for each of `atoms`, of size 1 where it is a broadcast or an axis that is reduced.
        """
        atoms = [atom if n > 1 else Atom(atom.axis, 1) for atom, n in zip(self.atoms, grid.shape, strict=True)]
        if not self.partial - reduced:
            return self._laid_out(grid, atoms).astype(into.dtype)
        places = self.places(atoms)
        where = tuple(np.zeros_like(place) if axis in reduced else place for axis, place in enumerate(places))
        return into.at[where].set(grid.astype(into.dtype))

    def _laid_out(self, grid: jax.Array, atoms: Sequence[Atom]) -> jax.Array:
        """The numbers of a grid that has all of the source, in the source's order: without a scatter."""
        flipped = [i for i, atom in enumerate(atoms) if atom.stride < 0]
        grid = jax.numpy.flip(grid, flipped) if flipped else grid
        sizes = [1] * len(self.shape)
        for atom in atoms:
            if atom.axis is not None:
                sizes[atom.axis] *= atom.size
        return grid.transpose(_by_axis(atoms)).reshape(sizes)


def _by_axis(atoms: Sequence[Atom]) -> list[int]:
    """The order of the atoms in their source: by axis, the outermost of an axis first; broadcasts come last."""
    return sorted(range(len(atoms)), key=lambda i: (atoms[i].axis is None, atoms[i].axis or 0, -abs(atoms[i].stride)))


@dataclasses.dataclass(frozen=True)
class Place:
    """Which part of an equation a view passes through."""

    operand: int = 0
    """Which operand has the view."""
    output: int = 0
    """Which result is asked for."""
    facts: Sequence[Fact] = ()
    """What is known of each operand, such as where a slice starts."""


def regrouped(dims: Sequence[Dim], shape: Sequence[int]) -> tuple[Dim, ...] | None:
    """The atoms of consecutive dimensions, gathered and split into dimensions of these sizes.

    `None` where an atom's size fits none of the ways to split it, or where other arrays beside would be mixed in.
    """
    if not all(isinstance(size, int) and size > 0 for size in (*shape, *(dim.size for dim in dims))):
        return None  # a dimension of 0 holds equally many numbers whatever else there is; jax.export leaves some open
    rest: list[Atom | Dim] = []
    for dim in dims:
        # A broadcast to size 1 is nothing, and would take the place of an axis of size 1.
        rest += [dim] if dim.is_beside_others else [atom for atom in dim.atoms if atom != Atom(None, 1, 0)]
    result: list[Dim] = []
    for size in shape:
        taken = _take(rest, size)
        if taken is None:
            return None
        result.append(taken)
    ones = [atom for atom in rest if isinstance(atom, Atom)]  # of size 1, or the sizes would not have fit
    if result and ones and not result[-1].is_beside_others:
        result[-1] = Dim.of((*result[-1].atoms, *ones))
    return tuple(result)


def _take(rest: list[Atom | Dim], size: int) -> Dim | None:
    """A dimension of this size from the first of `rest`, which it leaves there."""
    # An atom of size 1 would fit anywhere; it goes into a dimension of size 1, if one comes when it is next.
    if size == 1:
        first = rest.pop(0) if rest and rest[0].size == 1 else None
        return Dim((first,)) if isinstance(first, Atom) else first or Dim.broadcast(1)
    atoms: list[Atom] = []
    while size > 1:
        if not rest:
            return None
        first = rest.pop(0)
        if isinstance(first, Dim):
            # Its numbers and the others' can be told apart only while it stays a dimension of its own.
            return first if first.size == size and all(atom.size == 1 for atom in atoms) else None
        if first.size > size:
            if first.size % size:
                return None
            inner = first.size // size
            rest.insert(0, first._replace(size=inner))
            first = Atom(first.axis, size, first.stride * inner)
        if size % first.size:
            return None
        atoms.append(first)
        size //= first.size
    return Dim.of(atoms)


def paired(first: Dim, second: Dim) -> list[tuple[Atom, Atom]] | None:
    """Two dimensions of one size as pairs of atoms of one size each, or `None` where they cannot be split so."""
    sizes = _common_sizes([atom.size for atom in first.atoms], [atom.size for atom in second.atoms])
    if sizes is None or first.is_beside_others or second.is_beside_others:
        return None
    one, two = (regrouped([dim], sizes) for dim in (first, second))
    if one is None or two is None:
        return None
    return [(_longest(a), _longest(b)) for a, b in zip(one, two, strict=True)]


def _longest(dim: Dim) -> Atom:
    return max(dim.atoms, key=lambda atom: atom.size)  # all others, of size 1, were merged into it


def _common_sizes(first: Sequence[int], second: Sequence[int]) -> list[int] | None:
    """The coarsest sizes that both are products of, in order; `None` where there are none."""
    one, two, sizes = [n for n in first if n > 1], [n for n in second if n > 1], []
    while one and two:
        a, b = one.pop(0), two.pop(0)
        small, large, of = (a, b, two) if a <= b else (b, a, one)
        if large % small:
            return None
        sizes.append(small)
        if large > small:
            of.insert(0, large // small)
    return sizes if not one and not two else None
