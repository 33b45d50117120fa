"""Sharded arrays become nodes, are initialized and used where they are, with the numbers of one device."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import wn_jax as wn
import wn_jax.linen
import wn_jax.nnx
from tests.collectives import collectives
from tests.zoo import ZOO
from wn_jax._boxes import rebox, unbox
from wn_jax._tree import flatten

MODELS = ["linen_zero_initialized", "linen_boxed", "linen_cnn", "linen_scanned_stack"]
BATCH = P(("data", "fsdp"))


def mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(axis_type,) * 3)


def names(shape, axes):
    """`model` on the last feature axis that it divides, `fsdp` on the largest such reduction axis; and those of `g`."""
    reduction = {axis % len(shape) for axis in axes}
    even = [axis for axis, size in enumerate(shape) if size % 2 == 0]
    feature = [axis for axis in even if axis not in reduction and axis >= min(reduction)][-1:]
    largest = sorted((axis for axis in even if axis in reduction), key=lambda axis: shape[axis])[-1:]
    g = dict.fromkeys(feature, "model")
    v = {**g, **dict.fromkeys(largest, "fsdp")}
    return tuple(P(*(of.get(axis) for axis in range(len(shape)))) for of in (g, v))


def sharded(model, mesh):
    """A model's parameters on the mesh, and by path where `g` and `v` are to be."""
    paths, leaves, treedef = flatten(model.params)
    wanted, placed = {}, []
    for path, leaf in zip(paths, leaves, strict=True):
        array = unbox(leaf)
        g, v = names(array.shape, model.axes[path]) if path in model.axes else (None, P())
        wanted[path] = (g, v)
        placed.append(rebox(leaf, jax.device_put(array, NamedSharding(mesh, v))))
    return treedef.unflatten(placed), wanted


def assert_placed(array, mesh, spec):
    assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim), (array.sharding, spec)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", MODELS)
def test_nodes_are_made_where_the_weights_are(name, axis_type):
    """And become the same weights there, bit for bit; eagerly, as at the start of a training."""
    model, here = ZOO[name](), mesh(axis_type)
    params, wanted = sharded(model, here)
    with jax.set_mesh(here):
        nodes = wn.reparameterize(params, model.axes)
        rebuilt = wn.reconstruct(nodes)
    for path, node, new, old in zip(*flatten(nodes)[:2], flatten(rebuilt)[1], flatten(model.params)[1], strict=True):
        g, v = wanted[path]
        if path in model.axes:
            assert_placed(unbox(node.g), here, g)
            assert_placed(unbox(node.v), here, v)
        assert_placed(unbox(new), here, v)
        assert np.asarray(unbox(new)).tobytes() == np.asarray(unbox(old)).tobytes()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["linen_zero_initialized", "linen_attention"])
def test_compiled_they_are_made_there_too_and_no_weight_is_gathered(name, axis_type):
    model, here = ZOO[name](), mesh(axis_type)
    params, wanted = sharded(model, here)
    with jax.set_mesh(here):
        make = jax.jit(lambda params: wn.reparameterize(params, model.axes)).lower(params).compile()
        nodes = make(params)
    # JAX 0.12 forgets how the exponents of jnp.frexp are sharded and gathers them, one number a feature.
    moved = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", make.as_text())
    features = [unbox(node.g).size for node in flatten(nodes)[1] if isinstance(node, wn.WeightNorm)]
    assert all(math.prod(map(int, shape.split(","))) <= max(features) for shape in moved)
    for path, node in zip(*flatten(nodes)[:2], strict=True):
        if path in model.axes:
            assert_placed(unbox(node.g), here, wanted[path][0])
            assert_placed(unbox(node.v), here, wanted[path][1])


