"""The effect of a step in g and v on the weights, and on the length of v."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wn_jax as wn
from tests.curvature.problems import by_hand, flat, is_node, problem, relative
from tests.zoo import ZOO
from wn_jax import curvature

FORMS = ["plain", "nodes"]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def weight_gradient(p):
    """By the weights themselves."""
    return p.gradient(by_hand(p.params), p.batch)


@functools.cache
def step_of(p):
    return jax.jit(curvature.weight_step(p.loss))(p.params, p.batch)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_the_jacobian_times_its_transpose_times_the_gradient(form):
    p = problem("tanh", "cross_entropy", form)
    j = jax.jit(jax.jacobian(lambda vector: jax.flatten_util.ravel_pytree(by_hand(p.unravel(vector)))[0]))(p.vector)
    step = step_of(p)
    assert jax.tree.structure(step) == jax.tree.structure(by_hand(p.params))
    assert relative(flat(step), j @ j.T @ flat(weight_gradient(p))) < 1e-10


def test_a_step_of_weight_normalization_by_formula():
    """For each feature `(d d' + (g/||v||)^2 (I - d d')) grad_w`, with d = v/||v||; other parameters: the gradient."""
    p = problem("tanh", "cross_entropy", "nodes")
    step, gradient = step_of(p), weight_gradient(p)
    for layer, moved, own in zip(p.params, step, gradient, strict=True):
        node, grad = layer["kernel"], np.asarray(own["kernel"])
        lengths = np.linalg.norm(node.v, axis=0)
        along = np.asarray(node.v) / lengths
        radial = along * np.sum(along * grad, axis=0)
        expected = radial + (np.asarray(node.g) / lengths) ** 2 * (grad - radial)
        assert abs(np.asarray(node.g) / lengths - 1).min() > 1e-3  # or it would be the gradient
        assert relative(moved["kernel"], expected) < 1e-12
        assert relative(moved["bias"], own["bias"]) < 1e-12


def test_where_v_is_as_long_as_g_a_step_is_the_gradient():
    plain = problem("tanh", "cross_entropy", "plain")
    nodes = wn.reparameterize(plain.params, {"0/kernel": -2, "1/kernel": -2})
    step = jax.jit(curvature.weight_step(plain.loss))(nodes, plain.batch)
    gradient = weight_gradient(plain)
    assert relative(flat(step), flat(gradient)) < 1e-12
    np.testing.assert_allclose(curvature.cosine(step, gradient), 1, rtol=1e-12)


def test_a_step_is_what_a_small_update_does_to_the_weights():
    p = problem("tanh", "cross_entropy", "nodes")
    gradient, rate = p.gradient(p.params, p.batch), 1e-6
    after = by_hand(jax.tree.map(lambda x, g: x - rate * g, p.params, gradient))
    moved = (flat(by_hand(p.params)) - flat(after)) / rate
    assert relative(flat(step_of(p)), moved) < 1e-5


def test_a_step_of_another_parametrization():
    """`w = exp(p)`: the step is `w^2 grad_w`."""
    p = jnp.array([0.1, -0.4, 0.7])
    step = curvature.weight_step(lambda w, batch: jnp.sum(batch * w**2), lambda p: jax.tree.map(jnp.exp, p))
    np.testing.assert_allclose(step(p, 3.0), np.exp(2 * p) * 6 * np.exp(p), rtol=1e-12)


def test_the_cosine():
    first, second = ({"a": np.random.default_rng(i).standard_normal((3, 2)), "b": np.ones(2) * i} for i in (1, 2))
    expected = flat(first) @ flat(second) / np.linalg.norm(flat(first)) / np.linalg.norm(flat(second))
    np.testing.assert_allclose(curvature.cosine(first, second), expected, rtol=1e-12)
    np.testing.assert_allclose(curvature.cosine(first, jax.tree.map(lambda x: -3 * x, first)), -1, rtol=1e-12)
    assert np.isnan(curvature.cosine(first, jax.tree.map(np.zeros_like, second)))


def updated(p, tx, steps=1):
    """The parameters before the last of the steps, and after it."""
    params, state = p.params, tx.init(p.params)
    for _ in range(steps):
        before = params
        updates, state = tx.update(p.gradient(params, p.batch), state, params)
        params = optax.apply_updates(params, updates)
    return before, params


def growth_of(before, after):
    """`||v'|| / ||v||` and `||v' - v|| / ||v||` of every node, with NumPy."""
    nodes = [jax.tree.leaves(tree, is_leaf=is_node) for tree in (before, after)]
    for old, new in zip(*nodes, strict=True):
        if is_node(old):
            length, longer, step = (np.linalg.norm(v, axis=0) for v in (old.v, new.v, new.v - old.v))
            yield longer / length, step / length


def test_sgd_lengthens_v_by_the_law_of_the_paper():
    """Section 2.2: `||v'|| = sqrt(1 + c^2) ||v||`."""
    before, after = updated(problem("tanh", "cross_entropy", "nodes"), optax.sgd(2.0))
    figures = jax.jit(curvature.norm_growth)(before, after)
    assert set(figures) == {"0/kernel", "1/kernel"}
    for own, (growth, c) in zip(figures.values(), growth_of(before, after), strict=True):
        np.testing.assert_allclose(own["growth"], growth[None], rtol=1e-12)
        np.testing.assert_allclose(own["c"], c[None], rtol=1e-12)
        np.testing.assert_allclose(own["law"], np.sqrt(1 + c**2)[None], rtol=1e-12)
        np.testing.assert_allclose(own["growth"], own["law"], rtol=1e-10)
        assert own["growth"].max() > 1.01  # there is something to see


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.sgd(1.0, momentum=0.9)], ids=["adam", "momentum"])
def test_other_rules_depart_from_the_law(tx):
    before, after = updated(problem("tanh", "cross_entropy", "nodes"), tx, steps=3)
    for own in curvature.norm_growth(before, after).values():
        assert abs(own["growth"] - own["law"]).max() > 1e-3


def test_a_tree_without_nodes_has_no_growth():
    plain = problem("tanh", "cross_entropy", "plain").params
    assert curvature.norm_growth(plain, plain) == {}


@pytest.mark.slow
def test_a_tree_may_hold_functions():
    """As Equinox models do; compared with the same weights in a plain tree."""
    model = ZOO["equinox_mlp"]()
    net = wn.reparameterize(model.params, model.axes)
    net = jax.tree.map(
        lambda x: dataclasses.replace(x, v=3 * x.v) if is_node(x) else x, net, is_leaf=is_node
    )  # else a step is plain's own

    def loss(net, x):
        return jnp.mean(model.fn(net, x) ** 2)

    found = curvature.weight_step(loss)(net, model.x)
    arrays, rest = eqx.partition(net, eqx.is_array)

    def of_arrays(arrays):
        return eqx.partition(wn.reconstruct(eqx.combine(arrays, rest)), eqx.is_array)

    plain, plain_rest = of_arrays(arrays)
    gradient = jax.grad(lambda plain: loss(eqx.combine(plain, plain_rest), model.x))(plain)
    jacobian = jax.jacobian(lambda arrays: jax.flatten_util.ravel_pytree(of_arrays(arrays)[0])[0])(arrays)
    rows = np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(jacobian)], axis=1)
    expected = rows @ rows.T @ jax.flatten_util.ravel_pytree(gradient)[0]
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(found)[0], expected, rtol=1e-4, atol=1e-6)
    moved = jax.tree.map(lambda x: 1.5 * x if eqx.is_array(x) else x, net)
    for growth in curvature.norm_growth(net, moved).values():
        np.testing.assert_allclose(growth["growth"], 1.5, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_cosine_does_not_depend_on_lengths(scale):
    first = {"a": jnp.array([scale, 0.0], jnp.float32)}
    np.testing.assert_allclose(curvature.cosine(first, {"a": jnp.array([3.0, 4.0], jnp.float32)}), 0.6, rtol=1e-6)
    assert np.isnan(curvature.cosine({"a": jnp.zeros(2)}, first))
