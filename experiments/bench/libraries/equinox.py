"""The networks in Equinox, with `equinox.nn.WeightNorm` around each layer, or paramax's around each weight."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from experiments.bench.arms import Arm, CannotError
from experiments.bench.libraries.jax_steps import (
    Apply,
    Gradient,
    JaxOps,
    accumulated_once,
    arm,
    carry,
    inputs,
    members,
    of_members,
)
from experiments.bench.networks import Conv, Dense, Layer, Network, Recurrent, Upsample
from experiments.bench.rows import Row

Wrap = Callable[[Any], Any]


class Steps(eqx.Module):
    """A recurrent layer: Equinox has only the cell."""

    cell: Any
    """Equinox's cell, which takes one example."""

    kind: Recurrent = eqx.field(static=True)
    """The layer that it makes."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """The hidden states (examples, steps, features)."""

        def step(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            state = jax.vmap(self.cell)(x, state)
            return state, state[0] if isinstance(state, tuple) else state

        return jax.lax.scan(step, carry(self.kind, x), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def arms(row: Row) -> list[Arm]:
    """The plain arm, and that with each layer wrapped."""
    if _is_recurrent(row):
        raise CannotError("equinox.nn.WeightNorm wraps layers of one input, and a recurrent cell has two")
    return [_plain(row), _arm("equinox", row, eqx.nn.WeightNorm)]


def paramax_arms(row: Row) -> list[Arm]:
    """The arms with each weight wrapped. Weights are unwrapped once, outside of all loops."""
    plain = [_plain(row)] if _is_recurrent(row) else []  # else `arms` has it
    once = {"gradient": _once(row)} if row.work == "accumulate" else {}
    return [*plain, _arm("paramax", row, wrap_weights, paramax_unwrap, **once)]


def wrap_weights(layer: Any) -> Any:
    """A layer with paramax's weight normalization of its weights. That is of matrices, along their last axis."""
    import paramax  # not at the top: equinox may be installed without it

    def wrap(weight: jax.Array) -> Any:
        matrix = paramax.WeightNormalization(weight.reshape(len(weight), -1))
        return paramax.Parameterize(functools.partial(jnp.reshape, shape=weight.shape), matrix)

    return eqx.tree_at(_weights, layer, [wrap(weight) for weight in _weights(layer)])


def paramax_unwrap(layers: Any) -> Any:
    """The layers with plain weights."""
    import paramax

    return paramax.unwrap(layers)


def build(row: Row, wrap: Wrap = lambda layer: layer, unwrap: Wrap = lambda layers: layers) -> tuple[Apply, Any]:
    """A function and its parameters."""
    network = row.build()
    make = functools.partial(_make, row, wrap)
    _, rest = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        layers = unwrap(eqx.combine(params, rest))
        return network.forward(functools.partial(_apply, network, layers), x, JaxOps(channels=1))

    arrays = members(row, lambda key: eqx.filter(make(key), eqx.is_inexact_array))
    return of_members(row, apply), arrays


def _once(row: Row) -> Gradient:
    """The gradient of microbatches, for which paramax unwraps once."""
    _, rest = eqx.partition(_make(row, wrap_weights, jax.random.key(0)), eqx.is_inexact_array)

    def weights(params: Any) -> Any:
        return eqx.filter(paramax_unwrap(eqx.combine(params, rest)), eqx.is_inexact_array)

    return accumulated_once(build(row)[0], weights)


def _plain(row: Row) -> Arm:
    return _arm("equinox plain", row)


def _arm(name: str, row: Row, *wrap: Wrap, **options: Any) -> Arm:
    return arm(name, "equinox plain", row, *build(row, *wrap), inputs(row, channels_first=True), **options)


def _is_recurrent(row: Row) -> bool:
    return any(isinstance(layer, Recurrent) for layer in row.build().layers.values())


def _make(row: Row, wrap: Wrap, key: jax.Array) -> Any:
    """The layers by name."""
    layers = row.build().layers
    keys = jax.random.split(key, len(layers))
    return {name: wrap(_layer(layer, k)) for k, (name, layer) in zip(keys, layers.items(), strict=True)}


def _apply(network: Network, layers: Any, name: str, x: jax.Array) -> jax.Array:
    """A layer, which takes one example, on all of them."""
    layer, kind = layers[name], network.layers[name]
    if isinstance(kind, Recurrent):
        return layer(x)
    mapped = x.ndim - 1 if isinstance(kind, Dense) else 1  # a dense layer takes one vector
    for _ in range(mapped):
        layer = jax.vmap(layer)
    return layer(x)


def _weights(layer: Any) -> list[Any]:
    """The weights of a layer, without its biases."""
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
