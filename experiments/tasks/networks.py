"""The networks that classify. They know nothing of weight normalization: that is a transform of their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from wn_jax.linen import MeanOnlyBatchNorm


class MLP(nn.Module):
    """Dense layers with ReLU between. A normalized layer has its bias in the normalization."""

    hidden: tuple[int, ...]
    """The widths of the hidden layers."""

    classes: int
    """The number of classes."""

    norm: str
    """The normalization of each hidden layer: "none", "batch" or "mean_only"."""

    dtype: Any
    """The dtype of the computation."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits (examples, classes) of examples of any shape."""
        x = x.reshape(len(x), -1)
        for width in self.hidden:
            x = nn.Dense(width, use_bias=self.norm == "none", dtype=self.dtype)(x)
            x = nn.relu(_normalize(self, x, train))
        return nn.Dense(self.classes, dtype=self.dtype)(x)


class Conv(nn.Module):
    """Convolutions with ReLU and pooling, and a dense layer. A normalized layer has its bias in the normalization."""

    widths: tuple[int, ...]
    """The feature maps of each convolution."""

    image: tuple[int, ...]
    """Height, width and channels, as which examples are read."""

    classes: int
    """The number of classes."""

    norm: str
    """The normalization of each convolution: "none", "batch" or "mean_only"."""

    dtype: Any
    """The dtype of the computation."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits (examples, classes) of examples that can be reshaped to images."""
        x = x.reshape(len(x), *self.image)
        for width in self.widths:
            x = nn.Conv(width, (3, 3), use_bias=self.norm == "none", dtype=self.dtype)(x)
            x = nn.avg_pool(nn.relu(_normalize(self, x, train)), (2, 2), strides=(2, 2))
        return nn.Dense(self.classes, dtype=self.dtype)(x.reshape(len(x), -1))


class ConvPool(nn.Module):
    """The paper's network for CIFAR-10: ConvPool-CNN-C of Springenberg et al. with fewer and thinner last layers.

    Nine convolutions and a dense layer, Leaky ReLU of slope 0.1 after each convolution, Gaussian noise on the input
    and dropout after the pooling. Kernels are drawn from N(0, 0.05^2) and biases are 0, as in the published code.

    Source: Salimans & Kingma 2016, arXiv 1602.07868, section 5.1, and its published code.
    """

    width: int
    """The feature maps of the first stage; there are twice as many after it."""

    noise: float
    """The standard deviation of the noise on the input in training."""

    dropout: float
    """The fraction that is dropped after each pooling in training."""

    classes: int
    """The number of classes."""

    norm: str
    """The normalization of each layer, the last one included: "none", "batch" or "mean_only"."""

    dtype: Any
    """The dtype of the computation."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits (examples, classes) of images (examples, height, width, channels)."""
        if train and self.noise:
            x = x + self.noise * jax.random.normal(self.make_rng("noise"), x.shape, x.dtype)

        for width in (self.width, 2 * self.width):
            for _ in range(3):
                x = self._layer(width, (3, 3), "SAME")(x, train)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)

        x = self._layer(2 * self.width, (3, 3), "VALID")(x, train)
        for _ in range(2):
            x = self._layer(2 * self.width, (1, 1), "VALID")(x, train)

        x = x.mean(axis=(1, 2))
        x = nn.Dense(self.classes, use_bias=self.norm == "none", dtype=self.dtype, kernel_init=_NORMAL)(x)
        return _normalize(self, x, train)

    def _layer(self, width: int, size: tuple[int, int], padding: str) -> Callable[[jax.Array, bool], jax.Array]:
        """A convolution, its normalization and Leaky ReLU."""
        use_bias = self.norm == "none"
        conv = nn.Conv(width, size, padding=padding, use_bias=use_bias, dtype=self.dtype, kernel_init=_NORMAL)
        return lambda x, train: nn.leaky_relu(_normalize(self, conv(x), train), 0.1)


_NORMAL = nn.initializers.normal(0.05)


def _normalize(network: Any, x: jax.Array, train: bool) -> jax.Array:
    """A pre-activation after the network's normalization, if it has one. Only a compact method can call this."""
    if network.norm == "batch":
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=network.dtype)(x)
    if network.norm == "mean_only":
        return MeanOnlyBatchNorm(use_running_average=not train, momentum=0.9, dtype=network.dtype)(x)
    return x
