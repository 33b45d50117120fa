"""From the parameters of `flax.linen.WeightNorm` and `flax.nnx.WeightNorm` to nodes, of the same function.

Both compute `scale * v / sqrt(||v||^2 + epsilon)`, the norm running over all axes but `feature_axes`. They keep
`scale` apart from the layer: Linen in the scope of the `WeightNorm`, under the layer's path joined by `/`; NNX in a
dict `scales` beside the `layer_instance`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from wn_jax._boxes import rebox, unbox
from wn_jax._node import WeightNorm, is_node
from wn_jax._norms import norm_dtype
from wn_jax._types import Leaf, PyTree

FeatureAxes: TypeAlias = int | Sequence[int] | None
"""The axes over which Flax's norms do not run."""

EPSILON = 1e-12
"""Flax's default."""

Scope: TypeAlias = dict[Any, Any]
"""A nested dict: the scopes of a Linen model by their names, or the attributes of an NNX model, with leaves in them."""


class _Options(NamedTuple):
    """The arguments of Flax's `WeightNorm` that its parameters do not tell."""

    feature_axes: FeatureAxes
    """The axes over which the norm does not run."""
    epsilon: float
    """Added to the squared norm."""


def linen_nodes(params: Mapping[str, Any], feature_axes: FeatureAxes, epsilon: float) -> dict[str, Any]:
    """Nested dicts in which weights with a scale are nodes, and the scales and the wrappers' scopes are gone."""
    tree = _as_dicts(params)
    found, tree = _convert_linen(tree, tree, "", _Options(feature_axes, epsilon))
    _check_complete(found, tree)
    return tree


def nnx_nodes(state: Mapping[Any, Any], feature_axes: FeatureAxes, epsilon: float) -> Scope:
    """The same for the state of an NNX model, as nested dicts."""
    tree = _as_dicts(state)
    found, tree = _convert_nnx(tree, "", _Options(feature_axes, epsilon))
    _check_complete(found, tree)
    return tree


def folded(
    weight: Leaf, scale: Leaf, feature_axes: FeatureAxes, epsilon: float, path: str
) -> tuple[jax.Array, tuple[int, ...]]:
    """A weight with its scale (`None`: of ones) multiplied in, and the axes that its norm ran over."""
    factors = _factors(weight, scale, feature_axes, path)
    v = factors.v
    length = jnp.sqrt(jnp.sum(v * v, factors.axes, keepdims=True) + epsilon)
    return (v * (factors.g / length)).astype(v.dtype), factors.axes


def _node(weight: Leaf, scale: Leaf, options: _Options, path: str) -> Leaf:
    """The node of a weight, or a plain weight where Flax's norm runs over no axes, as that of a bias does."""
    v, g, wide, axes = _factors(weight, scale, options.feature_axes, path)
    squares = jnp.sum(jnp.square(v.astype(wide)), axes, keepdims=True)
    if not axes:
        return rebox(weight, (v * (g / jnp.sqrt(squares + options.epsilon))).astype(v.dtype))

    node = WeightNorm.from_weight(rebox(weight, v), axes)  # its v, which is right for zero vectors too
    # Flax divides by sqrt(||v||^2 + epsilon), and a node by ||v||.
    g = g * jnp.sqrt(squares / (squares + options.epsilon))
    return dataclasses.replace(node, g=rebox(node.g, g.astype(wide)))


class _Factors(NamedTuple):
    """A weight as Flax factors it."""

    v: jax.Array
    g: jax.Array
    """The scale, shaped to multiply `v`, in the dtype of the norm."""
    dtype: jnp.dtype
    """Of the norm."""
    axes: tuple[int, ...]
    """That the norm runs over, counted from the end."""


def _factors(weight: Leaf, scale: Leaf, feature_axes: FeatureAxes, path: str) -> _Factors:
    if is_node(weight):
        raise ValueError(f"{path!r} is wrapped by two flax WeightNorms, which no node can stand for")
    v = jnp.asarray(unbox(weight))
    given = () if feature_axes is None else (feature_axes,) if isinstance(feature_axes, int) else tuple(feature_axes)

    # A stack of layers (nn.scan, nn.vmap) has leading axes that weight and scale share, and feature_axes do not count.
    copies = 0 if scale is None else jnp.ndim(unbox(scale)) - len(given)
    rank = v.ndim - copies
    features = sorted({copies + axis % rank for axis in given if -rank <= axis < rank}) if copies >= 0 else []
    shape = (*v.shape[: max(copies, 0)], *(v.shape[axis] for axis in features))

    scale = jnp.ones(shape, v.dtype) if scale is None else jnp.asarray(unbox(scale))
    if scale.shape != shape or len(features) != len(given) or (copies and rank < 2):
        raise ValueError(
            f"{path!r} has shape {v.shape} and a scale of shape {scale.shape}, which are not those of feature_axes "
            f"{feature_axes}; pass the feature_axes of this flax WeightNorm"
        )

    kept = {*range(copies), *features}
    axes = tuple(axis - v.ndim for axis in range(v.ndim) if axis not in kept)
    v = v.astype(jnp.promote_types(v.dtype, scale.dtype))  # Flax's weight has the dtype of the product
    wide = norm_dtype(v.dtype)
    g = jnp.asarray(scale, wide).reshape([size if axis in kept else 1 for axis, size in enumerate(v.shape)])
    return _Factors(v, g, wide, axes)


