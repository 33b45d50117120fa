"""Curvature that can be written down: linear regression, in its weights and in the g and v of one neuron."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from tests.curvature.problems import flat, relative
from wn_jax import curvature

SIZE, EXAMPLES = 6, 40
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def inputs(covariance):
    """Centred inputs of exactly this covariance (mean of `x x'`)."""
    x = RANDOM.standard_normal((EXAMPLES, SIZE))
    x -= x.mean(axis=0)
    white = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / EXAMPLES)).T
    return white @ np.linalg.cholesky(covariance).T


def covariance(values):
    basis = np.linalg.qr(RANDOM.standard_normal((SIZE, SIZE)))[0]
    return (basis * values) @ basis.T, basis


def predict(params, batch):
    return batch[0] @ params["w"] + params.get("b", 0.0)


def losses(params, batch):
    return (predict(params, batch) - batch[1]) ** 2 / 2


def loss(params, batch):
    return jnp.mean(losses(params, batch))


def neuron(weight, scale=1.7):
    """The node of a vector with `g / ||v||` of this scale, and its direction."""
    node = wn.WeightNorm.from_weight(jnp.asarray(weight), -1)
    return wn.WeightNorm(node.g, node.v / scale, (-1,)), np.asarray(weight) / np.linalg.norm(weight)


def jacobian(direction, scale=1.7):
    """Of `w = g v / ||v||` by (g, v): `[v/||v||, (g/||v||) (I - v v'/||v||^2)]`."""
    return np.hstack([direction[:, None], scale * (np.eye(SIZE) - np.outer(direction, direction))])


def test_the_hessian_of_linear_regression_is_the_covariance_of_its_inputs():
    """`[[C, 0], [0, 1]]` for centred inputs, whatever the labels and the parameters."""
    c, _ = covariance(np.array([1.0, 2, 3, 5, 8, 100]))
    batch = inputs(c), RANDOM.standard_normal(EXAMPLES)
    params = {"w": jnp.asarray(RANDOM.standard_normal(SIZE)), "b": jnp.asarray(0.3)}
    own = curvature.hessian(loss)(params, batch)
    expected = np.block([[np.ones((1, 1)), np.zeros((1, SIZE))], [np.zeros((SIZE, 1)), c]])  # b is before w
    assert relative(own.dense(), expected) < 1e-12
    fisher = curvature.fisher(predict, "normal")(params, batch)
    assert relative(fisher.dense(), expected) < 1e-12
    values = curvature.eigenvalues(own, jax.random.key(0), steps=SIZE + 1)
    numbers = curvature.condition_numbers(values, damping=1.0, ks=(2, 7))
    np.testing.assert_allclose(values.values, [1, 1, 2, 3, 5, 8, 100], rtol=1e-10)
    np.testing.assert_allclose([numbers.damped, numbers.numerical_range], [101 / 2, 100], rtol=1e-10)
    np.testing.assert_allclose([numbers.to[2], numbers.to[7], numbers.to_mean], [12.5, 100, 700 / 120], rtol=1e-10)


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_the_condition_number_is_that_of_the_inputs(ratio):
    c, _ = covariance(np.geomspace(1, ratio, SIZE))
    own = curvature.hessian(loss)({"w": jnp.zeros(SIZE)}, (inputs(c), np.zeros(EXAMPLES)))
    numbers = curvature.condition_numbers(curvature.eigenvalues(own, jax.random.key(0)))
    np.testing.assert_allclose(numbers.damped, ratio, rtol=1e-6)
    np.testing.assert_allclose(numbers.numerical_range, ratio, rtol=1e-6)


def at_the_minimum(weight, c, scale):
    """The Hessian by (g, v), where the labels are fitted, and its Jacobian."""
    node, direction = neuron(weight, scale)
    x = inputs(c)
    own = curvature.hessian(wn.wrap(loss))({"w": node}, (x, x @ weight))
    return np.asarray(own.dense()), direction, jacobian(direction, scale)


def test_the_hessian_of_a_neuron_at_its_minimum():
    """`J'C J` with `J = [v/||v||, (g/||v||) (I - v v'/||v||^2)]`; 0 along v, for g as it is."""
    c, _ = covariance(np.array([1.0, 2, 3, 5, 8, 100]))
    dense, direction, j = at_the_minimum(RANDOM.standard_normal(SIZE), c, 1.7)
    assert relative(dense, j.T @ c @ j) < 1e-12
    np.testing.assert_allclose(dense @ np.concatenate([[0], direction]), 0, atol=1e-12 * abs(dense).max())
    assert np.linalg.matrix_rank(dense) == SIZE


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_the_spectrum_of_a_neuron_along_an_eigenvector(scale):
    """Where w is one of C's eigenvectors: its eigenvalue as it is, the others times `(g/||v||)^2`, and 0."""
    values = np.array([1.0, 2, 3, 5, 8, 100])
    c, basis = covariance(values)
    dense, _, _ = at_the_minimum(3 * basis[:, -1], c, scale)
    expected = np.sort([0, *(values[:-1] * scale**2), 100])
    np.testing.assert_allclose(np.linalg.eigvalsh(dense), expected, atol=1e-10 * expected.max())


