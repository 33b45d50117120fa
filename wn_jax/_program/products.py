"""Products that keep a weight a weight: with a scalar, and with an array of constants, such as a mask.

As of the moves, there are two rules for each: whether a view passes, and what becomes of a `Factored`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import cast

import jax.numpy as jnp

from wn_jax._program import jaxpr
from wn_jax._program.factored import Factored, Operand, weight
from wn_jax._program.jaxpr import Equation, outputs, primitive, shapes


def is_scaling(eqn: Equation, operand: int) -> bool:
    """Whether the equation multiplies this operand by a scalar, or divides it by one."""
    # A scalar of shape (1, 1, 1) would give a matrix one more dimension, which is more than a product.
    return _is_product(eqn, operand) and math.prod(shapes(eqn)[1 - operand]) == 1 and _keeps_shape(eqn, operand)


def scaled(eqn: Equation, values: Sequence[Operand]) -> Factored | None:
    """The result of a multiplication with a scalar, which the scale takes; `None` for any other equation."""
    for i, value in enumerate(values):
        # A weight that was rounded to another dtype must not be scaled before that.
        if isinstance(value, Factored) and is_scaling(eqn, i) and value.dtype == value.v.dtype:
            scalar = jnp.asarray(weight(values[1 - i]), value.scale.dtype).reshape((1,) * value.v.ndim)
            divides = eqn.primitive is primitive.div_p
            return dataclasses.replace(value, scale=value.scale / scalar if divides else value.scale * scalar)
    return None


def mask_operands(eqn: Equation, operand: int) -> tuple[list[int], list[int]] | None:
    """The operands that must be constants, and those that must be zeros, for the equation to mask this operand.

    A mask is a factor for each number, or a choice between each number and 0: it mixes no axes. `None` where the
    equation is neither.
    """
    if _is_product(eqn, operand):
        return ([1 - operand], []) if _keeps_shape(eqn, operand) else None
    if eqn.primitive is primitive.select_n_p and operand > 0:
        return [0], [i for i in range(1, len(eqn.invars)) if i != operand]
    return None


def masked(eqn: Equation, values: Sequence[Operand]) -> Factored | None:
    """The result of a mask over a weight, which `v` takes, as the scale has fewer numbers.

    The caller knows that what a choice puts in the place of the weight's numbers are zeros.
    """
    found = [i for i, value in enumerate(values) if isinstance(value, Factored)]
    if len(found) != 1 or mask_operands(eqn, found[0]) is None:
        return None
    factored = cast(Factored, values[found[0]])
    dtype = factored.v.dtype
    arrays = [factored.v if value is factored else weight(value) for value in values]
    which = arrays[:1] if eqn.primitive is primitive.select_n_p else []
    numbers = [jnp.asarray(array, dtype) for array in arrays[len(which) :]]
    return dataclasses.replace(factored, v=jaxpr.bind(eqn, [*which, *numbers])[0])


def _is_product(eqn: Equation, operand: int) -> bool:
    return eqn.primitive is primitive.mul_p or (eqn.primitive is primitive.div_p and operand == 0)


def _keeps_shape(eqn: Equation, operand: int) -> bool:
    return outputs(eqn)[0].shape == shapes(eqn)[operand]
