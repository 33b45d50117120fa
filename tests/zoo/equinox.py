"""The zoo's Equinox models.

Equinox stores (out features, in features, ...), and its trees hold functions and Python numbers among the leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from tests.zoo.model import KEY, Model, biases, elementwise, filled, normal, rows


def made(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return filled(eqx.filter_eval_shape(module, *args, key=KEY, **kwargs))


def equinox_mlp() -> Model:
    net = made(eqx.nn.MLP, 6, 3, width_size=8, depth=2, activation=jnp.tanh)
    axes = {f"layers/{i}/weight": (-1,) for i in range(3)}

    def preactivations(net, x):
        found = {}
        for i, layer in enumerate(net.layers):
            found[f"layers/{i}/weight"] = z = x @ layer.weight.T + layer.bias
            x = jnp.tanh(z)
        return found

    return Model(
        lambda net, x: jax.vmap(net)(x),
        net,
        normal(4, 6),
        axes,
        biases(*(f"layers/{i}" for i in range(3))),
        preactivations=preactivations,
        biased=frozenset(axes),
    )


def equinox_cnn() -> Model:
    # Of the transposed convolution too the weight is (features out, features in of a group, height, width).
    class Net(eqx.Module):
        down: eqx.nn.Conv2d
        up: eqx.nn.ConvTranspose2d

        def __init__(self, key):
            self.down = eqx.nn.Conv2d(3, 4, (2, 3), key=key)
            self.up = eqx.nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, key=key)

        def __call__(self, x):
            return self.up(jnp.tanh(self.down(x)))

    net = made(Net)

    def preactivations(net, x):
        z = jax.vmap(net.down)(x)
        found = {"down/weight": z, "up/weight": jax.vmap(net.up)(jnp.tanh(z))}
        return {path: rows(jnp.moveaxis(z, 1, -1)) for path, z in found.items()}

    axes = {"down/weight": (-3, -2, -1), "up/weight": (-3, -2, -1)}
    return Model(
        lambda net, x: jax.vmap(net)(x),
        net,
        normal(2, 3, 4, 5),
        axes,
        biases("down", "up"),
        preactivations=preactivations,
        biased=frozenset(axes),
    )


def equinox_attention() -> Model:
    net = made(
        eqx.nn.MultiheadAttention,
        2,
        5,
        output_size=7,
        qk_size=3,
        vo_size=2,
        use_query_bias=True,
        use_output_bias=True,
    )

    def preactivations(net, x):
        q = x @ net.query_proj.weight.T + net.query_proj.bias
        k, v = x @ net.key_proj.weight.T, x @ net.value_proj.weight.T
        heads = [z.reshape(*z.shape[:2], 2, -1) for z in (q, k, v)]
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", *heads[:2]) / jnp.sqrt(3))
        mixed = jnp.einsum("bhts,bshd->bthd", weights, heads[2]).reshape(*x.shape[:2], -1)
        out = mixed @ net.output_proj.weight.T + net.output_proj.bias
        found = {"query_proj": q, "key_proj": k, "value_proj": v, "output_proj": out}
        return {f"{name}/weight": rows(z) for name, z in found.items()}

    return Model(
        lambda net, x: jax.vmap(lambda x: net(x, x, x))(x),
        net,
        normal(2, 4, 5),
        {f"{name}_proj/weight": (-1,) for name in ("query", "key", "value", "output")},
        biases("query_proj", "output_proj"),
        preactivations=preactivations,
        biased=frozenset({"query_proj/weight", "output_proj/weight"}),
    )


def equinox_gru() -> Model:
    def fn(cell, x):
        def step(state, row):
            return cell(row, state), None

        return jax.vmap(lambda x: jax.lax.scan(step, jnp.zeros(4), x)[0])(x)

    axes = {"weight_ih": (-1,), "weight_hh": (-1,)}
    return Model(
        fn,
        made(eqx.nn.GRUCell, 5, 4),
        normal(2, 3, 5),
        axes,
        elementwise("bias", "bias_n"),
        initialized=0,
    )


MODELS: dict[str, Callable[[], Model]] = {
    "equinox_mlp": equinox_mlp,
    "equinox_cnn": equinox_cnn,
    "equinox_attention": equinox_attention,
    "equinox_gru": equinox_gru,
}
