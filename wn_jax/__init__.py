"""Weight normalization for any JAX model, as a transform of its parameter tree."""

from wn_jax import _interop as _interop
from wn_jax._data_init import init_from_data as init_from_data
from wn_jax._node import WeightNorm as WeightNorm
from wn_jax._saving import load as load
from wn_jax._saving import save as save
from wn_jax._shard_map import in_shard_map as in_shard_map
from wn_jax._sharding import shardings as shardings
from wn_jax._transform import kernel_axes as kernel_axes
from wn_jax._transform import labels as labels
from wn_jax._transform import reconstruct as reconstruct
from wn_jax._transform import reparameterize as reparameterize
from wn_jax._uses import infer_axes as infer_axes
from wn_jax._uses import weight_uses as weight_uses
from wn_jax._wrap import wrap as wrap

__version__ = "0.1.0"
