"""The zoo's Flax NNX models that use their weights under `nnx.RNN`, `nnx.scan` and `nnx.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo.model import Model, biases, kernels, normal
from tests.zoo.nnx import model


class Recurrent(nnx.Module):
    """An `nnx.RNN` or `nnx.Bidirectional` from zero, not from its own random keys: they would be among the leaves."""

    def __init__(self, *cells: Any):
        rnns = [nnx.RNN(cell, rngs=False) for cell in cells]
        self.rnn = rnns[0] if len(rnns) == 1 else nnx.Bidirectional(*rnns, rngs=False)
        self.sizes = tuple(cell.hidden_features for cell in cells)

    def __call__(self, x: jax.Array) -> jax.Array:
        zeros = [jnp.zeros((len(x), size)) for size in self.sizes]
        return self.rnn(x, initial_carry=tuple(zeros) if len(zeros) == 2 else (zeros[0], zeros[0]))


def nnx_lstm() -> Model:
    gates = ("ii", "if_", "ig", "io", "hi", "hf", "hg", "ho")
    paths = [f"rnn/cell/{gate}" for gate in gates]

    def net(rngs):
        return Recurrent(nnx.LSTMCell(5, 4, rngs=rngs))

    return model(net, normal(2, 3, 5), kernels(paths), biases(*paths[4:]), initialized=0)


def nnx_optimized_lstm() -> Model:
    # The gates' kernels are one array here.

    def net(rngs):
        return Recurrent(nnx.OptimizedLSTMCell(5, 4, rngs=rngs))

    layers = kernels(["rnn/cell/dense_i", "rnn/cell/dense_h"])
    return model(net, normal(2, 3, 5), layers, biases("rnn/cell/dense_h"), initialized=0)


def nnx_bidirectional() -> Model:

    def net(rngs):
        return Recurrent(nnx.GRUCell(5, 4, rngs=rngs), nnx.SimpleCell(5, 3, rngs=rngs))

    cells = ["rnn/forward_rnn/cell", "rnn/backward_rnn/cell"]
    layers = [f"{cell}/dense_{side}" for cell in cells for side in "ih"]
    left = biases(*(f"{cell}/dense_i" for cell in cells))
    return model(net, normal(2, 3, 5), kernels(layers), left, initialized=0)


def _stack(make: Callable[[nnx.Rngs], Any], copies: int, rngs: nnx.Rngs) -> Any:
    return nnx.vmap(make)(rngs.split(copies))


def nnx_scan() -> Model:
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(5, 5, rngs=rngs)

        def __call__(self, x):
            return x + jnp.tanh(self.linear(x))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = _stack(Block, 3, rngs)
            self.head = nnx.Linear(5, 2, rngs=rngs)

        def __call__(self, x):
            step = nnx.scan(nnx.remat(lambda x, block: block(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return self.head(step(x, self.layers))

    layers = ["layers/linear", "head"]
    return model(Net, normal(4, 5), kernels(layers), biases(*layers))


def nnx_ensemble() -> Model:
    # Members' kernels are stacked on the first axis: (3, 5, 7) for one input, then (3, 7, 2) for the members' own.
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = _stack(lambda rngs: nnx.Linear(5, 7, rngs=rngs), 3, rngs)
            self.out = _stack(lambda rngs: nnx.Linear(7, 2, rngs=rngs), 3, rngs)

        def __call__(self, x):
            def apply(layer, x):
                return layer(x)

            hidden = nnx.vmap(apply, in_axes=(0, None))(self.hidden, x)
            return nnx.vmap(apply)(self.out, jnp.tanh(hidden)).mean(0)

    return model(Net, normal(4, 5), kernels(["hidden", "out"]), biases("hidden", "out"))


_ALL = (nnx_lstm, nnx_optimized_lstm, nnx_bidirectional, nnx_scan, nnx_ensemble)
MODELS: dict[str, Callable[[], Model]] = {make.__name__: make for make in _ALL}
