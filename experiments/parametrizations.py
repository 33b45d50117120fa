"""The parametrizations of a model's weights: as they are, weight-normalized, or with a scale that stays.

To add one, name it in `Name` and say in `rewrite` what it makes of the parameters; where it has a node of its own, say
in `is_frozen` and `_vectors` which of its arrays are not trained, and what the norms of its vectors are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

import wn_jax as wn
from experiments.errors import ConfigError

Name = Literal["plain", "weight_norm", "frozen_scale"]
Axes = dict[str, tuple[int, ...]]
"""The reduction axes of each weight, by its path."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("v", "scale"), meta_fields=("axes",))
@dataclasses.dataclass(frozen=True, eq=False)
class FrozenScale:
    """A weight `scale * v` of which only `v` is trained.

    So the paper's code initializes its network without weight normalization from data: `v` keeps the size that it was
    drawn with, which is what the step size of Adam is relative to.
    """

    v: Any
    """The array that is trained, of the weight's shape."""

    scale: Any
    """A number for each feature, of the shape of `WeightNorm.g`."""

    axes: tuple[int, ...]
    """The reduction axes, over which `scale` has size 1."""

    def weight(self) -> jax.Array:
        """The weight."""
        v, scale = self.factors()
        return (v * scale).astype(v.dtype)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """`v` and the scale, which no gradient reaches."""
        return self.v, jax.lax.stop_gradient(self.scale)


def rewrite(name: Name, params: Any, axes: Axes, from_data: Callable[[Any], Any] | None) -> Any:
    """The parameters with their weights in a parametrization.

    Arguments:
        name: the parametrization.
        params: plain parameters.
        axes: the reduction axes of the weights, as `wn.infer_axes` gives them.
        from_data: sets the magnitudes and biases of a tree with `WeightNorm` nodes, or None.

    Raises:
        ConfigError: there is no weight.
    """
    if name == "plain":
        return params
    if not axes:
        raise ConfigError(f"model.weights: the network has no weights that {name!r} could write; leave it out")
    nodes = wn.reparameterize(params, axes)
    if from_data is not None:
        nodes = from_data(nodes)
    return nodes if name == "weight_norm" else jax.tree.map(_freeze, nodes, is_leaf=is_node)


def is_frozen(params: Any) -> Any:
    """A tree like `params`, with True at the leaves that are not trained."""

    def mark(x: Any) -> Any:
        if isinstance(x, FrozenScale):
            return dataclasses.replace(x, v=False, scale=True)
        return jax.tree.map(lambda _: False, x)

    return jax.tree.map(mark, params, is_leaf=is_node)


def shardings(params: Any, specs: Any) -> Any:
    """A tree like `params`, with the spec of each array.

    `specs` has those of the plain parameters: see `wn.shardings`, which is asked about weight norms in the place of
    frozen scales, as both have arrays of the same shapes.
    """

    def as_weight_norm(x: Any) -> Any:
        return wn.WeightNorm(x.scale, x.v, x.axes) if isinstance(x, FrozenScale) else x

    def as_it_was(x: Any, spec: Any) -> Any:
        return FrozenScale(spec.v, spec.g, x.axes) if isinstance(x, FrozenScale) else spec

    known = wn.shardings(jax.tree.map(as_weight_norm, params, is_leaf=is_node), specs)
    return jax.tree.map(as_it_was, params, known, is_leaf=is_node)


def vectors(params: Any, axes: Axes) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The norms of the vectors that are trained in a weight's place, and of the weight's own, by the weight's path.

    Both have a number for each feature, and the reduced axes with size 1.
    """
    pairs = jax.tree.leaves_with_path(params, is_leaf=is_node)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    return {path: _vectors(leaves[path], reduced) for path, reduced in axes.items()}


def _vectors(leaf: Any, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    trained = leaf.v if is_node(leaf) else leaf
    norm = jnp.sqrt(jnp.sum(jnp.square(trained), axis=axes, keepdims=True))
    if isinstance(leaf, wn.WeightNorm):
        return norm, abs(leaf.g)
    if isinstance(leaf, FrozenScale):
        return norm, norm * abs(leaf.scale)
    return norm, norm


def _freeze(x: Any) -> Any:
    """A weight norm as `v` and a scale that stays; anything else as it is."""
    return FrozenScale(*x.factors(), x.axes) if isinstance(x, wn.WeightNorm) else x


def is_node(x: Any) -> bool:
    """Whether it is a node, which stands for a weight."""
    return isinstance(x, wn.WeightNorm | FrozenScale)
