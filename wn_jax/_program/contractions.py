"""Contractions: which dimensions of an operand a matmul or a convolution sums over, and where the others go."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from wn_jax._program.jaxpr import Equation, primitive, ragged_dot_p, shapes


@dataclasses.dataclass(frozen=True)
class Contraction:
    """How one operand of a matmul or a convolution takes part: its dimensions, by what becomes of them."""

    operand: int
    """Which of the two it is."""
    contracted: tuple[int, ...]
    """The dimensions that are summed over."""
    kept: tuple[tuple[int, int], ...]
    """(dimension of the operand, dimension of the output) for those that the output has."""
    batch: tuple[int, ...] = ()
    """Those of the kept dimensions that the other operand has, too."""
    group: int | None = None
    """The dimension whose matrices take rows of the other operand in turn, as the experts of a `ragged_dot` do."""


def contractions(eqn: Equation) -> Iterator[Contraction]:
    """The ways to see an equation as a contraction of data with one of its operands; none for most equations."""
    if eqn.primitive is primitive.dot_general_p:
        yield _side_of_dot_general(eqn, 0)
        yield _side_of_dot_general(eqn, 1)
    elif eqn.primitive is primitive.conv_general_dilated_p:
        numbers = eqn.params["dimension_numbers"]
        # JAX keeps the kernel's dimensions in the order O, I, spatial. O are the output's channels and all others are
        # summed over, whatever the groups: this settles grouped, depthwise and transposed convolutions alike.
        feature, *summed = numbers.rhs_spec
        yield Contraction(1, tuple(summed), ((feature, numbers.out_spec[1]),))
    elif eqn.primitive is ragged_dot_p:
        yield from _groups_of_ragged_dot(eqn)


def _side_of_dot_general(eqn: Equation, side: int) -> Contraction:
    """One operand of a `dot_general`, whose output has the batch dimensions, then what is left of each operand."""
    contracted, batch = eqn.params["dimension_numbers"]
    free = [
        [dim for dim in range(len(shape)) if dim not in (*contracted[i], *batch[i])]
        for i, shape in enumerate(shapes(eqn)[:2])
    ]
    first = len(batch[0]) + (len(free[0]) if side == 1 else 0)
    kept = [(dim, target) for target, dim in enumerate(batch[side])]
    kept += [(dim, target) for target, dim in enumerate(free[side], first)]
    return Contraction(side, tuple(contracted[side]), tuple(sorted(kept)), tuple(batch[side]))


def _groups_of_ragged_dot(eqn: Equation) -> Iterator[Contraction]:
    """The matrices of a `ragged_dot` whose rows are in groups; its other modes (of gradients) are not understood."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    groups, ragged = numbers.rhs_group_dimensions, numbers.lhs_ragged_dimensions
    (left, right), (left_batch, right_batch) = numbers.dot_dimension_numbers
    if len(groups) != 1 or {*ragged} & {*left, *left_batch}:
        return
    left_shape, right_shape = shapes(eqn)[:2]
    free = [dim for dim in range(len(right_shape)) if dim not in (*right, *right_batch, *groups)]
    first = len(left_shape) - len(left)
    kept = [(dim, target) for target, dim in enumerate(right_batch)]
    kept += [(dim, target) for target, dim in enumerate(free, first)]
    yield Contraction(1, tuple(right), tuple(sorted(kept)), tuple(right_batch), groups[0])
