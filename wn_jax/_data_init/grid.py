"""Grids: from the output of a contraction to the `g` and the bias that it sets, and back.

An output has dimensions that are features of a weight, or several of them merged, or copies of them side by side. On
the grid each axis has a dimension of its own. This file owns the two targets of an initialization, and these layouts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from wn_jax._node import WeightNorm
from wn_jax._program.jaxpr import Site
from wn_jax._program.notes import Bias, Use
from wn_jax._program.reading import ParameterLeaf
from wn_jax._program.views import Atom, Dim, View, paired


@dataclasses.dataclass(frozen=True)
class Target:
    """A node, or a part of one, that gets its `g` at one contraction."""

    leaf: ParameterLeaf
    """The node's leaf."""
    use: Use
    """The contraction."""

    @property
    def node(self) -> WeightNorm:
        """The node itself. Others are no targets, as their `g` is not known."""
        return cast(WeightNorm, self.leaf.node)

    @property
    def _own(self) -> dict[int, Dim]:
        """The dimensions of the output that are dimensions of the weight."""
        return {target: self.use.view.dims[dim] for dim, target in self.use.contraction.kept}

    @property
    def grid(self) -> list[tuple[int, Atom]]:
        """The dimensions of the grid: of which dimension of the output each is a part, and the weight's axis."""
        own, found = self._own, list[tuple[int, Atom]]()
        for dim, size in enumerate(self.use.output):
            atoms = own[dim].atoms if dim in own else (Atom(None, size, 0),)
            found += [(dim, atom) for atom in atoms or (Atom(None, 1, 0),)]
        return found

    @property
    def samples(self) -> tuple[int, ...]:
        """The dimensions of the grid over which statistics are taken."""
        return tuple(i for i, (_, atom) in enumerate(self.grid) if atom.axis is None)

    @property
    def sample_count(self) -> int:
        """How many numbers each statistic is of."""
        return math.prod(self.grid[i][1].size for i in self.samples)

    @property
    def features(self) -> frozenset[int]:
        """The dimensions of the output along which features vary."""
        return frozenset(dim for dim, atom in self.grid if atom.axis is not None)

    @property
    def _window(self) -> tuple[slice, ...]:
        """Where this weight's numbers are in an output that others stand beside."""
        own = self._own
        parts = [own.get(dim, Dim.broadcast(size)) for dim, size in enumerate(self.use.output)]
        return tuple(slice(part.before, part.before + part.content) for part in parts)

    @property
    def is_alone(self) -> bool:
        """Whether no other weight has features in the output."""
        return not any(dim.is_beside_others for dim in self._own.values())

    def on_grid(self, output: jax.Array) -> jax.Array:
        """An array of the output's shape on the grid."""
        output = output if self.is_alone else output[self._window]
        sizes = [atom.size for _, atom in self.grid]
        return output if list(output.shape) == sizes else output.reshape(sizes)

    def grid_dim(self, dim: int) -> int:
        """The dimension of the grid that a dimension of the output is, where it is not split."""
        return [part for part, _ in self.grid].index(dim)

    def features_on_grid(self, numbers: jax.Array) -> jax.Array:
        """Numbers of features, laid out as the output with size 1 along all else, on the grid: undoes `in_output`."""
        own = self._own
        window = tuple(part if i in own else slice(None) for i, part in enumerate(self._window))
        numbers = jnp.broadcast_to(numbers, [own[i].size if i in own else 1 for i in range(numbers.ndim)])[window]
        apart = numbers.reshape([atom.size if dim in own else 1 for dim, atom in self.grid])
        return apart[tuple(slice(1) if atom.axis is None else slice(None) for _, atom in self.grid)]

    def in_output(self, numbers: jax.Array, others: jax.Array) -> jax.Array:
        """Numbers of the grid, of size 1 along samples, laid out as the output, among those of others beside."""
        own = self._own
        sizes = [atom.size if dim in own else 1 for dim, atom in self.grid]
        shape = [own[dim].content if dim in own else 1 for dim in range(len(self.use.output))]
        laid_out = numbers
        if sizes != list(numbers.shape):
            laid_out = jnp.broadcast_to(laid_out, sizes)
        if shape != list(laid_out.shape):
            laid_out = laid_out.reshape(shape)
        if self.is_alone:
            return laid_out
        whole = [dim.size if (dim := own.get(i)) else 1 for i in range(len(shape))]
        window = tuple(part if i in own else slice(None) for i, part in enumerate(self._window))
        return jnp.broadcast_to(others, whole).at[window].set(laid_out)

    def in_view(self, numbers: jax.Array) -> jax.Array:
        """Numbers of the grid, of size 1 along samples, in the order of the weight's view.

        With `group`, their leading axis is the one of the groups.
        """
        contraction, view = self.use.contraction, self.use.view
        grouped = contraction.group is not None
        first = {dim: i + grouped for i, (dim, _) in reversed(list(enumerate(self.grid)))}
        kept, order, sizes = dict(contraction.kept), list[int](), list[int]()
        for dim, parts in enumerate(view.dims):
            if dim == contraction.group:
                order.append(0)
                sizes += [atom.size for atom in parts.atoms]
            elif dim in kept and parts.atoms:
                order += range(first[kept[dim]], first[kept[dim]] + len(parts.atoms))
                sizes += [1 if atom.axis is None else atom.size for atom in parts.atoms]
            else:
                sizes += [1] * len(parts.atoms)
        rest = [i for i in range(numbers.ndim) if i not in order]
        return numbers.transpose([*order, *rest]).reshape(sizes)

    def renewed(self, g: jax.Array, found: jax.Array) -> jax.Array:
        """`g` with what was found, which scans around stacked along leading axes."""
        return _put(self.use.view, g, found, self.use.reduction)


