"""The bytes that a step must move, whatever the compiler: what contractions read and write, and the update.

Everything between contractions is taken as fused into these, and what is in a cache as in memory. So this is what a
perfect compiler would do on a machine without caches. With weight normalization, each `v` is read once more, for its
norm, and each `g`, of which there is one a feature, is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core as jex
from jax.extend.core import primitives

import wn_jax as wn
from experiments.bench.libraries import ours
from experiments.bench.libraries.jax_steps import inputs, work
from experiments.bench.rows import PARTS, Row

_CONTRACTIONS = (primitives.dot_general_p, primitives.conv_general_dilated_p)


def of(row: Row) -> tuple[int, int]:
    """The bytes of a step of a row: of the plain network, and with weight normalization."""
    apply, params, nodes = ours.build(row)
    program = jax.make_jaxpr(work(row, apply, None, None))(params, inputs(row))
    size = _bytes(jax.tree.leaves(params))
    plain = _contracted(program)
    if row.work == "accumulate":
        plain += PARTS * 3 * size  # each gradient is added to a sum that is read and written
    if row.work != "serve":
        plain += 3 * size  # the gradient and the parameter are read, the parameter is written

    pairs = list(zip(jax.tree.leaves(nodes), jax.tree.leaves(wn.labels(nodes)), strict=True))
    directions = _bytes(leaf for leaf, label in pairs if label == "v")
    magnitudes = _bytes(leaf for leaf, label in pairs if label == "g")
    times = 1 if row.work == "serve" else 4  # read for the weight; and where it is trained, as other parameters are
    return plain, plain + directions + times * magnitudes


def _contracted(jaxpr: Any, times: int = 1) -> int:
    """The bytes that contractions read and write.

    Those in a loop count as often as it runs, and those of a branch on both sides.
    """
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive in _CONTRACTIONS:
            total += times * _bytes(var.aval for var in (*eqn.invars, *eqn.outvars))
        trips = eqn.params["length"] if eqn.primitive is primitives.scan_p else 1
        total += sum(_contracted(inner, times * trips) for inner in _inner(eqn.params.values()))
    return total


def _inner(values: Any) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    for value in values:
        if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner(value)


def _bytes(arrays: Any) -> int:
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
