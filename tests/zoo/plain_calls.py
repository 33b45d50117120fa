"""The zoo's models in plain JAX that use their weights inside calls, branches and loops."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.model import Model, elementwise, normal


def plain_calls() -> Model:
    """Contractions inside `jit` and `jax.checkpoint`."""

    @jax.jit
    def dense(x, w, b):
        return jnp.tanh(x @ w + b)

    def fn(p, x):
        return jax.checkpoint(lambda p, x: dense(x, p["saved"], p["bias"]))(p, jax.jit(jnp.matmul)(x, p["jitted"]))

    def preactivations(p, x):
        return {"jitted": x @ p["jitted"], "saved": x @ p["jitted"] @ p["saved"] + p["bias"]}

    return Model(
        fn,
        {"jitted": normal(5, 7), "saved": normal(7, 3, seed=2), "bias": normal(3, seed=3)},
        normal(4, 5),
        {"jitted": (-2,), "saved": (-2,)},
        elementwise("bias"),
        preactivations=preactivations,
        biased=frozenset({"saved"}),
    )


def _custom(dense: Callable[[jax.Array, jax.Array], jax.Array], forward_mode: bool) -> Model:
    def preactivations(p, x):
        z = x @ p["inside"]
        return {"inside": z, "outside": jnp.tanh(z) @ p["outside"]}

    return Model(
        lambda p, x: jnp.tanh(dense(x, p["inside"])) @ p["outside"],
        {"inside": normal(5, 7), "outside": normal(7, 3, seed=2)},
        normal(4, 5),
        {"inside": (-2,), "outside": (-2,)},
        output=frozenset({"outside"}),
        preactivations=preactivations,
        forward_mode=forward_mode,
    )


def plain_custom_jvp() -> Model:
    @jax.custom_jvp
    def dense(x, w):
        return x @ w

    @dense.defjvp
    def double(primals, tangents):  # twice the gradient, so that a rule that got lost shows
        (x, w), (dx, dw) = primals, tangents
        return x @ w, 2 * (dx @ w + x @ dw)

    return _custom(dense, forward_mode=True)


def plain_custom_vjp() -> Model:
    @jax.custom_vjp
    def dense(x, w):
        return x @ w

    dense.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, z: (2 * z @ saved[1].T, 2 * saved[0].T @ z))
    return _custom(dense, forward_mode=False)


def plain_branches() -> Model:
    """The same weight in both branches of a `cond`, one in each, and one in all of a `switch`."""

    def fn(p, x):
        h = lax.cond(x.sum() > 0, lambda x: x @ p["alike"], lambda x: -(x @ p["alike"]), x)
        h = lax.cond(x.mean() > 0, lambda h: h @ p["then"], lambda h: jnp.tanh(h) @ p["else"], h)
        branches = [lambda h: h @ p["switched"], lambda h: jnp.tanh(h @ p["switched"]), lambda h: 2 * h @ p["switched"]]
        return lax.switch(jnp.argmax(x[0]) % 3, branches, h)

    params = {"alike": normal(5, 7), "then": normal(7, 6, seed=2), "else": normal(7, 6, seed=3)}
    axes = dict.fromkeys([*params, "switched"], (-2,))
    return Model(fn, {**params, "switched": normal(6, 3, seed=4)}, normal(4, 5), axes, initialized=0)


def plain_while() -> Model:
    def fn(p, x):
        constant = lax.stop_gradient(p["constant"])  # reverse mode does not go through a while loop
        h = lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ constant)), (0, x))[1]
        return h @ p["after"]

    return Model(
        fn,
        {"constant": normal(5, 5), "after": normal(5, 3, seed=2)},
        normal(4, 5),
        {"after": (-2,)},
        {"constant": "frozen"},
        output=frozenset({"after"}),
    )


def plain_fori() -> Model:
    """A constant of the loop, and a stack (layers, in, out) that the counter indexes."""

    def fn(p, x):
        return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["constant"]) @ p["stack"][i], x)

    params = {"constant": normal(5, 7), "stack": normal(3, 7, 5, seed=2)}
    return Model(fn, params, normal(4, 5), {"constant": (-2,), "stack": (-2,)}, initialized=1)


def plain_carried() -> Model:
    def fn(p, x):
        _, rows = lax.scan(lambda w, row: (0.9 * w, row @ w), p["carried"], x)
        return rows @ p["out"]

    params = {"carried": normal(5, 7), "out": normal(7, 3, seed=2)}
    return Model(fn, params, normal(4, 5), {"out": (-2,)}, {"carried": "carried"})


_ALL = (plain_calls, plain_custom_jvp, plain_custom_vjp, plain_branches, plain_while, plain_fori, plain_carried)
MODELS: dict[str, Callable[[], Model]] = {make.__name__: make for make in _ALL}
