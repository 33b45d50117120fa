"""The zoo's Linen models that are made of dense layers, attention and embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from tests.zoo.model import KEY, Axes, Model, biases, elementwise, filled, kernels, normal, rows, tokens


def linen(
    module: nn.Module,
    x: jax.Array,
    axes: Axes,
    left: dict[str, str],
    apply: Callable[[Any, jax.Array], jax.Array] | None = None,
    **statements: Any,
) -> Model:
    params = filled(jax.eval_shape(module.init, KEY, x))
    return Model(apply or module.apply, params, x, axes, left, **statements)


def captured(module: nn.Module, axes: Axes) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
    """The pre-activations, for kernels whose module returns it as it is: what `nn.Module.__call__` returned."""

    def preactivations(params: Any, x: jax.Array) -> dict[str, jax.Array]:
        _, found = module.apply(params, x, capture_intermediates=True, mutable=["intermediates", "batch_stats"])

        def of(path: str) -> jax.Array:
            node, kernel = found["intermediates"], meta.unbox(params)
            for key in path.split("/")[1:-1]:
                node = node[key]
            for key in path.split("/"):
                kernel = kernel[key]
            (z,) = node["__call__"]
            return rows(z, kernel.ndim - len(axes[path]))

        return {path: of(path) for path in axes}

    return preactivations


def feed_forward(
    module: nn.Module, x: jax.Array, axes: Axes, left: dict[str, str] | None = None, **statements: Any
) -> Model:
    """A model whose every weight is a module's `kernel` with a `bias` beside it."""
    left = {**biases(*(path.removesuffix("/kernel") for path in axes)), **(left or {})}
    return linen(module, x, axes, left, preactivations=captured(module, axes), biased=frozenset(axes), **statements)


def linen_mlp() -> Model:
    module = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(8), nn.relu, nn.Dense(3)])
    return feed_forward(module, normal(4, 6), kernels(f"params/layers_{i}" for i in (0, 2, 4)))


def linen_zero_initialized() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(8)(x))
            return nn.Dense(3, kernel_init=nn.initializers.zeros, bias_init=nn.initializers.ones)(x)

    model = feed_forward(Net(), normal(4, 6), kernels(["params/Dense_0", "params/Dense_1"]))
    # Data-dependent initialization leaves a layer that is zero on purpose.
    return dataclasses.replace(model, params=Net().init(KEY, model.x), initialized=1)


def linen_boxed() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.initializers.lecun_normal()
            x = nn.relu(nn.Dense(8, kernel_init=nn.with_partitioning(init, (None, "model")))(x))
            return nn.Dense(4, kernel_init=nn.with_logical_partitioning(init, ("hidden", "embed")))(x)

    return feed_forward(Net(), normal(4, 6), kernels(["params/Dense_0", "params/Dense_1"]))


def linen_half(dtype: Any) -> Model:
    module = nn.Sequential(
        [nn.Dense(16, dtype=dtype, param_dtype=dtype), nn.relu, nn.Dense(4, dtype=dtype, param_dtype=dtype)]
    )
    layers = ["params/layers_0", "params/layers_2"]
    output = frozenset() if dtype == jnp.float16 else None
    return linen(module, normal(4, 32, dtype=dtype), kernels(layers), biases(*layers), output=output)


def linen_mixed_bfloat16() -> Model:
    module = nn.Sequential([nn.Dense(7, dtype=jnp.bfloat16), nn.relu, nn.Dense(3, dtype=jnp.bfloat16)])
    layers = ["params/layers_0", "params/layers_2"]
    return linen(module, normal(4, 5), kernels(layers), biases(*layers))


def linen_general() -> Model:
    module = nn.DenseGeneral((3, 4), axis=(-2, -1))
    return feed_forward(module, normal(3, 5, 7), {"params/kernel": (-4, -3)})  # (5, 7, 3, 4)


def linen_batch_general() -> Model:
    # One kernel for each index of the first axis: (2, 5, 3).
    module = nn.DenseGeneral(3, batch_dims=(0,))
    return linen(module, normal(2, 4, 5), {"params/kernel": (-2,)}, biases("params"))


def linen_einsum() -> Model:
    module = nn.Sequential([nn.Einsum((5, 3, 2), "bi,iho->bho"), nn.tanh, nn.Einsum((7, 3, 2), "bho,fho->bf")])
    axes = {"params/layers_0/kernel": (-3,), "params/layers_2/kernel": (-2, -1)}
    return feed_forward(module, normal(4, 5), axes)


def linen_attention() -> Model:
    # Query, key and value kernels are (features, heads, head features), the output's (heads, head features, features).
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    axes = kernels(["params/query", "params/key", "params/value"], (-3,))
    return feed_forward(module, normal(2, 5, 6), {**axes, "params/out/kernel": (-3, -2)})


