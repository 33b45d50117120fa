"""Training through `TrainState` follows a (g, v) reference written by hand in NumPy, in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import wn_jax as wn

STEPS = 200


def data(features, targets, examples=64):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((examples, features))
    return x, np.tanh(x @ rng.standard_normal((features, targets))) + 0.1 * rng.standard_normal((examples, targets))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(8)(x))
        return nn.Dense(3)(x)


def reference_gradients(params, x, y):
    """Backpropagation by hand through `mean((dense(tanh(dense(x))) - y)^2)`, with equation 3 for each kernel."""
    (g1, v1, b1), (g2, v2, b2) = params
    n1, n2 = np.linalg.norm(v1, axis=0), np.linalg.norm(v2, axis=0)
    w1, w2 = v1 * (g1 / n1), v2 * (g2 / n2)
    hidden = np.tanh(x @ w1 + b1)
    error = 2 * (hidden @ w2 + b2 - y) / y.size
    grad_w2, grad_b2 = hidden.T @ error, error.sum(0)
    back = (error @ w2.T) * (1 - hidden**2)
    grad_w1, grad_b1 = x.T @ back, back.sum(0)
    gradients = []
    for g, v, n, grad_w, grad_b in ((g1, v1, n1, grad_w1, grad_b1), (g2, v2, n2, grad_w2, grad_b2)):
        grad_g = (grad_w * v).sum(0) / n
        gradients.append([grad_g, g / n * grad_w - g * grad_g / n**2 * v, grad_b])
    return gradients


def sgd(state, grad, t):
    return -0.1 * grad, state


def momentum(state, grad, t):
    state = grad + 0.9 * state
    return -0.05 * state, state


def adam(state, grad, t):
    first, second = state if isinstance(state, tuple) else (0.0, 0.0)
    first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
    return -1e-3 * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8), (first, second)


OPTIMIZERS = {
    "sgd": (sgd, optax.sgd(0.1)),
    "momentum": (momentum, optax.sgd(0.05, momentum=0.9)),
    "adam": (adam, optax.adam(1e-3)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_train_state_follows_the_reference(name):
    rule, tx = OPTIMIZERS[name]
    x, y = data(6, 3)
    x32, y32 = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    x, y = np.asarray(x32, np.float64), np.asarray(y32, np.float64)
    model = Net()
    variables = model.init(jax.random.key(0), x32)
    nodes = wn.reparameterize(variables, wn.kernel_axes(variables))["params"]
    state = TrainState.create(apply_fn=wn.wrap(model.apply), params=nodes, tx=tx)

    @jax.jit
    def step(state):
        loss = lambda params: jnp.mean((state.apply_fn({"params": params}, x32) - y32) ** 2)  # noqa: E731
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    def flat(params):
        layers = (params["Dense_0"], params["Dense_1"])
        return [[np.asarray(p, np.float64) for p in (l["kernel"].g[0], l["kernel"].v, l["bias"])] for l in layers]  # noqa: E741

    reference, memory = flat(nodes), [[0.0] * 3, [0.0] * 3]
    for t in range(1, STEPS + 1):
        state = step(state)
        gradients = reference_gradients(reference, x, y)
        for layer, leaf in np.ndindex(2, 3):
            update, memory[layer][leaf] = rule(memory[layer][leaf], gradients[layer][leaf], t)
            reference[layer][leaf] = reference[layer][leaf] + update
    for ours, theirs in zip(flat(state.params), reference, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.parametrize("tx", [optax.sgd(0.3), optax.adam(1e-2)])
def test_a_zero_initialized_layer_trains(tx):
    x, y = (jnp.asarray(a, jnp.float32) for a in data(6, 3))
    model = nn.Dense(3, kernel_init=nn.initializers.zeros)
    variables = model.init(jax.random.key(0), x)
    nodes = wn.reparameterize(variables, wn.kernel_axes(variables))
    apply = wn.wrap(model.apply)
    assert apply(nodes, x).tobytes() == model.apply(variables, x).tobytes()
    state, losses = tx.init(nodes), []
    value_and_grad = jax.jit(jax.value_and_grad(lambda nodes: jnp.mean((apply(nodes, x) - y) ** 2)))
    for _ in range(500):
        loss, grads = value_and_grad(nodes)
        losses.append(float(loss))
        updates, state = tx.update(grads, state, nodes)
        nodes = optax.apply_updates(nodes, updates)
    assert losses[-1] < 0.5 * losses[0]
    least_squares = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)
    best = least_squares[1].sum() / y.size  # no Dense layer can do better
    assert losses[-1] <= 1.2 * best


def test_the_length_of_v_grows_by_pythagoras():
    """A plain gradient step is orthogonal to v: ||v'||^2 = ||v||^2 + ||dv||^2 (section 2 of the paper)."""
    node = wn.WeightNorm.from_weight(jax.random.normal(jax.random.key(0), (9, 4)), 0)
    target = jax.random.normal(jax.random.key(1), (9, 4))
    grads = jax.grad(lambda node: jnp.sum((node.weight() - target) ** 2))(node)
    moved = node.v - 0.1 * grads.v
    np.testing.assert_allclose(
        jnp.sum(moved**2, 0), jnp.sum(node.v**2, 0) + jnp.sum((0.1 * grads.v) ** 2, 0), rtol=1e-5
    )
