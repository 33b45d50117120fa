"""`wn_jax.shardings`: how `g` and `v` are sharded, said by hand here, for specs of every kind; and used for real."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import meta
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import wn_jax as wn
from tests.core.foreign_box import Foreign
from tests.messages import pattern

PLAIN = {"kernel": jnp.arange(1.0, 65).reshape(8, 8), "bias": jnp.ones(8)}
SPECS = {"kernel": P("fsdp", "model"), "bias": P("model")}
RULES = (("embed", "fsdp"), ("mlp", "model"), ("layers", None))


def mesh(*shape, names=("data", "fsdp", "model"), **options):
    return jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape), **options)


def node(g, v, axes=(-2,)):
    return wn.WeightNorm(g, v, axes)


@pytest.fixture
def nodes():
    return wn.reparameterize(PLAIN, {"kernel": (-2,)})


def parts(specs):
    """The structure and the leaves, as nodes compare by identity."""
    leaves, treedef = jax.tree.flatten(specs, is_leaf=lambda x: x is None or type(x) is tuple)
    return treedef, leaves


@pytest.mark.parametrize(
    ("shape", "axes", "spec", "g"),
    [
        ((8, 6), (-2,), P("fsdp", "model"), P(None, "model")),
        ((8, 6), (-1,), P("fsdp", "model"), P("fsdp", None)),
        ((8, 6), (-2,), P(("data", "fsdp"), "model"), P(None, "model")),
        ((8, 6), (-2,), P(None, ("fsdp", "model")), P(None, ("fsdp", "model"))),
        ((8, 6), (-2,), P("fsdp"), P(None, None)),
        ((8, 6), (-2,), P(), P(None, None)),
        ((3, 3, 4, 6), (-4, -3, -2), P(None, None, "fsdp", "model"), P(None, None, None, "model")),
        ((3, 3, 6, 4), (-4, -3, -1), P(None, None, "model", "fsdp"), P(None, None, "model", None)),
        ((5, 8, 6), (-2,), P("stage", "fsdp", "model"), P("stage", None, "model")),
        ((5, 8, 6), (-2,), P("stage"), P("stage", None, None)),
        ((8, 6), (-2,), P(P.UNCONSTRAINED, P.UNCONSTRAINED), P(None, P.UNCONSTRAINED)),
        ((8, 6), (-2,), ("embed", "mlp"), (None, "mlp")),
        ((8, 6), (-2,), (("data", "fsdp"),), (None, None)),
        ((8, 6), (-2,), None, None),
    ],
)
def test_g_loses_the_names_of_the_axes_that_it_has_not(shape, axes, spec, g):
    params = [wn.WeightNorm.from_weight(jnp.ones(shape), axes), jnp.ones(3)]
    for tree in (params, jax.eval_shape(lambda: params)):
        specs = wn.shardings(tree, [spec, None])
        assert parts(specs) == parts([node(g, spec, axes), None])


def test_a_named_sharding_stays_what_it_is_but_for_its_names(nodes):
    sharding = NamedSharding(mesh(2, 2, 2), P("fsdp", "model"), memory_kind="pinned_host")
    specs = wn.shardings(nodes, {"kernel": sharding, "bias": sharding.update(spec=P("model"))})
    assert specs["kernel"].v is sharding
    assert specs["kernel"].g == NamedSharding(sharding.mesh, P(None, "model"), memory_kind="pinned_host")
    single = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    assert parts(wn.shardings(nodes, single)) == parts({"kernel": node(single, single), "bias": single})


def test_a_prefix_is_for_all_below_it(nodes):
    specs = wn.shardings({"a": nodes, "b": [nodes]}, {"a": P(), "b": P("fsdp")})
    whole = {"kernel": node(P(None, None), P()), "bias": P()}
    assert parts(specs) == parts({"a": whole, "b": [{"kernel": node(P(None, None), P("fsdp")), "bias": P("fsdp")}]})
    assert parts(wn.shardings(nodes, P())) == parts(whole)
    assert parts(wn.shardings(nodes, None)) == parts({"kernel": node(None, None), "bias": None})


def test_specs_of_nodes_stay(nodes):
    once = wn.shardings(nodes, SPECS)
    assert parts(wn.shardings(nodes, once)) == parts(once)
    mixed = wn.shardings({"a": nodes, "b": nodes}, {"a": once, "b": SPECS})
    assert parts(mixed) == parts({"a": once, "b": once})


class Boxed(nn.Module):
    """Names of mesh axes in one layer, logical ones in the other."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        x = nn.Dense(8, kernel_init=nn.with_partitioning(init, ("fsdp", "model")), name="mesh")(x)
        return nn.Dense(4, kernel_init=nn.with_logical_partitioning(init, ("embed", "mlp")), name="logical")(x)


