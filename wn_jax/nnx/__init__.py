"""Weight normalization for Flax NNX models.

`WeightNormed(model, axes)` is an NNX module that holds a weight-normalized model and works where the model works. The
functional way needs nothing from here: an `nnx.State` is a pytree as any other, which `wn_jax.reparameterize` takes,
and `wn_jax.wrap` a function that merges it. (`nnx.filter_state` goes before `reparameterize`, as it drops nodes.)
"""

from wn_jax.nnx._from_weight_norm import from_weight_norm as from_weight_norm
from wn_jax.nnx._functional import infer_axes as infer_axes
from wn_jax.nnx._functional import init_from_data as init_from_data
from wn_jax.nnx._functional import on_nodes as on_nodes
from wn_jax.nnx._functional import split as split
from wn_jax.nnx._functional import update as update
from wn_jax.nnx._mean_only import MeanOnlyBatchNorm as MeanOnlyBatchNorm
from wn_jax.nnx._weight_normed import WeightNormed as WeightNormed
