"""A small checkpoint, the Flax tree that it belongs to, and the map between them, for the tests of the map."""

import jax.numpy as jnp
import numpy as np

from wn_jax.torch import conv, linear

RNG = np.random.default_rng(0)


def numbers(*shape):
    return RNG.standard_normal(shape, np.float32)


# A checkpoint of two layers, and the Flax tree that it belongs to.
STATE = {
    "encoder.0.weight_g": numbers(6, 1, 1),
    "encoder.0.weight_v": numbers(6, 4, 3),
    "encoder.0.bias": numbers(6),
    "head.weight": numbers(2, 6),
    "head.bias": numbers(2),
    "steps": np.array(7),
}
TARGET = {
    "conv_0": {"kernel": jnp.zeros((3, 4, 6)), "bias": jnp.zeros(6)},
    "head": {"kernel": jnp.zeros((6, 2)), "bias": jnp.zeros(2)},
}
NAMES = {"encoder.{i}": conv("conv_{i}"), "head": linear("head"), "steps": None}


def changed(tree, *path, to):
    """A copy of nested dicts with another leaf; `None` takes it out."""
    key, *rest = path
    if rest:
        return {**tree, key: changed(tree[key], *rest, to=to)}
    return {k: v for k, v in tree.items() if k != key} | ({} if to is None else {key: to})