def dense(seed=0):
    """Two layers, and a batch."""
    random = np.random.default_rng(seed)
    shapes = {"k1": (16, 8), "b1": (8,), "k2": (8, 4), "b2": (4,)}
    params = {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    return params, jnp.asarray(random.normal(size=(32, 16)) * 3 + 1, jnp.float32)


def plain(params, x):
    return jnp.tanh(x @ params["k1"] + params["b1"]) @ params["k2"] + params["b2"]


def explicit(params, x):
    """The same, where explicit axes want it said what is gathered."""
    hidden = jnp.tanh(jnp.dot(x, params["k1"], out_sharding=P("data", "model")) + params["b1"])
    return jnp.dot(hidden, params["k2"], out_sharding=P("data", "model")) + params["b2"]


AXES = {"k1": (-2,), "k2": (-2,)}


@pytest.mark.parametrize("scale", ["weight", "output"])
def test_a_net_on_explicit_axes_has_the_numbers_of_one_device(scale):
    """Whose weights are sharded over features, one of them gathered by the program before its matmul."""
    params, x = dense()
    x = x / 8  # where tanh is steep, and gradients are no small differences
    nodes, here = wn.reparameterize(params, AXES), mesh(AxisType.Explicit)
    nodes = jax.tree.map(lambda leaf: 1.1 * leaf, nodes)
    specs = {"k1": P(None, "model"), "b1": P("model"), "k2": P(None, "model"), "b2": P("model")}
    specs = wn.shardings(nodes, jax.tree.map(lambda spec: NamedSharding(here, spec), specs))

    def fn(params, x):
        hidden = jnp.tanh(x @ params["k1"] + params["b1"])
        return jax.sharding.reshard(hidden, P("data")) @ params["k2"] + params["b2"]

    loss = lambda fn: lambda nodes, x: jnp.sum(jnp.sin(wn.wrap(fn, scale=scale)(nodes, x)))  # noqa: E731
    expected = jax.value_and_grad(loss(plain))(nodes, x)
    with jax.set_mesh(here):
        placed = jax.device_put(nodes, specs), jax.device_put(x, P("data"))
        value, grads = jax.jit(jax.value_and_grad(loss(fn)))(*placed)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for grad, reference, spec in zip(*map(jax.tree.leaves, (grads, expected[1], specs)), strict=True):
        assert_placed(grad, here, spec.spec)
        np.testing.assert_allclose(grad, reference, rtol=1e-5, atol=1e-5 * np.abs(reference).max())


@pytest.mark.parametrize(
    ("fn", "axis_type", "kernel", "bias", "jit"),
    [
        (plain, AxisType.Auto, P("fsdp", "model"), P("model"), False),
        (plain, AxisType.Auto, P("fsdp", "model"), P(), False),
        (plain, AxisType.Auto, P(None, ("fsdp", "model")), P("model"), False),
        (explicit, AxisType.Explicit, P(None, ("fsdp", "model")), P("model"), False),
        (explicit, AxisType.Explicit, P(None, "fsdp"), P(), False),
        (plain, AxisType.Auto, P("fsdp", "model"), P(), True),
        (explicit, AxisType.Explicit, P(None, ("fsdp", "model")), P("model"), True),
    ],
)
def test_initialization_from_data_on_a_mesh(fn, axis_type, kernel, bias, jit):
    """The numbers of one device, and every leaf where it was, whatever sharding the outputs of its layer have."""
    params, x = dense()
    nodes, here = wn.reparameterize(params, AXES), mesh(axis_type)
    specs = {"k1": kernel, "b1": bias, "k2": kernel, "b2": bias}
    specs = wn.shardings(nodes, jax.tree.map(lambda spec: NamedSharding(here, spec), specs))
    initialize = wn.init_from_data(fn)
    if jit:  # without explicit axes, the compiler decides where nothing is said
        initialize = jax.jit(initialize, out_shardings=specs if axis_type is AxisType.Auto else None)
    with jax.set_mesh(here):
        new = initialize(jax.device_put(nodes, specs), jax.device_put(x, NamedSharding(here, BATCH)))
    for leaf, reference, spec in zip(
        *map(jax.tree.leaves, (new, wn.init_from_data(plain)(nodes, x), specs)), strict=True
    ):
        assert_placed(leaf, here, spec.spec)
        np.testing.assert_allclose(leaf, reference, rtol=1e-5, atol=1e-6)


def test_a_gradient_sends_two_numbers_a_feature():
    """Where the norm's axes are sharded: the norm, once for value and derivative, and the gradient along `v`."""
    here = mesh()
    place = NamedSharding(here, P(("data", "fsdp", "model")))
    node = jax.device_put(wn.WeightNorm.from_weight(jnp.ones((16, 5)), 0), wn.WeightNorm(None, place, (-2,)))
    gradient = jax.jit(jax.value_and_grad(lambda node, x: jnp.sum(jnp.sin(node.weight()) * x)))
    hlo = gradient.lower(node, jax.device_put(jnp.ones((16, 5)), place)).compile().as_text()
    assert collectives(hlo) == {("all-reduce", 5): 2, ("all-reduce", 1): 1}


def test_the_mean_of_mean_only_batch_normalization_is_that_of_the_whole_batch():
    random = np.random.default_rng(0)
    x = random.normal(size=(16, 6)).astype(np.float32) + np.arange(16, dtype=np.float32)[:, None]
    batch = jax.device_put(x, NamedSharding(mesh(), P(("data", "fsdp", "model"))))
    layer = wn_jax.linen.MeanOnlyBatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    y, updates = jax.jit(lambda variables, x: layer.apply(variables, x, mutable=["batch_stats"]))(variables, batch)
    np.testing.assert_allclose(y, x - x.mean(0), atol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.01 * x.mean(0), rtol=1e-5)
    module = wn_jax.nnx.MeanOnlyBatchNorm(6, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(nnx.jit(lambda module, x: module(x))(module, batch), x - x.mean(0), atol=1e-5)
    np.testing.assert_allclose(module.mean[...], 0.01 * x.mean(0), rtol=1e-5)
