"""The mathematics of `WeightNorm`, against closed forms and float64."""

import copy
import dataclasses

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

from wn_jax import WeightNorm


def weight64(g, v, axes):
    """`g * v / ||v||` in float64."""
    g, v = np.asarray(g, np.float64), np.asarray(v, np.float64)
    return g * v / np.linalg.norm(v, axis=axes, keepdims=True)


def gradients64(g, v, cotangent, axis):
    """Equation 3 of the paper, in float64: the gradients of `sum(w * cotangent)` in g and v."""
    g, v, grad_w = (np.asarray(x, np.float64) for x in (g, v, cotangent))
    norm = np.sqrt((v**2).sum(axis, keepdims=True))
    grad_g = (grad_w * v).sum(axis, keepdims=True) / norm
    return grad_g, g / norm * grad_w - g * grad_g / norm**2 * v


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def relative(a, b):
    return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()


@pytest.mark.parametrize(
    ("shape", "axes"), [((5, 3), (-2,)), ((5, 3), (-1,)), ((3, 3, 4, 6), (-4, -3, -2)), ((7,), (-1,))]
)
def test_gradients_are_those_of_equation_3(shape, axes):
    v, cotangent = normal(*shape), normal(*shape, seed=1)
    g = normal(*(1 if i - len(shape) in axes else n for i, n in enumerate(shape)), seed=2)
    grad_g, grad_v = jax.grad(lambda g, v: jnp.sum(WeightNorm(g, v, axes).weight() * cotangent), (0, 1))(g, v)
    expected_g, expected_v = gradients64(g, v, cotangent, axes)
    assert relative(grad_g, expected_g) <= 1e-6
    assert relative(grad_v, expected_v) <= 1e-6
    assert np.abs(np.sum(np.asarray(grad_v, np.float64) * v, axes)).max() <= 1e-5  # equation 4: orthogonal to v


@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_derivatives_to_second_order(mode):
    with jax.enable_x64(True):
        v, g = jnp.asarray(normal(4, 3), jnp.float64), jnp.asarray([[1.0, -2.0, 0.0]], jnp.float64)
        check_grads(lambda g, v: jnp.sin(WeightNorm(g, v, (-2,)).weight()), (g, v), order=2, modes=[mode])


def test_factors_multiply_to_the_weight_and_have_its_derivatives():
    node = WeightNorm(normal(1, 3, seed=1), normal(4, 3), (-2,))
    v, scale = node.factors()
    np.testing.assert_array_equal(v, node.v)
    np.testing.assert_allclose(v * scale, node.weight(), rtol=1e-6)
    by_weight = jax.grad(lambda node: jnp.sum(jnp.sin(node.weight())))(node)
    by_factors = jax.grad(lambda node: jnp.sum(jnp.sin(jnp.multiply(*node.factors()))))(node)
    np.testing.assert_allclose(by_weight.v, by_factors.v, rtol=1e-6)
    np.testing.assert_allclose(by_weight.g, by_factors.g, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 300.0])
def test_a_weight_is_off_by_its_own_rounding_and_no_more(dtype, scale):
    v = normal(4096, 5, scale=scale).astype(dtype)
    g = jnp.full((1, 5), 1.7, jnp.float32)
    weight = WeightNorm(g, v, (-2,)).weight()
    assert weight.dtype == dtype
    expected = weight64(g, v, 0)
    rounding = np.maximum(
        np.abs(expected) * float(jnp.finfo(dtype).eps) / 2, float(jnp.finfo(dtype).smallest_subnormal) / 2
    )
    slack = 1e-5 * np.abs(expected)  # the norm's own error in float32
    assert (np.abs(np.asarray(weight, np.float64) - expected) <= rounding + slack).all()


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        v = jnp.asarray(np.random.default_rng(0).standard_normal((64, 3)))
        node = WeightNorm.from_weight(v, 0)
        assert node.g.dtype == node.weight().dtype == jnp.float64
        assert relative(WeightNorm(node.g + 1, v, (-2,)).weight(), weight64(node.g + 1, v, 0)) <= 1e-15


def test_there_is_no_epsilon():
    for length in (1e-15, 1e-12, 1e-6, 1.0, 1e12, 1e18):
        v = normal(50, 2) / 7 * length
        np.testing.assert_allclose(
            np.linalg.norm(WeightNorm(jnp.ones((1, 2)), v, (-2,)).weight(), axis=0), 1, rtol=1e-5
        )


