"""The HiFi-GAN generator in Flax, and where the arrays of a PyTorch checkpoint go in it.

Source: Kong, Kim & Bae 2020, *HiFi-GAN*, arXiv 2010.05646, and its published code; with `normalize_before`, the
vocoder of SpeechT5. The module knows nothing of weight normalization: that comes with the checkpoint.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.vocoder.config import GeneratorConfig
from wn_jax.torch import Array, conv, conv_transpose

_LAST_SLOPE = 0.01  # of the last activation, in the published code and in SpeechT5's: the default of PyTorch


class Generator(nn.Module):
    """From log-mel spectrograms (batch, frames, mels) to waveforms (batch, frames * hop length) within [-1, 1]."""

    config: GeneratorConfig
    """The sizes of the layers."""

    @nn.compact
    def __call__(self, mel: jax.Array) -> jax.Array:
        """The waveforms."""
        config, channels = self.config, self.config.upsample_initial_channel
        if config.normalize_before:
            mean = self.variable("buffers", "mean", jnp.zeros, config.model_in_dim)
            scale = self.variable("buffers", "scale", jnp.ones, config.model_in_dim)
            mel = (mel - mean.value) / scale.value
        x = _conv(channels, 7, name="conv_pre")(mel)
        for i, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True)):
            channels //= 2
            pad = kernel - 1 - (kernel - rate) // 2  # PyTorch's padding is (kernel - rate) // 2
            upsample = nn.ConvTranspose(channels, (kernel,), (rate,), [(pad, pad)], name=f"upsampler_{i}")
            x = upsample(nn.leaky_relu(x, config.leaky_relu_slope))

            kinds = list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True))
            first = i * len(kinds)  # blocks are numbered through all upsamplings
            blocks = [
                ResidualBlock(size, dilations, config, name=f"resblocks_{number}")(x)
                for number, (size, dilations) in enumerate(kinds, first)
            ]
            x = sum(blocks[1:], start=blocks[0]) / len(blocks)

        x = _conv(1, 7, name="conv_post")(nn.leaky_relu(x, _LAST_SLOPE))
        return jnp.tanh(x[..., 0])


class ResidualBlock(nn.Module):
    """Dilated convolutions, each added to what it reads; of the first kind, each followed by an undilated one."""

    kernel: int
    """The size of all kernels."""

    dilations: tuple[int, ...]
    """The dilation of each convolution that has one."""

    config: GeneratorConfig
    """The kind of block, and the slope of activations."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """An array (batch, time, channels) of the same shape."""
        first, second = ("convs1", "convs2") if self.config.resblock == 1 else ("convs", None)
        for i, dilation in enumerate(self.dilations):
            y = nn.leaky_relu(x, self.config.leaky_relu_slope)
            y = _conv(x.shape[-1], self.kernel, dilation, name=f"{first}_{i}")(y)
            if second:
                y = nn.leaky_relu(y, self.config.leaky_relu_slope)
                y = _conv(x.shape[-1], self.kernel, name=f"{second}_{i}")(y)
            x = x + y
        return x


def names(config: GeneratorConfig) -> dict[str, Any]:
    """The places of a checkpoint's arrays in the variables of a `Generator`."""
    upsampler = "upsampler" if config.names == "transformers" else "ups"
    block = {f"{convs}.{{j}}": conv(f"params/resblocks_{{i}}/{convs}_{{j}}") for convs in ("convs", "convs1", "convs2")}
    buffers = {name: Array(f"buffers/{name}") if config.normalize_before else None for name in ("mean", "scale")}
    return {
        "conv_pre": conv("params/conv_pre"),
        f"{upsampler}.{{i}}": conv_transpose("params/upsampler_{i}"),
        "resblocks.{i}": block,
        "conv_post": conv("params/conv_post"),
        **buffers,
    }


def _conv(features: int, kernel: int, dilation: int = 1, *, name: str) -> nn.Conv:
    """A convolution that keeps the length."""
    pad = dilation * (kernel - 1) // 2
    return nn.Conv(features, (kernel,), padding=[(pad, pad)], kernel_dilation=dilation, name=name)
