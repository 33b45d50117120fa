"""The zoo's Haiku models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from tests.zoo.model import Axes, Model, elementwise, filled, normal, rows


def model(forward: Callable[[jax.Array], jax.Array], x: jax.Array, axes: Axes, loop: bool = False) -> Model:
    """Every weight `w` has a bias `b` beside it, and outside loops its module returns the pre-activation."""
    net = hk.without_apply_rng(hk.transform(forward))

    def watched(x: jax.Array) -> dict[str, jax.Array]:
        found = {}

        def watch(call: Any, args: Any, kwargs: Any, context: hk.MethodContext) -> Any:
            z = call(*args, **kwargs)
            if (path := f"{context.module.module_name}/w") in axes and context.method_name == "__call__":
                found[path] = rows(z)
            return z

        with hk.intercept_methods(watch):
            forward(x)
        return found

    preactivations = None if loop else hk.without_apply_rng(hk.transform(watched)).apply
    return Model(
        net.apply,
        filled(jax.eval_shape(net.init, jax.random.PRNGKey(0), x)),
        x,
        axes,
        elementwise(*(path.removesuffix("w") + "b" for path in axes)),
        initialized=0 if loop else None,
        preactivations=preactivations,
        biased=frozenset() if loop else frozenset(axes),
    )


def haiku_mlp() -> Model:
    axes = {"mlp/~/linear_0/w": (-2,), "mlp/~/linear_1/w": (-2,)}
    return model(lambda x: hk.nets.MLP([8, 3])(x), normal(4, 6), axes)


def haiku_cnn() -> Model:
    # A transposed convolution's weight is (height, width, features out, features in).
    def forward(x):
        x = jnp.tanh(hk.Conv2D(4, (2, 3), feature_group_count=2, name="down")(x))
        return hk.Conv2DTranspose(3, 2, stride=2, name="up")(x)

    return model(forward, normal(2, 3, 4, 6), {"down/w": (-4, -3, -2), "up/w": (-4, -3, -1)})


def haiku_lstm() -> Model:
    # One matrix for all gates, on the input and the state behind each other: (5 + 4, 4 * 4).
    def forward(x):
        core = hk.LSTM(4)
        return hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0]

    return model(forward, normal(3, 2, 5), {"lstm/linear/w": (-2,)}, loop=True)


def haiku_attention() -> Model:
    def forward(x):
        attention = hk.MultiHeadAttention(
            2, 3, w_init=hk.initializers.VarianceScaling(), value_size=2, model_size=7, name="attention"
        )
        return attention(x, x, x)

    axes = {f"attention/{name}/w": (-2,) for name in ("query", "key", "value", "linear")}
    return model(forward, normal(2, 4, 5), axes)


MODELS: dict[str, Callable[[], Model]] = {
    "haiku_mlp": haiku_mlp,
    "haiku_cnn": haiku_cnn,
    "haiku_lstm": haiku_lstm,
    "haiku_attention": haiku_attention,
}
