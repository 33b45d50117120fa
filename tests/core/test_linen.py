"""`MeanOnlyBatchNorm`, against NumPy and `flax.linen.BatchNorm`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wn_jax.linen import MeanOnlyBatchNorm

X = 3 + 2 * jax.random.normal(jax.random.key(0), (8, 4, 5))


def run(layer, x, **kwargs):
    variables = layer.init(jax.random.key(0), x)
    return layer.apply(variables, x, mutable=["batch_stats"], **kwargs)


def test_subtracts_the_mean_of_each_feature_and_adds_the_bias():
    layer = MeanOnlyBatchNorm(use_running_average=False, bias_init=nn.initializers.constant(0.5))
    y, updates = run(layer, X)
    np.testing.assert_allclose(y, X - np.mean(X, (0, 1)) + 0.5, atol=1e-6)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.01 * np.mean(X, (0, 1)), rtol=1e-5)


def test_statistics_and_mean_are_those_of_flax_batch_norm():
    ours, theirs = (layer(use_running_average=False, momentum=0.9) for layer in (MeanOnlyBatchNorm, nn.BatchNorm))
    (y, updates), (z, expected) = run(ours, X), run(theirs, X)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], expected["batch_stats"]["mean"], rtol=1e-5)
    np.testing.assert_allclose(y / np.std(X, (0, 1)), z, atol=1e-4)


def test_the_running_mean_is_used_at_test_time_and_then_stays():
    layer = MeanOnlyBatchNorm(momentum=0.0)
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    assert (variables["batch_stats"]["mean"] == 0).all()  # init does not move it
    _, updates = layer.apply(variables, X, use_running_average=False, mutable=["batch_stats"])
    variables = {**variables, **updates}
    other = X + 7
    y, updates = layer.apply(variables, other, use_running_average=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, other - np.mean(X, (0, 1)), atol=1e-5)
    np.testing.assert_array_equal(updates["batch_stats"]["mean"], variables["batch_stats"]["mean"])
    with pytest.raises(ValueError, match="use_running_average"):
        layer.apply(variables, X)


def test_the_gradient_is_centred():
    layer = MeanOnlyBatchNorm(use_running_average=False)
    cotangent = jax.random.normal(jax.random.key(1), X.shape)
    gradient = jax.grad(lambda x: jnp.sum(run(layer, x)[0] * cotangent))(X)
    np.testing.assert_allclose(gradient, cotangent - np.mean(cotangent, (0, 1)), atol=1e-6)  # equation 8


def test_axis_mask_and_no_bias():
    first = MeanOnlyBatchNorm(use_running_average=False, axis=1, use_bias=False)
    assert "params" not in first.init(jax.random.key(0), X)
    np.testing.assert_allclose(run(first, X)[0], X - np.mean(X, (0, 2), keepdims=True), atol=1e-6)
    both = MeanOnlyBatchNorm(use_running_average=False, axis=(1, 2))
    np.testing.assert_allclose(run(both, X)[0], X - np.mean(X, 0), atol=1e-6)
    for axis in (3, -4, (0, 3)):
        with pytest.raises(ValueError, match="out of range for an input of 3 dimensions"):
            run(MeanOnlyBatchNorm(use_running_average=False, axis=axis), X)
    mask = (jnp.arange(8) < 5)[:, None, None]
    layer = MeanOnlyBatchNorm(use_running_average=False)
    np.testing.assert_allclose(run(layer, X, mask=mask)[0], X - np.mean(X[:5], (0, 1)), atol=1e-6)


def test_axis_name_averages_over_devices():
    layer = MeanOnlyBatchNorm(use_running_average=False, axis_name="devices")
    variables = layer.init(jax.random.key(0), X[0])  # the axis need not exist during init
    expected, updates = run(MeanOnlyBatchNorm(use_running_average=False), X)

    def apply(x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    mapped, stats = jax.vmap(apply, axis_name="devices")(X)
    np.testing.assert_allclose(mapped, expected, atol=1e-6)
    np.testing.assert_allclose(stats["batch_stats"]["mean"][3], updates["batch_stats"]["mean"], rtol=1e-5)
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("devices")
    sharded = jax.shard_map(apply, mesh=mesh, in_specs=spec, out_specs=(spec, jax.sharding.PartitionSpec()))
    y, stats = jax.jit(sharded)(X)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_allclose(stats["batch_stats"]["mean"], updates["batch_stats"]["mean"], rtol=1e-5)


def test_groups_average_among_themselves():
    layer = MeanOnlyBatchNorm(use_running_average=False, axis_name="d", axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]])
    variables = layer.init(jax.random.key(0), X[0])
    y, _ = jax.pmap(lambda x: layer.apply(variables, x, mutable=["batch_stats"]), axis_name="d")(X)
    means = np.repeat([np.mean(X[:4], (0, 1)), np.mean(X[4:], (0, 1))], 4, axis=0)
    np.testing.assert_allclose(y, X - means[:, None], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_has_float32_statistics(dtype):
    x = (1000 + jax.random.normal(jax.random.key(0), (4096, 3))).astype(dtype)
    layer = MeanOnlyBatchNorm(use_running_average=False, dtype=dtype)
    y, updates = run(layer, x)
    assert y.dtype == dtype
    assert updates["batch_stats"]["mean"].dtype == jnp.float32
    expected = np.asarray(x, np.float64) - np.asarray(x, np.float64).mean(0)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=1e-2, atol=5e-3)
    assert run(MeanOnlyBatchNorm(use_running_average=False), x)[0].dtype == jnp.float32  # promoted with the bias
    assert run(MeanOnlyBatchNorm(use_running_average=False, use_bias=False), x)[0].dtype == dtype
