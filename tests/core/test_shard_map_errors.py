"""Refused inside `shard_map` and `pmap`, where a norm over one shard would be wrong without anyone noticing."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

import wn_jax as wn
from tests.core.foreign_box import Foreign
from tests.core.shard_map_cases import CASES, mesh, sharded
from tests.messages import pattern
from wn_jax import optim

CASE = CASES["fan_in"]
KEPT = optim.ProjectDirectionsState({"w": jnp.ones((1, 8))})


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    "fn",
    [
        wn.reconstruct,
        lambda nodes: nodes["w"].factors()[1],
        lambda nodes: wn.wrap(lambda params: params["w"], scale="output")(nodes),
        lambda nodes: optim.direction_stats(nodes)["w"]["v_norm"],
        lambda nodes: optim.project_directions().init(nodes),
        lambda nodes: optim.project_directions().update(nodes, KEPT, nodes),
    ],
)
def test_without_a_statement_a_node_is_refused(fn, check_vma):
    nodes = CASE.nodes()
    with pytest.raises(ValueError, match=pattern("inside shard_map or pmap over ('fsdp', 'model').*in_shard_map(")):
        sharded(CASE, lambda nodes, x: fn(nodes), nodes, check_vma=check_vma)(nodes, CASE.data()[0])
    with pytest.raises(ValueError, match="pass the plain weights in"):
        jax.pmap(fn)(jax.tree.map(lambda leaf: jnp.ones((8, *leaf.shape)), nodes))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda nodes, x: wn.WeightNorm.from_weight(x, -2), "a node is made inside.*Make it outside"),
        (
            lambda nodes, x: wn.reparameterize({"w": nodes["w"].v}, {"w": -2}),
            "'w' cannot be reparameterized: .*over ('fsdp', 'model').*Make it outside",
        ),
        (lambda nodes, x: wn.reparameterize(nodes, {"w": -2}), "'w' is already a .* node"),
        (
            lambda nodes, x: wn.init_from_data(CASE.local)(nodes, x),
            "init_from_data was called inside.*('fsdp', 'model').*one shard of the batch. Call it outside",
        ),
    ],
)
def test_nodes_are_made_and_initialized_outside(fn, message, check_vma):
    """A statement about the weights says nothing of a weight that is to become one, or of the batch."""
    nodes = CASE.nodes()
    specs = wn.shardings(nodes, CASE.specs)
    local = sharded(CASE, lambda nodes, x: fn(wn.in_shard_map(nodes, specs), x), nodes, check_vma=check_vma)
    with pytest.raises(ValueError, match=pattern(message)):
        local(nodes, CASE.data()[0])


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (None, "'w': its spec is None.*for whole weights, say P()"),
        ({"w": None, "b": P()}, "'w': its spec is None.*for whole weights, say P()"),
        ({"w": P("nowhere"), "b": P()}, "'w': the mesh has no axis 'nowhere'; its axes are ('fsdp', 'model')"),
        ({"w": P("fsdp", None, None), "b": P()}, "'w': its spec .* has 3 entries.*shape is (4, 8)"),
        ({"w": wn.WeightNorm(P(), P("fsdp", None, None), (-2,)), "b": P()}, "'w': its spec .* has 3 entries"),
        ({"w": wn.WeightNorm(P(), P(), (-1,)), "b": P()}, "'w': its spec is for a node that reduces over (-1,)"),
        ({"w": P("fsdp")}, "specs must have the structure of the plain parameters"),
        ({"w": P("model"), "b": P()}, "'w': .*sharded over 'model', but it is the same on all.*in_specs"),
        ({"w": P(), "b": P()}, "'w': specs do not name 'fsdp', but it differs between devices along that axis"),
    ],
)
def test_statements_that_cannot_be(specs, message):
    nodes = CASE.nodes()
    local = sharded(CASE, lambda nodes, x: wn.in_shard_map(nodes, specs)["b"], nodes)
    with pytest.raises(ValueError, match=pattern(message)):
        local(nodes, CASE.data()[0])


def test_a_node_of_another_kind_is_refused():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Doubled:
        w: jax.Array

        def weight(self):
            return 2 * self.w

        def factors(self):
            return self.w, 2

    local = jax.shard_map(lambda node: wn.in_shard_map(node, P("fsdp")), mesh=mesh(), in_specs=P("fsdp"), out_specs=P())
    with pytest.raises(ValueError, match="is for a Doubled; only those of WeightNorm nodes are known"):
        local(Doubled(jnp.ones((4, 2))))


def test_a_box_of_another_kind_is_refused():
    nodes = CASE.nodes()
    specs = {"w": Foreign(nodes["w"].v), "b": P()}
    local = sharded(CASE, lambda nodes, x: wn.in_shard_map(nodes, specs)["b"], nodes)
    with pytest.raises(ValueError, match=pattern("'w': its spec is a Foreign around an array")):
        local(nodes, CASE.data()[0])


@pytest.mark.parametrize("v", [optax.MaskedNode(), None])
def test_a_node_that_was_masked_is_refused(v):
    nodes = CASE.nodes()

    def local(nodes, x):
        masked = dataclasses.replace(nodes["w"], v=v)
        return wn.in_shard_map({"w": masked, "b": nodes["b"]}, P())["b"]

    with pytest.raises(ValueError, match=pattern("'w': .*a " + type(v).__name__ + " in the place of v.*masked")):
        sharded(CASE, local, nodes)(nodes, CASE.data()[0])


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("specs", [CASE.specs, {"w": P("model"), "b": P()}, {"w": P(), "b": P()}, P(("fsdp", "model"))])
@pytest.mark.parametrize("named", [None, types.SimpleNamespace(), types.SimpleNamespace(varying_axes=("fsdp",))])
def test_a_jax_that_names_it_otherwise_is_refused(monkeypatch, named, specs, check_vma):
    """Right or wrong, a statement that cannot be checked against what JAX knows is none to rely on."""
    typeof = types.SimpleNamespace() if named is None else types.SimpleNamespace(manual_axis_type=named)
    nodes = CASE.nodes()
    local = sharded(CASE, lambda nodes, x: wn.in_shard_map(nodes, specs)["b"], nodes, check_vma=check_vma)
    monkeypatch.setattr(jax, "typeof", lambda x: typeof)
    message = f"jax {jax.__version__} .*jax.typeof(x).manual_axis_type.varying.*report.*wn_jax.reconstruct(params)"
    with pytest.raises(RuntimeError, match=pattern(message)):
        local(nodes, CASE.data()[0])


def test_it_reads_what_jax_knows():
    """Where a JAX release says it otherwise, this fails first."""
    found = {}

    def local(x):
        found[check_vma] = jax.typeof(x).manual_axis_type.varying
        return x

    for check_vma in (True, False):
        jax.shard_map(local, mesh=mesh(), in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=check_vma)(jnp.ones(4))
    assert found == {True: {"fsdp"}, False: set()}
