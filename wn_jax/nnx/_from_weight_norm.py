"""From `flax.nnx.WeightNorm` to `WeightNormed`, and from its state to one with nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

from flax import nnx

from wn_jax._flax_weight_norm import EPSILON, FeatureAxes, folded, nnx_nodes
from wn_jax._types import KeyPath, PyTree
from wn_jax.nnx._weight_normed import WeightNormed


@overload
def from_weight_norm(model: nnx.Module, feature_axes: FeatureAxes = ..., epsilon: float = ...) -> WeightNormed: ...


@overload
def from_weight_norm(model: Mapping[Any, Any], feature_axes: FeatureAxes = ..., epsilon: float = ...) -> nnx.State: ...


def from_weight_norm(
    model: nnx.Module | Mapping[Any, Any], feature_axes: FeatureAxes = -1, epsilon: float = EPSILON
) -> WeightNormed | nnx.State:
    """A model with `flax.nnx.WeightNorm` layers as a `WeightNormed` of the model without them, of the same function.

    The layers inside the wrappers take their places. The axes are those that Flax normalized over, wrong for attention;
    for others, wrap `.plain()` again. `v` is the weight, as Flax writes that to its `v` in every call.

    Arguments:
        model: an NNX module; or the state of one, as from a checkpoint, of which the result is a state with nodes.
        feature_axes: for a state, that of the model's `WeightNorm`s. A module knows it.
        epsilon: likewise.

    Raises:
        ValueError: there is no `flax.nnx.WeightNorm`, or shapes do not fit `feature_axes`.

    >>> import jax.numpy as jnp
    >>> theirs = nnx.Sequential(nnx.WeightNorm(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)), nnx.relu)
    >>> ours = from_weight_norm(theirs)
    >>> type(ours.plain().layers[0]).__name__
    'Linear'
    >>> bool(jnp.allclose(ours(jnp.ones((1, 3))), theirs(jnp.ones((1, 3)))))
    True
    """
    if not isinstance(model, nnx.Module):
        if not isinstance(model, Mapping):
            raise TypeError(f"from_weight_norm takes an NNX module or its state; got a {type(model).__name__}")
        return nnx.State(nnx_nodes(model, feature_axes, epsilon))

    axes: dict[str, tuple[int, ...]] = {}

    def unwrapped(path: KeyPath, part: PyTree) -> PyTree:
        return _fold(path, part, axes) if isinstance(part, nnx.WeightNorm) else part

    plain = nnx.recursive_map(unwrapped, nnx.clone(model, graph=True), graph=True)
    if not axes:
        raise ValueError("the model has no flax.nnx.WeightNorm; WeightNormed(model, axes) wraps a plain one")
    return WeightNormed(plain, axes)


def _fold(path: KeyPath, wrapper: nnx.WeightNorm, axes: dict[str, tuple[int, ...]]) -> nnx.Module:
    """The layer in a wrapper, its weights made what the wrapper makes of them; notes the axes of their norms."""
    for inner, param in nnx.to_flat_state(nnx.state(wrapper.layer_instance, nnx.Param, graph=True)):
        if wrapper.variable_filter(inner, param):
            name = "/".join(map(str, (*path, *inner)))
            # Flax asks `use_scale` in each call: it may have been set after the scales were made.
            scale = wrapper.scales[inner] if wrapper.use_scale and wrapper.scales is not None else None
            weight, reduced = folded(param, scale, wrapper.feature_axes, wrapper.epsilon, name)
            param.set_value(weight)
            if reduced:
                axes[name] = reduced
    return wrapper.layer_instance
