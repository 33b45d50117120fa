"""The zoo's Linen models that use their weights under `nn.RNN`, `nn.scan` and `nn.vmap`."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn

from tests.zoo.linen import linen
from tests.zoo.model import Model, biases, kernels, normal


def linen_lstm(cell: type[nn.RNNCellBase] = nn.LSTMCell) -> Model:
    # The optimized cell has the same parameters, and concatenates them along the features.
    gates = [f"params/cell/{side}{gate}" for side in "ih" for gate in "ifgo"]
    left = biases(*(f"params/cell/h{gate}" for gate in "ifgo"))
    return linen(nn.RNN(cell(8), name=None), normal(2, 5, 6), kernels(gates), left, initialized=0)


def linen_bidirectional() -> Model:
    module = nn.Bidirectional(nn.RNN(nn.GRUCell(4)), nn.RNN(nn.SimpleCell(3)))
    forward, backward = "params/forward_rnn/cell", "params/backward_rnn/cell"
    gates = [f"{forward}/{side}{gate}" for side in "ih" for gate in "rzn"]
    left = biases(*(f"{forward}/{gate}" for gate in ("ir", "iz", "in", "hn")), f"{backward}/i")
    return linen(module, normal(2, 4, 5), kernels([*gates, f"{backward}/i", f"{backward}/h"]), left, initialized=0)


def linen_scanned_stack() -> Model:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(6)(nn.tanh(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
            return layers(name="layers")(x, None)[0]

    layer = "params/layers/Dense_0"
    return linen(Stack(), normal(3, 6), kernels([layer]), biases(layer))  # (layers, 6, 6)


def linen_scan() -> Model:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            hidden = nn.tanh(nn.Dense(7)(x))
            return x + nn.Dense(5, use_bias=False)(hidden), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return nn.Dense(2, name="head")(layers(name="layers")(x, None)[0])

    layers = ["params/layers/Dense_0", "params/layers/Dense_1", "params/head"]
    return linen(Stack(), normal(4, 5), kernels(layers), biases("params/layers/Dense_0", "params/head"))


def linen_ensemble() -> Model:
    # Members' kernels are stacked on the first axis: (3, 5, 7) for one input, then (3, 7, 2) for the members' own.
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            def members(in_axes):
                return nn.vmap(nn.Dense, {"params": 0}, {"params": True}, in_axes=in_axes, out_axes=0, axis_size=3)

            return members(0)(2, name="out")(nn.tanh(members(None)(7, name="hidden")(x))).mean(0)

    layers = ["params/hidden", "params/out"]
    return linen(Net(), normal(4, 5), kernels(layers), biases(*layers))


MODELS: dict[str, Callable[[], Model]] = {
    "linen_lstm": linen_lstm,
    "linen_optimized_lstm": lambda: linen_lstm(nn.OptimizedLSTMCell),
    "linen_bidirectional": linen_bidirectional,
    "linen_scanned_stack": linen_scanned_stack,
    "linen_scan": linen_scan,
    "linen_ensemble": linen_ensemble,
}
