"""Weight normalization for Flax NNX models.

`WeightNormed(model, axes)` is an NNX module that holds a weight-normalized model and works where the model works. The
functional way needs nothing from here: an `nnx.State` is a pytree as any other, which `wn_jax.reparameterize` takes,
and `wn_jax.wrap` a function that merges it. (`nnx.filter_state` goes before `reparameterize`, as it drops nodes.)
"""

from wn_jax.nnx._from_weight_norm import from_weight_norm
from wn_jax.nnx._functional import infer_axes, init_from_data, on_nodes, split, update
from wn_jax.nnx._mean_only import MeanOnlyBatchNorm
from wn_jax.nnx._weight_normed import WeightNormed

__all__ = [
    "MeanOnlyBatchNorm",
    "WeightNormed",
    "from_weight_norm",
    "infer_axes",
    "init_from_data",
    "on_nodes",
    "split",
    "update",
]


def __dir__() -> list[str]:
    return __all__
