"""Nodes inside `shard_map` and `pmap`: against the same numbers on one device, with the formula written out."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import wn_jax as wn
from tests.core.shard_map_cases import CASES, mesh, sharded
from wn_jax import optim


def stated(case, nodes, scale="auto"):
    """The layer on nodes inside `shard_map`, with the statement made there."""
    apply = wn.wrap(case.local, scale=scale)
    specs = wn.shardings(nodes, case.specs)
    return lambda nodes, x: apply(wn.in_shard_map(nodes, specs), x)


def loss_of(fn, cotangent):
    return lambda nodes, x: jnp.sum((jnp.sin(fn(nodes, x)) * cotangent).astype(jnp.float32))


def assert_close(actual, expected, rtol):
    """To `rtol` of the largest number of each array."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def gradient_inside(case, nodes, scale, check_vma):
    """`jax.grad` inside `shard_map`: without `check_vma`, as JAX has it, of the sum of the losses of all devices."""
    specs = wn.shardings(nodes, case.specs)
    fn = stated(case, nodes, scale)

    def others(spec):
        named = {name for dim in spec if dim for name in ((dim,) if isinstance(dim, str) else dim)}
        return tuple(name for name in mesh().axis_names if name not in named)

    copies = 1 if check_vma else int(np.prod([mesh().shape[name] for name in others(case.y)]))

    def gradient(nodes, x, cotangent):
        grads = jax.grad(lambda nodes: loss_of(fn, cotangent)(nodes, x) / copies)(nodes)
        if check_vma:
            return grads
        return jax.tree.map(lambda grad, spec: jax.lax.psum(grad, others(spec)) if others(spec) else grad, grads, specs)

    return sharded(case, gradient, nodes, in_specs=(specs, case.x, case.y), out_specs=specs, check_vma=check_vma)


@pytest.mark.parametrize("scale", ["weight", "output"])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_one_device(name, check_vma, scale):
    case = CASES[name]
    nodes, (x, cotangent) = case.nodes(), case.data()
    fn = sharded(case, stated(case, nodes, scale), nodes, check_vma=check_vma)
    inside = gradient_inside(case, nodes, scale, check_vma)

    @jax.jit
    def everything(nodes, x):
        return fn(nodes, x), jax.grad(loss_of(fn, cotangent))(nodes, x), inside(nodes, x, cotangent)

    value, outside, inside = everything(nodes, x)
    rtol = 2e-2 if case.dtype == jnp.bfloat16 else 1e-5
    expected = jax.grad(loss_of(case.whole, cotangent))(nodes, x)
    assert_close(value, case.whole(nodes, x), rtol)
    assert_close(outside, expected, rtol)
    assert_close(inside, expected, rtol)


@pytest.mark.parametrize("check_vma", [True, False])
def test_forward_mode_and_second_order(check_vma):
    case = CASES["fan_in_and_features"]
    nodes, (x, cotangent) = case.nodes(), case.data()
    tangents = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), nodes)

    def derivatives(fn):
        gradient = lambda nodes: jax.grad(loss_of(fn, cotangent))(nodes, x)  # noqa: E731
        values = jax.jvp(lambda nodes: fn(nodes, x), (nodes,), (tangents,))[1]
        return values, jax.jvp(gradient, (nodes,), (tangents,))[1]

    fn = sharded(case, stated(case, nodes), nodes, check_vma=check_vma)
    for actual, expected in zip(jax.jit(lambda: derivatives(fn))(), derivatives(case.whole), strict=True):
        assert_close(actual, expected, 1e-5)


