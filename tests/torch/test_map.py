"""A map of names that fits, and the way back."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn
from tests.messages import pattern
from tests.torch.ported import NAMES, STATE, TARGET, numbers
from wn_jax.torch import Array, from_flax, from_state_dict, linear, to_flax, to_state_dict


def test_a_map_that_fits():
    params = to_flax(from_state_dict(STATE), TARGET, NAMES)
    np.testing.assert_array_equal(params["head"]["kernel"], STATE["head.weight"].T)
    assert to_state_dict(from_flax(params, NAMES), "old").keys() == STATE.keys() - {"steps"}


def test_none_leaves_out_a_whole_module():
    target = {"conv_0": TARGET["conv_0"]}
    params = to_flax(from_state_dict(STATE), target, NAMES | {"head": None})
    np.testing.assert_array_equal(params["conv_0"]["bias"], STATE["encoder.0.bias"])
    params = to_flax(from_state_dict(STATE), {"head": TARGET["head"]}, NAMES | {"encoder.{i}": None})
    assert params["head"]["bias"].shape == (2,)
    with pytest.raises(ValueError, match=pattern("keys without a place in the map .*: 'head.bias', 'head.weight'")):
        to_flax(from_state_dict(STATE), target, {"encoder.{i}": NAMES["encoder.{i}"], "he": None, "steps": None})


GATES = Array(("conv_0/kernel", "conv_1/kernel"), "(gate o) i -> gate i o", {"gate": 2})


@pytest.mark.parametrize(
    ("params", "names", "words"),
    [
        (
            TARGET,
            {"head": linear("head")},
            "these leaves of params have no place in the map: 'conv_0/bias', 'conv_0/kernel'",
        ),
        (
            TARGET,
            NAMES | {"again": "head/bias"},
            "'head/bias' is in two places of the map, as 'head.bias' and 'again'; leave out one",
        ),
        (
            {"conv_0": {"kernel": jnp.ones((3, 2))}},
            {"w": GATES},
            "'w' needs 'conv_1/kernel', which params does not",
        ),
        (
            {"conv_0": {"kernel": jnp.ones((3, 2))}, "conv_1": {"kernel": jnp.ones((4, 2))}},
            {"w": GATES},
            "'w', made of 'conv_0/kernel', 'conv_1/kernel', one array is made of .* which differ: ('array', (3, 2))",
        ),
        (
            {"a": jnp.ones(2), "b": jnp.ones(2)},
            {"": {"w": "a"}, "w": "b"},
            "'w' is made of 'b', and of other leaves too",
        ),
        ({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, {"x": "a/b"}, "two leaves of params have the path 'a/b'"),
        (
            {"a": wn.WeightNorm(numbers(2, 1), numbers(2, 3), (-1,))},
            {"x": Array("a", add=True), "y": Array("a", add=True)},
            "'a' is in two places of the map, as 'x' and 'y'",
        ),
        ({"a": jax.random.key(0)}, {"x": "a"}, "'a' is of type key<fry>, not an array of numbers"),
        ({"a": jax.random.key(0)}, {}, "no place in the map: 'a'. .*nnx.state(model, nnx.Param)"),
    ],
)
def test_a_tree_that_the_map_does_not_lead_back(params, names, words):
    with pytest.raises(ValueError, match=pattern(words)):
        from_flax(params, names)


def test_the_result_shares_no_memory_with_the_checkpoint():
    state = {key: np.array(value) for key, value in STATE.items()}
    params = to_flax(from_state_dict(state), TARGET, NAMES)
    for value in state.values():
        value[...] = 0
    np.testing.assert_array_equal(
        params["conv_0"]["kernel"].v, np.moveaxis(STATE["encoder.0.weight_v"], 0, 1).T.swapaxes(1, 2)
    )
    np.testing.assert_array_equal(params["head"]["bias"], STATE["head.bias"])


def test_boxes_and_shardings_are_the_targets():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    kernel = nn.Partitioned(jax.ShapeDtypeStruct((3, 2), jnp.float32, sharding=spec), names=(None, "x"))
    state = {"weight_g": numbers(2, 1), "weight_v": numbers(2, 3)}
    node = to_flax(from_state_dict(state), {"kernel": kernel}, linear(""))["kernel"]
    assert node.g.names == node.v.names == (None, "x")
    assert node.g.value.sharding == node.v.value.sharding == spec


def test_a_direction_of_zeros_is_a_weight_of_zeros_and_can_be_made_to_train():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight[1] = 0
    layer = torch.nn.utils.parametrizations.weight_norm(layer)
    assert torch.isnan(layer.weight[1]).all()
    params = to_flax(from_state_dict(layer.state_dict()), {"kernel": jnp.zeros((3, 2))}, linear(""))

    def loss(params):
        return jnp.sum((wn.reconstruct(params)["kernel"] - 1) ** 2)

    grads = jax.grad(loss)(params)["kernel"]
    np.testing.assert_array_equal(wn.reconstruct(params)["kernel"][:, 1], 0)
    assert np.isfinite(grads.g).all()
    assert np.isfinite(grads.v).all()
    assert float(grads.g[0, 1]) == 0
    again = wn.reparameterize(wn.reconstruct(params), {"kernel": -2})
    assert float(jax.grad(loss)(again)["kernel"].g[0, 1]) != 0


def test_numbers_of_their_own_can_be_added():
    """A part of an array of one axis is a scalar of NumPy's, and no array."""
    place = Array(("a", "b"), add=True)
    state = {"x": np.array([1.0, 2.0], np.float32), "y": np.array([3.0, 4.0], np.float32)}
    target = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    params = to_flax(from_state_dict(state), target, {"x": place, "y": place})
    assert (float(params["a"]), float(params["b"])) == (4.0, 6.0)