def linen_cross_attention() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, out_features=4, name="cross")
            return attention(x, x[:, ::-1][:, :3])

    axes = kernels([f"params/cross/{name}" for name in ("query", "key", "value")], (-3,))
    return feed_forward(Net(), normal(2, 5, 7), {**axes, "params/cross/out/kernel": (-3, -2)})


def linen_embed() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            tied = nn.Embed(7, 5, name="tied")
            return tied.attend(nn.Dense(5)(tied(x) + nn.Embed(7, 5, name="alone")(x)))

    left = {"params/tied/embedding": "indexed", "params/alone/embedding": "indexed"}
    return feed_forward(Net(), tokens(3, 4), kernels(["params/Dense_0"]), left)


def linen_experts() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            up = self.param("up", nn.initializers.normal(1.0), (3, 5, 7))  # (experts, features in, features out)
            down = self.param("down", nn.initializers.normal(1.0), (3, 7, 4))
            gates = nn.softmax(nn.Dense(3, name="gate")(x))
            hidden = nn.tanh(jnp.einsum("bi,eio->beo", x, up))
            return jnp.einsum("be,beo->bo", gates, jnp.einsum("bei,eio->beo", hidden, down))

    def preactivations(params: Any, x: jax.Array) -> dict[str, jax.Array]:
        p = params["params"]
        up = jnp.stack([x @ w for w in p["up"]], 1)
        down = jnp.stack([jnp.tanh(up[:, i]) @ w for i, w in enumerate(p["down"])], 1)
        gate = x @ p["gate"]["kernel"] + p["gate"]["bias"]
        return {"params/up": rows(up, 2), "params/down": rows(down, 2), "params/gate/kernel": gate}

    return linen(
        Net(),
        normal(4, 5),
        {"params/up": (-2,), "params/down": (-2,), "params/gate/kernel": (-2,)},
        biases("params/gate"),
        preactivations=preactivations,
        biased=frozenset({"params/gate/kernel"}),
    )


def linen_shared() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.Dense(5, name="shared")
            return nn.Dense(3)(nn.tanh(shared(nn.tanh(shared(x)))))

    layers = ["params/shared", "params/Dense_0"]
    return linen(Net(), normal(4, 5), kernels(layers), biases(*layers), initialized=1)


def _norm_net(training: bool) -> nn.Module:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            if not training:
                x = nn.relu(nn.LayerNorm()(nn.Dense(7)(x)))
                x = nn.relu(nn.RMSNorm()(nn.Dense(5)(x)))
            x = nn.relu(nn.BatchNorm(use_running_average=not training)(nn.Dense(6)(x)))
            return nn.Dense(3)(x)

    return Net()


def linen_norms() -> Model:
    # The batch norm uses its running statistics.
    gains = elementwise("params/RMSNorm_0/scale", "params/LayerNorm_0/scale", "params/BatchNorm_0/scale")
    statistics = elementwise("batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var")
    left = {**gains, **statistics, **biases("params/LayerNorm_0", "params/BatchNorm_0")}
    return feed_forward(_norm_net(False), normal(4, 5), kernels(f"params/Dense_{i}" for i in range(4)), left)


def linen_batch_norm() -> Model:
    # It normalizes with the statistics of the batch, and updates the running ones, which are not returned.
    module = _norm_net(True)
    statistics = dict.fromkeys(("batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var"), "unused")
    left = {**statistics, **elementwise("params/BatchNorm_0/scale"), **biases("params/BatchNorm_0")}
    return feed_forward(
        module,
        normal(4, 5),
        kernels(["params/Dense_0", "params/Dense_1"]),
        left,
        apply=lambda params, x: module.apply(params, x, mutable=["batch_stats"])[0],
    )


MODELS: dict[str, Callable[[], Model]] = {
    "linen_mlp": linen_mlp,
    "linen_zero_initialized": linen_zero_initialized,
    "linen_boxed": linen_boxed,
    "linen_bfloat16": lambda: linen_half(jnp.bfloat16),
    "linen_float16": lambda: linen_half(jnp.float16),
    "linen_mixed_bfloat16": linen_mixed_bfloat16,
    "linen_general": linen_general,
    "linen_batch_general": linen_batch_general,
    "linen_einsum": linen_einsum,
    "linen_attention": linen_attention,
    "linen_cross_attention": linen_cross_attention,
    "linen_embed": linen_embed,
    "linen_experts": linen_experts,
    "linen_shared": linen_shared,
    "linen_norms": linen_norms,
    "linen_batch_norm": linen_batch_norm,
}
