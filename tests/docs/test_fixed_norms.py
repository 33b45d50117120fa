"""Norms forced back after each step, against EDM2 and nGPT written by hand.

The hand-written methods follow the papers and their code, on plain weights, and know nothing of wn_jax.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wn_jax as wn
from tests.docs.documents import run

STEPS = 8
RATE = 0.05
OPTIMIZERS = {"sgd": optax.sgd(RATE, momentum=0.9), "adam": optax.adam(RATE)}


@pytest.fixture(scope="module")
def page():
    return run("docs/fixed_norms.md")


def edm2_normalize(w, epsilon):
    """EDM2's `normalize`, for weights (inputs, outputs): entries of root mean square 1 for each output."""
    return w / (epsilon + jnp.sqrt(jnp.mean(w**2, axis=0)))


def edm2_by_hand(loss, weights, tx, epsilon):
    """The stored weights after the steps, each brought back as the next forward pass would."""

    def used(weights):
        return {name: edm2_normalize(w, epsilon) / len(w) ** 0.5 for name, w in weights.items()}

    state = tx.init(weights)
    for _ in range(STEPS):
        weights = {name: edm2_normalize(w, epsilon) for name, w in weights.items()}
        updates, state = tx.update(jax.grad(lambda weights: loss(used(weights)))(weights), state)
        weights = optax.apply_updates(weights, updates)
    return {name: edm2_normalize(w, epsilon) for name, w in weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("epsilon", "tolerance"), [(0, 2e-5), (1e-4, 2e-3)])
def test_forced_norms_are_those_of_edm2(page, optimizer, epsilon, tolerance):
    tx = OPTIMIZERS[optimizer]
    rng = np.random.default_rng(0)
    plain = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in (("hidden", (6, 8)), ("out", (8, 3)))
    }
    x, y = (jnp.asarray(rng.normal(size=(16, size)), jnp.float32) for size in (6, 3))

    def loss(weights):
        return jnp.mean((page["edm2"](weights, x) - y) ** 2)

    nodes = page["on_spheres"](wn.reparameterize(plain, {"hidden": (-2,), "out": (-2,)}), np.sqrt)
    nodes = page["train"](wn.wrap(loss), nodes, page["fixed_norms"](tx), STEPS)
    for name, expected in edm2_by_hand(loss, plain, tx, epsilon).items():
        assert np.abs(expected - edm2_normalize(plain[name], 0)).max() > 0.1  # the steps went somewhere
        np.testing.assert_allclose(nodes[name].v, expected, atol=tolerance)
        np.testing.assert_array_equal(nodes[name].g, 1)


def ngpt_by_hand(loss, weights, axes, tx, steps):
    """The matrices after the steps, normalized along the embedding at the start and after each."""

    def normalize(weights):
        return {name: w / jnp.sqrt(jnp.sum(w**2, axes[name], keepdims=True)) for name, w in weights.items()}

    weights = normalize(weights)
    state = tx.init(weights)
    for _ in range(steps):
        updates, state = tx.update(jax.grad(loss)(weights), state)
        weights = normalize(optax.apply_updates(weights, updates))
    return weights


# Which dimension of each matrix the embedding is, from the paper's table of matrices.
NGPT_AXES = {"embedding": 1, "up": 0, "down": 1, "head": 0}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_directions_taken_as_weights_are_ngpt(page, optimizer):
    tx, loss, directions = OPTIMIZERS[optimizer], page["ngpt_loss"], page["directions"]
    nodes = page["train"](lambda nodes: loss(directions(nodes)), page["params"], page["fixed_norms"](tx), STEPS)
    for name, expected in ngpt_by_hand(loss, page["plain"], NGPT_AXES, tx, STEPS).items():
        before = ngpt_by_hand(loss, page["plain"], NGPT_AXES, tx, 0)[name]
        assert np.abs(expected - before).max() > 0.01
        np.testing.assert_allclose(nodes[name].v, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "order"), [(optax.sgd, 2), (optax.adam, 1)])
def test_weight_norm_differs_from_ngpt_in_the_order_that_the_page_says(page, optimizer, order):
    loss = page["ngpt_loss"]

    @functools.cache
    def apart(rate):
        tx = optimizer(rate)
        nodes = page["train"](lambda nodes: loss(wn.reconstruct(nodes)), page["params"], page["fixed_norms"](tx), 1)
        theirs = ngpt_by_hand(loss, page["plain"], NGPT_AXES, tx, 1)
        return np.abs(nodes["up"].v - theirs["up"]).max()

    rate = 1.0 if order == 2 else 0.01
    assert apart(rate) > 1e-4
    assert 0.75 * 2**order < apart(rate) / apart(rate / 2) < 1.35 * 2**order
