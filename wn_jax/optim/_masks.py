"""Masks for optax: which leaves of a tree with nodes decay.

Learning rates of their own for `g` and `v` need no mask; for these there is `wn_jax.labels`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from wn_jax._node import WeightNorm
from wn_jax._tree import filled
from wn_jax._types import Leaf, Params, PyTree


def weight_decay_mask(params: Params, plain: Callable[[Leaf], bool] = lambda leaf: jnp.ndim(leaf) >= 2) -> PyTree:
    """A mask for `optax.adamw(mask=...)` or `optax.add_decayed_weights`: decay every `g`, no `v`.

    Since `||w|| = |g|`, decaying `g` is L2 regularization of the weight: it shrinks `w` by the factor that decaying
    a plain `w` would. Decaying `v` leaves the function as it is and only keeps `||v||` from growing, which raises
    the effective step (van Laarhoven 2017, arXiv 1706.05350); where that is wanted, `project_directions` says it
    outright.

    Arguments:
        params: the tree with nodes.
        plain: which of the arrays outside nodes decay; by default those with two axes or more, so no biases or gains.

    Returns:
        The structure of `params`, with True or False at each leaf.

    >>> weight_decay_mask({"kernel": WeightNorm(jnp.ones((1, 2)), jnp.ones((3, 2)), (-2,)), "bias": jnp.zeros(2)})
    {'bias': False, 'kernel': WeightNorm(g=True, v=False, axes=(-2,))}
    """

    def mask(x: Leaf) -> bool | WeightNorm:
        if isinstance(x, WeightNorm):
            return dataclasses.replace(x, g=filled(x.g, True), v=filled(x.v, False))
        return hasattr(x, "shape") and bool(plain(x))  # no function or name of an Equinox model decays

    return jax.tree.map(mask, params, is_leaf=lambda x: isinstance(x, WeightNorm))
