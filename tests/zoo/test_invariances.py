"""Invariances, over the whole model zoo: what wrapping may never change."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from tests.zoo import ZOO
from wn_jax import optim


@functools.cache
def zoo(name):
    model = ZOO[name]()
    return model, wn.reparameterize(model.params, model.axes)


WITH_NODES = [name for name, model in ZOO.items() if model().axes]
every_model = pytest.mark.parametrize("name", WITH_NODES)
sampled = pytest.mark.parametrize("name", WITH_NODES[::16])  # what compiles much, and test_wrap.py has for all models
slow_for_most = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if i % 6 == 0 else pytest.mark.slow) for i, name in enumerate(WITH_NODES)]
)


def arrays(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def assert_same_bits(a, b):
    """Equal to the sign of each zero."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(arrays(a), arrays(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def split(tree):
    """Arrays of a tree, and a function that puts them back."""
    leaves, treedef = jax.tree.flatten(tree)
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]

    def merge(given):
        given = iter(given)
        merged = [next(given) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]
        return jax.tree.unflatten(treedef, merged)

    return arrays(tree), merge


def tolerance(x):
    return {"rtol": 0, "atol": 4 * float(jnp.finfo(x.dtype).eps) * max(1.0, float(jnp.abs(x).max()))}


@every_model
def test_round_trip_is_exact_eagerly(name):
    model, nodes = zoo(name)
    assert_same_bits(wn.reconstruct(nodes), model.params)


@slow_for_most
def test_round_trip_is_exact_under_jit(name):
    model, _ = zoo(name)
    leaves, merge = split(model.params)
    to_nodes = jax.jit(lambda leaves: arrays(wn.reparameterize(merge(leaves), model.axes)))
    _, merge_nodes = split(zoo(name)[1])
    to_plain = jax.jit(lambda leaves: arrays(wn.reconstruct(merge_nodes(leaves))))
    assert_same_bits(to_plain(to_nodes(leaves)), leaves)


@every_model
def test_the_chosen_leaves_are_nodes_and_the_others_are_untouched(name):
    model, nodes = zoo(name)
    leaves = jax.tree_util.tree_leaves_with_path(nodes, is_leaf=lambda x: isinstance(x, wn.WeightNorm))
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    nodes_found = {path: leaf for path, leaf in found.items() if isinstance(leaf, wn.WeightNorm)}
    assert {path: node.axes for path, node in nodes_found.items()} == model.axes
    for node in nodes_found.values():
        (g,), (v,) = jax.tree.leaves(node.g), jax.tree.leaves(node.v)
        assert g.shape == tuple(1 if i - v.ndim in node.axes else size for i, size in enumerate(v.shape))
        assert g.dtype == jnp.float32


@slow_for_most
def test_wrapping_changes_the_output_by_rounding_only(name):
    model, nodes = zoo(name)
    expected = model.fn(model.params, model.x)
    np.testing.assert_allclose(
        np.asarray(wn.wrap(model.fn)(nodes, model.x), np.float64),
        np.asarray(expected, np.float64),
        **tolerance(expected),
    )


@sampled
def test_jit_vmap_remat_and_grad_agree(name):
    model, nodes = zoo(name)
    leaves, merge = split(nodes)
    fn = wn.wrap(model.fn)

    def loss(leaves, x):
        return jnp.sum(jnp.sin(fn(merge(leaves), x).astype(jnp.float32)))

    def transformed(leaves, x):
        batch, stacks = jnp.stack([x, x]), [jnp.stack([leaf, leaf]) for leaf in leaves]
        return (
            jax.grad(jax.checkpoint(loss))(leaves, x),
            [leaf[1] for leaf in jax.vmap(jax.grad(loss), in_axes=(None, 0))(leaves, batch)],
            [leaf[1] for leaf in jax.vmap(jax.grad(loss))(stacks, batch)],
            jax.lax.scan(lambda carry, x: (carry, jax.grad(loss)(carry, x)), leaves, x[None])[1],
        )

    expected = jax.jit(jax.grad(loss))(leaves, model.x)
    for other in jax.jit(transformed)(leaves, model.x):
        for a, b in zip(other, expected, strict=True):
            limit = 2e-5 if b.dtype == jnp.float32 and "float16" not in name else 0.05
            np.testing.assert_allclose(
                np.asarray(a, np.float64).reshape(b.shape), np.asarray(b, np.float64), rtol=limit, atol=limit
            )


