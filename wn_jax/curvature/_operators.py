"""A matrix over the entries of a parameter tree, as a linear operator: nothing but products with vectors is computed.

This file owns what an operator is and the checks before there is one; which matrices there are is for `_matrices`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from operator import itemgetter
from typing import TypeVar

import jax
import jax.core
import jax.flatten_util
import jax.numpy as jnp

from wn_jax._types import Params, PyTree
from wn_jax.curvature._trees import Rest, combine, like, partition

Tree = TypeVar("Tree")

Whole = Callable[[Params], Params]
"""Makes the whole parameter tree of its arrays."""

Product = Callable[[Whole, Params, PyTree, Params], Params]
"""`(whole, arrays, chunk, vector) -> vector`: the product with a vector, on one part of the batch."""

NOT_FINITE = "a product with the matrix is not finite; its parameters or its batch lead to an overflow"

_BLOCK = 16  # products at once where a whole matrix is made: 3 to 6 times as fast as one by one on two CPU cores


# Product and rest are static, so that `jit` finds what it compiled by them: operators of one function share it.
@functools.partial(jax.tree_util.register_dataclass, data_fields=("params", "chunks"), meta_fields=("product", "rest"))
@dataclasses.dataclass(frozen=True, eq=False)
class LinearOperator:
    """A symmetric matrix over the entries of a parameter tree. `operator(vector)` is its product with a vector.

    Vectors are trees like the parameters; where these hold something else than arrays (a function, in an Equinox
    model), so may they, and products hold `None`. What `hessian(loss)`, for one, returns compiles its product once for
    all parameters and batches of the same shapes, so keep it. An operator is a pytree, and so may be an argument of a
    function under `jit`.

    Attributes:
        params: the arrays of the parameters, at which the matrix is taken.
        chunks: the batch, in parts of equal size; the matrix is the mean of theirs.
        product: the product with a vector, on one part of the batch.
        rest: the parameters' leaves that are no arrays.
    """

    params: Params
    chunks: tuple[PyTree, ...]
    product: Product
    rest: Rest

    def __call__(self, vector: Params) -> Params:
        """The matrix times a vector.

        Raises:
            ValueError: the vector is no tree like the parameters.
        """
        vector = like(self.params, vector)
        # Not by `lax.scan`, in which XLA's CPU backend is 20 times slower at convolutions.
        products = (_product(self.product, self.rest, self.params, chunk, vector) for chunk in self.chunks)
        total = functools.reduce(_sum, products)
        return total if len(self.chunks) == 1 else _divided(total, len(self.chunks))

    @property
    def size(self) -> int:
        """How many rows the matrix has."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def dense(self) -> jax.Array:
        """The whole matrix, (size, size), made by as many products; in the order of `jax.flatten_util.ravel_pytree`."""
        rows = -(-self.size // _BLOCK) * _BLOCK  # in whole blocks, each of which is compiled alike
        units = jnp.eye(rows, self.size, dtype=jnp.result_type(*jax.tree.leaves(self.params)))
        blocks = [self._rows(units[start : start + _BLOCK]) for start in range(0, rows, _BLOCK)]
        return jnp.concatenate(blocks)[: self.size]

    def _rows(self, units: jax.Array) -> jax.Array:
        """The products with some vectors, each in a row; the batch part by part, for the sake of memory."""
        parts = (_block(self.product, self.rest, self.params, chunk, units) for chunk in self.chunks)
        return functools.reduce(_sum, parts) / len(self.chunks)

    def unravel(self, vector: jax.Array) -> Params:
        """A flat vector, in the order of `dense`, as a tree."""
        return jax.flatten_util.ravel_pytree(self.params)[1](vector)


def operator_of(
    name: str,
    value: Callable[[Params, PyTree], PyTree],
    check_value: Callable[[str, PyTree], None],
    product: Product,
    batch_size: int | None,
) -> Callable[[Params, PyTree], LinearOperator]:
    """The function `(params, batch) -> LinearOperator` of a matrix, which first checks all that can be checked.

    Arguments:
        name: of the matrix, for messages.
        value: `(params, batch) -> value`, what is differentiated, as a whole.
        check_value: `(name, value)`, raises where the value's shape or dtype is not what the matrix needs.
        product: with a vector, on one part of the batch.
        batch_size: how many examples are in a part, or None for all.
    """
    compiled = jax.jit(lambda rest, arrays, chunk: value(combine(arrays, rest), chunk), static_argnums=0)

    def at(params: Params, batch: PyTree) -> LinearOperator:
        arrays, rest = partition(params)
        operator = LinearOperator(arrays, _chunks(batch, batch_size), product, rest)

        check_value(name, jax.eval_shape(functools.partial(compiled, rest), arrays, operator.chunks[0]))
        check_derivatives(name, operator)
        _check_finite(name, functools.partial(compiled, rest, arrays), operator.chunks)
        return operator

    return at


def check_derivatives(name: str, operator: LinearOperator) -> None:
    """Raises ValueError where the derivatives of a product are not there."""
    try:  # Lowered and not only traced, as it is then that JAX finds a custom_vjp without a forward mode.
        _product.lower(operator.product, operator.rest, operator.params, operator.chunks[0], operator.params)
    except Exception as error:
        raise ValueError(
            f"{name}: the derivatives that a product takes are not there: {str(error).splitlines()[0]} "
            "(a lax.while_loop, or a fori_loop with a traced number of trips, has no reverse mode, lax.scan has; "
            "a jax.custom_vjp has no forward mode, jax.custom_jvp has both)"
        ) from error


def _check_finite(name: str, loss: Callable[[PyTree], jax.Array], chunks: tuple[PyTree, ...]) -> None:
    """Raises ValueError where the loss on a part of the batch is not finite; under `jit` nobody can know."""
    for number, chunk in enumerate(chunks):
        found = loss(chunk)
        if isinstance(found, jax.core.Tracer) or jnp.isfinite(found).all():
            continue
        where = f" in part {number} of the batch" if len(chunks) > 1 else ""
        raise ValueError(
            f"{name}: the loss at these parameters{where} is {found}, so it has no curvature there; go back to "
            "parameters at which it is finite"
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _product(product: Product, rest: Rest, arrays: Params, chunk: PyTree, vector: Params) -> Params:
    return product(lambda arrays: combine(arrays, rest), arrays, chunk, vector)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block(product: Product, rest: Rest, arrays: Params, chunk: PyTree, units: jax.Array) -> jax.Array:
    """The products with the rows of `units`, each in a row."""
    unravel = jax.flatten_util.ravel_pytree(arrays)[1]

    def row(unit: jax.Array) -> jax.Array:
        return jax.flatten_util.ravel_pytree(_product(product, rest, arrays, chunk, unravel(unit)))[0]

    return jax.vmap(row)(units)


# The running total is donated, so that a sum over many parts of the batch takes the memory of one.
@functools.partial(jax.jit, donate_argnums=0)
def _sum(total: Tree, other: Tree) -> Tree:
    return jax.tree.map(jnp.add, total, other)


@jax.jit
def _divided(total: Tree, count: int) -> Tree:
    return jax.tree.map(lambda array: array / count, total)


def _chunks(batch: PyTree, size: int | None) -> tuple[PyTree, ...]:
    """The batch in parts of `size` examples each, or whole where `size` is None.

    Raises:
        ValueError: the batch has no common leading axis of examples, or `size` does not divide it.
    """
    if size is None:
        return (batch,)
    examples = _example_count(batch)
    if size < 1 or examples % size:
        divisors = [divisor for divisor in range(1, examples + 1) if examples % divisor == 0]
        near = sorted(divisors, key=lambda divisor: abs(divisor - size))[:2]
        raise ValueError(
            f"batch_size {size} does not divide the {examples} examples of the batch, and parts of different sizes "
            f"would not count alike; use {' or '.join(map(str, sorted(near)))}, or cut the batch"
        )
    parts = [slice(start, start + size) for start in range(0, examples, size)]
    return tuple(jax.tree.map(itemgetter(part), batch) for part in parts)


def _example_count(batch: PyTree) -> int:
    """The size of the leading axis that all arrays of the batch share.

    Raises:
        ValueError: they share none, or it is empty.
    """
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            f"batch_size splits every array of the batch along a leading axis of examples, and theirs are "
            f"{sorted((length[0] if length else 'missing' for length in lengths), key=str)}; leave batch_size out"
        )
    ((examples,),) = lengths
    if not examples:
        raise ValueError("the batch has no examples")
    return examples