@pytest.mark.parametrize("abstract", [True, False])
def test_boxes_of_linen_give_what_flax_reads_from_them(abstract):
    boxed = jax.eval_shape(Boxed().init, jax.random.key(0), jnp.ones((1, 8)))["params"]
    if not abstract:
        boxed = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), boxed)
    reparameterize = lambda params: wn.reparameterize(params, wn.kernel_axes(params))  # noqa: E731
    nodes = jax.eval_shape(reparameterize, boxed) if abstract else reparameterize(boxed)
    expected = {
        "mesh": {"kernel": node(P(None, "model"), P("fsdp", "model")), "bias": P()},
        "logical": {"kernel": node(P(None, "mlp"), P("embed", "mlp")), "bias": P()},
    }
    specs = wn.shardings(nodes, nn.get_partition_spec(boxed))
    assert parts(specs) == parts(expected)
    assert parts(nn.get_partition_spec(nodes)) == parts(expected)
    assert parts(wn.shardings(meta.unbox(nodes), nn.get_partition_spec(boxed))) == parts(expected)
    boxes = {name: {"kernel": layer["kernel"], "bias": P()} for name, layer in boxed.items()}
    assert parts(wn.shardings(nodes, boxes)) == parts(expected)
    on_mesh = nn.logical_to_mesh(specs, RULES)["logical"]["kernel"]
    assert parts(on_mesh) == parts(node(P(None, "model"), P("fsdp", "model")))
    here = mesh(2, 2, 2)
    placed = nn.logical_to_mesh_sharding(specs, here, RULES)["logical"]["kernel"]
    assert parts(placed) == parts(node(NamedSharding(here, P(None, "model")), NamedSharding(here, P("fsdp", "model"))))


def nnx_states():
    """States whose kernel has names, a spec, or logical names with rules for its axes."""
    with nnx.use_eager_sharding(False):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "model"))
        yield nnx.state(nnx.Linear(8, 8, kernel_init=init, rngs=nnx.Rngs(0)))
        yield nnx.State({"kernel": nnx.Param(jnp.ones((8, 8)), out_sharding=P("fsdp", "model"))})
        yield nnx.State({"kernel": nnx.Param(jnp.ones((8, 8)), out_sharding=("embed", "mlp"), sharding_rules=RULES)})


@pytest.mark.parametrize("which", range(3))
def test_boxes_of_nnx_give_what_flax_reads_from_them(which):
    with nnx.use_eager_sharding(False):
        state = list(nnx_states())[which]
        nodes = wn.reparameterize(state, {"kernel": (-2,)})
        plain = nnx.get_partition_spec(state)
        specs = wn.shardings(nodes, plain)
        assert jax.tree.structure(specs) == jax.tree.structure(nodes)
        assert [spec.get_value() for spec in (specs["kernel"].g, specs["kernel"].v)] == [
            P(None, "model"),
            P("fsdp", "model"),
        ]
        assert parts(nnx.get_partition_spec(nodes)) == parts(specs)
        here = mesh(2, 2, 2)
        named = wn.shardings(nodes, nnx.get_named_sharding(state, here))
        assert parts(nnx.get_named_sharding(nodes, here)) == parts(named)
        placed = jax.device_put(nodes, named)
        assert placed["kernel"].g.get_value().sharding == NamedSharding(here, P(None, "model"))
        assert placed["kernel"].v.get_value().sharding == NamedSharding(here, P("fsdp", "model"))


def test_jit_and_device_put_take_them(nodes):
    here = mesh(2, 2, 2)
    specs = wn.shardings(nodes, jax.tree.map(lambda spec: NamedSharding(here, spec), SPECS))
    placed = jax.device_put(nodes, specs)
    assert [leaf.sharding for leaf in jax.tree.leaves(placed)] == jax.tree.leaves(specs)
    step = jax.jit(lambda nodes: jax.tree.map(lambda x: 2 * x, nodes), in_shardings=(specs,), out_shardings=specs)
    doubled = step(nodes)
    assert [leaf.sharding for leaf in jax.tree.leaves(doubled)] == jax.tree.leaves(specs)
    np.testing.assert_array_equal(wn.reconstruct(doubled)["kernel"], 2 * PLAIN["kernel"])


