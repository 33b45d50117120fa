"""For Equinox: models with `equinox.nn.WeightNorm`, or with paramax's `WeightNormalization`, as models with nodes.

Neither library is imported here. All else that Equinox needs is in `wn_jax` itself, as its models are trees.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from wn_jax._foreign import EQUINOX, is_a, is_weight_norm
from wn_jax._node import WeightNorm, is_node
from wn_jax._norms import norm_dtype
from wn_jax._tree import is_array, leaf_path
from wn_jax._types import Leaf, Shape

__all__ = ["from_weight_norm"]

Model = TypeVar("Model")


def __dir__() -> list[str]:
    return __all__


def from_weight_norm(model: Model) -> Model:
    """A model in which each `equinox.nn.WeightNorm` and each paramax `WeightNormalization` is a node: same function.

    An `equinox.nn.WeightNorm(layer)` becomes its layer, whose weight is a `WeightNorm` node; a paramax
    `WeightNormalization` becomes a node where it stands. The norms run over the axes that they run over there, also in
    layers that `eqx.filter_vmap` stacked; `v` keeps its values and `g` has those of the scale (of paramax's, which is
    trained through a softplus, what the softplus gives). Run the result by `wn_jax.wrap`. Where a model has other
    wrappers of paramax, its function still calls `paramax.unwrap`.

    These axes are a convention and may be wrong for a layer, as Equinox' are for transposed convolutions in groups. To
    go on with those that the program sums over, `reconstruct` the result and `reparameterize` it with `infer_axes`.

    A vector of zeros, of which both libraries make NaN, becomes a weight of zeros that trains.

    Arguments:
        model: an Equinox model, or any tree with such modules in it.

    Returns:
        A new model. What is no weight norm is in it as it was.

    Raises:
        ValueError: there is no weight norm in the model; a weight is wrapped twice; a half is in another wrapper of
            paramax (`NonTrainable`), or abstract; the shapes of the halves do not fit.

    Source: `equinox.nn.WeightNorm` of Equinox 0.13, `paramax.WeightNormalization` of paramax 0.0.5.

    >>> import equinox as eqx, jax, jax.numpy as jnp, wn_jax as wn
    >>> def call(model, x):
    ...     return jax.vmap(model)(x)
    >>> theirs, x = eqx.nn.WeightNorm(eqx.nn.Linear(4, 3, key=jax.random.key(0))), jnp.ones((2, 4))
    >>> ours = from_weight_norm(theirs)
    >>> type(ours).__name__, ours.weight.axes, bool(jnp.allclose(wn.wrap(call)(ours, x), call(theirs, x)))
    ('Linear', (-1,), True)
    """
    pairs, treedef = jax.tree.flatten_with_path(model, is_leaf=_is_whole)
    if not any(is_weight_norm(leaf) for _, leaf in pairs):
        raise ValueError(
            "found no equinox.nn.WeightNorm and no paramax.WeightNormalization in the model. Plain weights become "
            "nodes by wn_jax.reparameterize(model, axes)"
        )
    return jax.tree.unflatten(treedef, [_converted(leaf, leaf_path(keys)) for keys, leaf in pairs])


def _is_whole(x: Leaf) -> bool:
    return is_node(x) or is_weight_norm(x)


def _converted(leaf: Leaf, path: str) -> Leaf:
    """A leaf as it was, or what a weight norm becomes."""
    if not is_weight_norm(leaf):
        return leaf
    try:
        return _layer(leaf) if is_a(leaf, EQUINOX) else _node_of_paramax(leaf)
    except ValueError as error:
        raise ValueError(f"the {type(leaf).__name__} at {path!r} {error}") from None


def _layer(wrapper: Leaf) -> Leaf:
    """The layer in Equinox' wrapper, with a node for its weight. The message of its errors goes on from the wrapper."""
    name, found = wrapper.weight_name, False
    pairs, treedef = jax.tree.flatten_with_path(wrapper.layer, is_leaf=_is_whole)
    leaves = []
    for keys, leaf in pairs:
        if leaf_path(keys) == name:
            found, leaf = True, _node_of_equinox(leaf, wrapper.g, wrapper.axis)
        elif is_weight_norm(leaf):
            leaf = _converted(leaf, leaf_path(keys))
        leaves.append(leaf)
    if not found:
        raise ValueError(
            f"wraps a {type(wrapper.layer).__name__} that has no array {name!r}. A weight that is wrapped twice is "
            "none that a node can stand for"
        )
    return jax.tree.unflatten(treedef, leaves)


