"""PyTorch as an oracle: the weight, and the gradients of g and v."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wn_jax import WeightNorm

torch = pytest.importorskip("torch")
parametrize = pytest.importorskip("torch.nn.utils.parametrizations")

# The layer, and the axes of its weight in PyTorch's layout that a norm with this `dim` runs over.
LAYERS = {
    "linear": (lambda: torch.nn.Linear(7, 5), 0, (-1,)),
    "conv1d": (lambda: torch.nn.Conv1d(4, 6, 3), 0, (-2, -1)),
    "conv2d_grouped": (lambda: torch.nn.Conv2d(4, 6, 3, groups=2), 0, (-3, -2, -1)),
    "conv_transpose1d": (lambda: torch.nn.ConvTranspose1d(4, 6, 3), 0, (-2, -1)),
    "positional_conv": (lambda: torch.nn.Conv1d(4, 4, 8), 2, (-3, -2)),
    "whole_tensor": (lambda: torch.nn.Linear(7, 5), None, (-2, -1)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_weight_and_gradients_equal_torch(name, scale):
    make, dim, axes = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    with torch.no_grad():
        layer.weight *= scale
    plain = layer.weight.detach().numpy().copy()
    layer = parametrize.weight_norm(layer, dim=dim)
    magnitude, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    with torch.no_grad():
        magnitude *= 1.5
    cotangent = torch.randn_like(layer.weight)
    (layer.weight * cotangent).sum().backward()

    node = WeightNorm.from_weight(jnp.asarray(plain), axes)
    np.testing.assert_allclose(np.squeeze(node.g * 1.5), np.squeeze(magnitude.detach().numpy()), rtol=1e-6)
    node = WeightNorm(node.g * 1.5, jnp.asarray(direction.detach().numpy()), node.axes)
    np.testing.assert_allclose(node.weight(), layer.weight.detach().numpy(), rtol=1e-6)
    grads = jax.grad(lambda node: jnp.sum(node.weight() * cotangent.numpy()))(node)
    magnitude_grad = magnitude.grad.numpy().reshape(grads.g.shape)
    np.testing.assert_allclose(
        grads.g, magnitude_grad, rtol=1e-5, atol=1e-6
    )  # a sum of terms of size 1 that may cancel
    direction_grad = direction.grad.numpy()
    np.testing.assert_allclose(grads.v, direction_grad, rtol=1e-5, atol=2e-6 * np.abs(direction_grad).max())
