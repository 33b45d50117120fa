"""Optimizer state across a rewrite of the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wn_jax as wn
from tests.optim.training import train
from wn_jax import optim

UNDERSTOOD = {
    "momentum": optax.sgd(1e-3, momentum=0.9),
    "adam": optax.adam(1e-4),
    "bfloat16 moments": optax.adam(1e-4, mu_dtype=jnp.bfloat16),
    "adamw, clipped": optax.chain(optax.clip(1.0), optax.adamw(1e-4, mask=optim.weight_decay_mask)),
    "amsgrad": optax.amsgrad(1e-4),
    "adamax": optax.adamax(1e-4),
    "rmsprop": optax.rmsprop(1e-4),
    "adagrad": optax.adagrad(1e-4),
    "lion": optax.lion(1e-5),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-4),
    "accumulated": optax.MultiSteps(optax.adam(1e-4), every_k_schedule=3).gradient_transformation(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNDERSTOOD)
def test_moments_survive_the_way_there_and_back(model, name):
    tx = UNDERSTOOD[name]
    params, state = train(model, model.params, tx, 20)
    nodes = wn.reparameterize(params, model.axes)
    there = optim.transfer_state(state, params, nodes)
    fresh = tx.init(nodes)
    assert jax.tree.structure(there) == jax.tree.structure(fresh)
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(there) if hasattr(leaf, "shape")]
    assert shapes == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(fresh) if hasattr(leaf, "shape")]
    new, _ = train(model, nodes, tx, 1, there)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    back = optim.transfer_state(there, nodes, wn.reconstruct(nodes))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(back), jax.tree.leaves(state), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if any(key in jax.tree_util.keystr(path) for key in (".nu", ".sum_of_squares")):
            assert (a >= b * (1 - 1e-5)).all()  # d^2 (d^2 . nu) comes on top, never less
            assert a.sum() <= 2.5 * b.sum()
        else:
            # A bfloat16 moment is rounded to 0.4% at the way there: of its largest number, where a difference is small.
            rtol, atol = (0.02, 4e-3) if "bfloat16" in name else (1e-4, 1e-6)
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * np.abs(b).max())


REFUSED = {
    "factored": optax.adafactor(1e-3, min_dim_size_to_factor=4),
    "adadelta": optax.adadelta(1e-3),
    "adan": optax.adan(1e-3),
    "centered": optax.rmsprop(1e-3, centered=True),
    "novograd": optax.novograd(1e-3),
    "rprop": optax.rprop(1e-3),
    "a copy of the parameters": optax.contrib.schedule_free_sgd(1e-3),
    "prodigy": optax.contrib.prodigy(),
    "a part of the parameters": optax.masked(optax.adam(1e-3), lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_states_of_unknown_meaning_are_refused(model, nodes, name):
    with pytest.raises(ValueError, match=r"start this optimizer afresh with tx\.init\(new_params\)"):
        optim.transfer_state(REFUSED[name].init(model.params), model.params, nodes)


def test_a_single_array_is_a_tree_too():
    params = jnp.ones((3, 2))
    nodes = wn.reparameterize(params, {"": -2})
    state = optim.transfer_state(optax.adam(1e-3).init(params), params, nodes)
    assert jax.tree.structure(state) == jax.tree.structure(optax.adam(1e-3).init(nodes))
    with pytest.raises(ValueError, match="start this optimizer afresh"):
        optim.transfer_state(optax.novograd(1e-3).init(params), params, nodes)


def test_the_way_back_from_g_zero_is_finite():
    node = wn.WeightNorm.from_weight(jnp.zeros((3, 2)), 0)
    state = optax.adam(1e-3).init({"w": node})
    back = optim.transfer_state(jax.tree.map(jnp.ones_like, state), {"w": node}, {"w": node.weight()})
    np.testing.assert_allclose(back[0].mu["w"], node.v, rtol=1e-6)  # what g's moment says of the direction
    np.testing.assert_allclose(back[0].nu["w"], node.v**2, rtol=1e-6)


def test_projection_goes_through_a_rewrite(model, nodes):
    tx = optax.chain(optax.sgd(1e-3, momentum=0.9), optim.project_directions())
    new, state = train(model, nodes, tx, 5)
    plain = wn.reconstruct(new)
    on_plain = optim.transfer_state(state, new, plain)
    assert on_plain[1].norms == {}
    _, on_plain = train(model, plain, tx, 3, on_plain)
    again = wn.reparameterize(plain, model.axes)
    with pytest.raises(ValueError, match="knows no norm for the node 'params/layers_0/kernel'"):
        optim.project_directions().update(again, on_plain[1], again)
    state = optim.transfer_state(on_plain, plain, again)
    assert set(state[1].norms) == set(model.axes)


def test_momentum_goes_on_as_if_nothing_had_happened(model):
    """At v = w the map from (g, v) to w is orthogonal, so to first order the next step on nodes is the plain one."""
    tx = optax.sgd(1e-3, momentum=0.9)
    params, state = train(model, model.params, tx, 20)
    plain, _ = train(model, params, tx, 1, state)
    nodes = wn.reparameterize(params, model.axes)
    on_nodes, node_state = train(model, nodes, tx, 1, optim.transfer_state(state, params, nodes))
    moved = lambda new: jax.tree.leaves(jax.tree.map(jnp.subtract, wn.reconstruct(new), params))  # noqa: E731
    for a, b in zip(moved(on_nodes), moved(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=0.01 * np.abs(b).max())
    fresh, _ = train(model, nodes, tx, 1)  # without the momentum the step is another
    assert any(np.abs(a - b).max() > 0.3 * np.abs(b).max() for a, b in zip(moved(fresh), moved(plain), strict=True))
    returned = wn.reconstruct(on_nodes)
    train(model, returned, tx, 1, optim.transfer_state(node_state, on_nodes, returned))


def test_first_moments_follow_the_chain_rule_at_any_g(model):
    """Equation 3, against JAX's own transpose of the map from (g, v) to w."""
    node = wn.WeightNorm(jnp.array([[2.0, -0.5]]), jax.random.normal(jax.random.key(0), (5, 2)), (-2,))
    moment = jax.random.normal(jax.random.key(1), (5, 2))
    state = optax.TraceState(trace={"w": moment})
    moved = optim.transfer_state(state, {"w": node.weight()}, {"w": node}).trace["w"]
    (expected,) = jax.vjp(wn.WeightNorm.weight, node)[1](moment)
    np.testing.assert_allclose(moved.g, expected.g, rtol=1e-5)
    np.testing.assert_allclose(moved.v, expected.v, rtol=1e-5, atol=1e-6)


def test_only_a_rewrite_is_a_rewrite(model, nodes):
    state = optax.adam(1e-3).init(model.params)
    other_axes = wn.reparameterize(model.params, dict.fromkeys(model.axes, -1))
    wider = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), model.params)
    for before, after in ((model.params, {"w": jnp.ones(2)}), (model.params, wider), (nodes, other_axes)):
        with pytest.raises(ValueError, match="new_params is not a rewrite of params"):
            optim.transfer_state(state, before, after)
