"""Repeats: the dimensions of an array along which it repeats itself, as a learned vector does over a batch.

Such an array is no matrix for each sample, but one for all of them. Nothing is known of an operation that is not here.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.extend.core as jex

from wn_jax._program import jaxpr
from wn_jax._program.contractions import contractions
from wn_jax._program.jaxpr import Equation, outputs, primitive, shapes
from wn_jax._types import Shape

Dims = frozenset[int]


def of_result(eqn: Equation, operands: Sequence[Dims]) -> Dims:
    """Those of the (only) result, from those of the operands."""
    if eqn.primitive is primitive.dot_general_p:
        return _of_contraction(eqn, operands)
    if not operands or not outputs(eqn):
        return frozenset()
    out, first = outputs(eqn)[0].shape, shapes(eqn)[0]
    if eqn.primitive is primitive.broadcast_in_dim_p:
        return _of_broadcast(first, operands[0], out, eqn.params["broadcast_dimensions"])
    if eqn.primitive is jaxpr.tile_p:
        return frozenset(i for i, size in enumerate(first) if i in operands[0] or size == 1)
    if eqn.primitive is primitive.transpose_p:
        return frozenset(i for i, dim in enumerate(eqn.params["permutation"]) if dim in operands[0])
    if eqn.primitive in _REDUCTIONS:
        kept = [dim for dim in range(len(first)) if dim not in eqn.params["axes"]]
        return frozenset(i for i, dim in enumerate(kept) if dim in operands[0])
    if eqn.primitive in (primitive.reshape_p, primitive.squeeze_p):
        return _of_leading(first, operands[0], out)
    return _of_elementwise(eqn, operands, out) if eqn.primitive in _ELEMENTWISE else frozenset()


def _of_broadcast(before: Shape, repeats: Dims, after: Shape, where: Sequence[int]) -> Dims:
    source = dict(zip(where, range(len(before)), strict=True))
    varies = {dim for dim, own in source.items() if own not in repeats and before[own] == after[dim]}
    return frozenset(range(len(after))) - varies


def _of_leading(before: Shape, repeats: Dims, after: Shape) -> Dims:
    """Of a reshape, the dimensions that come before the first that it changes."""
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
    return frozenset(dim for dim in repeats if dim < same)


def _of_elementwise(eqn: Equation, operands: Sequence[Dims], out: Shape) -> Dims:
    found = frozenset(dim for dim, size in enumerate(out) if size > 1)  # along one number, nothing is repeated
    for shape, repeats in zip(shapes(eqn), operands, strict=True):
        found -= {dim for dim, size in enumerate(shape) if size > 1 and dim not in repeats}
    return found


def _of_contraction(eqn: Equation, operands: Sequence[Dims]) -> Dims:
    varies: set[int] = set()
    for side in contractions(eqn):
        varies |= {target for dim, target in side.kept if dim not in operands[side.operand]}
    return frozenset(range(len(outputs(eqn)[0].shape))) - varies


_REDUCTIONS = frozenset({primitive.reduce_sum_p, primitive.reduce_max_p, primitive.reduce_min_p})
_ELEMENTWISE: frozenset[jex.Primitive] = frozenset(
    getattr(primitive, f"{name}_p")
    for name in (
        *("abs", "add", "convert_element_type", "copy", "div", "erf", "exp", "exp2", "expm1", "integer_pow", "log"),
        *("log1p", "logistic", "max", "min", "mul", "neg", "pow", "rsqrt", "select_n", "sign", "sin", "sqrt", "square"),
        *("stop_gradient", "sub", "tanh"),
    )
)
