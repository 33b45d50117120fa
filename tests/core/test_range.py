"""Weights whose scale `g / ||v||` leaves float32 while they do not, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.test_node import gradients64, normal, relative, weight64
from wn_jax import WeightNorm

EXTREMES = [(1e-10, 1e30), (1e-16, 1e25), (1e-15, 1e33), (1e-7, 1e33), (1e18, 1e-25), (1e10, 1e-31), (1e18, 1e-30)]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(("length", "g"), EXTREMES)
def test_weights_and_derivatives_where_the_scale_is_out_of_range(length, g, jit):
    """A loss of the weight over its size, beside a feature of ordinary numbers."""
    directions = np.asarray(normal(50, 2), np.float64)
    v = jnp.asarray(directions / np.linalg.norm(directions, axis=0) * [length, 1], jnp.float32)
    g = jnp.asarray([[g, 1.5]], jnp.float32)
    over = jnp.asarray([[1 / float(g[0, 0]), 1]], jnp.float32)
    cotangent = normal(50, 2, seed=1)

    def weight(g, v):
        return WeightNorm(g, v, (-2,)).weight()

    def loss(g, v):
        return jnp.sum(weight(g, v) * over * cotangent)

    def everything(g, v):
        gradient = jax.grad(loss, (0, 1))
        tangents = (jnp.zeros_like(g), v * cotangent)
        return weight(g, v), gradient(g, v), jax.jvp(gradient, (g, v), tangents)[1]

    found, grads, products = (jax.jit(everything) if jit else everything)(g, v)
    with np.errstate(all="raise"):
        expected = weight64(g, v, 0)
        of_g, of_v = gradients64(g, v, np.asarray(over, np.float64) * np.asarray(cotangent, np.float64), 0)
        step = 1e-6  # the derivative along the tangent, by differences in float64
        moved = [np.asarray(v, np.float64) * (1 + sign * step * np.asarray(cotangent, np.float64)) for sign in (1, -1)]
        ahead, behind = (
            gradients64(g, x, np.asarray(over, np.float64) * np.asarray(cotangent, np.float64), 0) for x in moved
        )
    for feature in (0, 1):
        pick = lambda x: np.asarray(x)[:, feature]  # noqa: B023, E731
        assert relative(pick(found), pick(expected)) <= 1e-6
        assert relative(pick(grads[0]), pick(of_g)) <= 5e-6
        assert relative(pick(grads[1]), pick(of_v)) <= 2e-6
        for own, a, b in zip(products, ahead, behind, strict=True):
            assert relative(pick(own), pick((a - b) / (2 * step))) <= 3e-4
