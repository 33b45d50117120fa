"""Training through `TrainState` follows a (g, v) reference written by hand in NumPy, in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import wn_jax as wn
from tests.by_hand import OPTIMIZERS, assert_close, data, trained

STEPS = 200


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(8)(x))
        return nn.Dense(3)(x)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_train_state_follows_the_reference(name):
    x, y = (a.astype(np.float32) for a in data(6, 3))
    model = Net()
    variables = model.init(jax.random.key(0), x)
    nodes = wn.reparameterize(variables, wn.kernel_axes(variables))["params"]
    state = TrainState.create(apply_fn=wn.wrap(model.apply), params=nodes, tx=OPTIMIZERS[name][1])

    @jax.jit
    def step(state):
        loss = lambda params: jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)  # noqa: E731
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    def flat(params):
        layers = (params["Dense_0"], params["Dense_1"])
        return [[np.asarray(p, np.float64) for p in (l["kernel"].g[0], l["kernel"].v, l["bias"])] for l in layers]  # noqa: E741

    for _ in range(STEPS):
        state = step(state)
    expected = trained(name, flat(nodes), x.astype(np.float64), y.astype(np.float64), STEPS)
    assert_close(flat(state.params), expected)


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