@dataclasses.dataclass(frozen=True)
class BiasTarget:
    """A bias, or a part of one, that is set where the program adds it."""

    leaf: ParameterLeaf
    """The bias."""
    bias: Bias
    """The addition."""
    output: View
    """The contraction's output as the addition meets it, with a dimension for each axis."""
    view: View
    """The bias as the addition meets it, with the same dimensions."""
    features: frozenset[int]
    """The dimensions of the contraction's output along which features vary."""

    @property
    def contraction(self) -> Site:
        """The site of the contraction whose output it is added to."""
        return cast(Site, self.output.source)

    def from_output(self, shift: jax.Array) -> jax.Array:
        """Numbers of the contraction's output, of size 1 but along features, on the grid of these views."""
        samples = frozenset(range(shift.ndim)) - self.features
        return dataclasses.replace(self.output, slices=()).take(shift, samples)

    def from_operand(self, operand: jax.Array) -> jax.Array:
        """The numbers that the program adds, on that grid: one a feature."""
        apart = jnp.broadcast_to(operand, self._shape).reshape([dim.size for dim in self.view.dims])
        along = (slice(1) if atom.axis is None else slice(None) for dim in self.view.dims for atom in dim.atoms)
        return apart[tuple(along)]

    def as_operand(self, numbers: jax.Array, operand: jax.Array) -> jax.Array:
        """Numbers of that grid as the operand of the addition."""
        whole = jnp.broadcast_to(numbers, [dim.size for dim in self.view.dims]).reshape(self._shape)
        return whole[tuple(slice(size) for size in operand.shape)].astype(operand.dtype)

    @property
    def _shape(self) -> list[int]:
        return [dim.size for dim in self.bias.output.dims]

    def renewed(self, bias: jax.Array, found: jax.Array) -> jax.Array:
        """The parameter with what was found, which scans around stacked along leading axes."""
        return _put(self.view, bias, found, frozenset())


def refined(bias: Bias) -> tuple[View, View] | None:
    """The output and the bias with a dimension for each axis of either, in pairs; `None` where they do not fit."""
    pairs: list[tuple[Atom, Atom]] = []
    of_a_number = [Dim.broadcast(1)] * len(bias.output.dims)
    for of_output, of_bias in zip(bias.output.dims, bias.view.dims or of_a_number, strict=True):
        # An operand of size 1 is repeated by the addition itself.
        repeats = of_bias.size == 1 and not of_bias.is_beside_others
        found = paired(of_output, Dim.broadcast(of_output.size) if repeats else of_bias)
        if found is None:
            return None
        pairs += found
    output, view = ([Dim((atom,)) for atom in atoms] for atoms in zip(*pairs, strict=True)) if pairs else ([], [])
    return dataclasses.replace(bias.output, dims=tuple(output)), dataclasses.replace(bias.view, dims=tuple(view))


def places_in_source(view: View, reduced: frozenset[int]) -> np.ndarray:
    """The numbers of the source, counted through, that a view and all slices of it hold; reduced axes count as 1."""
    atoms = [atom for atom in view.atoms if atom.axis is not None and atom.axis not in reduced]
    shape = [1 if axis in reduced else size for axis, size in enumerate(view.shape)]
    places = [np.zeros_like(place) if axis in reduced else place for axis, place in enumerate(view.places(atoms))]
    flat = np.ravel_multi_index(np.broadcast_arrays(*places), shape) if places else np.zeros(())
    return np.ravel(flat)


def _put(view: View, into: jax.Array, found: jax.Array, reduced: frozenset[int]) -> jax.Array:
    """`into` with the numbers of a grid that scans around stacked along leading axes."""
    sliced = [dim for _, dim in view.slices]
    own = found.shape[len(sliced) :]
    atoms = view.atoms
    leading = atoms[: sum(len(dim.atoms) for dim in sliced)]
    return view.put(into, found.reshape([*(atom.size for atom in leading), *own]), reduced)
