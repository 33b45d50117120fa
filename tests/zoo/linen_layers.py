"""The zoo's Linen models that are made of convolutions."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn

from tests.zoo.linen import feed_forward, linen
from tests.zoo.model import Model, biases, kernels, normal


def linen_cnn() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3))(x))
            x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=4, strides=2)(x))
            x = nn.relu(nn.ConvTranspose(6, (2, 2), strides=(2, 2))(x))
            return nn.Dense(3)(x.mean((1, 2)))

    convs = kernels(["params/Conv_0", "params/Conv_1", "params/ConvTranspose_0"], (-4, -3, -2))
    return feed_forward(Net(), normal(2, 8, 8, 3), {**convs, "params/Dense_0/kernel": (-2,)})


def linen_transposed_kernel() -> Model:
    # With transpose_kernel=True the kernel is (height, width, features out, features in), as the forward one's is.
    module = nn.ConvTranspose(6, (3, 3), strides=(2, 2), transpose_kernel=True)
    return feed_forward(module, normal(2, 4, 4, 5), {"params/kernel": (-4, -3, -1)})


def linen_convs() -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3,), kernel_dilation=2)(x))
            return nn.Conv(5, (2, 1, 2))(x.reshape(-1, 2, 2, 2, 4))

    axes = {"params/Conv_0/kernel": (-3, -2), "params/Conv_1/kernel": (-5, -4, -3, -2)}
    return feed_forward(Net(), normal(2, 8, 3), axes)


def linen_depthwise() -> Model:
    # The kernel is (3, 3, 1, 10): each feature sums over the window of one input channel.
    module = nn.Conv(10, (3, 3), feature_group_count=5, strides=(2, 1), kernel_dilation=(1, 2))
    return feed_forward(module, normal(2, 6, 4, 5), {"params/kernel": (-4, -3, -2)})


def linen_conv_local() -> Model:
    # A kernel for each place of the output: (3, 2, height * width * features in, features out).
    module = nn.ConvLocal(3, (2, 2), padding="VALID")
    return linen(module, normal(2, 4, 3, 5), {"params/kernel": (-2,)}, biases("params"))


MODELS: dict[str, Callable[[], Model]] = {
    "linen_cnn": linen_cnn,
    "linen_transposed_kernel": linen_transposed_kernel,
    "linen_convs": linen_convs,
    "linen_depthwise": linen_depthwise,
    "linen_conv_local": linen_conv_local,
}
