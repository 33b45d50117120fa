"""Facts: what is known of the numbers of an array before the program runs.

A mask puts zeros in places, and a loop counts its trips to slice a stack: both are seen here. A fact is a number that
fills the array, the count of a loop's trips, or nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import jax.extend.core as jex
import numpy as np

from wn_jax._program.jaxpr import Equation, outputs, primitive


@dataclasses.dataclass(frozen=True)
class Counter:
    """The number of the trip of a scan: 0, 1, ... , length - 1, in the order of what the scan slices and stacks."""

    scan: Hashable
    length: int
    ahead: int = 0
    """How much is added to it."""


@dataclasses.dataclass(frozen=True)
class Count:
    """The array 0, 1, 2, ... of this length."""

    length: int


Fact: TypeAlias = bool | int | float | Counter | Count | None
"""A number that fills an array of any shape; a loop's counter; an array that counts; `None` where nothing is known."""


def of_number(value: Any) -> Fact:
    """The fact about a number that stands in a program."""
    return value.item() if np.ndim(value) == 0 and isinstance(value, np.generic | np.ndarray) else _if_number(value)


def _if_number(value: Any) -> Fact:
    return value if isinstance(value, bool | int | float) else None


def of_array(value: Any) -> Fact:
    """The fact about an array that a function closes over."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu":
        return Count(value.size) if np.array_equal(value, np.arange(value.size)) else None
    return None


def of_result(eqn: Equation, facts: Sequence[Fact]) -> Fact:
    """The fact about the (only) result of an equation, from those about its operands."""
    if eqn.primitive is primitive.iota_p:
        (shape,) = [out.shape for out in outputs(eqn)]
        return Count(shape[0]) if len(shape) == 1 else None
    if eqn.primitive is primitive.convert_element_type_p:
        return _converted(facts[0], outputs(eqn)[0].dtype)
    rule = _RULES.get(eqn.primitive)
    return rule(*facts) if rule else None


def of_slice(fact: Fact, length: int, scan: Hashable) -> Fact:
    """The fact about the slice that a trip of a scan gets of an array whose leading axis has that length."""
    if isinstance(fact, Count):
        return Counter(scan, length)
    return None if isinstance(fact, Counter) else fact


def _converted(fact: Fact, dtype: np.dtype) -> Fact:
    """The fact after a conversion, if the dtype holds the numbers."""
    if isinstance(fact, Counter | Count):
        return fact if np.issubdtype(dtype, np.integer) and np.iinfo(dtype).max > fact.length else None
    return fact if isinstance(fact, bool | int | float) and np.asarray(fact).astype(dtype).item() == fact else None


def _same(fact: Fact, *_: Fact) -> Fact:
    return fact


def _add(first: Fact, second: Fact) -> Fact:
    if isinstance(first, Counter) and isinstance(second, int):
        return dataclasses.replace(first, ahead=first.ahead + second)
    if isinstance(second, Counter) and isinstance(first, int):
        return _add(second, first)
    return _of_numbers(lambda a, b: a + b, first, second)


def _less(first: Fact, second: Fact) -> Fact:
    """Of a counter, a comparison with a number that is none of those that it goes through."""
    if isinstance(first, Counter) and isinstance(second, int):
        if first.ahead >= second:
            return False
        return True if first.ahead + first.length <= second else None
    return _of_numbers(lambda a, b: a < b, first, second)


def _select(which: Fact, *cases: Fact) -> Fact:
    if isinstance(which, bool | int) and 0 <= which < len(cases):
        return cases[which]
    return cases[0] if all(case == cases[0] for case in cases) else None


def _clamp(low: Fact, value: Fact, high: Fact) -> Fact:
    if isinstance(value, Counter) and isinstance(low, int) and isinstance(high, int):
        inside = low <= value.ahead and value.ahead + value.length - 1 <= high
        return value if inside else None
    return None


def _of_numbers(rule: Callable[[Any, Any], Fact], first: Fact, second: Fact) -> Fact:
    if isinstance(first, bool | int | float) and isinstance(second, bool | int | float):
        return rule(first, second)
    return None


_RULES: dict[jex.Primitive, Callable[..., Fact]] = {
    primitive.add_p: _add,
    primitive.broadcast_in_dim_p: _same,
    primitive.clamp_p: _clamp,
    primitive.copy_p: _same,
    primitive.lt_p: _less,
    primitive.reshape_p: _same,
    primitive.select_n_p: _select,
    primitive.squeeze_p: _same,
    primitive.stop_gradient_p: _same,
}
