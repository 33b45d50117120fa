"""A decoder of the GPT kind: causal attention with rotary positions, RMSNorm before each part, blocks in a scan."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

STACK = "blocks"
"""The name of the parameters that have a leading axis of layers."""


class GPT(nn.Module):
    """Logits of the next symbol at each place.

    The blocks are one block under `nn.scan`, whose parameters have a leading axis of layers, so that compiling takes as
    long for any number of them. They are rematerialized in the backward pass, and gather their parameters each time.

    Source: Radford et al. 2019 (GPT-2), with the rotary positions of Su et al. 2021, arXiv 2104.09864, and the RMSNorm
    of Zhang & Sennrich 2019, arXiv 1910.07467.
    """

    layers: int
    """The number of blocks."""

    width: int
    """The features at each place: a multiple of twice the heads."""

    heads: int
    """The attention heads of each block."""

    symbols: int
    """The number of different tokens."""

    dtype: Any
    """The dtype of the computation."""

    gather: Callable[[Any], Any]
    """The function through which a block's parameters go before each use."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (examples, places, symbols) of tokens (examples, places)."""
        x = nn.Embed(self.symbols, self.width, dtype=self.dtype, name="embed")(tokens)

        block: Any = Block if self.is_initializing() else nn.map_variables(Block, "params", self._gathered)
        block = nn.remat(block, prevent_cse=False)  # in a scan there is no common subexpression to prevent
        blocks = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)

        x, _ = blocks(self.heads, self.layers, self.dtype, name=STACK)(x, None)
        x = nn.RMSNorm(dtype=self.dtype, name="norm")(x)
        return nn.Dense(self.symbols, use_bias=False, dtype=self.dtype, name="head")(x)

    def _gathered(self, variables: Any) -> Any:
        return {"params": self.gather(variables["params"])}


class Block(nn.Module):
    """Attention and a perceptron, each added to what goes in."""

    heads: int
    """The attention heads."""

    layers: int
    """The number of blocks of the whole network."""

    dtype: Any
    """The dtype of the computation."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """The next block's input (examples, places, width), and None: a scan wants a pair in and out."""
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        # Each block adds two of these: begun smaller, so that their sum does not grow with the layers, as in GPT-2.
        small = nn.initializers.variance_scaling(0.5 / self.layers, "fan_in", "truncated_normal")
        width = x.shape[-1]
        by_head = (*x.shape[:-1], self.heads, width // self.heads)

        y = nn.RMSNorm(dtype=self.dtype, name="before_attention")(x)
        query, key, value = (dense(width, name=name)(y).reshape(by_head) for name in ("query", "key", "value"))
        mixed = jax.nn.dot_product_attention(rotated(query), rotated(key), value, is_causal=True)
        x = x + dense(width, kernel_init=small, name="out")(mixed.reshape(x.shape))

        y = nn.RMSNorm(dtype=self.dtype, name="before_perceptron")(x)
        y = nn.gelu(dense(4 * width, name="up")(y))
        return x + dense(width, kernel_init=small, name="down")(y), None


def rotated(x: jax.Array) -> jax.Array:
    """Queries or keys (examples, places, heads, features), their pairs turned by angles that grow with the place.

    The number of features must be even. Number `i` of the first half and of the second are a pair, whose angle is the
    place times `10000 ** (-i / half)`. So the product of a query and a key depends on how far apart they are.
    """
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-jnp.arange(half) / half)
    angle = jnp.arange(x.shape[1])[:, None, None] * frequency
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