@pytest.mark.parametrize("checkpointer", [ocp.StandardCheckpointer, ocp.PyTreeCheckpointer])
def test_orbax_restores_onto_another_mesh(nodes, tmp_path, checkpointer):
    """From shapes alone, which have the shardings that the leaves are to have."""
    eight, four = mesh(2, 2, 2), mesh(1, 2, 2, devices=jax.devices()[:4])
    reparameterize = lambda params: wn.reparameterize(params, {"kernel": (-2,)})  # noqa: E731
    saved = jax.device_put(nodes, wn.shardings(nodes, jax.tree.map(lambda spec: NamedSharding(eight, spec), SPECS)))
    shapes = jax.eval_shape(reparameterize, jax.eval_shape(lambda: PLAIN))
    wanted = wn.shardings(shapes, {"kernel": NamedSharding(four, P("model", "fsdp")), "bias": NamedSharding(four, P())})
    target = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), shapes, wanted)
    with checkpointer() as saver:
        saver.save(tmp_path / "nodes", saved)
    with checkpointer() as loader:
        if checkpointer is ocp.StandardCheckpointer:
            restored = loader.restore(tmp_path / "nodes", target)
        else:
            how = ocp.checkpoint_utils.construct_restore_args(target)
            restored = loader.restore(tmp_path / "nodes", item=target, restore_args=how)
    assert jax.tree.structure(restored) == jax.tree.structure(nodes)
    assert [leaf.sharding for leaf in jax.tree.leaves(restored)] == jax.tree.leaves(wanted)
    for leaf, original in zip(jax.tree.leaves(restored), jax.tree.leaves(nodes), strict=True):
        np.testing.assert_array_equal(leaf, original)


class Opaque(jax.sharding.Sharding):
    """A sharding without names of axes."""

    is_fully_replicated = False


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"kernel": P("a", None, "b"), "bias": P()}, "'kernel': its spec P('a', None, 'b') has 3 entries.*(8, 8)"),
        ({"kernel": P(), "bias": P(None, "a")}, "'bias': its spec P(None, 'a') has 2 entries.*(8,)"),
        ({"kernel": P(), "bias": ("a", "b")}, "'bias': its spec ('a', 'b') has 2 entries.*(8,)"),
        ({"kernel": node(P(), P("a", None, "b")), "bias": P()}, "'kernel': its spec P('a', None, 'b') has 3 entries"),
        ({"kernel": node(P(), P(), (-1,)), "bias": P()}, "'kernel': its spec .* reduces over (-1,), .* over (-2,)"),
        ({"kernel": P(), "bias": node(P(), P())}, "'bias': its spec is of type WeightNorm"),
        ({"kernel": P()}, "specs must have the structure of the plain parameters.*or be a prefix"),
        ({"kernel": P(), "bias": P(), "scale": P()}, "specs must have the structure of the plain parameters"),
        ([P(), P()], "specs must have the structure of the plain parameters"),
        ({"kernel": 3, "bias": P()}, "'kernel': its spec is of type int; expected a PartitionSpec"),
        ({"kernel": "fsdp", "bias": P()}, "'kernel': its spec is of type str; expected a PartitionSpec"),
        ({"kernel": Opaque(), "bias": P()}, "'kernel': its spec is a Opaque, which has no names of axes"),
    ],
)
def test_specs_that_do_not_fit(nodes, specs, message):
    with pytest.raises(ValueError, match="(?s)" + pattern(message)):
        wn.shardings(nodes, specs)


def test_nodes_of_which_nothing_is_known(nodes):
    @jax.tree_util.register_static
    class Other:
        def weight(self):
            return 1

        def factors(self):
            return 1, 1

    with pytest.raises(ValueError, match="'0': its spec is for a Other; only those of WeightNorm nodes are known"):
        wn.shardings([Other()], P())
    nested = wn.WeightNorm(nodes["kernel"].g, nodes["kernel"], (-2,))
    with pytest.raises(ValueError, match="'0': its spec is for a node inside a node"):
        wn.shardings([nested], P())


def test_states_of_optimizers_that_see_a_part_of_a_node():
    """As recipes with `optax.partition` make them: what is masked away has no sharding."""
    nodes = wn.reparameterize({"w": jnp.ones((4, 6)), "b": jnp.ones(6)}, {"w": -2})
    state = optax.partition({"g": optax.sgd(0.1, 0.9), "v": optax.adam(0.1), "other": optax.sgd(0.1)}, wn.labels).init(
        nodes
    )
    specs = wn.shardings(state, P())
    assert jax.tree.structure(specs) == jax.tree.structure(state)
    only_v = wn.WeightNorm(optax.MaskedNode(), nodes["w"].v, (-2,))
    assert wn.shardings({"w": only_v}, {"w": P("x", "y")})["w"].v == P("x", "y")


