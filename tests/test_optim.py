"""optax pieces: decay, projection, statistics and moments across a rewrite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wn_jax as wn
from tests.zoo import ZOO
from wn_jax import optim


@pytest.fixture
def model():
    return ZOO["linen_mlp"]()


@pytest.fixture
def nodes(model):
    return wn.reparameterize(model.params, model.axes)


def gradient(model, params):
    return jax.jit(jax.grad(lambda params: jnp.mean((wn.wrap(model.fn)(params, model.x) - 1) ** 2)))(params)


def train(model, params, tx, steps, state=None):
    state = tx.init(params) if state is None else state

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda params: jnp.mean((wn.wrap(model.fn)(params, model.x) - 1) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def weight_norms(tree):
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, wn.WeightNorm))
    return [leaf for leaf in leaves if isinstance(leaf, wn.WeightNorm)]


def test_labels_give_g_and_v_their_own_learning_rate(model, nodes):
    tx = optax.partition({"g": optax.sgd(1.0), "v": optax.sgd(0.0), "other": optax.sgd(0.0)}, wn.labels)
    grads = gradient(model, nodes)
    new, _ = train(model, nodes, tx, 1)
    for before, after, grad in zip(weight_norms(nodes), weight_norms(new), weight_norms(grads), strict=True):
        np.testing.assert_array_equal(after.v, before.v)
        np.testing.assert_allclose(after.g, before.g - grad.g, rtol=1e-6)


def test_muon_takes_v_for_a_matrix_and_leaves_g_alone(model, nodes):
    adam = optax.adam(1e-2)
    recipe = optax.partition({"v": optax.contrib.muon(0.02), "g": adam, "other": adam}, wn.labels)
    new, _ = train(model, nodes, recipe, 1)
    grads = weight_norms(gradient(model, nodes))
    for before, after, grad in zip(weight_norms(nodes), weight_norms(new), grads, strict=True):
        step = np.asarray(after.v - before.v, np.float64) / 0.02
        values = np.linalg.svd(step, compute_uv=False)
        values = values[values > 1e-6]  # of the rank of the gradient
        assert values.max() / values.min() < 2.5  # orthogonalized: the singular values are close to one another
        np.testing.assert_allclose(after.g - before.g, -0.01 * np.sign(grad.g), rtol=1e-3)  # Adam's first step


def test_decaying_g_is_l2_on_the_weight_and_decaying_v_changes_nothing(model, nodes):
    mask = optim.weight_decay_mask(nodes)
    decay = optax.chain(optax.add_decayed_weights(0.1, mask), optax.scale(-1.0))
    zeros = jax.tree.map(jnp.zeros_like, nodes)
    updates, _ = decay.update(zeros, decay.init(nodes), nodes)
    decayed = optax.apply_updates(nodes, updates)
    for before, after in zip(weight_norms(nodes), weight_norms(decayed), strict=True):
        np.testing.assert_allclose(after.weight(), 0.9 * before.weight(), rtol=1e-6)
        np.testing.assert_array_equal(after.v, before.v)
    assert mask["params"]["layers_0"]["bias"] is False
    train(model, nodes, optax.adamw(1e-3, mask=optim.weight_decay_mask), 1)  # as a function, too
    only_v = jax.tree.map(lambda label: label == "v", wn.labels(nodes))
    decay = optax.chain(optax.add_decayed_weights(0.1, only_v), optax.scale(-1.0))
    updates, _ = decay.update(zeros, decay.init(nodes), nodes)
    for before, after in zip(weight_norms(nodes), weight_norms(optax.apply_updates(nodes, updates)), strict=True):
        np.testing.assert_allclose(after.weight(), before.weight(), rtol=1e-5, atol=1e-7)


def test_the_mask_decays_plain_matrices_and_no_vectors_or_functions(model):
    mask = optim.weight_decay_mask(model.params)
    assert mask["params"]["layers_0"] == {"kernel": True, "bias": False}
    assert optim.weight_decay_mask({"kernel": jnp.ones((2, 2))}, plain=lambda leaf: False) == {"kernel": False}
    assert optim.weight_decay_mask({"f": jax.nn.relu}) == {"f": False}


@pytest.mark.parametrize("inner", [optax.sgd(0.5), optax.adam(0.05)])
def test_projection_keeps_every_norm_and_the_direction_of_the_step(model, nodes, inner):
    tx = optax.chain(inner, optim.project_directions())
    projected, _ = train(model, nodes, tx, 1)
    free, _ = train(model, nodes, inner, 1)
    for a, b in zip(weight_norms(projected), weight_norms(free), strict=True):
        np.testing.assert_allclose(a.weight(), b.weight(), rtol=2e-5, atol=1e-6)  # the function does not change
        np.testing.assert_array_equal(a.g, b.g)
    projected, _ = train(model, nodes, tx, 100)
    free, _ = train(model, nodes, inner, 100)
    for start, a, b in zip(weight_norms(nodes), weight_norms(projected), weight_norms(free), strict=True):
        lengths = [np.linalg.norm(node.v, axis=0) for node in (start, a, b)]
        np.testing.assert_allclose(lengths[1], lengths[0], rtol=1e-6)
        assert (lengths[2] >= lengths[0] * (1 - 1e-6)).all()  # equal for a unit that never fires
        assert lengths[2].mean() > 1.001 * lengths[0].mean()


def test_projection_inside_partition_and_in_bfloat16():
    model = ZOO["linen_bfloat16"]()
    nodes = wn.reparameterize(model.params, model.axes)
    v = optax.chain(optax.sgd(0.5), optim.project_directions())
    tx = optax.partition({"v": v, "g": optax.sgd(0.1), "other": optax.sgd(0.1)}, wn.labels)
    new, _ = train(model, nodes, tx, 20)
    for before, after in zip(weight_norms(nodes), weight_norms(new), strict=True):
        assert after.v.dtype == jnp.bfloat16
        lengths = [np.linalg.norm(np.asarray(node.v, np.float64), axis=0) for node in (before, after)]
        np.testing.assert_allclose(lengths[1], lengths[0], rtol=4e-3)


def test_projection_with_boxed_parameters():
    model = ZOO["linen_boxed"]()
    nodes = wn.reparameterize(model.params, model.axes)
    tx = optim.project_directions()
    step = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), nodes)
    updates, _ = tx.update(step, tx.init(nodes), nodes)
    assert jax.tree.structure(updates) == jax.tree.structure(nodes)
    new = optax.apply_updates(nodes, updates)
    for before, after in zip(weight_norms(nodes), weight_norms(new), strict=True):
        np.testing.assert_allclose(*(np.linalg.norm(node.v.value, axis=0) for node in (after, before)), rtol=1e-6)


def test_projection_says_what_is_missing(model, nodes):
    tx = optim.project_directions()
    with pytest.raises(ValueError, match="found no WeightNorm node"):
        tx.init(model.params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(nodes, tx.init(nodes))


def test_a_masked_away_direction_is_left_alone(model, nodes):
    mask = jax.tree.map(lambda _: True, nodes)
    mask["params"]["layers_0"]["kernel"] = wn.WeightNorm(False, False, (-2,))
    tx = optax.chain(optax.sgd(0.5), optax.masked(optim.project_directions(), mask))
    new, _ = train(model, nodes, tx, 5)
    lengths = [[np.linalg.norm(node.v, axis=0) for node in weight_norms(tree)] for tree in (nodes, new)]
    assert (lengths[1][0] > 1.001 * lengths[0][0]).any()
    np.testing.assert_allclose(lengths[1][1], lengths[0][1], rtol=1e-6)


def test_a_vanished_direction_is_reported_and_not_blown_up():
    node = wn.WeightNorm(jnp.ones((1, 3)), jnp.array([[0.0, 1e-21, 3.0], [0.0, 0.0, 4.0]]), (-2,))
    (figures,) = optim.direction_stats({"w": node}, reduce=None).values()
    np.testing.assert_allclose(figures["v_norm"], [[0, 0, 5]])
    np.testing.assert_allclose(figures["effective_step"], [[0, 0, 1 / 25]], rtol=1e-6)
    tx = optim.project_directions()
    step = wn.WeightNorm(jnp.zeros((1, 3)), jnp.full((2, 3), 1e-3), (-2,))
    updates, _ = tx.update({"w": step}, tx.init({"w": node}), {"w": node})
    np.testing.assert_array_equal(updates["w"].v[:, :2], step.v[:, :2])


def test_direction_stats(model, nodes):
    stats = jax.jit(optim.direction_stats)(nodes)
    assert set(stats) == set(model.axes)
    assert all(value.shape == () for figures in stats.values() for value in figures.values())
    node = wn.WeightNorm(jnp.array([[2.0, -3.0]]), jnp.array([[3.0, 0.0], [4.0, 2.0]]), (-2,))
    (figures,) = optim.direction_stats({"kernel": node}, reduce=None).values()
    np.testing.assert_allclose(figures["v_norm"], [[5, 2]])
    np.testing.assert_allclose(figures["g"], [[2, -3]])
    np.testing.assert_allclose(figures["effective_step"], [[2 / 25, 3 / 4]])
    assert optim.direction_stats(model.params) == {}


def test_the_effective_step_is_what_an_sgd_step_turns_the_direction_by():
    node = wn.WeightNorm(jnp.array([[2.0, 3.0]]), jax.random.normal(jax.random.key(0), (6, 2)), (-2,))
    cotangent = jax.random.normal(jax.random.key(1), (6, 2))
    grads = jax.grad(lambda node: jnp.sum(node.weight() * cotangent))(node)
    unit = lambda v: np.asarray(v, np.float64) / np.linalg.norm(np.asarray(v, np.float64), axis=0)  # noqa: E731
    d = unit(node.v)
    orthogonal = cotangent - d * np.sum(d * cotangent, 0)
    lr = 1e-3
    turned = np.linalg.norm(unit(node.v - lr * grads.v) - d, axis=0)
    (figures,) = optim.direction_stats({"w": node}, reduce=None).values()
    np.testing.assert_allclose(
        turned, lr * figures["effective_step"][0] * np.linalg.norm(orthogonal, axis=0), rtol=1e-3
    )


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
            tolerance = 0.02 if "bfloat16" in name else 1e-4
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-2 * tolerance * np.abs(b).max())


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
