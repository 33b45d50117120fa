"""Products with the matrices, against dense ones by definition; and in parts of a batch, in float32, on many devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from tests.curvature import flat, problem, relative
from wn_jax import curvature

PROBLEMS = list(itertools.product(["tanh", "relu"], ["cross_entropy", "squared"], ["plain", "nodes"]))
every_problem = pytest.mark.parametrize("of", PROBLEMS, ids="-".join)
MATRICES = ["hessian", "gauss_newton", "fisher", "empirical_fisher", "gradient_covariance"]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def operator(name, p, batch_size=None, likelihood="categorical"):
    """The matrix of this name, as the library has it."""
    apply, losses = wn.wrap(p.apply), wn.wrap(p.losses)
    make = {
        "hessian": lambda: curvature.hessian(wn.wrap(p.loss), batch_size),
        "gauss_newton": lambda: curvature.gauss_newton(apply, p.mean_loss_of, batch_size),
        "fisher": lambda: curvature.fisher(apply, likelihood, batch_size),
        "empirical_fisher": lambda: curvature.empirical_fisher(losses, batch_size),
        "gradient_covariance": lambda: curvature.gradient_covariance(losses, batch_size),
    }[name]
    return make()(p.params, p.batch)


def tempered(outputs, others):
    """The divergence of one softmax at temperature 1/2 from another."""
    log_p, log_q = jax.nn.log_softmax(2 * outputs), jax.nn.log_softmax(2 * others)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))


def one_hot(outputs):
    return np.broadcast_to(np.eye(3)[:, None], (3, *outputs.shape))


def log_normal(outputs, y):
    return -jnp.sum((y - outputs) ** 2, -1) / 2


def around_the_mean(outputs):
    """Points of Gauss-Hermite quadrature, which is exact for the polynomials of a Fisher matrix."""
    points = np.array(list(itertools.product(np.polynomial.hermite_e.hermegauss(3)[0], repeat=3)))
    return outputs + points[:, None]


def hermite_weights(outputs, y):
    points, weights = np.polynomial.hermite_e.hermegauss(3)
    weight_of = dict(zip(np.round(points, 6), weights / weights.sum(), strict=True))
    table = np.vectorize(lambda z: weight_of[np.round(z, 6) + 0.0])(np.asarray(y - outputs))
    return table.prod(-1)


def binary(outputs):
    labels = np.array(list(itertools.product([0.0, 1.0], repeat=3)))
    return np.broadcast_to(labels[:, None], (8, *outputs.shape))


# What labels there are, and the logarithm of their probability at given outputs.
LIKELIHOODS = {
    "categorical": ("categorical", one_hot, lambda o, y: jnp.sum(y * jax.nn.log_softmax(o), -1)),
    "bernoulli": ("bernoulli", binary, lambda o, y: jnp.sum(y * o - jnp.log1p(jnp.exp(o)), -1)),
    "normal": ("normal", around_the_mean, log_normal),
    "custom": (tempered, one_hot, lambda o, y: jnp.sum(y * jax.nn.log_softmax(2 * o), -1)),
}


def fisher_by_definition(p, name):
    """The mean over inputs of `sum_y p(y|x) grad log p(y|x) grad log p(y|x)'`."""
    _, labels, log_p = LIKELIHOODS[name]
    outputs = p.flat(p.apply)[0](p.flat(p.apply)[1])
    y = labels(np.asarray(outputs))
    scores = p.derivative(lambda params, batch: log_p(p.apply(params, batch), y))
    p_y = hermite_weights(outputs, y) if name == "normal" else np.exp(log_p(outputs, y))
    np.testing.assert_allclose(p_y.sum(0), 1, rtol=1e-12)
    return np.einsum("yn,ynp,ynq->pq", p_y, scores, scores) / len(outputs)


def gauss_newton_by_definition(p):
    """`J' H J` with H of the softmax (`diag(q) - q q'`) or of the squares (1)."""
    jacobian, outputs = p.derivative(p.apply), np.asarray(p.flat(p.apply)[0](p.flat(p.apply)[1]))
    if p.batch[1].ndim == 1:
        q = np.exp(outputs) / np.exp(outputs).sum(-1, keepdims=True)
        inner = q[:, :, None] * np.eye(3) - q[:, :, None] * q[:, None]
    else:
        inner = np.broadcast_to(np.eye(3), (len(outputs), 3, 3))
    return np.einsum("nap,nab,nbq->pq", jacobian, inner, jacobian) / len(outputs)


def by_definition(name, p):
    if name == "hessian":
        return p.derivative(p.loss, jax.hessian)
    if name == "gauss_newton":
        return gauss_newton_by_definition(p)
    if name == "fisher":
        return fisher_by_definition(p, "categorical")
    gradients = p.derivative(p.losses)
    return gradients.T @ gradients / len(gradients) if name == "empirical_fisher" else np.cov(gradients.T, bias=True)


@every_problem
@pytest.mark.parametrize("name", MATRICES)
def test_products_are_those_with_the_dense_matrix(name, of, x64):
    p = problem(*of)
    expected = by_definition(name, p)
    own = operator(name, p)
    vector = np.random.default_rng(1).standard_normal(len(expected))
    assert own.size == len(expected)
    assert relative(flat(own(own.unravel(vector))), expected @ vector) < 1e-10
    dense = np.asarray(own.dense())
    assert dense.dtype == np.float64
    assert relative(dense, expected) < 1e-10
