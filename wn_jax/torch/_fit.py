"""An array or a node of a checkpoint in the place of a leaf of the target: its shape, axes, dtype, box and devices.

This file owns one leaf. Which value goes to which leaf is `_flax`'s.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from wn_jax._boxes import rebox, rebox_reduced, reduced, unbox
from wn_jax._node import WeightNorm, is_node
from wn_jax._norms import norm_dtype
from wn_jax._tree import is_array, sharding_of
from wn_jax._types import Leaf, Shape
from wn_jax.torch._arrays import ArrayOrNode, cast


def fitted(value: ArrayOrNode, leaf: Leaf) -> Leaf:
    """`value` in the place of `leaf`, which gives all but the numbers.

    Where `leaf` is plain and `value` a node, the result is a node.

    Raises:
        ValueError: they do not fit. The message goes on from the name of the value.
    """
    if isinstance(leaf, WeightNorm):
        return _node_for_node(value, leaf)
    if is_node(leaf) or not is_array(unbox(leaf)):
        raise ValueError(f"is an array in the checkpoint and a {type(leaf).__name__} in the target; use a plain target")
    array = unbox(leaf)
    if not isinstance(value, WeightNorm):
        _check_shape(value.shape, array.shape)
        return rebox(leaf, _on_device(value, array.dtype, sharding_of(array)))
    _check_shape(value.v.shape, array.shape)
    v = _on_device(value.v, array.dtype, sharding_of(array))
    _check_directions(value, v)
    # A plain target has no g to give its dtype and sharding, so these are the ones that `reparameterize` would give it.
    g = _on_device(value.g, norm_dtype(v.dtype), reduced(sharding_of(array), v.ndim, value.axes))
    return WeightNorm(rebox_reduced(leaf, g, v.ndim, value.axes), rebox(leaf, v), value.axes)


def _node_for_node(value: ArrayOrNode, leaf: WeightNorm) -> WeightNorm:
    """The node in the place of a node of the target, whose norm must run over the same axes."""
    if not isinstance(value, WeightNorm):
        raise ValueError(
            "is a plain weight in the checkpoint and a node in the target; use a plain target, and reparameterize the "
            "result"
        )
    g, v = unbox(leaf.g), unbox(leaf.v)
    _check_shape(value.v.shape, v.shape)
    whole = [len(axes) == v.ndim for axes in (value.axes, leaf.axes)]  # PyTorch has another g for all of a tensor
    if value.g.shape != g.shape or whole[0] != whole[1]:
        raise ValueError(
            f"has a norm over the axes {value.axes} in the checkpoint, and over {leaf.axes} in the target. For the "
            "checkpoint's axes, use a plain target; for others, reconstruct the result and reparameterize it"
        )
    new_g = _on_device(value.g, g.dtype, sharding_of(g))
    new_v = _on_device(value.v, v.dtype, sharding_of(v))
    _check_directions(value, new_v)
    return WeightNorm(rebox(leaf.g, new_g), rebox(leaf.v, new_v), leaf.axes)


def _check_shape(shape: Shape, wanted: Shape) -> None:
    """Raises where the shapes differ, naming the order of axes in which they would not."""
    if shape == wanted:
        return
    orders = itertools.permutations(range(len(shape))) if len(shape) == len(wanted) else ()
    fitting = next((order for order in orders if tuple(shape[i] for i in order) == wanted), None)
    transposed = (
        f": it fits only transposed, its axes in the order {fitting}. Is it another layer (conv, conv_transpose, "
        "linear), or has it groups, or transpose_kernel?"
        if fitting
        else ""
    )
    raise ValueError(f"has the shape {shape} in Flax's layout, where the target has {wanted}{transposed}")


def _check_directions(node: WeightNorm, v: jax.Array) -> None:
    """Raises where a direction became zero in the dtype of the target, and the weight with it."""
    if v.dtype != node.v.dtype and ((np.asarray(v) != 0).any(node.axes) != (node.v != 0).any(node.axes)).any():
        raise ValueError(f"has a direction that is zero in {v.dtype}, the target's dtype; use another in the target")


def _on_device(value: np.ndarray, dtype: np.dtype, sharding: Sharding | None) -> jax.Array:
    """A JAX array of its own with these numbers."""
    if jnp.issubdtype(value.dtype, jnp.floating) and np.isnan(value).any():
        raise ValueError("has NaN in it: the model diverged before it was saved")
    try:
        array = cast(value, jax.dtypes.canonicalize_dtype(dtype))  # a copy: JAX may go on using its memory
    except ValueError as error:
        raise ValueError(f"{error}, the target's dtype; use another in the target, or cast the checkpoint") from None
    return jax.device_put(array, sharding)
