"""`save` and `load`: what comes back, what is refused, and what a kill leaves."""

import os
import signal
import subprocess
import sys

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import wn_jax as wn
from tests.nnx_net import AXES, Net, arrays
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
    for target in (tree, abstract):
        loaded = wn.load(path, target)
        assert loaded["a"].sharding == sharding
        assert not loaded["b"].committed  # it may go to the mesh with the other
        assert_same(loaded, tree)


def node(rows=2, axes=-2):
    return wn.WeightNorm.from_weight(jnp.arange(1.0, 1 + 3 * rows).reshape(rows, 3), axes)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            {"w": node(axes=-1), "b": jnp.ones(3)},
            r"node 'w' reduces over axes \(-2,\) in the file and \(-1,\) in the target",
        ),
        ({"w": node(4), "b": jnp.ones(3)}, r"'w/v' has shape \(2, 3\) in the file and \(4, 3\) in the target"),
        (
            {"w": jnp.ones((2, 3)), "b": jnp.ones(3)},
            r"'w' is a node in the file and a plain weight in the target \(repar",
        ),
        (
            {"w": node(), "b": node()},
            r"'b' is a plain weight in the file and a node in the target \(load into the plain",
        ),
        ({"w": node()}, "'b' is in the file, but not in the target"),
        ({"w": node(), "b": jnp.ones(3), "c": jnp.ones(3)}, "'c' is in the target, but not in the file"),
        ({"w": node(), "b": jnp.ones(3, jnp.bfloat16)}, "'b' is float32 in the file and bfloat16 in the target"),
        ({"w": node(), "b": jax.random.key(0)}, "'b' is .* in the file, not"),
        ({"w": node(), "b": 3.0}, "'b' is in the file, but not in the target"),
    ],
)
def test_a_file_that_does_not_fit_the_target(path, target, message):
    wn.save(path, {"w": node(), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match=message) as caught:
        wn.load(path, target)
    assert str(path) in str(caught.value)


def test_many_problems_are_counted(path):
    wn.save(path, {"w": node()})
    with pytest.raises(ValueError, match="; and 7 more"):
        wn.load(path, {f"w{i}": node() for i in range(5)})


def test_files_that_are_broken_or_of_others(path):
    wn.save(path, {"w": node(100)})
    whole = path.read_bytes()
    for size in (0, 4, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            wn.load(path)
    safetensors.numpy.save_file({"a": np.ones(3)}, path)
    with pytest.raises(ValueError, match=r"not one that wn_jax.save wrote.*safetensors.numpy.load_file"):
        wn.load(path)
    for metadata, message in (
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"version": 2}', "of format 2; this wn_jax reads 1"),
        ('{"version": 1, "nodes": {}, "keys": {}, "paths": {"b": ["b"]}}', "does not fit its arrays"),
    ):
        safetensors.numpy.save_file({"a": np.ones(3)}, path, {"wn_jax": metadata})
        with pytest.raises(ValueError, match=message):
            wn.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        wn.load(path.with_name("nowhere"))


def test_trees_that_cannot_be_saved(path):
    wn.save(path, {"w": node()})
    before = path.read_bytes()
    for tree, message in (
        ({}, "no arrays"),
        ({"f": jnp.tanh, "n": 3.0}, "no arrays"),
        ({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, "two leaves have the path 'a/b'"),
        (jax.eval_shape(lambda: {"w": jnp.ones(3)}), "'w' is abstract"),
        ({"w": wn.labels({"w": node()})["w"]}, "'w' is a node that holds no arrays"),
        ({"w": jnp.ones(3, jnp.float8_e5m2)}, "'w' is float8_e5m2; a file can hold .*bfloat16"),
        ({"w": nnx.Variable((jnp.ones(3),))}, "'w' is a Variable around a tuple"),
    ):
        with pytest.raises(ValueError, match=message):
            wn.save(path, tree)
    with pytest.raises(ValueError, match="abstract"):
        jax.jit(lambda tree: wn.save(path, tree))({"w": node()})
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing; make it first"):
        wn.save(path.parent / "missing" / "params.safetensors", {"w": node()})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
    wn.save(path, {"w": node()})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        wn.save(path, {"w": node(50)})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_link_stays_a_link(path):
    link = path.with_name("latest")
    wn.save(path, {"w": node()})
    link.symlink_to(path)
    wn.save(link, {"w": node(4)})
    assert link.is_symlink()
    assert wn.load(path)["w"].v.shape == (4, 3)


WRITER = """
import os, signal, sys
import jax.numpy as jnp
import wn_jax as wn

path, moment = sys.argv[1:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def save(i):
    v = jnp.full((2000, 2000), i, jnp.float32)
    wn.save(path, {"w": wn.WeightNorm(jnp.full((1, 2000), i, jnp.float32), v, (-2,))})
    print(i, flush=True)

save(1)
replace = os.replace
if moment == "before it is flushed":
    os.fsync = die
elif moment == "before the rename":
    os.replace = die
elif moment == "after the rename":
    os.replace = lambda *names: die(replace(*names))
for i in range(2, 1000):
    save(i)
"""


@pytest.mark.parametrize(
    "moment", ["before it is flushed", "before the rename", "after the rename", "while it is written"]
)
def test_a_process_that_is_killed_leaves_the_old_file_or_the_new_one(path, moment):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), moment], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"1\n"
    if moment == "while it is written":  # 16 MB, a few milliseconds
        while not list(path.parent.glob(f".{path.name}.*")):
            pass
        writer.send_signal(signal.SIGKILL)
    last = [1, *map(int, writer.communicate()[0].split())][-1]
    assert writer.returncode == -signal.SIGKILL
    w = wn.load(path)["w"]
    number = int(w.g[0, 0])
    assert number in ({"after the rename": (2,), "while it is written": (last, last + 1)}.get(moment, (1,)))
    assert bool((w.g == number).all())
    assert bool((w.v == number).all())
    wn.save(path, {"w": node()})  # what the killed one left is in nobody's way
    assert wn.load(path)["w"].v.shape == (2, 3)
