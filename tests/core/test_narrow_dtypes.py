"""Dtypes of a narrower range than the scale's: what `wrap` and `init_from_data` compute in them."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import wn_jax as wn
from tests.zoo.arrays import equations

FLOAT8 = ["float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"]
NARROW = [*FLOAT8, "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn", "float16"]
LENGTHS = [1e-3, 1.0, 100.0, 1000.0]


def dense(dtype, preferred):
    def apply(params, x):
        numbers = (((1,), (0,)), ((), ()))
        w = params["w"].astype(dtype)
        return lax.dot_general(x.astype(dtype), w, numbers, preferred_element_type=preferred).astype(jnp.float32)

    return apply


def conv(dtype, preferred):
    def apply(params, x):
        x, w = x.reshape(2, -1, 4).astype(dtype), params["w"].reshape(4, 4, 8).astype(dtype)
        out = lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), preferred_element_type=preferred
        )
        return out.astype(jnp.float32)

    return apply


def of_length(params, length):
    """The same weight, by a `v` of another length."""
    return {"w": dataclasses.replace(params["w"], v=params["w"].v * length)}


def case(shape=(16, 8)):
    x = jax.random.normal(jax.random.key(1), (2, shape[0]))
    return wn.reparameterize({"w": jax.random.normal(jax.random.key(0), shape)}, {"w": -2}), x


def check(apply, params, x):
    """On either side, at all lengths of `v`: the same outputs and gradients."""

    def everything(params, x, scale):
        fn = wn.wrap(apply, scale=scale)
        return jax.value_and_grad(lambda params: (jnp.mean((out := fn(params, x)) ** 2), out), has_aux=True)(params)

    run = jax.jit(lambda params, x: {scale: everything(params, x, scale) for scale in ("weight", "auto", "output")})
    for length in LENGTHS:
        found = run(of_length(params, length), x)
        expected = jax.tree.leaves(found["weight"])
        for scale in ("auto", "output"):
            for own, right in zip(jax.tree.leaves(found[scale]), expected, strict=True):
                np.testing.assert_array_equal(own, right)
        if np.isfinite(found["weight"][0][1]).all():
            assert all(np.isfinite(leaf).all() for leaf in expected)


@pytest.mark.parametrize("preferred", [None, jnp.float32])
@pytest.mark.parametrize("dtype", NARROW)
def test_a_weight_that_a_narrow_dtype_rounds_is_rebuilt(dtype, preferred):
    if dtype == "float4_e2m1fn" and preferred is not None:
        pytest.skip("XLA for CPU has no such product")
    check(dense(dtype, preferred), *case())


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float16"])
def test_the_kernel_of_a_convolution_is_rebuilt(dtype):
    check(conv(dtype, jnp.float32), *case())


@pytest.mark.parametrize(
    ("stored", "operand", "out", "side"),
    [
        ("float32", "float32", None, "output"),
        ("float32", "bfloat16", None, "output"),
        ("bfloat16", "float32", None, "output"),
        ("float32", "float16", "float32", "weight"),
        ("float32", "bfloat16", "float16", "weight"),
        ("float32", "float8_e5m2", "float32", "weight"),
        ("float32", "float8_e8m0fnu", "float32", "weight"),
        ("float16", "float32", None, "weight"),
        ("float64", "float64", None, "output"),
        ("float64", "float32", None, "weight"),
        ("float64", "bfloat16", "float64", "weight"),
    ],
)
def test_the_table_says_where_wrap_puts_the_scale(stored, operand, out, side):
    def apply(params, x):
        w = params["w"].astype(operand)
        return lax.dot_general(x.astype(operand), w, (((1,), (0,)), ((), ())), preferred_element_type=out)

    with jax.enable_x64(True):
        params = {"w": jnp.ones((64, 8), stored)}
        x = jnp.ones((2, 64), stored)
        nodes = wn.reparameterize(params, {"w": -2})
        assert [use.scale for use in wn.weight_uses(apply)(nodes, x)] == [side]
        jaxpr = jax.make_jaxpr(wn.wrap(apply))(nodes, x).jaxpr
        products = {eqn.outvars[0].aval.shape for eqn in equations(jaxpr) if str(eqn.primitive) == "mul"}
        assert ((64, 8) in products) == (side == "weight")


@pytest.mark.parametrize("length", [1.0, 1000.0])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16"])
@pytest.mark.parametrize("jit", [False, True])
def test_data_init_takes_the_statistics_of_the_weight_that_a_narrow_dtype_rounds(dtype, length, jit):
    """Data with a mean much larger than its deviation: the roundings of a weight add up to a mean of their own."""

    def apply(params, x):
        return dense(dtype, jnp.float32)(params, x) + params["b"]

    nodes, _ = case((512, 8))
    x = 5 * jax.random.normal(jax.random.key(1), (300, 512)) + 10
    init = jax.jit(wn.init_from_data(apply)) if jit else wn.init_from_data(apply)
    params = init({**of_length(nodes, length), "b": jnp.zeros(8)}, x)
    y = wn.wrap(apply, scale="weight")(params, x)
    rounding = float(jnp.finfo(dtype).eps)
    # Eagerly and compiled, a weight may be rounded to one side or the other of a number halfway.
    assert np.abs(y.mean(0)).max() <= rounding / 10
    assert np.abs(y.std(0) - 1).max() <= rounding


def test_data_init_of_small_data_in_a_dtype_that_cannot_hold_the_weight_raises():
    nodes, x = case((64, 8))
    with pytest.raises(ValueError, match="range of the dtype"):
        wn.init_from_data(dense("float8_e3m4", jnp.float32))(nodes, x / 100)


@pytest.mark.parametrize("weight", [jnp.zeros((3, 2)), jnp.ones((1, 2)), jnp.ones((3, 2)).at[:, 1].set(0)])
def test_vectors_whose_gradient_is_0_in_float16_warn_and_train_as_the_warning_says(weight):
    weight = weight.astype(jnp.float16)
    x = jax.random.normal(jax.random.key(0), (8, weight.shape[0]), jnp.float16)
    with pytest.warns(UserWarning, match=r"'head': .*float16.*eps=1e-4"):
        nodes = wn.reparameterize({"head": weight, "other": jnp.ones((3, 2), jnp.float16)}, {"head": -2, "other": -2})
    loss = lambda nodes: jnp.mean((wn.wrap(lambda p: x @ p["head"])(nodes) - 1) ** 2)  # noqa: E731

    def after(tx):
        updates, _ = tx.update(jax.grad(loss)(nodes), tx.init(nodes), nodes)
        return optax.apply_updates(nodes, updates)

    assert np.isnan(after(optax.adam(0.01))["head"].v).any()  # what the warning is about
    assert np.isfinite(loss(after(optax.adam(0.01, eps=1e-4))))
    assert loss(after(optax.adam(0.01, eps=1e-4))) < loss(nodes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_zeros_in_other_dtypes_and_in_jit_do_not_warn(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wn.reparameterize({"w": jnp.zeros((3, 2), dtype)}, {"w": -2})
        wn.reparameterize({"w": jnp.ones((3, 2), "float16")}, {"w": -2})
        jax.jit(lambda w: wn.reparameterize({"w": w}, {"w": -2}))(jnp.zeros((3, 2), "float16"))
