"""The zoo's models in plain JAX: what can happen to a weight before a matmul, or instead of one."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tests.zoo.model import Model, elementwise, normal, rows


def plain_dense() -> Model:
    params = {"w1": normal(5, 7), "b1": normal(7, seed=2), "w2": normal(7, 3, seed=3)}

    def preactivations(p, x):
        z = x @ p["w1"] + p["b1"]
        return {"w1": z, "w2": jnp.tanh(z) @ p["w2"]}

    return Model(
        lambda p, x: jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"],
        params,
        normal(4, 5),
        {"w1": (-2,), "w2": (-2,)},
        elementwise("b1"),
        preactivations=preactivations,
        biased=frozenset({"w1"}),
    )


def plain_stack() -> Model:
    """A stack (layers, in, out) that constants index: used twice."""
    return Model(
        lambda p, x: jnp.tanh(x @ p["stack"][0]) @ p["stack"][1],
        {"stack": normal(2, 5, 5)},
        normal(4, 5),
        {"stack": (-2,)},
    )


def plain_low_rank() -> Model:
    def fn(p, x):
        averaged = jnp.ones((1, 4)) @ p["averaged"]
        return jnp.tanh(x @ (p["u"] @ p["v"]) + averaged) @ p["out"]

    return Model(
        fn,
        {"u": normal(5, 2), "v": normal(2, 7, seed=2), "averaged": normal(4, 7, seed=3), "out": normal(7, 3, seed=4)},
        normal(4, 5),
        {"out": (-2,), "averaged": (-2,)},
        {"u": "product", "v": "product"},
        initialized=1,
    )


def plain_additive() -> Model:
    """A positional embedding, gain and shift go into a matmul along with the activations."""

    def steps(p, x):
        hidden = (x + p["position"]) @ p["w1"]
        return hidden, (jax.nn.standardize(hidden) * p["gain"] + p["shift"]) @ p["w2"]

    vectors = {"gain": normal(7, seed=2), "shift": normal(7, seed=3)}
    return Model(
        lambda p, x: steps(p, x)[1],
        {"position": normal(4, 5), "w1": normal(5, 7, seed=4), **vectors, "w2": normal(7, 3, seed=5)},
        normal(2, 4, 5),
        {"w1": (-2,), "w2": (-2,)},
        elementwise("position", "gain", "shift"),
        preactivations=lambda p, x: dict(zip(("w1", "w2"), map(rows, steps(p, x)), strict=True)),
    )


def plain_twice() -> Model:
    """One weight used twice alike, and one with either of its axes."""

    def fn(p, x):
        h = jnp.tanh(jnp.tanh(x @ p["alike"]) @ p["alike"])
        return jnp.tanh(h @ p["both"]) @ p["both"].T

    params = {"alike": normal(5, 5), "both": normal(5, 5, seed=2)}
    return Model(fn, params, normal(4, 5), {"alike": (-2,)}, {"both": "disagree"}, initialized=0)


def plain_vector() -> Model:
    """A weight (out, in), and one that is a vector."""

    def steps(p, x):
        z = jnp.einsum("ij,kj->ik", x, p["transposed"])
        return z, jnp.tanh(z) @ p["vector"]

    return Model(
        lambda p, x: steps(p, x)[1],
        {"transposed": normal(7, 5), "vector": normal(7, seed=2)},
        normal(4, 5),
        {"transposed": (-1,), "vector": (-1,)},
        preactivations=lambda p, x: {"transposed": steps(p, x)[0], "vector": rows(steps(p, x)[1], 0)},
    )


def plain_concatenated() -> Model:
    """Weights side by side along the features, along the reduction axis, and one of which a part is used."""

    def fn(p, x):
        h = jnp.tanh(x @ jnp.concatenate([p["left"], p["right"]], axis=1))
        h = jnp.tanh(h @ jnp.concatenate([p["top"], p["bottom"]], axis=0))
        return h[:, :3] @ p["part"][:3]

    sides = {"left": normal(5, 3), "right": normal(5, 4, seed=2)}
    return Model(
        fn,
        {**sides, "top": normal(2, 6, seed=3), "bottom": normal(5, 6, seed=4), "part": normal(6, 2, seed=5)},
        normal(4, 5),
        {"left": (-2,), "right": (-2,)},
        {"top": "sliced", "bottom": "sliced", "part": "sliced"},
        preactivations=lambda p, x: {name: x @ p[name] for name in ("left", "right")},
    )


def plain_reshaped() -> Model:
    """A reshape that splits the features of `merged`; reshapes that merge axes of one kind in the others."""

    def steps(p, x):
        merged = jnp.einsum("bi,ihd->bhd", x, p["merged"].reshape(5, 2, 3)).reshape(-1, 6)
        split = jnp.tanh(merged) @ p["split"].reshape(6, 8)  # stored as (in, heads, dim)
        return merged, split, jnp.tanh(split) @ p["joined"].reshape(8, 3)  # stored as (heads, dim, out)

    return Model(
        lambda p, x: steps(p, x)[2],
        {"merged": normal(5, 6), "split": normal(6, 2, 4, seed=2), "joined": normal(2, 4, 3, seed=3)},
        normal(4, 5),
        {"merged": (-2,), "split": (-3,), "joined": (-3, -2)},
        preactivations=lambda p, x: dict(zip(("merged", "split", "joined"), steps(p, x), strict=True)),
    )


def plain_scaled() -> Model:
    """Weights times a scalar, negated, and times a mask."""

    def steps(p, x):
        halved = x @ (0.5 * p["halved"])
        negated = jnp.tanh(halved) @ -p["negated"]
        return halved, negated, jnp.tanh(negated) @ (p["masked"] * np.tri(6, 3, dtype=np.float32))

    return Model(
        lambda p, x: steps(p, x)[2],
        {"halved": normal(5, 7), "negated": normal(7, 6, seed=2), "masked": normal(6, 3, seed=3)},
        normal(4, 5),
        {"halved": (-2,), "negated": (-2,), "masked": (-2,)},
        preactivations=lambda p, x: dict(zip(("halved", "negated", "masked"), steps(p, x), strict=True)),
    )


def plain_leftovers() -> Model:
    """Parameters that are unused, no real numbers, or in an operation that mixes them."""

    def fn(p, x):
        return jnp.tanh(x @ p["w"] * p["integer"]) @ jnp.cumsum(p["mixed"], axis=0)

    return Model(
        fn,
        # A NumPy array, as tests differentiate in every jax.Array.
        {"w": normal(5, 7), "unused": normal(3, 2), "integer": np.int32([2]), "mixed": normal(7, 3, seed=2)},
        normal(4, 5),
        {"w": (-2,)},
        {"unused": "unused", "integer": "dtype", "mixed": "opaque"},
        preactivations=lambda p, x: {"w": x @ p["w"]},
    )


def plain_penalty() -> Model:
    def fn(p, x):
        return jnp.mean(jnp.square(jnp.tanh(x @ p["penalized"]) @ p["w"])) + 0.1 * jnp.sum(p["penalized"] ** 2)

    return Model(
        fn,
        {"penalized": normal(5, 7), "w": normal(7, 3, seed=2)},
        normal(4, 5),
        {"w": (-2,)},
        {"penalized": "penalty"},
        preactivations=lambda p, x: {"w": jnp.tanh(x @ p["penalized"]) @ p["w"]},
    )


_ALL = (
    plain_dense,
    plain_stack,
    plain_low_rank,
    plain_additive,
    plain_twice,
    plain_vector,
    plain_concatenated,
    plain_reshaped,
    plain_scaled,
    plain_leftovers,
    plain_penalty,
)
MODELS: dict[str, Callable[[], Model]] = {make.__name__: make for make in _ALL}
