"""The networks in Flax NNX, with `flax.nnx.WeightNorm` around each layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.bench.arms import Arm
from experiments.bench.libraries.jax_steps import Apply, JaxOps, arm, carry, inputs, members, of_members
from experiments.bench.networks import Conv, Dense, Layer, Network, Recurrent, Upsample
from experiments.bench.rows import Row


class Net(nnx.Module):
    """A network, its layers wrapped or not."""

    def __init__(self, network: Network, wrapped: bool, rngs: nnx.Rngs) -> None:
        wrap: Any = (lambda layer: nnx.WeightNorm(layer, rngs=rngs)) if wrapped else lambda layer: layer
        self.layers = nnx.Dict({name: wrap(_layer(layer, rngs)) for name, layer in network.layers.items()})

    def __call__(self, x: jax.Array, network: Network) -> jax.Array:
        """The output."""

        def apply(name: str, x: jax.Array) -> jax.Array:
            layer = network.layers[name]
            if isinstance(layer, Recurrent):
                return self.layers[name](x, initial_carry=carry(layer, x))
            return self.layers[name](x)

        return network.forward(apply, x, JaxOps())


def arms(row: Row) -> list[Arm]:
    """The plain arm, and the wrapped one."""
    plain = arm("nnx plain", "nnx plain", row, *build(row), inputs(row))
    return [plain, arm("nnx", "nnx plain", row, *build(row, wrapped=True), inputs(row))]


def build(row: Row, wrapped: bool = False) -> tuple[Apply, Any]:
    """A function and its parameters: all arrays of floating-point numbers, as the scales are no `nnx.Param`."""
    network = row.build()
    graph, _, rest = nnx.split(Net(network, wrapped, nnx.Rngs(1)), _is_floating, ...)

    def make(key: jax.Array) -> Any:
        return nnx.split(Net(network, wrapped, nnx.Rngs(key)), _is_floating, ...)[1]

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, params, rest)(x, network)

    return of_members(row, apply), members(row, make)


def _is_floating(_: Any, leaf: Any) -> bool:
    """Whether a leaf, an array or a variable of NNX, has floating-point numbers."""
    value = leaf.get_value() if hasattr(leaf, "get_value") else leaf
    return jnp.issubdtype(jnp.asarray(value).dtype, jnp.floating)


def _layer(layer: Layer, rngs: nnx.Rngs) -> nnx.Module:
    if isinstance(layer, Dense):
        return nnx.Linear(layer.inputs, layer.features, use_bias=layer.bias, rngs=rngs)
    if isinstance(layer, Conv):
        padding = [(layer.padding, layer.padding)] * len(layer.kernel)
        shape: Any = (layer.inputs, layer.features, layer.kernel)
        return nnx.Conv(*shape, padding=padding, kernel_dilation=layer.dilation, rngs=rngs)
    if isinstance(layer, Upsample):
        pad = layer.kernel - 1 - layer.padding
        shape = (layer.inputs, layer.features, (layer.kernel,), (layer.stride,))
        return nnx.ConvTranspose(*shape, padding=[(pad, pad)], rngs=rngs)
    cell: Any = {"lstm": nnx.OptimizedLSTMCell, "gru": nnx.GRUCell}[layer.kind]
    return nnx.RNN(cell(layer.inputs, layer.features, rngs=rngs), rngs=rngs)