def _convert_linen(tree: Scope, parent: Scope, path: str, options: _Options) -> tuple[int, Scope]:
    """The number of nodes that were made, and the scope as it is without wrappers.

    A wrapped layer is in the scope of its wrapper, or beside it.
    """
    found = 0
    _check_unbroken(tree, path)
    for key, child in _children(tree):
        count, child = _convert_linen(child, tree, f"{path}{key}/", options)
        found += count
        tree[key] = child
        if count and not child:  # it held scales only
            del tree[key]

    scales = [key for key in tree if isinstance(key, str) and key.endswith("/scale")]
    for key in scales:
        owner, name = _owner(tree, parent, key, path)
        owner[name] = _node(owner[name], tree.pop(key), options, path + key.removesuffix("/scale"))
    moves_up = scales and set(tree) == {"layer_instance"}  # as without the wrapper
    return found + len(scales), tree["layer_instance"] if moves_up else tree


def _owner(tree: Scope, parent: Scope, key: str, path: str) -> tuple[Scope, str]:
    """The dict with the weight whose scale is at `key` of `tree`, and the weight's name there."""
    *layer, name = key.removesuffix("/scale").split("/")
    owner = _at(tree, layer, name) or _at(parent, layer, name)
    if owner is None and layer:  # the last key may be that of a box, such as nn.Partitioned
        *layer, name = layer
        owner = _at(tree, layer, name) or _at(parent, layer, name)
    if owner is None:
        raise ValueError(
            f"{path + key!r} is the scale of a weight that is not there. Pass the whole tree. (Of WeightNorms "
            "within one another, or around an nn.RNN, the tree does not tell which weights they are for.)"
        )
    return owner, name


def _convert_nnx(tree: Scope, path: str, options: _Options) -> tuple[int, Scope]:
    """The same for the attributes of an NNX model, where the layer and its scales are beside each other."""
    found = 0
    for key, child in _children(tree):
        count, tree[key] = _convert_nnx(child, f"{path}{key}/", options)
        found += count
    if set(tree) != {"layer_instance", "scales"}:
        return found, tree

    layer = tree["layer_instance"]
    for key, scale in tree["scales"].items():
        *inner, name = key if isinstance(key, tuple) else (key,)
        owner = _at(layer, inner, name)
        if owner is None:
            raise ValueError(f"{path}scales has {key!r}, which layer_instance has not; pass the whole state")
        owner[name] = _node(owner[name], scale, options, path + "/".join(map(str, (*inner, name))))
    return found + len(tree["scales"]), layer


def _at(tree: PyTree, keys: Sequence[Any], name: str) -> Scope | None:
    """The dict below `tree` that has `name`, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) and name in tree else None


def _as_dicts(tree: PyTree) -> PyTree:
    """A copy in which all mappings are dicts, to be changed in place."""
    return {key: _as_dicts(child) for key, child in tree.items()} if isinstance(tree, Mapping) else tree


def _children(tree: Scope) -> list[tuple[Any, Scope]]:
    return [(key, child) for key, child in tree.items() if isinstance(child, dict)]


def _check_unbroken(tree: Scope, path: str) -> None:
    """Raises where numbered wrappers are missing between others: without a scale, they leave no trace but that."""
    numbers = sorted(int(key[11:]) for key in tree if re.fullmatch(r"WeightNorm_\d+", str(key)))
    if missing := set(range(numbers[-1])) - set(numbers) if numbers else set():
        raise ValueError(
            f"{path}WeightNorm_{min(missing)} is missing: a WeightNorm without a scale (use_scale=False) leaves no "
            "parameters, so nothing tells which weight it normalizes. Give it a scale of ones, or pass the whole tree"
        )


def _check_complete(found: int, tree: Scope) -> None:
    """Raises where no node was made, or a layer is still in a wrapper."""
    if not found:
        raise ValueError(
            "there is no scale of a flax WeightNorm in this tree (with use_scale=False it leaves none); pass the "
            "parameters as model.init or nnx.state returned them"
        )
    if path := _leftover(tree, ""):
        raise ValueError(
            f"{path} has no scale beside it: a WeightNorm without one (use_scale=False) leaves no parameters that "
            "would tell which weights it normalizes. Give it a scale of ones"
        )


def _leftover(tree: Scope, path: str) -> str | None:
    """The path of a layer that is still in a wrapper."""
    for key, child in _children(tree):
        here = f"{path}{key}"
        if inner := here if key == "layer_instance" else _leftover(child, f"{here}/"):
            return inner
    return None
