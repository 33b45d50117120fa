"""The NNX network of the tests of objects, and every bit of a model."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import wn_jax as wn

X = jax.random.normal(jax.random.key(0), (8, 4))


def call(model, x):
    return model(x)


class Net(nnx.Module):
    """Statistics, random keys, layers in a list, one layer used in two places, and more methods than one."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(6, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)])
        self.again = self.layers[0]

    def features(self, x):
        return self.dropout(self.norm(self.first(x)))

    def __call__(self, x):
        x = self.layers[0](jnp.tanh(self.features(x)))
        return self.layers[1](jnp.tanh(self.again(x)))


AXES = {"first/kernel": (-2,), "again/kernel": (-2,), "layers/1/kernel": (-2,)}


def arrays(model):
    """Every array of a model, as bytes, by path."""
    state = nnx.to_flat_state(nnx.state(model))
    values = {path: leaf.get_value() for path, leaf in state}
    return {
        path: np.asarray(jax.random.key_data(value) if path[-1] == "key" else value).tobytes()
        for path, value in values.items()
    }


def is_whole(wrapped):
    """Whether the nodes of a wrapped `Net` are in their places."""
    return all(isinstance(layer.kernel, wn.WeightNorm) for layer in (wrapped.model.first, *wrapped.model.layers))
