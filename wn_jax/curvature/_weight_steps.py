"""Steps in the parameters that are trained, and what they do to the weights that these stand for.

This file owns the way of a step through a parametrization, the angle between two steps, and the law by which `||v||`
grows. Statistics of `v` itself are `wn_jax.optim`'s.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from wn_jax._transform import reconstruct
from wn_jax._types import Params, PyTree
from wn_jax.curvature._trees import combine, inner, normalized, partition
from wn_jax.optim._directions import node_lengths


def weight_step(
    loss: Callable[[Params, PyTree], jax.Array], weights: Callable[[Params], Params] = reconstruct
) -> Callable[[Params, PyTree], Params]:
    """The direction in which a small step of gradient descent moves the weights: `J J' grad_w`.

    J is the Jacobian of the weights by the parameters. A step of size `lr` in the parameters changes the weights by
    `-lr * J J' grad_w` to first order, whatever the parametrization; so, at one set of weights, parametrizations are
    compared by these vectors: with each other, with the gradient (that of plain weights, where J is the identity) and
    with the natural gradient.

    Arguments:
        loss: `(plain params, batch) -> scalar`, a function of the *weights*.
        weights: what plain parameters the trained ones stand for; by default their nodes' weights.

    Returns:
        `(params, batch) -> step`, a tree like the plain parameters, with None for what is no array. It raises
        `ValueError` where the parameters hold integers or numbers of less than 32 bits.

    >>> from wn_jax import WeightNorm
    >>> node = WeightNorm.from_weight(jnp.array([[3.0], [4.0]]), -2)
    >>> step = weight_step(lambda params, factor: factor * jnp.sum(params["w"]))({"w": node}, 1.0)
    >>> print(step["w"].T)  # here ||v|| = g, so J J' is the identity
    [[1. 1.]]
    """

    def step(params: Params, batch: PyTree) -> Params:
        arrays, rest = partition(params)
        _, plain_rest = partition(weights(params))

        def plain_arrays(arrays: Params) -> Params:
            return partition(weights(combine(arrays, rest)))[0]

        def loss_of_plain(plain: Params) -> jax.Array:
            return loss(combine(plain, plain_rest), batch)

        # J' grad_w is the gradient in the parameters; J takes it back to the weights.
        plain, pull_back = jax.vjp(plain_arrays, arrays)
        (in_params,) = pull_back(jax.grad(loss_of_plain)(plain))
        return jax.jvp(plain_arrays, (arrays,), (in_params,))[1]

    return step


def cosine(first: Params, second: Params) -> jax.Array:
    """The cosine of the angle between two trees of one structure, as vectors; NaN where one is 0.

    >>> print(cosine({"a": jnp.array([1.0, 0.0])}, {"a": jnp.array([3.0, 4.0])}))
    0.6
    """
    (first, length), (second, other_length) = normalized(first), normalized(second)
    return jnp.where((length > 0) & (other_length > 0), inner(first, second), jnp.nan)


def norm_growth(before: Params, after: Params) -> dict[str, dict[str, jax.Array]]:
    """How much longer an update made each `v`, and how much longer it would have if it were orthogonal to `v`.

    A gradient is orthogonal to `v`, so that under plain SGD `||v'|| = sqrt(1 + c^2) ||v||`, with `c` the length of the
    step over `||v||` (section 2.2 of the paper). Momentum and Adam depart from that.

    Arguments:
        before: a tree with nodes.
        after: the same tree after the update.

    Returns:
        `{path: {"c": ..., "growth": ||v'|| / ||v||, "law": sqrt(1 + c^2)}}`, each shaped as the node's `g`.

    >>> from wn_jax import WeightNorm
    >>> before, after = ({"w": WeightNorm(jnp.ones(1), jnp.array(v), (-1,))} for v in ([3.0, 0.0], [3.0, 4.0]))
    >>> {name: round(float(x[0]), 3) for name, x in norm_growth(before, after)["w"].items()}
    {'c': 1.333, 'growth': 1.667, 'law': 1.667}
    """
    # Leaves that are no arrays (a function, in an Equinox model) cannot be subtracted.
    changes = jax.tree.map(lambda old, new: new - old if hasattr(new, "dtype") else new, before, after)
    old, new, steps = (node_lengths(tree) for tree in (before, after, changes))

    growth = {}
    for path, length in old.items():
        c = steps[path] / length
        growth[path] = {"c": c, "growth": new[path] / length, "law": jnp.sqrt(1 + jnp.square(c))}
    return growth
