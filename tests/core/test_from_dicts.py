"""`nodes_from_dicts`: trees that a checkpoint gave back without a target, and the word where nobody calls it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization

import wn_jax as wn

NET = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)])
X = jax.random.normal(jax.random.key(0), (5, 4))
PLAIN = NET.init(jax.random.key(1), X)
AXES = {"params/layers_0/kernel": (-2,), "params/layers_2/kernel": (-2,)}
KERNEL = "params/layers_0/kernel"


def nodes():
    return wn.reparameterize(PLAIN, AXES)


def by_orbax(tree, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", tree)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "checkpoint")


def halves():
    """Nested dicts with `g` and `v` where the nodes stand."""
    tree = jax.tree.map(lambda x: x, PLAIN)
    for path in AXES:
        node = wn.WeightNorm.from_weight(tree["params"][path.split("/")[1]]["kernel"], -2)
        tree["params"][path.split("/")[1]]["kernel"] = {"g": node.g, "v": node.v}
    return tree


def check_same_as_nodes(tree):
    assert jax.tree.structure(tree) == jax.tree.structure(nodes())
    for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(nodes()), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_from_orbax(tmp_path):
    restored = by_orbax(nodes(), tmp_path)
    back = wn.nodes_from_dicts(restored, AXES)
    check_same_as_nodes(back)
    np.testing.assert_allclose(wn.wrap(NET.apply)(back, X), NET.apply(PLAIN, X), atol=1e-6)
    assert isinstance(restored["params"]["layers_0"]["kernel"], dict)  # it is a new tree


def test_from_msgpack_the_axes_are_in_the_dicts():
    restored = serialization.msgpack_restore(serialization.to_bytes(nodes()))
    check_same_as_nodes(wn.nodes_from_dicts(restored))
    check_same_as_nodes(wn.nodes_from_dicts(restored, AXES))
    with pytest.raises(
        ValueError, match=rf"{KERNEL!r} is no node over the axes -1: .*g has shape|was saved with the axes"
    ):
        wn.nodes_from_dicts(restored, {KERNEL: -1})


def test_axes_by_a_function_and_of_a_part():
    check_same_as_nodes(wn.nodes_from_dicts(halves(), lambda path, v: (0,) if v.ndim == 2 else None))
    back = wn.nodes_from_dicts(halves(), {KERNEL: -2, "params/layers_2/kernel": None})
    assert isinstance(back["params"]["layers_0"]["kernel"], wn.WeightNorm)
    assert isinstance(back["params"]["layers_2"]["kernel"], dict)


def test_a_square_node_has_the_axes_that_it_is_given():
    square = {"g": np.ones((1, 1)), "v": np.ones((1, 1))}
    assert wn.nodes_from_dicts({"k": square}, {"k": -1})["k"].axes == (-1,)
    with pytest.raises(ValueError, match=r"'k' was saved with the axes \[-2\], and not \(-1,\)"):
        wn.nodes_from_dicts({"k": {**square, "axes": np.asarray([-2])}}, {"k": -1})


@pytest.mark.parametrize(
    ("tree", "axes", "message"),
    [
        (PLAIN, AXES, "hold no dict of 'g' and 'v' to make a node of.*wn_jax.reparameterize"),
        (halves(), None, f"nothing says over which axes the norms of {KERNEL!r}, .* run; give axes"),
        (halves(), {}, "axes name none of the dicts"),
        (halves(), {"layers_0/kernel": -2}, rf"'layers_0/kernel' \(did you mean {KERNEL!r}"),
        (halves(), {"params/layers_0/bias": -1}, "'params/layers_0/bias' is a plain leaf, and no dict of 'g' and 'v'"),
        (halves(), {KERNEL: -1}, rf"{KERNEL!r} is no node over the axes -1: .*g has shape \(1, 6\)"),
        (halves(), {KERNEL: -5}, rf"{KERNEL!r} is no node over the axes -5: axis -5 is out of range"),
        (halves(), {KERNEL: "x"}, rf"{KERNEL!r} is no node over the axes x: axes must be an int"),
        ({"a": nodes(), "b": halves()}, {f"a/{KERNEL}": -2}, "is already a WeightNorm node; leave it out"),
        (
            {"k": {"g": {"value": np.ones((1, 2))}, "v": {"value": np.ones((3, 2))}}},
            {"k": -2},
            "'g' and 'v' of 'k' are dict and dict, not arrays: their boxes got lost, too. Restore the",
        ),
    ],
)
def test_what_is_refused(tree, axes, message):
    with pytest.raises(ValueError, match=message):
        wn.nodes_from_dicts(tree, axes)
    with pytest.raises(TypeError, match="axes must be a dict from path to axes, a function, or None; got int"):
        wn.nodes_from_dicts(halves(), 3)


@pytest.mark.parametrize("scale", ["auto", "weight", "output"])
def test_wrap_says_that_nodes_got_lost(scale):
    with pytest.raises(Exception, match="kernel") as caught:
        wn.wrap(NET.apply, scale=scale)(halves(), X)
    (note,) = [note for note in caught.value.__notes__ if "wn_jax" in note]
    assert f"dicts of g and v at {KERNEL!r}" in note
    assert "restored without a target" in note
    assert "wn_jax.nodes_from_dicts(params, axes)" in note


@pytest.mark.parametrize("function", [wn.infer_axes, wn.weight_uses, wn.init_from_data])
def test_so_do_those_that_read_the_program(function):
    with pytest.raises(Exception, match="kernel") as caught:
        function(NET.apply)(halves(), X)
    assert any("wn_jax.nodes_from_dicts" in note for note in caught.value.__notes__)


def test_reparameterize_names_the_way_back():
    with pytest.raises(ValueError, match=rf"{KERNEL!r} \(a dict of g and v: wn_jax.nodes_from_dicts"):
        wn.reparameterize(halves(), AXES)


def test_a_model_that_has_such_dicts_of_its_own_works_without_a_word():
    def own(params, x):
        kernel = params["kernel"]
        return x @ (kernel["g"] * kernel["v"])

    params = {"kernel": {"g": jnp.ones((1, 2)), "v": jnp.ones((4, 2))}}
    np.testing.assert_array_equal(wn.wrap(own)(params, X), own(params, X))
    assert wn.infer_axes(own)(params, X) == {}
    with pytest.raises(KeyError) as caught:
        wn.wrap(own)({"kernel": {"g": jnp.ones(3)}}, X)
    assert not getattr(caught.value, "__notes__", [])


def test_an_array_in_another_byte_order_is_named():
    with pytest.raises(ValueError, match=r"'k' is in another byte order \(>f4\) than JAX takes; cast it"):
        wn.reparameterize({"k": np.ones((3, 2), ">f4")}, {"k": -2})
