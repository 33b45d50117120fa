"""The lower bound against closed forms, quadrature and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from experiments.data import Dataset
from experiments.tasks import build
from experiments.tasks.bound import Gaussian, divergences, log_weight, reconstruction
from experiments.tasks.pixels import PIXELS
from experiments.tasks.resnet_vae import VAE
from experiments.tasks.vae import VAEConfig

# A linear-Gaussian model, x = W z + b + SIGMA noise. The columns of W are orthogonal, so posteriors are independent.
WEIGHT = np.array([[0.8, 0.3], [-0.6, 0.4], [0.0, 0.5]])
WEIGHT[:, 1] -= WEIGHT[:, 0] * (WEIGHT[:, 0] @ WEIGHT[:, 1])
BIAS, SIGMA = np.array([0.2, -0.1, 0.7]), 0.6
X = np.random.default_rng(0).normal(size=(5, 3))
EXACT_VARIANCE = 1 / (1 + (WEIGHT**2).sum(axis=0) / SIGMA**2)
EXACT_MEAN = EXACT_VARIANCE[:, None] * WEIGHT.T / SIGMA**2  # times x - b


def linear_config(**changes):
    fields = {"name": "vae", "widths": (), "dense": 0, "latents": (2,), "likelihood": "normal"}
    return VAEConfig(**fields, **changes)


def parameters(mean_kernel, mean_bias, scale, weight=WEIGHT, bias=BIAS, sigma=SIGMA):
    """Of a linear encoder and decoder."""
    kernel = np.concatenate([mean_kernel.T, np.zeros_like(mean_kernel.T)], axis=1)
    raw = np.log(np.expm1(scale))  # what softplus makes the scale of
    decoder = {
        "posterior": {"kernel": kernel, "bias": np.concatenate([mean_bias, raw])},
        "unfold": {"kernel": weight.T, "bias": bias},
        "log_scale": np.log([sigma]),
    }
    return {"decoder": decoder}


def exact_log_likelihood(x):
    return scipy.stats.multivariate_normal(BIAS, WEIGHT @ WEIGHT.T + SIGMA**2 * np.eye(3)).logpdf(x)


def closed_form(x, mean, variance):
    """Minus E_q[log p(x | z)], and the divergence, of independent normal posteriors."""
    error = x - mean @ WEIGHT.T - BIAS
    square = (error**2).sum(axis=-1) + ((WEIGHT**2).sum(axis=0) * variance).sum()
    expected = 0.5 * square / SIGMA**2 + 3 * np.log(SIGMA) + 1.5 * np.log(2 * np.pi)
    return expected, 0.5 * (variance + mean**2 - 1 - np.log(variance)).sum(axis=-1)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def linear_network():
    return VAE((1, 3, 1), (), 1, 0, (2,), log_scale=0.0, dtype=jnp.float64)


def test_the_bound_of_a_linear_gaussian_model_is_its_closed_form(double):
    """Points at plus and minus sqrt(2) on each axis have the mean and covariance of N(0, 1): that is all it takes."""
    random = np.random.default_rng(1)
    kernel, bias, scale = random.normal(size=(2, 3)), random.normal(size=2), np.array([0.5, 1.7])
    params = parameters(kernel, bias, scale)
    points = np.sqrt(2) * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])
    noise, x = np.tile(points, (len(X), 1)), np.repeat(X, 4, axis=0).reshape(-1, 1, 3, 1)
    drawn = linear_network().apply({"params": params}, x, [noise])
    expected, kl = closed_form(X, X @ kernel.T + bias, scale**2)
    found = np.asarray(reconstruction(PIXELS["normal"], drawn, x)).reshape(-1, 4).mean(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(divergences(drawn).sum(axis=-1)[::4], kl, rtol=1e-12)
    assert (expected + kl > -exact_log_likelihood(X)).all(), "a lower bound"


def exact_task():
    """The task in float32, with parameters whose posterior is the true one."""
    x = X.reshape(-1, 1, 3, 1).astype(np.float32)
    task = build(linear_config(), Dataset({"x": x}, {"x": x}, "test", 1))
    params = parameters(EXACT_MEAN, -EXACT_MEAN @ BIAS, np.sqrt(EXACT_VARIANCE))
    return task, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params), {"x": x}


def test_each_draw_of_the_true_posterior_gives_the_exact_log_likelihood():
    """p(x, z) / p(z | x) is p(x) for every z."""
    task, params, examples = exact_task()
    estimate = jax.jit(lambda keys: task.log_weight(params, {}, examples, keys))
    for seed in range(3):
        found = estimate(jax.random.split(jax.random.key(seed), len(X)))
        np.testing.assert_allclose(found, exact_log_likelihood(X), atol=1e-5)


def test_the_task_evaluates_the_closed_form():
    """In the mean over many draws, within four of its standard errors; the terms are its parts."""
    task, params, examples = exact_task()
    evaluate = jax.jit(jax.vmap(lambda keys: task.evaluate(params, {}, examples, keys)))
    figures = evaluate(jax.random.split(jax.random.key(0), (10_000, len(X))))
    expected, kl = closed_form(X, (X - BIAS) @ EXACT_MEAN.T, EXACT_VARIANCE)
    np.testing.assert_allclose(expected + kl, -exact_log_likelihood(X), rtol=1e-12)  # the bound is tight
    error = np.std(figures["reconstruction"], axis=0) / 100
    assert (abs(np.mean(figures["reconstruction"], axis=0) - expected) < 4 * error).all()
    np.testing.assert_allclose(figures["kl"][0], kl, rtol=1e-4)
    np.testing.assert_allclose(figures["loss"], figures["reconstruction"] + figures["kl"], rtol=1e-6)


def test_more_draws_come_closer_to_the_log_likelihood_from_below(double):
    """With a posterior that is too wide and off: the estimate rises to the exact value."""
    params = parameters(EXACT_MEAN, 0.3 - EXACT_MEAN @ BIAS, 1.5 * np.sqrt(EXACT_VARIANCE))
    x, count = np.repeat(X, 4000, axis=0).reshape(-1, 1, 3, 1), 4000
    noise = np.random.default_rng(0).normal(size=(len(x), 2))
    drawn = linear_network().apply({"params": params}, x, [noise])
    weights = np.asarray(log_weight(PIXELS["normal"], drawn, x)).reshape(len(X), count)
    exact, gaps = exact_log_likelihood(X), []
    for draws in (1, 10, 100):
        groups = weights.reshape(len(X), -1, draws)
        gaps.append(np.mean(exact - (scipy.special.logsumexp(groups, axis=-1) - np.log(draws)).mean(axis=1)))
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2] > 0
    whole = scipy.special.logsumexp(weights, axis=-1) - np.log(count)
    np.testing.assert_allclose(whole, exact, atol=0.05)


@pytest.mark.parametrize("likelihood", ["bernoulli", "logistic"])
def test_gradients_through_the_samples_are_finite_differences(double, likelihood):
    network = VAE((4, 4, 1), (2, 3), 1, 5, (3, 2, 1), log_scale=PIXELS[likelihood].log_scale, dtype=jnp.float64)
    random = np.random.default_rng(0)
    x = random.integers(0, 2, size=(2, 4, 4, 1)).astype(float)
    x = x if likelihood == "bernoulli" else (random.integers(0, 256, size=x.shape) - 127.5) / 128
    noise = [random.normal(size=(2, *shape)) for shape in network.noise_shapes()]
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, noise)["params"]
    params = jax.tree.map(lambda leaf: 0.4 * random.normal(size=leaf.shape), shapes)

    @jax.jit
    def loss(params):
        drawn = network.apply({"params": params}, x, noise)
        return jnp.mean(reconstruction(PIXELS[likelihood], drawn, x) + divergences(drawn).sum(axis=-1))

    gradient = jax.jit(jax.grad(loss))(params)
    for _ in range(3):
        direction = jax.tree.map(lambda leaf: random.normal(size=leaf.shape), params)
        along = sum(np.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
        ends = [loss(jax.tree.map(lambda p, d, size=size: p + size * d, params, direction)) for size in (1e-5, -1e-5)]
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, along, rtol=1e-6)


def test_a_gaussian_against_scipy_and_quadrature(double):
    one, other = Gaussian(np.float64(0.3), np.float64(0.5)), Gaussian(np.float64(-0.4), np.float64(1.2))
    density = scipy.stats.norm(0.3, 0.5)
    np.testing.assert_allclose(one.log_density(np.linspace(-3, 3, 7)), density.logpdf(np.linspace(-3, 3, 7)))

    def integrand(z):
        return density.pdf(z) * (density.logpdf(z) - scipy.stats.norm(-0.4, 1.2).logpdf(z))

    np.testing.assert_allclose(one.kl(other), scipy.integrate.quad(integrand, -5, 6)[0], rtol=1e-8)
    np.testing.assert_allclose(one.kl(one), 0, atol=1e-15)
    moved = other.relative(one)
    np.testing.assert_allclose((moved.mean, moved.scale), (-0.4 + 1.2 * 0.3, 0.6))
    np.testing.assert_allclose(one.at(2.0), 1.3)


def test_a_group_of_divergences_is_a_variable_on_top_and_a_map_below():
    network = VAE((4, 4, 1), (2, 3), 1, 0, (3, 2), log_scale=None, dtype=jnp.float32)
    assert network.noise_shapes() == [(3,), (2, 2, 2)]
    noise = [np.zeros((5, *shape), np.float32) for shape in network.noise_shapes()]
    random = np.random.default_rng(0)
    x = random.normal(size=(5, 4, 4, 1))
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, noise)  # whose numbers take seconds to draw
    params = jax.tree.map(lambda leaf: 0.4 * random.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    drawn = jax.jit(network.apply)(params, x, noise)
    top, maps = (np.asarray(layer.posterior.kl(layer.prior)) for layer in drawn.layers)
    np.testing.assert_allclose(divergences(drawn), np.concatenate([top, maps.sum(axis=(1, 2))], axis=1), rtol=1e-6)
