"""The zoo's Flax NNX models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo.model import Axes, Model, biases, elementwise, filled, kernels, normal, rows, tokens

Outputs = dict[str, tuple[jax.Array, int]]


def made(net: Callable[[nnx.Rngs], Any]) -> tuple[Any, Any]:
    """The graph, and a state whose numbers took no compilation."""
    graph, state = nnx.split(nnx.eval_shape(lambda: net(nnx.Rngs(0))))
    return graph, filled(state)


def model(net: Callable[[nnx.Rngs], Any], x: jax.Array, axes: Axes, left: dict[str, str], **statements: Any) -> Model:
    graph, state = made(net)
    statements = {"module": lambda: nnx.merge(graph, state, copy=True), **statements}
    return Model(lambda state, x: nnx.merge(graph, state)(x), state, x, axes, left, **statements)


def feed_forward(net: Callable[[nnx.Rngs], Any], x: jax.Array, axes: Axes, left: dict[str, str] | None = None) -> Model:
    """A model with a method `outputs`: for each weight's path what its layer returns, and its number of feature axes.

    Each `kernel` has a `bias` beside it.
    """
    graph, state = made(net)

    def preactivations(state: Any, x: jax.Array) -> dict[str, jax.Array]:
        return {path: rows(*output) for path, output in nnx.merge(graph, state).outputs(x).items()}

    layers = [path.removesuffix("/kernel") for path in axes if path.endswith("/kernel")]
    return Model(
        lambda state, x: nnx.merge(graph, state)(x),
        state,
        x,
        axes,
        {**biases(*layers), **(left or {})},
        preactivations=preactivations,
        biased=frozenset(f"{layer}/kernel" for layer in layers),
        module=lambda: nnx.merge(graph, state, copy=True),
    )


class Chain(nnx.Module):
    """Layers one after the other, with tanh between them."""

    def __init__(self, features: tuple[int, ...] = (), **layers: Any):
        self.names, self.features = tuple(layers), features or (1,) * len(layers)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def outputs(self, x: jax.Array) -> Outputs:
        found = {}
        for name, features in zip(self.names, self.features, strict=True):
            z = getattr(self, name)(x)
            found[f"{name}/kernel"], x = (z, features), jnp.tanh(z)
        return found

    def __call__(self, x: jax.Array) -> jax.Array:
        return list(self.outputs(x).values())[-1][0]


def nnx_mlp() -> Model:
    def net(rngs):
        return Chain(hidden=nnx.Linear(6, 8, rngs=rngs), out=nnx.Linear(8, 3, rngs=rngs))

    return feed_forward(net, normal(4, 6), kernels(["hidden", "out"]))


def nnx_mixed_bfloat16() -> Model:
    def net(rngs):
        return Chain(
            hidden=nnx.Linear(5, 7, dtype=jnp.bfloat16, rngs=rngs), out=nnx.Linear(7, 3, dtype=jnp.bfloat16, rngs=rngs)
        )

    return model(net, normal(4, 5), kernels(["hidden", "out"]), biases("hidden", "out"))


def nnx_general() -> Model:
    def net(rngs):
        return Chain((2,), general=nnx.LinearGeneral((5, 7), (3, 4), axis=(-2, -1), rngs=rngs))

    return feed_forward(net, normal(3, 5, 7), {"general/kernel": (-4, -3)})


def nnx_einsum() -> Model:
    def net(rngs):
        return Chain(
            (2, 1),
            split=nnx.Einsum("bi,iho->bho", (5, 3, 2), (3, 2), rngs=rngs),
            join=nnx.Einsum("bho,fho->bf", (7, 3, 2), (7,), rngs=rngs),
        )

    return feed_forward(net, normal(4, 5), {"split/kernel": (-3,), "join/kernel": (-2, -1)})


def nnx_convs() -> Model:
    class Net(Chain):
        def outputs(self, x):
            line = self.line(x)
            box = self.box(jnp.tanh(line).reshape(-1, 2, 2, 2, 4))
            return {"line/kernel": (line, 1), "box/kernel": (box, 1)}

    def net(rngs):
        return Net(line=nnx.Conv(3, 4, 3, rngs=rngs), box=nnx.Conv(4, 5, (2, 1, 2), rngs=rngs))

    return feed_forward(net, normal(2, 8, 3), {"line/kernel": (-3, -2), "box/kernel": (-5, -4, -3, -2)})


def nnx_cnn() -> Model:
    def net(rngs):
        return Chain(
            depthwise=nnx.Conv(3, 6, (3, 3), strides=2, feature_group_count=3, rngs=rngs),
            grouped=nnx.Conv(6, 4, (2, 2), kernel_dilation=2, feature_group_count=2, rngs=rngs),
            up=nnx.ConvTranspose(4, 5, (2, 2), strides=2, rngs=rngs),
            back=nnx.ConvTranspose(5, 3, (3, 3), transpose_kernel=True, rngs=rngs),  # kernel (3, 3, out, in)
        )

    axes = {**kernels(["depthwise", "grouped", "up"], (-4, -3, -2)), "back/kernel": (-4, -3, -1)}
    return feed_forward(net, normal(2, 5, 4, 3), axes)


def nnx_attention() -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.own = nnx.MultiHeadAttention(2, 5, qkv_features=6, decode=False, rngs=rngs)
            self.cross = nnx.MultiHeadAttention(
                2, 5, qkv_features=8, out_features=4, in_kv_features=7, decode=False, rngs=rngs
            )

        def outputs(self, x):
            def one(name, layer, x, y):
                parts = ("query", "key", "value")
                q, k, v = layer.query(x), layer.key(y), layer.value(y)
                weights = jnp.einsum("bthd,bshd->bhts", q, k) / jnp.sqrt(q.shape[-1])
                out = layer.out(jnp.einsum("bhts,bshd->bthd", nnx.softmax(weights), v))
                heads = {f"{name}/{part}/kernel": (z, 2) for part, z in zip(parts, (q, k, v), strict=True)}
                return {**heads, f"{name}/out/kernel": (out, 1)}

            own = one("own", self.own, x, x)
            return {**own, **one("cross", self.cross, own["own/out/kernel"][0], self.others(x))}

        def others(self, x):
            return jnp.concatenate([x, x[..., :2]], -1)[:, ::-1][:, :3]

        def __call__(self, x):
            return self.cross(self.own(x), self.others(x))

    axes = {
        f"{name}/{part}/kernel": (-3, -2) if part == "out" else (-3,)
        for name in ("own", "cross")
        for part in ("query", "key", "value", "out")
    }
    return feed_forward(Net, normal(2, 4, 5), axes)


def nnx_embed() -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.tied, self.alone = nnx.Embed(7, 5, rngs=rngs), nnx.Embed(7, 5, rngs=rngs)
            self.hidden = nnx.Linear(5, 5, rngs=rngs)

        def outputs(self, x):
            return {"hidden/kernel": (self.hidden(self.tied(x) + self.alone(x)), 1)}

        def __call__(self, x):
            return self.tied.attend(self.outputs(x)["hidden/kernel"][0])

    left = {"tied/embedding": "indexed", "alone/embedding": "indexed"}
    return feed_forward(Net, tokens(3, 4), kernels(["hidden"]), left)


def nnx_norms() -> Model:
    # The batch norm uses its running statistics.
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 6, rngs=rngs)
            self.third, self.last = nnx.Linear(6, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
            self.layer, self.rms = nnx.LayerNorm(7, rngs=rngs), nnx.RMSNorm(6, rngs=rngs)
            self.batch = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

        def outputs(self, x):
            first = self.first(x)
            second = self.second(jnp.tanh(self.layer(first)))
            third = self.third(jnp.tanh(self.rms(second)))
            found = {"first": first, "second": second, "third": third, "last": self.last(self.batch(third))}
            return {f"{name}/kernel": (z, 1) for name, z in found.items()}

        def __call__(self, x):
            return self.outputs(x)["last/kernel"][0]

    left = elementwise(
        "layer/scale", "layer/bias", "rms/scale", *(f"batch/{x}" for x in ("scale", "bias", "mean", "var"))
    )
    return feed_forward(Net, normal(4, 5), kernels(["first", "second", "third", "last"]), left)


def nnx_batch_norm() -> Model:
    # It normalizes with the statistics of the batch, and updates the running ones, which are not returned.
    class Net(Chain):
        def outputs(self, x):
            hidden = self.hidden(x)
            return {"hidden/kernel": (hidden, 1), "out/kernel": (self.out(jnp.tanh(self.norm(hidden))), 1)}

    def net(rngs):
        return Net(
            hidden=nnx.Linear(5, 6, rngs=rngs), norm=nnx.BatchNorm(6, rngs=rngs), out=nnx.Linear(6, 3, rngs=rngs)
        )

    left = {**elementwise("norm/scale", "norm/bias"), "norm/mean": "unused", "norm/var": "unused"}
    return feed_forward(net, normal(4, 5), kernels(["hidden", "out"]), left)


def nnx_experts() -> Model:
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Param(normal(3, 5, 7))  # (experts, features in, features out)
            self.down = nnx.Param(normal(3, 4, 7, seed=2))  # (experts, features out, features in)
            self.gate = nnx.Linear(5, 3, rngs=rngs)

        def outputs(self, x):
            gate, up = self.gate(x), jnp.einsum("bi,eio->beo", x, self.up[...])
            down = jnp.einsum("bei,eoi->beo", jnp.tanh(up), self.down[...])
            return {"gate/kernel": (gate, 1), "up": (up, 2), "down": (down, 2)}

        def __call__(self, x):
            gate, _, down = self.outputs(x).values()
            return jnp.einsum("be,beo->bo", nnx.softmax(gate[0]), down[0])

    return feed_forward(Net, normal(4, 5), {"gate/kernel": (-2,), "up": (-2,), "down": (-1,)})


def nnx_shared() -> Model:
    class Net(Chain):
        def __call__(self, x):
            return self.out(jnp.tanh(self.shared(jnp.tanh(self.shared(x)))))

    def net(rngs):
        return Net(shared=nnx.Linear(5, 5, rngs=rngs), out=nnx.Linear(5, 3, rngs=rngs))

    return model(net, normal(4, 5), kernels(["shared", "out"]), biases("shared", "out"), initialized=1)


_ALL = (
    nnx_mlp,
    nnx_mixed_bfloat16,
    nnx_general,
    nnx_einsum,
    nnx_convs,
    nnx_cnn,
    nnx_attention,
    nnx_embed,
    nnx_norms,
    nnx_batch_norm,
    nnx_experts,
    nnx_shared,
)
MODELS: dict[str, Callable[[], Model]] = {make.__name__: make for make in _ALL}
