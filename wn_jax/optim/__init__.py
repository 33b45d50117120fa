"""optax pieces for trees with nodes: decay masks, norm-keeping updates, statistics to log, moments across a rewrite.

A learning rate of its own for `g` and `v` needs nothing from here, as `wn_jax.labels` is what `optax.partition`
asks for:

>>> import optax, wn_jax as wn
>>> tx = optax.partition({"g": optax.sgd(0.01), "v": optax.sgd(0.1), "other": optax.sgd(0.1)}, wn.labels)

Muon orthogonalizes the updates of matrices and would take `g`, of shape (1, features), for one. Keep it to `v`:

>>> adam = optax.adam(1e-3)
>>> tx = optax.partition({"v": optax.contrib.muon(0.02), "g": adam, "other": adam}, wn.labels)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wn_jax._node import WeightNorm
from wn_jax.optim._directions import ProjectDirectionsState as ProjectDirectionsState
from wn_jax.optim._directions import direction_stats as direction_stats
from wn_jax.optim._directions import project_directions as project_directions
from wn_jax.optim._moments import transfer_state as transfer_state


def weight_decay_mask(params: Any, plain: Callable[[Any], bool] = lambda leaf: jnp.ndim(leaf) >= 2) -> Any:
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

    def mask(x: Any) -> Any:
        if isinstance(x, WeightNorm):
            return dataclasses.replace(x, g=_fill(x.g, True), v=_fill(x.v, False))
        return hasattr(x, "shape") and bool(plain(x))

    return jax.tree_util.tree_map(mask, params, is_leaf=lambda x: isinstance(x, WeightNorm))


def _fill(tree: Any, value: Any) -> Any:
    return jax.tree_util.tree_map(lambda _: value, tree)
