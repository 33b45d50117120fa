"""For Flax Linen: mean-only batch normalization, and the parameters of `flax.linen.WeightNorm` as nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict, freeze
from flax.typing import Dtype, Initializer

from wn_jax import _mean_only
from wn_jax._flax_weight_norm import EPSILON, FeatureAxes, linen_nodes
from wn_jax._types import Params

__all__ = ["MeanOnlyBatchNorm", "from_weight_norm"]


def __dir__() -> list[str]:
    return __all__


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
    axis_index_groups: Sequence[Sequence[int]] | None = None

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
        axes = _mean_only.batch_axes(self.axis, x.ndim)
        shape = [size for axis, size in enumerate(x.shape) if axis not in axes]

        average = self.variable("batch_stats", "mean", lambda: jnp.zeros(shape, jnp.float32))
        if running:
            mean = average.value
        else:
            axis_name = None if self.is_initializing() else self.axis_name
            mean = _mean_only.batch_mean(x, axes, mask, axis_name, self.axis_index_groups)
            if not self.is_initializing():
                average.value = _mean_only.moved(average.value, mean, self.momentum)

        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        return _mean_only.centred(x, mean, bias, axes, self.dtype)


def from_weight_norm(params: Mapping[str, Any], feature_axes: FeatureAxes = -1, epsilon: float = EPSILON) -> Params:
    """The parameters of a model with `flax.linen.WeightNorm` layers, for the same model without them: same function.

    Each weight with a scale becomes a `WeightNorm` node with the axes that Flax normalized over. `v` is Flax's (so
    training goes on with the same `||v||`), and `g` its scale, less what Flax's epsilon takes from it. The wrapped
    layers move to where they are without the wrapper: `wn_jax.wrap(model.apply)` runs the model with
    `nn.WeightNorm(nn.Dense(3))` replaced by `nn.Dense(3)`.

    Flax's axes are wrong for attention and for `ConvTranspose(transpose_kernel=True)`; to go on with the right ones,
    `reconstruct` the result and `reparameterize` it with `infer_axes`.

    Arguments:
        params: what `model.init` returned (variables, or their `"params"`).
        feature_axes: that of the model's `WeightNorm`s.
        epsilon: likewise.

    Returns:
        Nested dicts of the model without wrappers (a `FrozenDict` where that was given). A bias that Flax normalized
        comes back as a plain array of the values that it had.

    Raises:
        ValueError: no scale is found; a `WeightNorm` without a scale (`use_scale=False`) shows by a gap; or shapes do
            not fit `feature_axes`. (The last `WeightNorm` of a scope shows by no gap: look at the outputs. A stack of
            layers must be on the leading axis, where `nn.scan` puts it with `variable_axes={"params": 0}`.)

    >>> x = jnp.array([[1.0, 2.0, 3.0]])
    >>> theirs = nn.Sequential([nn.WeightNorm(nn.Dense(2))])
    >>> params = theirs.init(jax.random.key(0), x)
    >>> ours = nn.Sequential([nn.Dense(2)])
    >>> import wn_jax
    >>> bool(jnp.allclose(wn_jax.wrap(ours.apply)(from_weight_norm(params), x), theirs.apply(params, x)))
    True
    """
    nodes = linen_nodes(params, feature_axes, epsilon)
    return freeze(nodes) if isinstance(params, FrozenDict) else nodes
