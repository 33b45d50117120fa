"""Scanned stacks of layers: each layer is rebuilt in its trip, and never the stack as a whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import wn_jax as wn

LAYERS, WIDTH = 16, 64
RNG = np.random.default_rng(0)
KERNELS = jnp.asarray(RNG.normal(size=(LAYERS, WIDTH, WIDTH)) / 8, jnp.float32)
X = jnp.asarray(RNG.normal(size=(2 * WIDTH, WIDTH)), jnp.float32)  # so many rows that the scale goes to the weight


def layer(x, kernel):
    return jnp.tanh(x @ kernel), None


def scanned(params, x):
    return jnp.sum(lax.scan(layer, x, params["kernel"])[0] ** 2)


def rematerialized(params, x):
    return jnp.sum(lax.scan(jax.checkpoint(layer, prevent_cse=False), x, params["kernel"])[0] ** 2)


def backwards_and_turned(params, x):
    turned = jnp.flip(params["kernel"].transpose(0, 2, 1) * 0.5, axis=1)
    return jnp.sum(lax.scan(layer, x, turned, reverse=True)[0] ** 2)


def used_again_in_an_inner_loop(params, x):
    """Each layer at several time steps: rebuilt once, before them."""

    def recurrent(x, kernel):
        return lax.fori_loop(0, 3, lambda _, x: layer(x, kernel)[0], x), None

    return jnp.sum(lax.scan(recurrent, x, params["kernel"])[0] ** 2)


def scanned_twice(params, x):
    return scanned(params, x) + rematerialized(params, 2 * x)


def scan_of_scans(params, x):
    def outer(x, kernels):
        return lax.scan(layer, x, kernels)[0], None

    return jnp.sum(lax.scan(outer, x, params["kernel"].reshape(4, LAYERS // 4, WIDTH, WIDTH))[0] ** 2)


def with_its_own_rule(params, x):
    @jax.custom_jvp
    def matmul(x, kernel):
        return x @ kernel

    matmul.defjvps(lambda dx, _, x, kernel: dx @ kernel, lambda dk, _, x, kernel: x @ dk)
    return jnp.sum(lax.scan(lambda x, kernel: (jnp.tanh(matmul(x, kernel)), None), x, params["kernel"])[0] ** 2)


def used_thrice(params, x):
    """In one trip, by an unrolled recurrence."""

    def recurrent(x, kernel):
        for _ in range(3):
            x = jnp.tanh(x @ kernel)
        return x, None

    return jnp.sum(lax.scan(recurrent, x, params["kernel"])[0] ** 2)


def in_a_branch(params, x):
    def either(x, kernel):
        return lax.cond(x[0, 0] > 0, lambda: x @ kernel, lambda: x @ (2 * kernel)), None

    return jnp.sum(lax.scan(either, x, params["kernel"])[0] ** 2)


PROGRAMS = [
    scanned,
    rematerialized,
    backwards_and_turned,
    used_again_in_an_inner_loop,
    scanned_twice,
    scan_of_scans,
    with_its_own_rule,
    used_thrice,
    in_a_branch,
]


@pytest.mark.parametrize(
    ("program", "axes"),
    [*((program, (-2,)) for program in PROGRAMS), (rematerialized, (-3, -2)), (scan_of_scans, (-3, -2))],
)  # the last two have a norm of all layers together
def test_values_and_derivatives_are_those_of_the_weight(program, axes):
    params = wn.reparameterize({"kernel": KERNELS}, {"kernel": axes})
    params["kernel"] = wn.WeightNorm(1.5 * params["kernel"].g, params["kernel"].v, params["kernel"].axes)
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda a: a.astype(jnp.float64), (params, X))
        direction = jax.tree.map(lambda a: jnp.asarray(RNG.normal(size=a.shape)), params)
        for function in (jax.value_and_grad, lambda f: lambda p, x: jax.jvp(lambda p: f(p, x), (p,), (direction,))):
            found, expected = (
                jax.jit(function(wn.wrap(program, scale=scale)))(params, x) for scale in ("auto", "weight")
            )
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), found, expected)


@pytest.mark.parametrize("program", [scanned, rematerialized])
def test_the_stack_is_never_rebuilt_as_a_whole(program):
    """So what a forward pass needs beside its arguments is less than the stack."""
    params = wn.reparameterize({"kernel": KERNELS}, {"kernel": (-2,)})
    temporary = {
        scale: jax.jit(wn.wrap(program, scale=scale)).lower(params, X).compile().memory_analysis().temp_size_in_bytes
        for scale in ("auto", "weight")
    }
    assert temporary["weight"] > KERNELS.nbytes > 3 * temporary["auto"]


def test_nor_in_the_gradient_with_remat():
    params = wn.reparameterize({"kernel": KERNELS}, {"kernel": (-2,)})
    gradient = {
        scale: jax.jit(jax.grad(wn.wrap(rematerialized, scale=scale))).lower(params, X).compile()
        for scale in ("auto", "weight")
    }
    auto, weight = (compiled.memory_analysis().temp_size_in_bytes for compiled in gradient.values())
    assert weight - auto > 0.9 * KERNELS.nbytes


def test_a_layer_is_rebuilt_once_a_trip_however_often_it_is_used():
    """A barrier for the norm, and one for the layer."""
    params = wn.reparameterize({"kernel": KERNELS}, {"kernel": (-2,)})
    assert str(jax.make_jaxpr(wn.wrap(used_thrice))(params, X)).count(" optimization_barrier ") == 2


def test_under_vmap_and_twice_differentiated():
    params = wn.reparameterize({"kernel": KERNELS[:3, :8, :8]}, {"kernel": (-2,)})
    several, x = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), params), X[:20, :8]

    def curvature(function, params, x):
        return jax.jvp(jax.grad(function), (params, x), (params, x))[1]

    found, expected = (
        jax.jit(jax.vmap(functools.partial(curvature, wn.wrap(rematerialized, scale=scale)), (0, None)))(several, x)
        for scale in ("auto", "weight")
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), found, expected)
