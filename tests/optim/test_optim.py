"""optax pieces: labels, decay, projection and statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wn_jax as wn
from tests.optim.training import loss, train, weight_norms
from tests.zoo import ZOO
from wn_jax import optim


def test_labels_give_g_and_v_their_own_learning_rate(model, nodes):
    tx = optax.partition({"g": optax.sgd(1.0), "v": optax.sgd(0.0), "other": optax.sgd(0.0)}, wn.labels)
    grads = jax.grad(lambda nodes: loss(model, nodes))(nodes)
    new, _ = train(model, nodes, tx, 1)
    for before, after, grad in zip(weight_norms(nodes), weight_norms(new), weight_norms(grads), strict=True):
        np.testing.assert_array_equal(after.v, before.v)
        np.testing.assert_allclose(after.g, before.g - grad.g, rtol=1e-6)


def test_muon_takes_v_for_a_matrix_and_leaves_g_alone(model, nodes):
    adam = optax.adam(1e-2)
    recipe = optax.partition({"v": optax.contrib.muon(0.02), "g": adam, "other": adam}, wn.labels)
    new, _ = train(model, nodes, recipe, 1)
    grads = weight_norms(jax.grad(lambda nodes: loss(model, nodes))(nodes))
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


@pytest.mark.parametrize("inner", [optax.sgd(0.5), pytest.param(optax.adam(0.05), marks=pytest.mark.slow)])
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Doubled:
    """A node within a node: its weight is twice its array."""

    half: jax.Array

    def weight(self):
        return 2 * self.half

    def factors(self):
        return self.half, jnp.full((1, 1), 2.0)


def test_a_direction_that_is_itself_a_node():
    params = {"kernel": wn.WeightNorm(jnp.array([[3.0]]), Doubled(jnp.array([[1.5], [2.0]])), (-2,))}
    stats = optim.direction_stats(params)["kernel"]
    np.testing.assert_allclose([stats["v_norm"], stats["g"], stats["effective_step"]], [5, 3, 3 / 25], rtol=1e-6)
    with pytest.raises(ValueError, match=r"cannot keep the norms of 'kernel': a node stands there as v.*optax.masked"):
        optim.project_directions().init(params)