def test_a_tree_of_boxes_may_hold_bare_arrays():
    """As Flax's does, which boxes what has names."""
    boxed = {"w": nn.Partitioned(jnp.ones((4, 6)), ("x", "y")), "b": jnp.ones(6)}
    nodes = wn.reparameterize(boxed, {"w": -2})
    assert jax.tree.leaves(wn.shardings(nodes, boxed)) == [P(), P(None, "y"), P("x", "y")]


class Silent(jax.sharding.Sharding):
    """A sharding that does not even say whether it is one."""


def param(value, **metadata):
    """An NNX box, made where no mesh is set."""
    with nnx.use_eager_sharding(False):
        return nnx.Param(value, **metadata)


KERNEL = PLAIN["kernel"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (lambda: Foreign(KERNEL), "'kernel': its spec is a Foreign around an array.*get_partition_spec.*give a Part"),
        (lambda: nn.Partitioned(KERNEL, names=None), "'kernel': its spec is a Partitioned.*not say.*TypeError.*give"),
        (lambda: nn.Partitioned(KERNEL, names=3), "'kernel': its spec is a Partitioned.*not say.*TypeError.*give"),
        (lambda: param(KERNEL, out_sharding=3), "'kernel': its spec is a Param.*not say how.*TypeError.*give"),
        (lambda: nn.Partitioned(P(), names=3), "'kernel': its spec is in a Partitioned whose sharding is a int, which"),
        (lambda: param(P(), out_sharding="fsdp"), "'kernel': its spec is in a Param whose sharding is a str, which"),
        (lambda: mesh(2, 2, 2), "'kernel': its spec is of type Mesh; expected a PartitionSpec"),
        (lambda: param(mesh(2, 2, 2)), "'kernel': its spec is of type Mesh; expected a PartitionSpec"),
        (lambda: Foreign(Foreign(KERNEL)), "'kernel': its spec is of type Foreign; expected a PartitionSpec"),
        (lambda: Silent(), "'kernel': its spec is a Silent, which has no names of axes"),
    ],
)
def test_boxes_and_specs_of_other_kinds(nodes, spec, message):
    with pytest.raises(ValueError, match="(?s)" + pattern(message)):
        wn.shardings(nodes, {"kernel": spec(), "bias": P()})


def test_a_box_of_another_kind_around_a_spec_stays(nodes):
    kernel = wn.shardings(nodes, {"kernel": Foreign(P("fsdp", "model")), "bias": P()})["kernel"]
    assert (type(kernel.g), type(kernel.v)) == (Foreign, Foreign)
    assert (kernel.g.value, kernel.v.value) == (P(None, "model"), P("fsdp", "model"))


@pytest.mark.parametrize("abstract", [True, False])
@pytest.mark.parametrize("metadata", [{"out_sharding": ("fsdp", "model")}, {"out_sharding": P("fsdp", "model")}])
def test_a_box_of_nnx_around_an_array_gives_its_names(nodes, metadata, abstract):
    box = param(KERNEL, **metadata)
    specs = wn.shardings(nodes, {"kernel": jax.eval_shape(lambda: box) if abstract else box, "bias": jnp.ones(8)})
    assert parts(specs) == parts({"kernel": node(P(None, "model"), P("fsdp", "model")), "bias": P()})


@pytest.mark.parametrize(
    ("half", "message"),
    [
        ("v", "'0': its spec is for a node whose v is a str.*as params"),
        (P(), "'0': its spec is for a node whose v is a P.*as params"),
        (2.0, "'0': its spec is for a node whose v is a float.*as params"),
        ({"a": KERNEL}, "'0': its spec is for a node whose v is a dict.*as params"),
    ],
)
def test_nodes_that_hold_something_else_than_arrays(half, message):
    """As trees of labels or specs do, or of numbers, and what an optimizer may keep for a leaf."""
    with pytest.raises(ValueError, match=pattern(message)):
        wn.shardings([node(half, half)], P())


def test_a_leaf_with_something_else_named_shape():
    leaf = type("Layer", (), {"shape": 3})()
    assert wn.shardings([leaf], P("fsdp")) == [P("fsdp")]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (lambda: nn.Partitioned(KERNEL, names=3), "'kernel'.*a Partitioned whose sharding is a int, which has"),
        (lambda: param(KERNEL, out_sharding="a"), "'kernel'.*a Param whose sharding is a str, which has"),
    ],
)
def test_a_weight_in_a_box_whose_names_are_none(box, message):
    with pytest.raises(ValueError, match=pattern(message)):
        wn.reparameterize({"kernel": box()}, {"kernel": -2})
