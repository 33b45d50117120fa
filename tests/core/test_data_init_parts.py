"""Data-dependent initialization of weights that a program takes in parts, indexes, masks, or means to be zero."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wn_jax as wn

BATCH = jax.random.normal(jax.random.key(5), (50, 3)) * 2 + 1


def u_and_w():
    return wn.reparameterize({"w": jnp.eye(3) + 0.1, "u": jnp.eye(3) + 0.2}, {"w": -2, "u": -2})


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (
            lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, jnp.broadcast_to(p["w"], (2, 3, 3)))[0],
            "several steps of a loop",
        ),
        (
            lambda p, x: jax.lax.scan(
                lambda h, w: (jnp.tanh(h @ w), None), x, jnp.concatenate([p["w"][None], p["u"][None]])
            )[0],
            "together with others",
        ),
        (lambda p, x: x @ p["w"] + x @ p["w"][:, :2].sum(1, keepdims=True), "squared or summed"),
        (lambda p, x: jnp.concatenate([x @ p["w"][:, :2], x @ p["w"][:, 1:]], 1), "at 2 places"),
        (lambda p, x: x @ jax.lax.stop_gradient(p["w"]), "not trained"),
    ],
)
def test_weights_that_a_statistic_cannot_be_told_of_are_named(fn, why):
    nodes = u_and_w()
    with pytest.warns(UserWarning, match=why):
        new = wn.init_from_data(fn)(nodes, BATCH)
    np.testing.assert_array_equal(new["w"].g, nodes["w"].g)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: (x @ p["w"][:, ::-1], x @ p["u"]),
        lambda p, x: x @ jnp.concatenate([p["w"], p["u"]], 1),
        lambda p, x: jnp.einsum("bi,lio->lbo", x, jnp.concatenate([p["w"][None], p["u"][None]])),
        lambda p, x: jnp.einsum("bi,lio->lbo", x, jnp.stack([p["w"], p["u"]])),
        lambda p, x: (x @ jnp.tile(p["w"], (1, 4)), x @ p["u"]),
        lambda p, x: [x @ w for w in (*jnp.split(p["w"], 3, 1), *jnp.unstack(p["u"][None, :, ::-1]))],
        lambda p, x: [x @ w for w in jnp.split(jnp.concatenate([p["w"], p["u"]], 1), [2, 3], 1)],
        lambda p, x: (jnp.einsum("bi,iho->bho", x, p["w"].reshape(3, 3, 1)), x @ p["u"].T.reshape(1, 3, 3)[0].T),
    ],
)
def test_parts_of_weights_are_initialized_each_by_itself(fn):
    """Each column of both weights is a feature, wherever the program takes it."""
    new = wn.init_from_data(fn)(u_and_w(), BATCH)
    for node in new.values():
        np.testing.assert_allclose((BATCH @ node.weight()).std(0), 1, atol=1e-4)


def counted(p, x):
    def trip(i, h):
        return jnp.tanh(h @ jax.lax.dynamic_index_in_dim(p["w"], i, keepdims=False) + p["b"][i])

    return jax.lax.fori_loop(0, 3, trip, x)


def counted_by_what_a_scan_slices(p, x):
    def trip(h, i):
        return jnp.tanh(h @ p["w"][i] + p["b"][i]), None

    return jax.lax.scan(trip, x, jnp.arange(3))[0]


def by_hand(p, x):
    for i in range(3):
        x = jnp.tanh(x @ p["w"][i] + p["b"][i])
    return x


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fn", [counted, counted_by_what_a_scan_slices, by_hand])
def test_a_stack_that_a_loop_indexes_is_initialized_as_one_that_it_slices(fn):
    stack = {"w": jax.random.normal(jax.random.key(0), (3, 3, 3)), "b": jnp.ones((3, 3))}
    nodes = wn.reparameterize(stack, wn.infer_axes(fn)(stack, BATCH))

    def sliced(p, x):
        return jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"]), None), x, p)[0]

    new, expected = (wn.init_from_data(f)(nodes, BATCH) for f in (fn, sliced))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new, expected)


def test_a_loop_that_counts_otherwise_leaves_the_stack():
    def shifted(p, x):  # from the second layer on, and the first one twice
        return jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][(i + 1) % 3]), x)

    stack = {"w": jax.random.normal(jax.random.key(0), (3, 3, 3))}
    nodes = wn.reparameterize(stack, wn.infer_axes(shifted)(stack, BATCH))
    with pytest.warns(UserWarning, match="only a run chooses"):
        new = wn.init_from_data(shifted)(nodes, BATCH)
    np.testing.assert_array_equal(new["w"].g, nodes["w"].g)


def flow(p, x):
    """An affine coupling that starts as the identity: its last layer is zero."""
    shift, log_scale = jnp.split(jnp.tanh(x @ p["hidden"]) @ p["last"], 2, 1)
    return jnp.concatenate([x[:, :1] * jnp.exp(log_scale) + shift, x[:, 1:]], 1)


def test_a_layer_that_is_zero_on_purpose_stays_zero_unless_asked():
    params = {"hidden": jax.random.normal(jax.random.key(0), (3, 4)), "last": jnp.zeros((4, 2))}
    nodes = wn.reparameterize(params, {"hidden": -2, "last": -2})
    with pytest.warns(UserWarning, match=r"last: 2 of its features are zero on purpose \(g = 0\); zeros='set'"):
        new = wn.init_from_data(flow)(nodes, BATCH)
    np.testing.assert_array_equal(wn.wrap(flow)(new, BATCH), BATCH)
    assert not np.array_equal(new["hidden"].g, nodes["hidden"].g)
    half = {**nodes, "last": dataclasses.replace(nodes["last"], g=nodes["last"].g.at[0, 0].set(1.0))}
    with pytest.warns(UserWarning, match="last: 1 of its features"):
        new = wn.init_from_data(flow)(half, BATCH)
    assert new["last"].g[0, 1] == 0
    with warnings.catch_warnings(action="error"):
        new = wn.init_from_data(flow, zeros="set")(nodes, BATCH)
    y = jnp.tanh(BATCH @ new["hidden"].weight()) @ new["last"].weight()
    np.testing.assert_allclose(y.std(0), 1, atol=1e-4)
    with pytest.raises(ValueError, match="zeros must be 'keep' or 'set'"):
        wn.init_from_data(flow, zeros="leave")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["product", "choice"])
def test_a_masked_kernel_is_initialized_as_it_is_used(kind):
    mask = np.tril(np.ones((3, 3)))

    def masked(p, x):
        w = p["w"] * mask if kind == "product" else jnp.where(mask > 0, p["w"], 0)
        return x @ w + p["b"]

    params = {"w": jax.random.normal(jax.random.key(0), (3, 3)), "b": jnp.zeros(3)}
    axes = wn.infer_axes(masked)(params, BATCH)
    assert axes == {"w": (-2,)}
    y = wn.wrap(masked)(wn.init_from_data(masked)(wn.reparameterize(params, axes), BATCH), BATCH)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(0), 1, atol=1e-4)


def test_the_experts_of_a_ragged_dot_are_initialized_on_their_own_rows():
    sizes = jnp.array([20, 0, 30])

    def experts(p, x):
        return jax.lax.ragged_dot(x, p["w"], sizes)

    params = {"w": jax.random.normal(jax.random.key(0), (3, 3, 4))}
    nodes = wn.reparameterize(params, wn.infer_axes(experts)(params, BATCH))
    with pytest.warns(UserWarning, match="w: 4 of its features are constant"):  # an expert that gets no rows
        new = wn.init_from_data(experts)(nodes, BATCH)
    np.testing.assert_allclose((BATCH[:20] @ new["w"].weight()[0]).std(0), 1, atol=1e-4)
    np.testing.assert_allclose((BATCH[20:] @ new["w"].weight()[2]).std(0), 1, atol=1e-4)
    np.testing.assert_array_equal(new["w"].g[1], nodes["w"].g[1])
    for scale in ("auto", "output", "weight"):
        got = wn.wrap(experts, scale=scale)(new, BATCH)
        np.testing.assert_allclose(got, experts(wn.reconstruct(new), BATCH), rtol=1e-5, atol=1e-5)
