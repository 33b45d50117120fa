"""The networks in Equinox, with `equinox.nn.WeightNorm` around each layer, or paramax's around each weight."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from experiments.bench.arms import Arm, CannotError
from experiments.bench.libraries.jax_steps import Apply, JaxOps, arm, carry, inputs, members, of_members
from experiments.bench.networks import Conv, Dense, Layer, Network, Recurrent, Upsample
from experiments.bench.rows import Row

Wrap = Callable[[Any], Any]


class Steps(eqx.Module):
    """A recurrent layer: Equinox has the cell."""

    cell: Any
    kind: Recurrent = eqx.field(static=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The hidden states (examples, steps, features)."""

        def step(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            state = jax.vmap(self.cell)(x, state)
            return state, state[0] if isinstance(state, tuple) else state

        return jax.lax.scan(step, carry(self.kind, x), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def arms(row: Row) -> list[Arm]:
    """Plain and wrapped."""
    network = row.build()
    if any(isinstance(layer, Recurrent) for layer in network.layers.values()):
        raise CannotError("equinox.nn.WeightNorm wraps layers of one input, and a recurrent cell has two")
    return [_plain(row), _arm("equinox", row, eqx.nn.WeightNorm)]


def paramax_arms(row: Row) -> list[Arm]:
    """Plain, and with each weight wrapped; they are unwrapped once, outside of all loops."""
    import paramax

    return [_plain(row), _arm("paramax", row, wrap_weights, paramax.unwrap)]


def wrap_weights(layer: Any) -> Any:
    """A layer with paramax's weight normalization of its weights."""
    import paramax

    return eqx.tree_at(_weights, layer, [paramax.WeightNormalization(weight) for weight in _weights(layer)])


def build(row: Row, wrap: Wrap = lambda layer: layer, unwrap: Wrap = lambda layers: layers) -> tuple[Apply, Any]:
    """A function and its parameters."""
    network = row.build()

    def make(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(network.layers))
        return {name: wrap(_layer(layer, k)) for k, (name, layer) in zip(keys, network.layers.items(), strict=True)}

    _, rest = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        layers = unwrap(eqx.combine(params, rest))
        return network.forward(functools.partial(_apply, network, layers), x, JaxOps(channels=1))

    arrays = members(row, lambda key: eqx.filter(make(key), eqx.is_inexact_array))
    return of_members(row, apply), arrays


def _plain(row: Row) -> Arm:
    return _arm("equinox plain", row)


def _arm(name: str, row: Row, *wrap: Wrap) -> Arm:
    return arm(name, "equinox plain", row, *build(row, *wrap), inputs(row, channels_first=True))


def _apply(network: Network, layers: Any, name: str, x: jax.Array) -> jax.Array:
    """A layer, which takes one example, on all of them."""
    layer, kind = layers[name], network.layers[name]
    if isinstance(kind, Recurrent):
        return layer(x)
    mapped = x.ndim - 1 if isinstance(kind, Dense) else 1
    for _ in range(mapped):
        layer = jax.vmap(layer)
    return layer(x)


def _weights(layer: Any) -> list[Any]:
    return [layer.cell.weight_ih, layer.cell.weight_hh] if isinstance(layer, Steps) else [layer.weight]


def _layer(layer: Layer, key: jax.Array) -> Any:
    if isinstance(layer, Dense):
        return eqx.nn.Linear(layer.inputs, layer.features, use_bias=layer.bias, key=key)
    if isinstance(layer, Conv):
        rank: Any = len(layer.kernel)
        options: Any = {"padding": layer.padding, "dilation": layer.dilation, "key": key}
        return eqx.nn.Conv(rank, layer.inputs, layer.features, layer.kernel, **options)
    if isinstance(layer, Upsample):
        shape = (layer.inputs, layer.features, layer.kernel, layer.stride)
        return eqx.nn.ConvTranspose1d(*shape, padding=layer.padding, key=key)
    cell: Any = {"lstm": eqx.nn.LSTMCell, "gru": eqx.nn.GRUCell}[layer.kind]
    return Steps(cell(layer.inputs, layer.features, key=key), layer)
