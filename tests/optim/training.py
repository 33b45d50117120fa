"""A small training loop that the tests of optimizers share."""

import jax
import jax.numpy as jnp
import optax

import wn_jax as wn


def loss(model, params):
    """A loss that every parameter of the model matters to."""
    return jnp.mean((wn.wrap(model.fn)(params, model.x) - 1) ** 2)


def train(model, params, tx, steps, state=None):
    """`params` and optimizer state after `steps` updates."""
    state = tx.init(params) if state is None else state

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(lambda params: loss(model, params))(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def weight_norms(tree):
    """The nodes of a tree."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, wn.WeightNorm))
    return [leaf for leaf in leaves if isinstance(leaf, wn.WeightNorm)]
