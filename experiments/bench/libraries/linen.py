"""The networks in Flax Linen, with `flax.linen.WeightNorm` around each layer."""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax

from experiments.bench.arms import Arm
from experiments.bench.libraries.jax_steps import Apply, JaxOps, arm, carry, inputs, members, of_members
from experiments.bench.networks import Conv, Dense, Layer, Network, Recurrent, Upsample
from experiments.bench.rows import Row


class Net(nn.Module):
    """A network, its layers wrapped or not."""

    network: Network
    """The network."""

    wrapped: bool = False
    """Whether each layer is in a weight norm."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The output."""
        wrap: Any = nn.WeightNorm if self.wrapped else lambda layer: layer
        layers = {name: wrap(_layer(layer, name)) for name, layer in self.network.layers.items()}

        def apply(name: str, x: jax.Array) -> jax.Array:
            layer = self.network.layers[name]
            if isinstance(layer, Recurrent):
                return layers[name](x, initial_carry=carry(layer, x))
            return layers[name](x)

        return self.network.forward(apply, x, JaxOps())


def arms(row: Row) -> list[Arm]:
    """The wrapped arm; `ours` has the plain one."""
    return [arm("linen", "linen plain", row, *build(row, wrapped=True), inputs(row))]


def build(row: Row, wrapped: bool = False) -> tuple[Apply, Any]:
    """A function and its parameters."""
    net, x = Net(row.build(), wrapped), inputs(row)
    example = (x[0] if row.work == "accumulate" else x).astype("float32")  # as parameters begin; they are cast then
    return of_members(row, cast(Apply, net.apply)), members(row, lambda key: net.init(key, example))


def _layer(layer: Layer, name: str) -> nn.Module:
    if isinstance(layer, Dense):
        return nn.Dense(layer.features, use_bias=layer.bias, name=name)
    if isinstance(layer, Conv):
        padding = [(layer.padding, layer.padding)] * len(layer.kernel)
        return nn.Conv(layer.features, layer.kernel, padding=padding, kernel_dilation=layer.dilation, name=name)
    if isinstance(layer, Upsample):
        pad = layer.kernel - 1 - layer.padding
        return nn.ConvTranspose(layer.features, (layer.kernel,), (layer.stride,), [(pad, pad)], name=name)
    cell = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}[layer.kind](layer.features)
    return nn.RNN(cell, name=name)
