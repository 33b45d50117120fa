"""The cost of products: one compilation for all parameters and batches of the same shapes, and little memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wn_jax as wn
from tests.curvature.test_errors import MAKERS
from wn_jax import curvature

MATRICES = ["hessian", "gauss_newton", "fisher", "empirical_fisher"]


class Counted:
    """A function that counts its Python calls, which are its traces."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


@pytest.mark.parametrize("name", MAKERS)
def test_a_product_is_compiled_once_for_all_parameters_and_batches(name):
    counted = Counted(MAKERS[name].args[0])
    make = MAKERS[name].func(counted, *MAKERS[name].args[1:], batch_size=3)
    for seed in range(4):
        params, batch = {"w": jnp.array([1.0, seed])}, np.random.default_rng(seed).standard_normal((6, 2))
        own = make(params, jnp.asarray(batch, jnp.float32))
        for _ in range(3):
            own(own.params)
        if seed == 0:
            traced = counted.calls
    assert counted.calls == traced <= 8
    make(params, jnp.ones((9, 2)))  # three parts, and not two, of the same shape
    assert counted.calls == traced
    curvature.eigenvalues(own, jax.random.key(0), steps=1, count=None)
    assert counted.calls == traced


def convnet():
    """About 1 million parameters, on images of 32 x 32, and its loss."""
    convs = [
        layer
        for width, stride in ((64, 1), (128, 2), (256, 2), (256, 1))
        for layer in (nn.Conv(width, (3, 3), strides=stride), nn.relu)
    ]
    net = nn.Sequential([*convs, lambda x: x.mean((1, 2)), nn.Dense(10)])
    batch = jnp.zeros((32, 32, 32, 3)), jnp.arange(32) % 10
    params = jax.eval_shape(net.init, jax.random.key(0), batch[0])

    def losses(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, batch[0]), batch[1])

    return net, losses, jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params), batch


def temporary(compiled):
    """The bytes of memory that a compiled function needs beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "nodes"])
@pytest.mark.parametrize("name", [*MATRICES, "gradient_covariance"])
def test_a_product_takes_the_memory_of_four_gradients_at_most(name, form):
    net, losses, params, batch = convnet()
    if form == "nodes":
        params = wn.reparameterize(params, wn.kernel_axes(params))
    losses = wn.wrap(losses)

    def loss(params, batch):
        return losses(params, batch).mean()

    make = {
        "hessian": lambda: curvature.hessian(loss),
        "gauss_newton": lambda: curvature.gauss_newton(
            wn.wrap(lambda params, batch: net.apply(params, batch[0])),
            lambda outputs, batch: optax.softmax_cross_entropy_with_integer_labels(outputs, batch[1]).mean(),
        ),
        "fisher": lambda: curvature.fisher(wn.wrap(lambda params, batch: net.apply(params, batch[0])), "categorical"),
        "empirical_fisher": lambda: curvature.empirical_fisher(losses),
        "gradient_covariance": lambda: curvature.gradient_covariance(losses),
    }[name]()
    gradient = temporary(jax.jit(jax.grad(loss)).lower(params, batch).compile())
    shapes = jax.eval_shape(make, params, batch)
    product = temporary(jax.jit(lambda own, vector: own(vector)).lower(shapes, shapes.params).compile())
    assert 900_000 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 1_100_000
    assert product <= 4 * gradient


def test_a_whole_matrix_is_made_part_by_part():
    """In the memory of some products with one part of the batch, and not with all of them."""
    make = curvature.hessian(lambda params, batch: jnp.mean(jnp.tanh(batch @ params) ** 2), batch_size=8)
    batch = jnp.asarray(np.random.default_rng(0).standard_normal((64, 5)), jnp.float32)
    own = make(jnp.ones((5, 7)), batch)
    whole = curvature.hessian(lambda params, batch: jnp.mean(jnp.tanh(batch @ params) ** 2))(jnp.ones((5, 7)), batch)
    np.testing.assert_allclose(own.dense(), whole.dense(), atol=1e-6)
    assert own.dense().shape == (35, 35)  # 35 rows are no multiple of a block
