"""`save` and `load`: what comes back, what is refused, and what a kill leaves."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from flax.training.train_state import TrainState

import wn_jax as wn
from tests.nnx.net import AXES, Net, arrays
from tests.zoo import ZOO
from wn_jax import optim
from wn_jax.nnx import WeightNormed, split


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if eqx.is_array(x):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
        else:
            assert x is y or x == y


def node(rows=2, axes=-2):
    return wn.WeightNorm.from_weight(jnp.arange(1.0, 1 + 3 * rows).reshape(rows, 3), axes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "params.safetensors"


@pytest.mark.parametrize("name", ["linen_mlp", "linen_boxed", "linen_bfloat16", "haiku_mlp", "equinox_mlp", "nnx_mlp"])
def test_a_tree_comes_back_into_a_target(name, path):
    model = ZOO[name]()
    nodes = wn.reparameterize(model.params, model.axes)
    wn.save(path, nodes)
    other = jax.tree.map(lambda x: jnp.zeros_like(x) if eqx.is_array(x) else x, nodes)
    assert_same(wn.load(path, other), nodes)
    if not name.startswith("equinox"):
        assert_same(wn.load(str(path), jax.eval_shape(lambda: nodes)), nodes)


@pytest.mark.parametrize("name", ["linen_mlp", "haiku_mlp"])  # haiku's keys contain '/'
def test_a_tree_of_dicts_comes_back_without_a_target(name, path):
    model = ZOO[name]()
    nodes = wn.reparameterize(model.params, model.axes)
    wn.save(path, nodes)
    assert_same(wn.load(path), nodes)
    wn.save(path, model.params)  # plain trees, too
    assert_same(wn.load(path), model.params)


def test_lists_and_boxes_become_dicts_and_arrays_without_a_target(path):
    node = wn.WeightNorm.from_weight(nn.Partitioned(jnp.ones((2, 3)), names=("in", "out")), -2)
    wn.save(path, {"layers": [node, {"bias": jnp.zeros(3)}]})
    loaded = wn.load(path)
    assert set(loaded["layers"]) == {"0", "1"}
    assert isinstance(loaded["layers"]["0"].v, jax.Array)
    wn.save(path, node)
    assert_same(wn.load(path), jax.tree.map(lambda x: x, wn.WeightNorm.from_weight(jnp.ones((2, 3)), -2)))
    wn.save(path, jnp.ones(3))
    assert_same(wn.load(path), jnp.ones(3))


def test_dtypes_shapes_and_layouts(path):
    tree = {name: jnp.ones((2, 3), name) for name in ("bfloat16", "float16", "int8", "uint32", "bool", "complex64")}
    tree |= {"scalar": jnp.float32(3), "empty": jnp.zeros((0, 3)), "keys": jax.random.split(jax.random.key(0), 3)}
    tree |= {"rbg": jax.random.key(1, impl="rbg"), "transposed": np.arange(6.0, dtype=np.float32).reshape(2, 3).T}
    wn.save(path, tree)
    for loaded in (wn.load(path), wn.load(path, tree)):
        assert jax.random.key_impl(loaded["rbg"]) == jax.random.key_impl(tree["rbg"])
        for name in ("keys", "rbg"):
            np.testing.assert_array_equal(jax.random.key_data(loaded[name]), jax.random.key_data(tree[name]))
        rest = {name: value for name, value in tree.items() if name not in ("keys", "rbg")}
        assert_same({name: loaded[name] for name in rest}, {**rest, "transposed": jnp.asarray(rest["transposed"])})
    wn.save(path, {"x": np.ones(3)})
    with pytest.raises(ValueError, match=r"'x' is float64, which JAX has with .*jax_enable_x64"):
        wn.load(path)
    with jax.enable_x64(True):
        assert wn.load(path)["x"].dtype == np.float64


def test_any_reader_of_safetensors_opens_it(path):
    model = ZOO["linen_mlp"]()
    nodes = wn.reparameterize(model.params, model.axes)
    wn.save(path, nodes)
    found = safetensors.numpy.load_file(path)
    expected = {f"{path}/{part}" for path in model.axes for part in "gv"} | set(model.left)
    assert set(found) == expected
    for name, stats in optim.direction_stats(nodes, reduce=None).items():
        np.testing.assert_array_equal(found[f"{name}/g"], stats["g"])


def test_an_nnx_module_with_shared_layers_and_random_keys(path):
    model, other = (WeightNormed(Net(nnx.Rngs(seed)), AXES) for seed in (0, 1))
    wn.save(path, model)
    before = arrays(other)
    loaded = wn.load(path, other)
    assert arrays(loaded) == arrays(model)
    assert arrays(other) == before
    assert loaded.model.again is loaded.model.layers[0]
    state = wn.load(path, split(other)[1])  # the file knows nothing of the object
    np.testing.assert_array_equal(state["first"]["kernel"].g, model.model.first.kernel.g)


def test_arrays_come_back_where_the_target_s_are(path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    tree = {"a": jax.device_put(jnp.arange(16.0), sharding), "b": jnp.ones(3)}
    wn.save(path, tree)
    abstract = {
        "a": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding),
        "b": jax.ShapeDtypeStruct((3,), "float32"),
    }
    with jax.set_mesh(jax.make_mesh((8,), ("x",))):  # here eval_shape knows the axes, and not the devices
        assert_same(wn.load(path, jax.eval_shape(lambda: tree)), tree)
    for target in (tree, abstract):
        loaded = wn.load(path, target)
        assert loaded["a"].sharding == sharding
        assert not loaded["b"].committed  # it may go to the mesh with the other
        assert_same(loaded, tree)


def test_numbers_of_python_are_saved(path):
    tree = {"w": node(), "step": 7, "rate": 0.1, "on": True, "none": None, "box": nnx.Variable(3), "fn": jnp.tanh}
    wn.save(path, tree)
    loaded = wn.load(path)
    assert (loaded["step"], loaded["rate"], loaded["on"], loaded["box"]) == (7, 0.1, True, 3)
    assert type(loaded["on"]) is bool
    fresh = {**tree, "step": 0, "rate": jnp.zeros(()), "on": False, "box": nnx.Variable(0)}
    loaded = wn.load(path, fresh)
    assert (loaded["step"], loaded["on"], loaded["box"].get_value(), loaded["fn"]) == (7, True, 3, jnp.tanh)
    assert isinstance(loaded["rate"], jax.Array)
    np.testing.assert_allclose(loaded["rate"], 0.1, rtol=1e-6)


def test_numbers_that_are_not_finite_or_large_are_saved(path):
    tree = {"w": node(), "nan": float("nan"), "inf": -float("inf"), "large": 10**4000, "one": 1.0}
    wn.save(path, tree)
    for loaded in (wn.load(path), wn.load(path, tree)):
        assert repr([loaded[name] for name in ("nan", "inf", "large", "one")]) == f"[nan, -inf, {10**4000}, 1.0]"


def test_a_train_state_that_was_jitted_comes_back_into_a_fresh_one(path):
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    params = wn.reparameterize(params, wn.kernel_axes(params))
    fresh = TrainState.create(apply_fn=wn.wrap(model.apply), params=params, tx=optax.adam(0.1))
    state = fresh
    for step in (lambda s: s.apply_gradients(grads=s.params), jax.jit(lambda s: s.apply_gradients(grads=s.params))):
        state = step(step(state))
        wn.save(path, state)
        assert_same(jax.tree.map(jnp.asarray, wn.load(path, fresh)), jax.tree.map(jnp.asarray, state))


def test_numpy_targets_and_other_kinds_of_random_keys(path):
    wn.save(path, {"n": np.arange(3), "key": jax.random.key(0, impl="rbg")})
    loaded = wn.load(path, {"n": np.zeros(3, np.int64), "key": jax.random.key(1, impl="rbg")})
    assert isinstance(loaded["n"], np.ndarray)
    np.testing.assert_array_equal(loaded["n"], np.arange(3))
    with pytest.raises(ValueError, match=r"'key' is key<rbg>\[\] in the file and key<fry>"):
        wn.load(path, {"n": np.zeros(3, np.int64), "key": jax.random.key(0)})


def test_a_file_has_the_mode_of_any_new_file_and_then_keeps_its_own(path):
    wn.save(path, {"w": node()})
    (path.parent / "other").touch()
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode
    path.chmod(0o640)
    wn.save(path, {"w": node()})
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_link_stays_a_link(path):
    link = path.with_name("latest")
    wn.save(path, {"w": node()})
    link.symlink_to(path)
    wn.save(link, {"w": node(4)})
    assert link.is_symlink()
    assert wn.load(path)["w"].v.shape == (4, 3)
