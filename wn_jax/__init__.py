"""Weight normalization for any JAX model, as a transform of its parameter tree."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from wn_jax import _interop as _interop  # registers nodes with flax.serialization and jax.export
from wn_jax import _pickles as _pickles  # lets pickles of before find the classes that moved
from wn_jax._data_init import init_from_data
from wn_jax._from_dicts import nodes_from_dicts
from wn_jax._node import Node, WeightNorm
from wn_jax._saving import load, save
from wn_jax._shard_map import in_shard_map
from wn_jax._sharding import shardings
from wn_jax._transform import kernel_axes, labels, reconstruct, reparameterize
from wn_jax._uses import infer_axes, weight_uses
from wn_jax._wrap import wrap

if TYPE_CHECKING:
    from wn_jax import curvature, linen, nnx, optim, torch

__version__ = "0.1.0"

__all__ = [
    "Node",
    "WeightNorm",
    "__version__",
    "curvature",
    "in_shard_map",
    "infer_axes",
    "init_from_data",
    "kernel_axes",
    "labels",
    "linen",
    "load",
    "nnx",
    "nodes_from_dicts",
    "optim",
    "reconstruct",
    "reparameterize",
    "save",
    "shardings",
    "torch",
    "weight_uses",
    "wrap",
]

# The rest of the family, a module a line, imported when it is first touched: what nobody uses costs nobody time.
_LAZY = (
    "curvature",
    "linen",
    "nnx",
    "optim",
    "torch",
)


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"wn_jax.{name}")
    raise AttributeError(f"module 'wn_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
