"""The arithmetic of mean-only batch normalization, for the modules in `wn_jax.linen` and `wn_jax.nnx`.

Source: Salimans & Kingma 2016, arXiv 1602.07868, section 4, equation 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax.linen import dtypes
from flax.typing import Dtype

from wn_jax._norms import norm_dtype


def batch_axes(axis: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The axes that the mean runs over: all but the feature axes."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    if not all(-ndim <= axis < ndim for axis in axes):
        raise ValueError(f"MeanOnlyBatchNorm: axis {axis} is out of range for an input of {ndim} dimensions")
    features = {axis % ndim for axis in axes}
    return tuple(axis for axis in range(ndim) if axis not in features)


def batch_mean(
    x: jax.Array,
    axes: tuple[int, ...],
    mask: jax.Array | None,
    axis_name: str | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> jax.Array:
    """The mean over `axes` and the devices of `axis_name`. Sums are added up, so that each example counts once."""
    x = x.astype(norm_dtype(x.dtype))
    counted = jnp.ones((1,) * x.ndim, bool) if mask is None else mask
    total = jnp.sum(x, axes, where=counted)
    count = jnp.sum(jnp.broadcast_to(counted, x.shape), axes, dtype=x.dtype)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name, axis_index_groups=axis_index_groups)
    return total / jnp.maximum(count, 1)


def moved(average: jax.Array, mean: jax.Array, momentum: float) -> jax.Array:
    """The running mean after a batch."""
    return (momentum * average + (1 - momentum) * mean).astype(jnp.float32)


def centred(
    x: jax.Array, mean: jax.Array, bias: jax.Array | None, axes: tuple[int, ...], dtype: Dtype | None
) -> jax.Array:
    """`x - mean + bias`, computed in float32 at least; by default of the dtype that `x` and `bias` promote to."""
    wide = norm_dtype(x.dtype)
    y = x.astype(wide) - jnp.expand_dims(mean, axes).astype(wide)
    if bias is not None:
        y = y + jnp.expand_dims(bias, axes).astype(wide)
    return y.astype(dtypes.canonicalize_dtype(x, bias, dtype=dtype))
