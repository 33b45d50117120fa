"""`save` and `load` of nodes within nodes, and of nodes of other types: what comes back, and what is refused."""

import copy
import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

import wn_jax as wn


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scaling", "axes", "rule"]
)
@dataclasses.dataclass
class LowRank:
    """`base + scaling * a b`: a node of a user's own. `rule` is a field that no file can hold."""

    base: object
    a: object
    b: object
    scaling: float = 1.0
    axes: tuple = (-2,)
    rule: object = None

    def weight(self):
        return self.base + self.scaling * (self.a @ self.b)

    def factors(self):
        return self.weight(), jnp.ones((1, self.b.shape[-1]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Sum:
    """A sum of nodes, which stand in a tuple, and of a number of Python."""

    terms: tuple
    shift: float

    def weight(self):
        return sum(self.terms) + self.shift

    def factors(self):
        return self.weight(), jnp.ones((1, 1))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "params.safetensors"


KERNEL = jax.random.normal(jax.random.key(0), (5, 4))


def low_rank(base=KERNEL, rank=2, **static):
    a, b = jax.random.normal(jax.random.key(1), (5, rank)), jax.random.normal(jax.random.key(2), (rank, 4))
    return LowRank(base, a, b, **static)


def dora(**static):
    return wn.WeightNorm(jnp.ones((1, 4)), low_rank(**static), (-2,))


def two():
    """Weight norm of the directions of weight norm."""
    node = wn.WeightNorm.from_weight(KERNEL, -2)
    return dataclasses.replace(node, v=wn.WeightNorm.from_weight(node.v, (-1,)))


TREES = {
    "a node in a node": lambda: {"kernel": dora(scaling=0.5), "bias": jnp.zeros(4)},
    "a node of another type": lambda: {"layers": [low_rank(), wn.WeightNorm.from_weight(KERNEL, -2)]},
    "nodes in a tuple in a node": lambda: {"w": Sum((dora(), wn.WeightNorm.from_weight(KERNEL, -1), KERNEL), 2.5)},
    "a tree that is one node": dora,
    "boxes in it": lambda: {"w": wn.WeightNorm(jnp.ones((1, 4)), low_rank(nn.Partitioned(KERNEL, (None, "x"))), (-2,))},
    "weight norm in weight norm": lambda: {"w": two(), "n": 3},
}


def check_equal(back, tree):
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert type(ours) is type(theirs)
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", TREES)
def test_nodes_come_back_into_a_target(name, path):
    tree = TREES[name]()
    wn.save(path, tree)
    check_equal(wn.load(path, tree), tree)
    floats = jax.tree.map(lambda x: x if isinstance(x, float | int) else jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    check_equal(wn.load(path, floats), tree)


def test_weight_norm_in_weight_norm_needs_no_target(path):
    tree = TREES["weight norm in weight norm"]()
    wn.save(path, tree)
    check_equal(wn.load(path), tree)


def test_any_reader_sees_the_arrays_by_their_paths(path):
    wn.save(path, {"kernel": dora()})
    found = safetensors.numpy.load_file(path)
    assert sorted(found) == ["kernel/g", "kernel/v/a", "kernel/v/b", "kernel/v/base"]
    np.testing.assert_array_equal(found["kernel/v/base"], KERNEL)


def test_a_tree_of_weight_norm_keeps_the_format_that_every_wn_jax_reads(path):
    wn.save(path, {"kernel": wn.WeightNorm.from_weight(KERNEL, -2), "n": 3})
    assert json.loads(metadata(path)) == {
        "version": 1,
        "paths": {"kernel": ["kernel"], "n": ["n"]},
        "nodes": {"kernel": [-2]},
        "numbers": {"n": 3},
        "keys": {},
    }
    wn.save(path, {"kernel": dora()})
    assert json.loads(metadata(path))["version"] == 2


def test_without_a_target_a_node_of_another_type_is_named(path):
    for tree, message in (
        (
            {"kernel": dora(scaling=0.5)},
            r"'kernel/v' is a node of the type LowRank\(scaling=0.5, axes=\[-2\], rule=None\)",
        ),
        ({"w": Sum((KERNEL,), 1.0)}, r"'w' is a node of the type Sum, which load cannot make without a target"),
    ):
        wn.save(path, tree)
        with pytest.raises(ValueError, match=message):
            wn.load(path)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"w": dora(scaling=2.0)}, r"'w/v' is the node LowRank\(scaling=1.0.* in the file and .*scaling=2.0"),
        ({"w": dora(axes=(-1,))}, r"axes=\[-2\].* in the file and .*axes=\[-1\]"),
        ({"w": dataclasses.replace(dora(), axes=(-1,))}, r"node 'w' reduces over axes \(-2,\) in the file and \(-1,\)"),
        ({"w": wn.WeightNorm.from_weight(KERNEL, -2)}, r"'w/v' is the node LowRank.* in the file and no node in the"),
        ({"w": two()}, r"'w/v' is the node LowRank.* in the file and a WeightNorm over the axes \(-1,\) in the target"),
        ({"w": low_rank()}, r"'w' is a WeightNorm over the axes \(-2,\) in the file and the node LowRank"),
        ({"w": KERNEL}, r"'w' is a node in the file and a plain weight in the target \(reparameterize"),
        (
            {"w": wn.WeightNorm(jnp.ones((1, 4)), low_rank(rank=3), (-2,))},
            r"'w/v/a' is float32\[5, 2\] in the file and",
        ),
        ({"w": wn.WeightNorm(jnp.ones((1, 4)), low_rank(None), (-2,))}, "'w/v/base' is in the file only"),
    ],
)
def test_a_target_with_other_nodes(path, target, message):
    wn.save(path, {"w": dora()})
    with pytest.raises(ValueError, match=message):
        wn.load(path, target)


