"""The model zoo: small models of every framework, with reduction axes written by hand.

The axes say, for each weight, which of its axes its layer sums over, and were written down from the layers'
definitions, not from what wn_jax answers. Tests of invariances run over the whole zoo.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Model:
    """`fn(params, x)`, and the hand-written axes by leaf path."""

    fn: Callable[[Any, jax.Array], jax.Array]
    params: Any
    x: jax.Array
    axes: dict[str, tuple[int, ...]]


def _normal(*shape: int, seed: int = 1, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def _linen(module: nn.Module, x: jax.Array, axes: dict[str, tuple[int, ...]]) -> Model:
    params = module.init(KEY, x)
    return Model(lambda params, x: module.apply(params, x), params, x, axes)


def plain_dense() -> Model:
    params = {"w1": _normal(5, 7), "b1": _normal(7, seed=2), "w2": _normal(7, 3, seed=3)}
    return Model(
        lambda p, x: jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"], params, _normal(4, 5), {"w1": (-2,), "w2": (-2,)}
    )


def linen_mlp() -> Model:
    module = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(8), nn.relu, nn.Dense(3)])
    return _linen(module, _normal(4, 6), {f"params/layers_{i}/kernel": (-2,) for i in (0, 2, 4)})


def linen_cnn() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3))(x))
            x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=4, strides=2)(x))
            x = nn.relu(nn.ConvTranspose(6, (2, 2), strides=(2, 2))(x))
            return nn.Dense(3)(x.mean((1, 2)))

    conv = (-4, -3, -2)
    axes = {"params/Conv_0/kernel": conv, "params/Conv_1/kernel": conv, "params/ConvTranspose_0/kernel": conv}
    return _linen(Net(), _normal(2, 8, 8, 3), {**axes, "params/Dense_0/kernel": (-2,)})


def linen_transposed_kernel() -> Model:
    # With transpose_kernel=True the kernel is (height, width, features out, features in), as the forward one's is.
    module = nn.ConvTranspose(6, (3, 3), strides=(2, 2), transpose_kernel=True)
    return _linen(module, _normal(2, 4, 4, 5), {"params/kernel": (-4, -3, -1)})


def linen_attention() -> Model:
    # Query, key and value kernels are (features, heads, head features), the output's (heads, head features, features).
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    axes = {f"params/{name}/kernel": (-3,) for name in ("query", "key", "value")}
    return _linen(module, _normal(2, 5, 6), {**axes, "params/out/kernel": (-3, -2)})


def linen_lstm() -> Model:
    gates = [f"params/cell/{side}{gate}/kernel" for side in "ih" for gate in "ifgo"]
    return _linen(nn.RNN(nn.LSTMCell(8), name=None), _normal(2, 5, 6), dict.fromkeys(gates, (-2,)))


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

    return _linen(Stack(), _normal(3, 6), {"params/layers/Dense_0/kernel": (-2,)})  # (layers, 6, 6)


def linen_zero_initialized() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(8)(x))
            return nn.Dense(3, kernel_init=nn.initializers.zeros, bias_init=nn.initializers.ones)(x)

    return _linen(Net(), _normal(4, 6), {f"params/Dense_{i}/kernel": (-2,) for i in (0, 1)})


def linen_boxed() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.initializers.lecun_normal()
            x = nn.relu(nn.Dense(8, kernel_init=nn.with_partitioning(init, (None, "model")))(x))
            return nn.Dense(4, kernel_init=nn.with_logical_partitioning(init, ("hidden", "embed")))(x)

    return _linen(Net(), _normal(4, 6), {f"params/Dense_{i}/kernel": (-2,) for i in (0, 1)})


def linen_half(dtype: Any) -> Model:
    module = nn.Sequential(
        [nn.Dense(16, dtype=dtype, param_dtype=dtype), nn.relu, nn.Dense(4, dtype=dtype, param_dtype=dtype)]
    )
    return _linen(module, _normal(4, 32, dtype=dtype), {f"params/layers_{i}/kernel": (-2,) for i in (0, 2)})


def nnx_mlp() -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(6, 8, rngs=rngs)
            self.out = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.hidden(x)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    axes = {"hidden/kernel": (-2,), "out/kernel": (-2,)}
    return Model(lambda state, x: nnx.merge(graph, state)(x), state, _normal(4, 6), axes)


def equinox_mlp() -> Model:
    # Equinox stores (out features, in features), and its trees hold activation functions among the leaves.
    net = eqx.nn.MLP(6, 3, width_size=8, depth=2, activation=jnp.tanh, key=KEY)
    axes = {f"layers/{i}/weight": (-1,) for i in range(3)}
    return Model(lambda net, x: jax.vmap(net)(x), net, _normal(4, 6), axes)


def haiku_mlp() -> Model:
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 3])(x)))
    x = _normal(4, 6)
    axes = {"mlp/~/linear_0/w": (-2,), "mlp/~/linear_1/w": (-2,)}
    return Model(net.apply, net.init(jax.random.PRNGKey(0), x), x, axes)


ZOO: dict[str, Callable[[], Model]] = {
    "plain_dense": plain_dense,
    "linen_mlp": linen_mlp,
    "linen_cnn": linen_cnn,
    "linen_transposed_kernel": linen_transposed_kernel,
    "linen_attention": linen_attention,
    "linen_lstm": linen_lstm,
    "linen_scanned_stack": linen_scanned_stack,
    "linen_zero_initialized": linen_zero_initialized,
    "linen_boxed": linen_boxed,
    "linen_bfloat16": lambda: linen_half(jnp.bfloat16),
    "linen_float16": lambda: linen_half(jnp.float16),
    "nnx_mlp": nnx_mlp,
    "equinox_mlp": equinox_mlp,
    "haiku_mlp": haiku_mlp,
}
