"""The NNX `MeanOnlyBatchNorm`: the Linen one's numbers, as an NNX module."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wn_jax import linen
from wn_jax.nnx import MeanOnlyBatchNorm, WeightNormed

X = 3 + 2 * jax.random.normal(jax.random.key(0), (8, 4, 5))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("axis", [-1, 1])
def test_outputs_statistics_and_gradients_are_those_of_the_linen_module(axis, dtype):
    x = X.astype(dtype)
    mask = (jnp.arange(8) < 5)[:, None, None]
    ours = MeanOnlyBatchNorm(x.shape[axis], axis=axis, momentum=0.9, bias_init=nn.initializers.ones, rngs=nnx.Rngs(0))
    theirs = linen.MeanOnlyBatchNorm(axis=axis, momentum=0.9, bias_init=nn.initializers.ones)
    variables = theirs.init(jax.random.key(0), x, use_running_average=False)
    for given in (None, mask):
        y = nnx.jit(lambda ours, x, given=given: ours(x, mask=given))(ours, x)
        expected, updates = theirs.apply(variables, x, use_running_average=False, mask=given, mutable=["batch_stats"])
        variables = {**variables, **updates}
        assert y.dtype == expected.dtype
        np.testing.assert_allclose(y.astype(np.float32), expected.astype(np.float32), atol=2e-6)
        np.testing.assert_allclose(ours.mean[...], updates["batch_stats"]["mean"], rtol=1e-6)
    assert type(ours.mean) is nnx.BatchStat
    ours.eval()
    expected = theirs.apply(variables, x, use_running_average=True)
    np.testing.assert_allclose(ours(x).astype(np.float32), expected.astype(np.float32), atol=2e-6)


def test_the_gradient_is_centred():
    layer = MeanOnlyBatchNorm(5, rngs=nnx.Rngs(0))
    cotangent = jax.random.normal(jax.random.key(1), X.shape)
    gradient = nnx.grad(lambda x, layer: jnp.sum(layer(x) * cotangent))(X, layer)
    np.testing.assert_allclose(gradient, cotangent - np.mean(cotangent, (0, 1)), atol=1e-6)  # equation 8


def test_what_nnx_batch_norm_offers():
    theirs, ours = nnx.BatchNorm(5, rngs=nnx.Rngs(0)), MeanOnlyBatchNorm(5, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(ours(X) / np.std(X, (0, 1)), theirs(X), atol=1e-4)
    np.testing.assert_allclose(ours.mean[...], theirs.mean[...], rtol=1e-5)
    before = np.array(ours.mean[...])
    for layer in (nnx.view(ours, use_running_average=True), ours):
        np.testing.assert_allclose(layer(X, use_running_average=True), X - before, atol=1e-5)
    assert nnx.view(ours, use_running_average=True).use_running_average
    assert not ours.use_running_average
    np.testing.assert_array_equal(ours.mean[...], before)
    assert MeanOnlyBatchNorm(5, use_bias=False, rngs=nnx.Rngs(0)).bias is None
    with pytest.raises(ValueError, match=r"has 5 features, but axis -1 of an input of shape \(2, 3\) has 3"):
        ours(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="out of range"):
        MeanOnlyBatchNorm(5, axis=3, rngs=nnx.Rngs(0))(X)


def test_axis_name_averages_over_a_mapped_axis():
    layer = MeanOnlyBatchNorm(5, axis_name="devices", rngs=nnx.Rngs(0))
    axes = nnx.StateAxes({...: None})
    y = nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, 0), axis_name="devices")(layer, X)
    np.testing.assert_allclose(y, X - np.mean(X, (0, 1)), atol=1e-6)
    np.testing.assert_allclose(layer.mean[...], 0.01 * np.mean(X, (0, 1)), rtol=1e-5)


def test_after_a_weight_normalized_layer():
    model = nnx.Sequential(
        nnx.Linear(5, 3, use_bias=False, rngs=nnx.Rngs(0)), MeanOnlyBatchNorm(3, rngs=nnx.Rngs(0)), nnx.relu
    )
    wrapped = WeightNormed(model, {"layers/0/kernel": -2})
    for _ in range(3):
        np.testing.assert_allclose(wrapped(X), model(X), atol=1e-6)
    np.testing.assert_allclose(wrapped.layers[1].mean[...], model.layers[1].mean[...], rtol=1e-6)
