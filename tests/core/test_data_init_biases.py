"""Data-dependent initialization of biases: set wherever they can be followed, and else named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn

BATCH = jax.random.normal(jax.random.key(5), (50, 3)) * 2 + 1


def nodes_of_dense():
    weight = jax.random.normal(jax.random.key(0), (3, 2))
    return wn.reparameterize({"w": weight, "b": jnp.ones(2)}, {"w": -2})


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda p, x: x @ p["w"] + p["b"] * 0.01, "scales or masks it"),
        (lambda p, x: x @ p["w"] - (-p["b"]), "scales or masks it"),
        (lambda p, x: -(x @ p["w"]) + p["b"], "scales or masks the output"),
        (lambda p, x: (x @ p["w"] + p["b"]) + p["b"], "something else, too"),
        (lambda p, x: (x @ p["w"] + p["b"]) * p["b"], "something else, too"),
        (lambda p, x: x @ p["w"] + jax.lax.stop_gradient(p["b"]), "frozen"),
        (lambda p, x: x @ p["w"] + p["b"][0], "not one number a feature"),
        (lambda p, x: (x @ p["w"]).reshape(-1, 1) + p["b"][:1], "not one number a feature"),
    ],
)
def test_a_bias_that_cannot_be_set_stays_and_is_named(fn, why):
    with pytest.warns(UserWarning, match=f"left biases as they were:\n  b: .*{why}"):
        new = wn.init_from_data(fn)(nodes_of_dense(), BATCH)
    np.testing.assert_array_equal(new["b"], jnp.ones(2))
    np.testing.assert_allclose((BATCH @ new["w"].weight()).std(0), 1, atol=1e-4)


def features_last(y):
    return y.reshape(-1, y.shape[-1])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("fn", "features"),
    [
        (lambda p, x: x @ p["w"] - p["b"], features_last),
        (lambda p, x: (x @ p["w"]).reshape(5, 10, 2) + p["b"], features_last),
        (lambda p, x: x @ p["w"] + p["b"][::-1], features_last),
        (lambda p, x: (x @ p["w"])[:, ::-1] - p["b"], features_last),
        (lambda p, x: p["b"] - x @ p["w"], features_last),
        (lambda p, x: jax.jit(lambda y, b: y + b)(x @ p["w"], p["b"]), features_last),
        (lambda p, x: (x @ p["w"])[:, None, :].reshape(-1, 2) + p["b"], features_last),
        (lambda p, x: (x @ p["w"])[:, :, None].transpose(0, 2, 1).reshape(-1, 2) - p["b"], features_last),
        (lambda p, x: (x @ p["w"]).T + p["b"][:, None], lambda y: y.T),
        (lambda p, x: (x @ p["w"][:, :1]) + p["b"][1], features_last),
        (lambda p, x: (x @ p["w"][:, :1]) + p["b"][:1].reshape(1, -1), features_last),
        (lambda p, x: (x @ p["w"]).reshape(5, 20) + jnp.tile(p["b"], 10), lambda y: y.reshape(-1, 2)),
        (
            lambda p, x: jnp.stack([y + b for y, b in zip((x @ p["w"]).T, p["b"], strict=True)], -1),
            features_last,
        ),
        (lambda p, x: jnp.concatenate([x @ p["w"][:, i : i + 1] + p["b"][i] for i in (0, 1)], 1), features_last),
        (lambda p, x: x @ p["w"].reshape(3, 2, 1)[:, :, 0] + p["b"], features_last),
    ],
)
def test_a_bias_is_set_wherever_it_can_be_followed(fn, features):
    new = wn.init_from_data(fn)(nodes_of_dense(), BATCH)
    y = features(fn({**new, "w": new["w"].weight()}, BATCH))
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(0), 1, atol=1e-4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_bias_of_one_element_is_set_where_the_layer_has_one_feature(shape):
    def dense(p, x):
        return x @ p["w"] + p["b"]

    nodes = wn.reparameterize({"w": jnp.ones((3, 1)), "b": jnp.ones(shape)}, {"w": -2})
    new = wn.init_from_data(dense)(nodes, BATCH)
    assert new["b"].shape == shape
    y = wn.wrap(dense)(new, BATCH)
    np.testing.assert_allclose([y.mean(), y.std()], [0, 1], atol=1e-4)