def _node_of_equinox(v: Leaf, g: Leaf, axis: int | None) -> WeightNorm | jax.Array:
    """Of Equinox' halves: the norm runs over all axes of the layer's weight but one, or over all.

    Of a weight with a single axis (a bias) that is no axis at all, and the weight a plain one.
    """
    _check_halves(v, g)
    axes = next((axes for copies in range(v.ndim) if (axes := _reduced(v.shape, g.shape, axis, copies))), None)
    if axes is None and g.shape == v.shape:
        return v * g / jnp.abs(v)
    if axes is None:
        raise ValueError(f"has a g of shape {g.shape}, which is not one of a weight of shape {v.shape} for axis={axis}")
    return _node(v, g, axes)


def _reduced(v: Shape, g: Shape, axis: int | None, copies: int) -> tuple[int, ...]:
    """The reduction axes of a stack of `copies` leading axes; none where `g` has another shape."""
    rank = len(v) - copies
    if axis is not None and not -rank <= axis < rank:
        return ()
    kept = () if axis is None else (axis % rank,)
    reduced = tuple(i - rank for i in range(rank) if i not in kept)
    shape = tuple(1 if i - len(v) in reduced else size for i, size in enumerate(v))
    return reduced if g == shape else ()


def _node_of_paramax(wrapper: Leaf) -> WeightNorm:
    """Of paramax' halves: the norm runs over the last axis, and the scale comes out of a softplus."""
    v, scale = wrapper.weight, wrapper.scale
    if not is_array(scale):
        parts = jax.tree.leaves(scale, is_leaf=lambda x: x is not scale and hasattr(type(x), "unwrap"))
        if not hasattr(type(scale), "unwrap") or any(hasattr(type(part), "unwrap") for part in parts):
            raise ValueError(f"has a scale in a {type(scale).__name__} that no node can stand for; unwrap that first")
        scale = scale.unwrap()
    _check_halves(v, scale)
    if scale.shape != (*v.shape[:-1], 1):
        raise ValueError(f"has a scale of shape {scale.shape}, which is not one of a weight of shape {v.shape}")
    return _node(v, scale, (-1,))


def _check_halves(v: Leaf, g: Leaf) -> None:
    for name, half in (("weight", v), ("scale", g)):
        if is_weight_norm(half) or is_node(half):
            raise ValueError("wraps a weight that is wrapped already, which no node can stand for")
        if not is_array(half) or isinstance(half, jax.ShapeDtypeStruct):
            raise ValueError(
                f"has a {type(half).__name__} as its {name}, and not an array; where that is a wrapper of paramax, "
                "unwrap it first"
            )
        if not jnp.issubdtype(half.dtype, jnp.floating):
            raise ValueError(f"has a {name} of {half.dtype}, which has no norm")


def _node(v: Leaf, g: Leaf, axes: tuple[int, ...]) -> WeightNorm:
    """The node of the halves of a foreign weight norm, whose weight has the dtype of their product."""
    v = jnp.asarray(v, jnp.promote_types(v.dtype, g.dtype))
    node = WeightNorm.from_weight(v, axes)  # its v, which is right for zero vectors too
    g = jnp.asarray(g, norm_dtype(v.dtype)).reshape(node.g.shape)
    return dataclasses.replace(node, g=jnp.where(jnp.any(v != 0, axes, keepdims=True), g, 0))
