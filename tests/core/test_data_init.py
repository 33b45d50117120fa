"""Data-dependent initialization against the zoo's hand-written pre-activations, and its failures."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from tests.zoo import ZOO

WITH_NODES = [name for name, model in ZOO.items() if model().axes]
FEED_FORWARD = [name for name in WITH_NODES if ZOO[name]().preactivations]


def is_node(x):
    return isinstance(x, wn.WeightNorm)


@functools.cache
def initialized(name, init_scale=1.0):
    """A model of the zoo, its nodes, and these after initialization."""
    model = ZOO[name]()
    nodes = wn.reparameterize(model.params, model.axes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model, nodes, wn.init_from_data(model.fn, init_scale)(nodes, model.x)


def found(tree):
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_node) if is_node(leaf)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if i % 8 == 0 else pytest.mark.slow) for i, name in enumerate(WITH_NODES)]
)
def test_as_many_nodes_are_initialized_as_the_zoo_says(name):
    model, nodes, new = initialized(name)
    assert jax.tree.structure(new) == jax.tree.structure(nodes)
    changed = 0
    for before, after in zip(found(nodes), found(new), strict=True):
        (g,), (new_g,) = jax.tree.leaves(before.g), jax.tree.leaves(after.g)
        assert (new_g.shape, new_g.dtype) == (g.shape, g.dtype)
        assert all(map(np.array_equal, jax.tree.leaves(before.v), jax.tree.leaves(after.v)))
        changed += not np.array_equal(g, new_g)
    assert changed == model.initialized


@pytest.mark.parametrize("init_scale", [1.0, 0.5])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if i % 5 == 0 else pytest.mark.slow) for i, name in enumerate(FEED_FORWARD)]
)
def test_pre_activations_are_normalized(name, init_scale):
    if ZOO[name]().initialized < len(ZOO[name]().axes) or (init_scale != 1.0 and name not in FEED_FORWARD[::8]):
        pytest.skip("not all of its nodes are initialized, or left out of the second scale")
    model, _, new = initialized(name, init_scale)
    for path, z in model.preactivations(wn.reconstruct(new), model.x).items():
        z = np.asarray(z, np.float64) / init_scale
        np.testing.assert_allclose(z.std(0), 1, atol=1e-4, err_msg=path)
        if path in model.biased:
            np.testing.assert_allclose(z.mean(0), 0, atol=1e-5, err_msg=path)


def deep_stack():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(8)(nn.tanh(nn.LayerNorm()(x))), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = stack()(nn.Dense(8)(x), None)
            return nn.Dense(2)(nn.relu(nn.Conv(8, (3,))(x)))

    model = Net()
    x = jax.random.normal(jax.random.key(1), (16, 5, 4)) * 3 + 1
    params = model.init(jax.random.key(0), x)
    return model, wn.reparameterize(params, wn.infer_axes(model.apply)(params, x)), x


@pytest.mark.slow
def test_eager_jit_and_a_sharded_batch_agree():
    model, nodes, x = deep_stack()
    init = wn.init_from_data(model.apply)
    eager = init(nodes, x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    replicated = jax.device_put(nodes, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    for other in (jax.jit(init)(nodes, x), init(replicated, sharded), jax.jit(init)(replicated, sharded)):
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(eager), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_each_scanned_layer_sees_what_the_layers_before_it_give():
    """The scanned stack, against a loop over its layers written by hand."""
    model, nodes, x = deep_stack()
    plain = wn.reconstruct(wn.init_from_data(model.apply)(nodes, x))["params"]
    h = x @ plain["Dense_0"]["kernel"] + plain["Dense_0"]["bias"]
    for i in range(3):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], plain["ScanCheckpointBlock_0"])
        normed = nn.LayerNorm().apply({"params": layer["LayerNorm_0"]}, h)
        z = jnp.tanh(normed) @ layer["Dense_0"]["kernel"] + layer["Dense_0"]["bias"]
        np.testing.assert_allclose(z.mean((0, 1)), 0, atol=1e-5)
        np.testing.assert_allclose(z.std((0, 1)), 1, atol=1e-4)
        h = h + z


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_has_float32_statistics(dtype):
    """In float16, 4,000 samples of size 60 have squares that overflow, and in bfloat16 a sum that stops growing."""
    x = (jax.random.normal(jax.random.key(0), (4000, 16)) * 60).astype(dtype)
    params = {"w": jax.random.normal(jax.random.key(1), (16, 3)).astype(dtype), "b": jnp.zeros(3, dtype)}

    def model(params, x):
        return x @ params["w"] + params["b"]

    nodes = wn.init_from_data(model)(wn.reparameterize(params, {"w": -2}), x)
    assert nodes["w"].g.dtype == jnp.float32
    z = np.asarray(wn.wrap(model)(nodes, x), np.float64)
    np.testing.assert_allclose(z.std(0), 1, rtol=2e-2)
    np.testing.assert_allclose(z.mean(0), 0, atol=2e-2)


def dense(params, x):
    return x @ params["w"] + params["b"]


def nodes_of_dense():
    return wn.reparameterize({"w": jnp.eye(3, 2) + 0.1, "b": jnp.ones(2)}, {"w": -2})


BATCH = jnp.asarray(np.random.default_rng(0).standard_normal((10, 3)), jnp.float32)


def test_a_constant_feature_keeps_its_function_and_is_named():
    nodes = wn.reparameterize({"w": jnp.array([[1.0, 2.0], [0.0, 1.0]]), "b": jnp.array([3.0, 4.0])}, {"w": -2})
    x = BATCH[:, :2].at[:, 0].set(5.0)  # the first feature sees only this
    with pytest.warns(UserWarning, match=r"w: 1 of its features are constant"):
        new = wn.init_from_data(dense)(nodes, x)
    assert new["w"].g[0, 0] == nodes["w"].g[0, 0]
    assert new["b"][0] == 3.0
    np.testing.assert_allclose(dense(wn.reconstruct(new), x)[:, 0], 8.0)
    np.testing.assert_allclose(dense(wn.reconstruct(new), x)[:, 1].std(), 1.0, rtol=1e-4)


def test_in_jit_the_constant_features_are_told_by_a_callback():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new = jax.jit(wn.init_from_data(dense))(nodes_of_dense(), BATCH.at[:].set(1.0))
        jax.block_until_ready(new)
        jax.effects_barrier()
    assert any("2 of its features are constant" in str(warning.message) for warning in caught)


def test_what_is_used_twice_keeps_its_function_and_is_named():
    nodes = wn.reparameterize({"w": jnp.eye(3) + 0.1, "u": jnp.ones((3, 2))}, {"w": -2, "u": -2})
    with pytest.warns(UserWarning, match=r"left 1 of 2 nodes[^:]*:\s+w: the program uses it at 2 places"):
        new = wn.init_from_data(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"] @ p["u"])(nodes, BATCH)
    np.testing.assert_array_equal(new["w"].g, nodes["w"].g)
    assert not np.array_equal(new["u"].g, nodes["u"].g)


def test_a_norm_over_other_axes_keeps_its_function_and_is_named():
    nodes = wn.reparameterize({"w": jnp.eye(3, 2) + 0.1, "b": jnp.ones(2)}, {"w": (-2, -1)})
    with pytest.warns(UserWarning, match=r"its norm runs over \(-2, -1\), the program sums over \(-2,\)"):
        wn.init_from_data(dense)(nodes, BATCH)


def test_nothing_is_mutated_and_the_gradient_of_nothing_is_needed():
    nodes = nodes_of_dense()
    before = jax.tree.map(np.array, nodes)
    wn.init_from_data(dense)(nodes, BATCH)
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(nodes)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: wn.init_from_data(dense)({"w": jnp.ones((3, 2))}, BATCH), Exception, "b"),
        (lambda: wn.init_from_data(dense)({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, BATCH), ValueError, "no nodes"),
        (lambda: wn.init_from_data(dense)(nodes_of_dense(), BATCH[:1]), ValueError, "single sample .* 'w'"),
        (lambda: wn.init_from_data(dense)(nodes_of_dense(), BATCH.at[0, 0].set(jnp.nan)), ValueError, "'w' are NaN"),
        (lambda: wn.init_from_data(dense, init_scale=0.0), ValueError, "init_scale must be a positive"),
        (lambda: wn.init_from_data(dense, init_scale=float("nan")), ValueError, "init_scale must be a positive"),
        (lambda: wn.init_from_data({}), TypeError, "init_from_data takes a function"),
        (lambda: wn.init_from_data(dense)(params=nodes_of_dense(), x=BATCH), TypeError, "by position"),
        (
            lambda: wn.init_from_data(dense)(nodes_of_dense(), jax.ShapeDtypeStruct((4, 3), jnp.float32)),
            TypeError,
            "ShapeDtypeStruct",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_first_layer_that_is_not_finite_is_named():
    model, nodes, x = deep_stack()
    bad = nodes["params"]["ScanCheckpointBlock_0"]["Dense_0"]["kernel"]
    bad = wn.WeightNorm(bad.g, bad.v.at[1, 0, 0].set(jnp.inf), bad.axes)
    nodes["params"]["ScanCheckpointBlock_0"]["Dense_0"]["kernel"] = bad
    with pytest.raises(ValueError, match="'params/ScanCheckpointBlock_0/Dense_0/kernel' are NaN"):
        wn.init_from_data(model.apply)(nodes, x)


def test_a_tensor_parallel_layer_in_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    plain = {"w": jnp.asarray(np.random.default_rng(3).standard_normal((3, 4)), jnp.float32), "b": jnp.ones(4)}
    expected = wn.init_from_data(dense)(wn.reparameterize(plain, {"w": -2}), BATCH)
    with jax.set_mesh(mesh):
        sharded = {**plain, "w": jax.device_put(plain["w"], jax.P(None, "x"))}
        new = wn.init_from_data(dense)(wn.reparameterize(sharded, {"w": -2}), BATCH)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