@pytest.mark.slow
@sampled
def test_forward_mode_agrees_with_reverse_mode(name):
    model, nodes = zoo(name)
    if not model.forward_mode:
        pytest.skip("its custom derivative rule has no forward mode")
    leaves, merge = split(nodes)
    fn = wn.wrap(model.fn)

    def loss(leaves):
        return jnp.mean(jnp.sin(fn(merge(leaves), model.x).astype(jnp.float32)))

    keys = jax.random.split(jax.random.key(3), len(leaves))
    tangents = [jax.random.normal(k, leaf.shape).astype(leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    _, forward = jax.jit(lambda p, t: jax.jvp(loss, (p,), (t,)))(leaves, tangents)
    reverse = sum(
        jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32))
        for a, b in zip(jax.jit(jax.grad(loss))(leaves), tangents, strict=True)
    )
    np.testing.assert_allclose(forward, reverse, rtol=0.05 if "float16" in name else 1e-4, atol=1e-4)


@sampled
def test_nothing_is_mutated(name):
    model, nodes = zoo(name)
    before = [np.array(leaf) for leaf in arrays(model.params)]
    nodes_before = [np.array(leaf) for leaf in arrays(nodes)]
    for _ in range(3):
        wn.wrap(model.fn)(nodes, model.x)
    for old, leaf in zip(before + nodes_before, arrays(model.params) + arrays(nodes), strict=True):
        assert old.tobytes() == np.asarray(leaf).tobytes()


def test_a_training_step_is_traced_once_and_donates_its_nodes():
    model, _ = zoo("linen_mlp")
    nodes = wn.reparameterize(model.params, model.axes)
    fn = wn.wrap(model.fn)

    @chex.assert_max_traces(n=1)
    def step(nodes, x):
        grads = jax.grad(lambda nodes: jnp.mean(fn(nodes, x) ** 2))(nodes)
        return jax.tree.map(lambda p, g: p - 0.1 * g, nodes, grads)

    jitted = jax.jit(step, donate_argnums=0)
    new = jitted(jax.tree.map(jnp.array, nodes), model.x)
    for _ in range(3):
        old = new
        new = jitted(new, model.x)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert jax.tree.structure(new) == jax.tree.structure(nodes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "linen_mlp",
        "linen_bfloat16",
        "linen_float16",
        "linen_zero_initialized",
    ],
)
def test_strict_promotion_and_no_leaks(name):
    model, _ = zoo(name)

    def loss(nodes):
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(wn.reconstruct(nodes)))

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.checking_leaks():
        nodes = jax.jit(lambda p: wn.reparameterize(p, model.axes))(model.params)
        grads = jax.jit(jax.grad(loss))(nodes)
        tx = optim.project_directions()
        jax.jit(tx.update)(grads, tx.init(nodes), nodes)
        jax.jit(optim.direction_stats)(nodes)
    assert jax.tree.structure(grads) == jax.tree.structure(nodes)


def test_a_stack_of_nodes_is_scanned_and_mapped_layer_by_layer():
    """Axes counted from the end hold for a slice: each layer keeps its own norm."""
    stack = jax.random.normal(jax.random.key(0), (3, 4, 5))
    node = wn.WeightNorm.from_weight(stack, -2)
    x = jnp.ones((2, 4))
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, x @ layer.weight()), None, node)
    mapped = jax.vmap(lambda layer: x @ layer.weight())(node)
    one_by_one = jnp.stack([x @ wn.WeightNorm.from_weight(layer, 0).weight() for layer in stack])
    np.testing.assert_allclose(scanned, one_by_one, rtol=1e-6)
    np.testing.assert_allclose(mapped, one_by_one, rtol=1e-6)