@pytest.mark.parametrize("length", [1e-15, 1e-12, 1e-6, 1e6, 1e12, 1e18])
def test_gradients_hold_over_the_whole_range_of_lengths(length):
    v, cotangent, g = normal(50, 4) / 7 * length, normal(50, 4, seed=1), jnp.array([[1.0, 10.0, -3.0, 0.5]])
    grads = jax.grad(lambda g, v: jnp.sum(WeightNorm(g, v, (-2,)).weight() * cotangent), (0, 1))(g, v)
    for grad, expected in zip(grads, gradients64(g, v, cotangent, 0), strict=True):
        assert relative(grad, expected) <= 2e-6


@pytest.mark.parametrize("length", [2e-19, 3e-19, 8e-19, 9e-19, 1e18, 1e19])
def test_gradients_hold_to_the_ends_of_the_range(length):
    """Where the square of each of two entries is still a normal float32."""
    v, cotangent, g = jnp.full((2, 1), length / 2**0.5, jnp.float32), jnp.array([[0.3], [-0.8]]), jnp.array([[0.5]])
    grads = jax.grad(lambda g, v: jnp.sum(WeightNorm(g, v, (-2,)).weight() * cotangent), (0, 1))(g, v)
    for grad, expected in zip(grads, gradients64(g, v, cotangent, 0), strict=True):
        assert relative(grad, expected) <= 2e-6


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-30, 1e-25, 1e-20, 1e-18, 1e-12, 1e12, 1e18, 1e19, 1e25, 3e37])
def test_every_finite_v_has_finite_values_and_derivatives(size):
    v, cotangent, g = normal(50, 4) * np.float32(size), normal(50, 4, seed=1), jnp.array([[1.0, 10.0, -3.0, 0.0]])

    def loss(g, v):
        return jnp.sum(jnp.sin(WeightNorm(g, v, (-2,)).weight()) * cotangent)

    gradient = jax.grad(loss, (0, 1))
    tangents = (jnp.ones_like(g), normal(50, 4, seed=2))
    hvp = jax.jvp(gradient, (g, v), tangents)[1]
    reverse_hvp = jax.grad(lambda v: sum(jnp.vdot(a, t) for a, t in zip(gradient(g, v), tangents, strict=True)))(v)
    values = [loss(g, v), *gradient(g, v), *jax.jvp(loss, (g, v), tangents), *hvp, reverse_hvp]
    assert all(np.isfinite(value).all() for value in values)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("jit", [False, True])
def test_zero_vectors_keep_their_function_and_can_train(dtype, jit):
    weight = jnp.array(normal(6, 4)).at[:, 1].set(0.0).at[:, 2].set(-0.0).astype(dtype)
    weight = weight.at[:, 3].set(jnp.array([0.0, -0.0] * 3, dtype))
    make = lambda w: WeightNorm.from_weight(w, 0)  # noqa: E731
    node = (jax.jit(make) if jit else make)(weight)
    assert node.weight().tobytes() == weight.tobytes()
    assert (node.g[0, 1:] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(np.asarray(node.v[:, 1:], np.float32), axis=0), 1, rtol=4e-3)
    grads = jax.grad(lambda node: jnp.sum(node.weight().astype(jnp.float32) * normal(6, 4, seed=1)))(node)
    assert (grads.g[0, 1:] != 0).all()  # through g the direction is reached; at v = 0 nothing ever would be
    assert len(set(np.sign(np.asarray(node.v[:, 1], np.float32)))) == 2  # a random direction, not one quadrant's


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e-80, 1e-3, 1.0, 1e80, 1e200, 1e300])
def test_float64_weights_survive_the_round_trip(size):
    with jax.enable_x64(True):
        weight = jnp.asarray(np.random.default_rng(0).standard_normal((40, 3)) * size).at[:, 1].set(0)
        node = WeightNorm.from_weight(weight, 0)
        assert node.weight().tobytes() == weight.tobytes()
        assert (
            jax.jit(WeightNorm.weight)(jax.jit(lambda w: WeightNorm.from_weight(w, 0))(weight)).tobytes()
            == weight.tobytes()
        )
        squared = np.sum(np.asarray(node.v) ** 2, axis=0)
        assert np.isfinite(squared).all()
        assert (squared > np.finfo(np.float64).tiny).all()


def test_a_norm_that_no_float32_can_hold_is_visible():
    assert np.isinf(WeightNorm.from_weight(jnp.full((4, 2), 3e38), 0).weight()).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [2e-37, 1e-30, 1e-20, 1e-12, 1e12, 1e18, 1e25, 1e30, 1e37])