def test_a_plain_file_and_a_target_with_nodes_in_nodes(path):
    wn.save(path, {"w": KERNEL})
    with pytest.raises(ValueError, match="'w' is a plain weight in the file and a node in the target"):
        wn.load(path, {"w": dora()})
    wn.save(path, {"w": wn.WeightNorm.from_weight(KERNEL, -2)})
    with pytest.raises(ValueError, match=r"'w/v' is no node in the file and the node LowRank"):
        wn.load(path, {"w": dora()})


def test_an_nnx_module_with_a_node_in_a_node(path):
    def module(key):
        model = nnx.Sequential(nnx.Linear(5, 4, rngs=nnx.Rngs(key)))
        kernel = model.layers[0].kernel
        node = wn.WeightNorm.from_weight(kernel, -2)
        v = low_rank(node.v, scaling=0.5)
        v = dataclasses.replace(v, a=nnx.Param(v.a), b=nnx.Param(v.b))  # NNX updates Variables only
        model.layers[0].kernel = dataclasses.replace(node, v=v)
        return model

    saved = module(0)
    wn.save(path, saved)
    back = wn.load(path, module(1))
    first, second = (model.layers[0].kernel for model in (back, saved))
    assert type(first.v) is LowRank
    for part in (lambda node: node.g[...], lambda node: node.v.base[...], lambda node: node.v.a[...]):
        np.testing.assert_array_equal(part(first), part(second))


def test_a_field_that_no_file_can_hold_comes_from_the_target(path):
    wn.save(path, {"w": dora(rule=jnp.tanh)})
    assert wn.load(path, {"w": dora(rule=jnp.sin)})["w"].v.rule is jnp.sin


def test_nodes_that_cannot_be_saved(path):
    for tree, message in (
        ({"w": wn.WeightNorm("g", low_rank(), (-2,))}, "'w' is a node that holds no arrays .* but a str"),
        ({"w": wn.WeightNorm(1.0, low_rank(), (-2,))}, "'w/g' is half of a WeightNorm node that holds no arrays"),
        ({"w": wn.WeightNorm(jax.random.key(0), KERNEL, (-2,))}, "'w/g' is half of a WeightNorm node that holds no"),
        ({"w": low_rank(jax.ShapeDtypeStruct((5, 4), jnp.float32))}, "'w/base' is abstract"),
        ({"w": dora(), "w/v": KERNEL}, "two leaves have the path 'w/v'"),
    ):
        with pytest.raises(ValueError, match=message):
            wn.save(path, tree)
    assert not path.exists()


def metadata(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata()["wn_jax"]


def changes_of(facts):
    """Each of the many ways to take something out of the metadata, or to put a wrong thing there."""
    for field in ("paths", "nodes", "others", "parts", "numbers", "keys"):
        yield lambda facts, field=field: facts.pop(field)
        for name, value in facts[field].items():
            yield lambda facts, field=field, name=name: facts[field].pop(name)
            yield lambda facts, field=field, name=name: facts[field].update({name: None})
            yield lambda facts, field=field, name=name, value=value: facts[field].update({f"{name}x": value})
            for i in range(len(value) if isinstance(value, list) else 0):
                yield lambda facts, field=field, name=name, i=i: facts[field][name].pop(i)
                yield lambda facts, field=field, name=name, i=i: facts[field][name].append(facts[field][name][i])


def crafted(path, change):
    """The file at `path`, with its metadata changed."""
    facts = json.loads(metadata(path))
    change(facts)
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, {"wn_jax": json.dumps(facts)})


def test_metadata_that_was_changed(path):
    """Whatever is taken out or put in, it is an error, and no leaf is lost without a word."""
    tree = {"w": Sum((dora(), wn.WeightNorm.from_weight(KERNEL, -1)), 2.5), "x": jnp.ones(3), "n": 4}
    wn.save(path, tree)
    whole, facts = path.read_bytes(), json.loads(metadata(path))
    changes = list(changes_of(copy.deepcopy(facts)))
    assert len(changes) > 50
    for change in changes:
        path.write_bytes(whole)
        crafted(path, change)
        with pytest.raises(ValueError, match=r"its metadata is damaged|does not fit the target") as caught:
            wn.load(path, tree)
        assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("order", [">", "<"])
def test_numpy_arrays_of_either_byte_order(path, order):
    tree = {"w": np.arange(6, dtype=f"{order}f4").reshape(2, 3), "n": np.arange(3, dtype=f"{order}i2")}
    wn.save(path, tree)
    for target in (tree, jax.eval_shape(lambda: {"w": jnp.zeros((2, 3)), "n": jnp.zeros(3, jnp.int16)}), None):
        back = wn.load(path, target)
        np.testing.assert_array_equal(back["w"], [[0, 1, 2], [3, 4, 5]])
        np.testing.assert_array_equal(back["n"], [0, 1, 2])
        assert target is not tree or all(back[name].dtype == tree[name].dtype for name in tree)
