"""Nodes pass through other libraries: boxes, flax.serialization, Orbax, pickle, deepcopy, jax.export."""

import copy
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.core import meta

import wn_jax as wn
from tests.zoo import ZOO


@pytest.fixture(params=["linen_mlp", "linen_boxed", "linen_bfloat16", "haiku_mlp"])
def nodes(request):
    model = ZOO[request.param]()
    return wn.reparameterize(model.params, model.axes)


def blank(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_flax_serialization(nodes):
    assert_equal(serialization.from_bytes(blank(nodes), serialization.to_bytes(nodes)), nodes)
    assert_equal(serialization.from_state_dict(blank(nodes), serialization.to_state_dict(nodes)), nodes)


def test_orbax_with_a_target(nodes, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", nodes)
    with ocp.StandardCheckpointer() as checkpointer:
        assert_equal(checkpointer.restore(tmp_path / "checkpoint", blank(nodes)), nodes)


def test_pickle_and_deepcopy(nodes):
    assert_equal(pickle.loads(pickle.dumps(nodes)), nodes)
    assert_equal(copy.deepcopy(nodes), nodes)


def test_serialized_axes_are_checked():
    weight = jnp.arange(6.0).reshape(2, 3)
    saved = serialization.to_bytes({"layer": wn.WeightNorm.from_weight(weight, -2)})
    other = {"layer": wn.WeightNorm.from_weight(weight, -1)}
    with pytest.raises(ValueError, match=r"layer: the saved node reduces over axes \(-2,\), the target over \(-1,\)"):
        serialization.from_bytes(other, saved)


def test_a_plain_state_does_not_load_into_a_node():
    saved = serialization.to_bytes({"layer": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match="layer: the target is a WeightNorm node"):
        serialization.from_bytes({"layer": wn.WeightNorm.from_weight(jnp.ones((2, 3)), -2)}, saved)
    partial = serialization.to_bytes({"layer": {"g": jnp.ones((1, 3))}})
    with pytest.raises(ValueError, match=r"holds \['g'\]"):
        serialization.from_bytes({"layer": wn.WeightNorm.from_weight(jnp.ones((2, 3)), -2)}, partial)


def test_export_with_live_nodes():
    model = ZOO["linen_mlp"]()
    nodes = wn.reparameterize(model.params, model.axes)
    exported = jax.export.export(jax.jit(wn.wrap(model.fn)))(nodes, model.x)
    loaded = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(loaded.call(nodes, model.x), model.fn(model.params, model.x), rtol=1e-6, atol=1e-6)


def test_boxes_move_inside_with_the_right_names():
    model = ZOO["linen_boxed"]()
    nodes = wn.reparameterize(model.params, model.axes)
    partitioned, logical = (nodes["params"][f"Dense_{i}"]["kernel"] for i in (0, 1))
    assert type(partitioned.g) is nn.Partitioned
    assert (partitioned.g.names, partitioned.v.names) == ((None, "model"), (None, "model"))
    assert type(logical.v) is nn.LogicallyPartitioned
    assert (logical.g.names, logical.v.names) == ((None, "embed"), ("hidden", "embed"))
    spec = jax.sharding.PartitionSpec
    specs = nn.get_partition_spec(nodes)["params"]["Dense_1"]["kernel"]
    assert (specs.g, specs.v) == (spec(None, "embed"), spec("hidden", "embed"))
    rebuilt = wn.reconstruct(nodes)
    assert nn.get_partition_spec(rebuilt) == nn.get_partition_spec(model.params)
    unboxed = meta.unbox(nodes)["params"]["Dense_0"]["kernel"]
    assert isinstance(unboxed, wn.WeightNorm)
    assert isinstance(unboxed.g, jax.Array)


def test_other_metadata_boxes_and_short_names():
    box = nn.Partitioned(jnp.ones((2, 3, 4)), names=("layers",))  # as in a PartitionSpec, trailing names may be missing
    node = wn.WeightNorm.from_weight(box, -2)
    assert node.g.names == ("layers", None, None)
    stack = wn.WeightNorm.from_weight(nn.Partitioned(jnp.ones((2, 3, 4)), names=("layers", "in", "out")), -2)
    assert stack.g.names == ("layers", None, "out")


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("names", [("data", "model"), (None, "model")])
def test_a_sharded_weight_keeps_its_sharding_and_its_bits(axis_type, names):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))
    weight = jax.random.normal(jax.random.key(0), (16, 8)).at[:, 3].set(0)
    sharded = jax.device_put(weight, sharding)
    with jax.set_mesh(mesh):
        node = wn.WeightNorm.from_weight(sharded, 0)
        rebuilt = jax.jit(wn.reconstruct)(node)
    assert node.v.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(node.g[0], np.linalg.norm(weight, axis=0), rtol=1e-6)
    np.testing.assert_allclose(rebuilt, weight, rtol=1e-6)
    np.testing.assert_array_equal(node.weight(), weight)


def test_nnx_params_move_inside():
    # Names come with a mesh in NNX; eager sharding is off, as only the metadata is looked at.
    with nnx.use_eager_sharding(False):
        kernel = nnx.Param(jnp.ones((4, 3)), out_sharding=("in", "out"))
        node = wn.reparameterize(nnx.State({"kernel": kernel}), {"kernel": -2})["kernel"]
        assert type(node.g) is type(node.v) is nnx.Param
        assert (node.g.out_sharding, node.v.out_sharding) == ((None, "out"), ("in", "out"))
        assert type(node.weight()) is nnx.Param
