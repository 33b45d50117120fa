"""Mean-only batch normalization as a Flax NNX module."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from wn_jax import _mean_only


class MeanOnlyBatchNorm(nnx.Module):
    """Batch normalization without the division: `y = x - mean[x] + bias`.

    Meant for the pre-activation of a weight-normalized layer without a bias of its own: weight normalization fixes
    the scale, and this the mean. The gradient with respect to the pre-activation is centred. Arguments are those of
    `flax.nnx.BatchNorm` that have a meaning here; `train()`, `eval()` and `nnx.view` switch it likewise.

    Statistics are computed in float32 at least. The running mean is an `nnx.BatchStat`, in float32.

    Arguments:
        num_features: the size of the feature axis.
        use_running_average: subtract the running mean (at test time) instead of the batch's.
        axis: the feature axis; the mean runs over all others.
        momentum: decay of the running mean, per call.
        dtype: the dtype of the result (default: that of the input and the bias, promoted).
        param_dtype: the dtype of the bias.
        use_bias: whether to add a learned bias, one number a feature.
        bias_init: initializer of the bias.
        axis_name: the mapped axis, of `vmap`, `pmap` or `shard_map`, over which to average the mean. Under `jit` on
            sharded arrays the mean is that of the global batch without it.
        axis_index_groups: groups of devices along `axis_name` that average among themselves.
        rngs: for `bias_init`.

    Source: Salimans & Kingma 2016, arXiv 1602.07868, section 4, equations 7 and 8.

    >>> layer = MeanOnlyBatchNorm(2, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
    Array([[ -1., -10.],
           [  1.,  10.]], dtype=float32)
    >>> layer.mean[...]
    Array([0.02      , 0.19999999], dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool = False,
        axis: int = -1,
        momentum: float = 0.99,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        axis_name: str | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.mean = nnx.BatchStat(jnp.zeros(num_features, jnp.float32))
        self.bias = nnx.data(nnx.Param(bias_init(rngs.params(), (num_features,), param_dtype)) if use_bias else None)
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.dtype = dtype
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        """Subtract the mean of every feature and add the bias.

        Arguments:
            x: an array with `num_features` features on `axis`.
            use_running_average: in place of the attribute.
            mask: booleans that broadcast to `x`; positions at False do not count in the mean.

        Returns:
            An array of the shape of `x`.

        Raises:
            ValueError: `x` has another number of features.
        """
        axes = _mean_only.batch_axes(self.axis, x.ndim)
        if x.shape[self.axis] != self.num_features:
            raise ValueError(
                f"MeanOnlyBatchNorm has {self.num_features} features, but axis {self.axis} of an input of shape "
                f"{x.shape} has {x.shape[self.axis]}"
            )
        if self.use_running_average if use_running_average is None else use_running_average:
            mean = self.mean[...]
        else:
            mean = _mean_only.batch_mean(x, axes, mask, self.axis_name, self.axis_index_groups)
            self.mean[...] = jax.lax.stop_gradient(_mean_only.moved(self.mean[...], mean, self.momentum))
        bias = None if self.bias is None else self.bias[...]
        return _mean_only.centred(x, mean, bias, axes, self.dtype)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """For `nnx.view`.

        Args:
          use_running_average: if True, the running mean is subtracted instead of the batch's.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