def test_the_covariance_of_gradients_by_v_is_that_by_w_projected():
    """Equation 4 of the paper: `(g/||v||)^2 M C M`, `M = I - w w'/||w||^2`, away from a minimum."""
    c, _ = covariance(np.array([1.0, 2, 3, 5, 8, 100]))
    batch = inputs(c), RANDOM.standard_normal(EXAMPLES)
    scale = 1.7
    node, direction = neuron(RANDOM.standard_normal(SIZE), scale)
    by_v = curvature.gradient_covariance(wn.wrap(losses))({"w": node}, batch).dense()
    residuals = batch[0] @ np.asarray(node.weight()) - batch[1]
    by_w = np.cov((residuals[:, None] * batch[0]).T, bias=True)
    m = np.eye(SIZE) - np.outer(direction, direction)
    assert relative(np.asarray(by_v)[1:, 1:], scale**2 * m @ by_w @ m) < 1e-12
    np.testing.assert_allclose(by_v[0, 0], direction @ by_w @ direction, rtol=1e-10)  # that of g
    assert relative(curvature.gradient_covariance(losses)({"w": node.weight()}, batch).dense(), by_w) < 1e-12


def test_the_empirical_fisher_vanishes_at_a_fit_where_the_fisher_does_not():
    c, _ = covariance(np.ones(SIZE))
    x, w = inputs(c), RANDOM.standard_normal(SIZE)
    params = {"w": jnp.asarray(w)}
    np.testing.assert_allclose(curvature.empirical_fisher(losses)(params, (x, x @ w)).dense(), 0, atol=1e-20)
    assert relative(curvature.fisher(predict, "normal")(params, (x, x @ w)).dense(), np.eye(SIZE)) < 1e-12


def test_the_natural_gradient_of_linear_regression_is_the_way_to_its_solution():
    """`C^-1 C (w - w*) = w - w*`; that of a neuron moves the weight the same way to first order."""
    c, _ = covariance(np.geomspace(1, 100, SIZE))
    x, w, start = inputs(c), RANDOM.standard_normal(SIZE), RANDOM.standard_normal(SIZE)
    node, direction = neuron(start)
    for params, own_loss, own_predict in (
        ({"w": jnp.asarray(start)}, loss, predict),
        ({"w": node}, wn.wrap(loss), wn.wrap(predict)),
    ):
        own = curvature.fisher(own_predict, "normal")(params, (x, x @ w))
        gradient = jax.grad(own_loss)(params, (x, x @ w))
        step = flat(curvature.natural_gradient(own, gradient, damping=0.0, tolerance=1e-10).value)
        moved = step if len(step) == SIZE else jacobian(direction) @ step
        np.testing.assert_allclose(moved, start - w, rtol=1e-6)
