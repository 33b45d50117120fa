"""Flax Linen modules: mean-only batch normalization, weight normalization's companion."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes
from flax.typing import Dtype, Initializer

from wn_jax._node import norm_dtype


class MeanOnlyBatchNorm(nn.Module):
    """Batch normalization without the division: `y = x - mean[x] + bias`.

    Meant for the pre-activation of a weight-normalized layer without a bias of its own: weight normalization fixes
    the scale, and this the mean. The gradient with respect to the pre-activation is centred. Attributes are those of
    `flax.linen.BatchNorm` that have a meaning here.

    Statistics are computed in float32 at least. The running mean is kept in float32 in the collection `batch_stats`,
    which must be mutable while the batch's mean is used; it does not move during `init`.

    Attributes:
        use_running_average: subtract the running mean (at test time) instead of the batch's.
        axis: the feature axis or axes; the mean runs over all others.
        momentum: decay of the running mean, per call.
        dtype: the dtype of the result (default: that of the input and the bias, promoted).
        param_dtype: the dtype of the bias.
        use_bias: whether to add a learned bias, one number a feature.
        bias_init: initializer of the bias.
        axis_name: the mapped axis, of `vmap`, `pmap` or `shard_map`, over which to average the mean. Under `jit` on
            sharded arrays the mean is that of the global batch without it.
        axis_index_groups: groups of devices along `axis_name` that average among themselves.

    Source: Salimans & Kingma 2016, arXiv 1602.07868, section 4, equations 7 and 8.

    >>> layer = MeanOnlyBatchNorm(use_running_average=False)
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, updates = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    >>> y
    Array([[ -1., -10.],
           [  1.,  10.]], dtype=float32)
    """

    use_running_average: bool | None = None
    axis: int | tuple[int, ...] = -1
    momentum: float = 0.99
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    bias_init: Initializer = nn.initializers.zeros
    axis_name: str | None = None
    axis_index_groups: Any = None

    @nn.compact
    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        """Subtract the mean of every feature and add the bias.

        Arguments:
            x: an array with the features on `axis`.
            use_running_average: as the attribute; to be given in exactly one of the two places.
            mask: booleans that broadcast to `x`; positions at False do not count in the mean.

        Returns:
            An array of the shape of `x`.
        """
        running = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        feature_axes = self._feature_axes(x.ndim)
        batch_axes = tuple(axis for axis in range(x.ndim) if axis not in feature_axes)
        shape = [x.shape[axis] for axis in sorted(feature_axes)]
        wide = norm_dtype(x.dtype)

        average = self.variable("batch_stats", "mean", lambda: jnp.zeros(shape, jnp.float32))
        if running:
            mean = average.value
        else:
            mean = self._batch_mean(x.astype(wide), batch_axes, mask)
            if not self.is_initializing():
                average.value = (self.momentum * average.value + (1 - self.momentum) * mean).astype(jnp.float32)

        arguments = [x]
        y = x.astype(wide) - jnp.expand_dims(mean, batch_axes).astype(wide)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
            y = y + jnp.expand_dims(bias, batch_axes).astype(wide)
            arguments.append(bias)
        return y.astype(dtypes.canonicalize_dtype(*arguments, dtype=self.dtype))

    def _feature_axes(self, ndim: int) -> set[int]:
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        if not all(-ndim <= axis < ndim for axis in axes):
            raise ValueError(f"MeanOnlyBatchNorm: axis {self.axis} is out of range for an input of {ndim} dimensions")
        return {axis % ndim for axis in axes}

    def _batch_mean(self, x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None) -> jax.Array:
        """The mean over `axes` and the devices of `axis_name`. Sums are added up, so that each example counts once."""
        counted = jnp.ones((1,) * x.ndim, bool) if mask is None else mask
        total = jnp.sum(x, axes, where=counted)
        count = jnp.sum(jnp.broadcast_to(counted, x.shape), axes, dtype=x.dtype)
        if self.axis_name is not None and not self.is_initializing():
            total, count = jax.lax.psum((total, count), self.axis_name, axis_index_groups=self.axis_index_groups)
        return total / jnp.maximum(count, 1)