def all_reduces(fn, *args):
    """The shapes of what a compiled program adds up over devices."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    return sorted(re.findall(r"= (\S+?)(?:\{\S*)? all-reduce(?:-start)?\(", text))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("name", "sent"), [("fan_in", ["f32[1,8]"]), ("conv", ["f32[1,1,1,2]"]), ("features", []), ("replicated", [])]
)
def test_what_is_sent_for_a_norm_is_one_number_a_feature(name, sent, check_vma):
    case = CASES[name]
    nodes, (x, _) = case.nodes(), case.data()
    plain = {**nodes, "w": nodes["w"].v}
    of_plain = sharded(case, case.local, plain, check_vma=check_vma)
    of_nodes = sharded(case, stated(case, nodes), nodes, check_vma=check_vma)
    assert all_reduces(of_nodes, nodes, x) == sorted(all_reduces(of_plain, plain, x) + sent)


@pytest.mark.parametrize("scale", ["weight", "output"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_axes_that_are_not_manual_are_left_to_the_compiler(check_vma, scale):
    case = CASES["fan_in"]
    nodes, (x, cotangent) = case.nodes(), case.data()
    both = wn.shardings(nodes, {"w": P("fsdp", "model"), "b": P("model")})
    placed = jax.device_put(nodes, jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh(), spec), both))
    apply = wn.wrap(case.local, scale=scale)
    partly = {"axis_names": {"fsdp"}, "check_vma": check_vma}
    fn = sharded(case, lambda nodes, x: apply(wn.in_shard_map(nodes, both), x), nodes, **partly)
    value, grads = jax.jit(lambda nodes, x: (fn(nodes, x), jax.grad(loss_of(fn, cotangent))(nodes, x)))(placed, x)
    assert_close(value, case.whole(nodes, x), 1e-5)
    assert_close(grads, jax.grad(loss_of(case.whole, cotangent))(nodes, x), 1e-5)


def test_each_layer_of_a_stack_has_its_norm():
    """A scan over a stack whose layers are whole and whose inputs are sharded: the spec counts the leading axis."""
    random = np.random.default_rng(0)
    nodes = wn.WeightNorm(
        jnp.asarray(random.uniform(1, 2, (3, 1, 8))), jnp.asarray(random.normal(size=(3, 8, 8))), (-2,)
    )
    specs = wn.shardings(nodes, P(None, "fsdp", None))
    x = jnp.asarray(random.normal(size=(2, 8)))

    def local(nodes, x):
        def layer(x, w):
            here = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("fsdp") * 2, 2, axis=1)
            return jnp.tanh(jax.lax.psum(here @ w, "fsdp")), None

        return jax.lax.scan(lambda x, node: layer(x, node.weight()), x, wn.in_shard_map(nodes, specs))[0]

    expected = x
    for g, v in zip(nodes.g, nodes.v, strict=True):
        expected = np.tanh(expected @ (g * v / np.linalg.norm(v, axis=0, keepdims=True)))
    fn = jax.shard_map(local, mesh=mesh(), in_specs=(specs, P()), out_specs=P())
    np.testing.assert_allclose(jax.jit(fn)(nodes, x), expected, rtol=1e-5, atol=1e-6)


def test_a_training_step_with_projected_directions():
    case = CASES["fan_in"]
    nodes, (x, cotangent) = case.nodes(), case.data()
    specs = wn.shardings(nodes, case.specs)
    tx = optax.chain(optax.sgd(0.1), optim.project_directions())
    state = tx.init(nodes)

    def step(nodes, x):
        grads = jax.grad(lambda nodes: loss_of(stated(case, nodes), cotangent)(nodes, x))(nodes)
        there = wn.in_shard_map(nodes, specs)
        lengths = optim.direction_stats(there, None)["w"]["v_norm"]
        return optax.apply_updates(nodes, tx.update(grads, state, there)[0]), lengths

    new, lengths = jax.jit(sharded(case, step, nodes, out_specs=(specs, P())))(nodes, x)
    np.testing.assert_allclose(lengths, np.linalg.norm(nodes["w"].v, axis=0, keepdims=True), rtol=1e-6)
    grads = jax.grad(loss_of(case.whole, cotangent))(nodes, x)
    moved = np.asarray(nodes["w"].v - 0.1 * grads["w"].v)
    np.testing.assert_allclose(new["w"].v, moved * (lengths / np.linalg.norm(moved, axis=0)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["w"].g, nodes["w"].g - 0.1 * grads["w"].g, rtol=1e-5)


def test_pmap():
    """With whole weights, and with the fan-in along the mapped axis."""
    case = CASES["replicated"]
    nodes, (x, _) = case.nodes(), case.data()
    whole = jax.pmap(lambda nodes, x: wn.wrap(case.local)(wn.in_shard_map(nodes, P()), x), in_axes=(None, 0))
    np.testing.assert_allclose(whole(nodes, x[:, None])[:, 0], case.whole(nodes, x), rtol=1e-5, atol=1e-6)
    node = nodes["w"]
    part = jax.pmap(
        lambda g, v: wn.in_shard_map(wn.WeightNorm(g, v, (-2,)), P("devices")).weight(),
        axis_name="devices",
        in_axes=(None, 0),
    )
    expected = node.g * node.v / np.linalg.norm(node.v, axis=0)
    np.testing.assert_allclose(part(node.g, node.v.reshape(8, 2, 8)).reshape(16, 8), expected, rtol=1e-6)


def test_outside_it_changes_nothing():
    nodes = CASES["fan_in"].nodes()
    assert wn.in_shard_map(nodes, CASES["fan_in"].specs) is nodes


def test_other_leaves_and_what_was_stated_before_stay():
    case = CASES["fan_in"]
    nodes, (x, _) = case.nodes(), case.data()
    specs = wn.shardings(nodes, case.specs)

    def local(nodes, x):
        once = wn.in_shard_map(nodes, specs)
        twice = wn.in_shard_map(once, case.specs)
        assert twice["b"] is nodes["b"]
        assert isinstance(twice["w"], wn.WeightNorm)
        assert jax.tree.structure(once) == jax.tree.structure(twice)
        return wn.wrap(case.local)(twice, x)

    assert_close(sharded(case, local, nodes)(nodes, x), case.whole(nodes, x), 1e-5)