def test_weights_out_of_range_are_brought_into_it_without_a_changed_bit(dtype, size):
    weight = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, (40, 3)) * size, dtype)
    node = WeightNorm.from_weight(weight, 0)
    assert node.weight().tobytes() == weight.tobytes()
    squared = np.sum(np.asarray(node.v, np.float32) ** 2, axis=0)
    assert (np.finfo(np.float32).tiny < squared).all()
    assert (squared < np.finfo(np.float32).max).all()
    assert set(np.unique(np.log2(np.asarray(node.v, np.float64) / np.asarray(weight, np.float64)) % 1)) == {0.0}


any_weight = hypothesis.given(
    data=st.data(),
    shape=hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=6),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    exponent=st.integers(-90, 90),
)


def check_round_trip(data, shape, dtype, exponent):
    """Shapes, axes, dtypes and magnitudes; subnormals are left out, as XLA flushes them to zero."""
    entries = st.floats(-16, 16, width=16, allow_subnormal=False)
    values = np.asarray(data.draw(hnp.arrays(np.float32, shape, elements=entries)))
    axes = data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
    weight = jnp.asarray(values * (1 if dtype == "float16" else np.float32(2.0**exponent)), dtype)
    node = WeightNorm.from_weight(weight, axes)
    assert node.weight().tobytes() == weight.tobytes()
    assert node.axes == tuple(sorted(axis - len(shape) for axis in axes))
    norms = np.sqrt(np.sum(np.asarray(weight, np.float64) ** 2, axis=tuple(axes), keepdims=True))
    np.testing.assert_allclose(node.g, norms, rtol=1e-5)  # a float32 sum of up to 1,296 squares


@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@any_weight
def test_any_weight_survives_the_round_trip(data, shape, dtype, exponent):
    check_round_trip(data, shape, dtype, exponent)


@pytest.mark.slow
@hypothesis.settings(max_examples=100, deadline=None)
@any_weight
def test_any_weight_survives_the_round_trip_at_length(data, shape, dtype, exponent):
    check_round_trip(data, shape, dtype, exponent)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_stay_visible(bad):
    weight = normal(4, 3).at[1, 1].set(bad)
    rebuilt = WeightNorm.from_weight(weight, 0).weight()
    assert not np.isfinite(rebuilt[1, 1])
    np.testing.assert_array_equal(rebuilt[:, [0, 2]], weight[:, [0, 2]])
    updated = dataclasses.replace(WeightNorm.from_weight(normal(4, 3), 0), v=weight)  # as after a diverged step
    assert not np.isfinite(updated.weight()[1, 1])


@pytest.mark.parametrize(
    ("axes", "message"),
    [(2, "axis 2 is out of range"), (-3, "use -2 to -1"), ((), "axes is empty"), ((0, -2), "twice"), ((0, 0), "twice")],
)
def test_axes_that_do_not_fit(axes, message):
    with pytest.raises(ValueError, match=message):
        WeightNorm.from_weight(jnp.ones((3, 2)), axes)


@pytest.mark.parametrize(
    ("weight", "axes"), [(jnp.ones((3, 2), int), 0), (jnp.ones((3, 2)), 0.5), (jnp.ones((3, 2)), "0")]
)
def test_what_is_no_weight_or_no_axis(weight, axes):
    with pytest.raises(TypeError):
        WeightNorm.from_weight(weight, axes)


def test_a_stack_sliced_on_one_side_says_so():
    node = WeightNorm.from_weight(jnp.ones((3, 4, 2)), -2)
    for method in (WeightNorm.weight, WeightNorm.factors):
        with pytest.raises(ValueError, match="must be sliced on the leading axis"):
            method(dataclasses.replace(node, v=node.v[0]))
    with pytest.raises(ValueError, match="sorted tuple of negative ints"):
        WeightNorm(node.g, node.v, (1,)).weight()
    with pytest.raises(TypeError, match="holds no weights"):
        WeightNorm("g", "v", (-2,)).weight()


def test_a_node_is_frozen_compares_by_identity_and_copies():
    node = WeightNorm.from_weight(normal(3, 2), 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        node.g = 1
    assert node == node
    assert node != WeightNorm(node.g, node.v, node.axes)
    twin = copy.deepcopy(node)
    assert twin.axes == node.axes
    np.testing.assert_array_equal(twin.v, node.v)
