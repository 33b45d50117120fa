"""The directions `v` of a tree's nodes: statistics of their lengths, and an update rule that keeps them.

What becomes of the lengths that are kept when the parameters are rewritten is for `_moments`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from wn_jax._boxes import rebox, unbox
from wn_jax._node import WeightNorm, is_node
from wn_jax._norms import norm, norm_dtype
from wn_jax._tree import leaf_path, listed, rebuild
from wn_jax._types import KeyPath, Leaf, Params


def direction_stats(params: Params, reduce: Callable[[jax.Array], Any] | None = jnp.mean) -> dict[str, dict[str, Any]]:
    """Figures to log of every node, by path: `v_norm`, `g` and `effective_step`.

    One pass over `v`, inside or outside `jit`.

    Arguments:
        params: the tree with nodes.
        reduce: how the features of a node become one number; `None` returns one number a feature, shaped as `g`.

    Returns:
        `{path: {"v_norm": ||v||, "g": g, "effective_step": |g| / ||v||^2}}`. The effective step is the factor on the
        learning rate for the direction: a step of plain SGD turns `w/||w||` by `lr * effective_step` times the
        gradient with respect to the weight, as far as that is orthogonal to it. It falls as `||v||` grows.

    >>> stats = direction_stats({"kernel": WeightNorm.from_weight(jnp.array([[3.0], [4.0]]), -2)})
    >>> {name: float(value) for name, value in stats["kernel"].items()}
    {'v_norm': 5.0, 'g': 5.0, 'effective_step': 0.20000000298023224}
    """
    return {path: _stats(node, reduce or (lambda x: x)) for path, node in _nodes_by_path(params).items()}


class ProjectDirectionsState(NamedTuple):
    """The state of `project_directions`."""

    norms: dict[str, jax.Array]
    """The norms to keep, by path of the node; 0 where there is no direction to keep."""


def project_directions() -> optax.GradientTransformation:
    """Keep every `v` at its initial norm. Chain it last, after the learning rate.

    After each step `v` is scaled back to the norm it had at `init`. The function does not change by that, as the
    weight does not depend on `||v||`; what stops is the growth of `||v||` (a gradient step is orthogonal to `v` and
    so always lengthens it), and with it the decay of the effective step. Under SGD the direction's step stays `lr *
    g / ||v||^2` instead of falling as `1 / ||v||^2`. Under Adam, whose updates keep their size whatever the
    gradient's, the angle a step turns the direction by stays `lr / ||v||` instead of falling as `1 / ||v||`; so a
    schedule that relied on that decay needs one of its own. Moments are left as they are.

    This is the variant of EDM2 (arXiv 2312.02696), nGPT (arXiv 2410.01131) and SimbaV2 (arXiv 2502.15280).

    Raises:
        ValueError: `init` finds no `WeightNorm` node, or one whose `v` is itself a node; or `update` is called without
            `params` or on other nodes.

    >>> tx = optax.chain(optax.adam(1e-3), project_directions())
    """

    def init(params: Params) -> ProjectDirectionsState:
        if not _nodes_by_path(params):
            raise ValueError("project_directions found no WeightNorm node in the parameters; reparameterize them first")
        if nested := [path for path, node in _nodes_by_path(params).items() if is_node(node.v)]:
            raise ValueError(
                f"project_directions cannot keep the norms of {listed(nested)}: a node stands there as v, and an "
                "update moves its parts, not v. Leave these out, with optax.masked or optax.partition"
            )
        return ProjectDirectionsState(lengths_to_keep(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError("project_directions needs the parameters: call tx.update(updates, state, params)")
        norms = cast(ProjectDirectionsState, state).norms  # optax hands back what `init` made

        def project(path: KeyPath, update: Leaf, node: Leaf) -> Leaf:
            if not (isinstance(node, WeightNorm) and _has_direction(node)):
                return update
            name = leaf_path(path)
            if name not in norms:
                raise ValueError(
                    f"project_directions knows no norm for the node {name!r}, which was not there at init; "
                    "use wn_jax.optim.transfer_state after a rewrite of the parameters"
                )
            return dataclasses.replace(update, v=_projected(update.v, node, norms[name]))

        return jax.tree.map_with_path(project, updates, params, is_leaf=_is_weight_norm), state

    return optax.GradientTransformation(init, update)


def node_lengths(params: Params) -> dict[str, jax.Array]:
    """`||v||` of every node, by path, shaped as `g`."""
    return {path: _length(node) for path, node in _nodes_by_path(params).items()}


def lengths_to_keep(params: Params) -> dict[str, jax.Array]:
    """`||v||` of every node that holds a `v`, by path; 0 where there is no direction to keep."""
    return {path: _length(node) for path, node in _nodes_by_path(params).items() if _has_direction(node)}


def _projected(update: Leaf, node: WeightNorm, target: jax.Array) -> Leaf:
    """The update that ends on the sphere of radius `target`, in the direction where `update` would have ended."""
    v = _wide_direction(node)
    dtype = unbox(update).dtype
    step = unbox(update).astype(v.dtype)
    length, _ = norm(v + step, node.axes, node.axis_names)
    on_sphere = (v + step) * (target / length) - v
    return rebox(update, jnp.where(target > 0, on_sphere, step).astype(dtype))


def _stats(node: WeightNorm, reduce: Callable[[jax.Array], Any]) -> dict[str, Any]:
    """The figures of one node."""
    length, g = _length(node), unbox(node.g)
    # Divided twice, as the square of a length may leave the range of the dtype where the length does not.
    effective_step = jnp.where(length == 0, 0, jnp.abs(g) / length / length)
    stats = {"v_norm": length, "g": g, "effective_step": effective_step}
    return {name: reduce(value) for name, value in stats.items()}


def _length(node: WeightNorm) -> jax.Array:
    """`||v||`, in the norm's dtype. Where `||v||^2` underflows, it reads 0."""
    length, vanishes = norm(_wide_direction(node), node.axes, node.axis_names)
    return jnp.where(vanishes, 0, length)


def _wide_direction(node: WeightNorm) -> jax.Array:
    """`v` without its box, in the norm's dtype; where a node stands there, its weight."""
    v = unbox(rebuild(node.v))
    return jnp.asarray(v, norm_dtype(v.dtype))


def _nodes_by_path(params: Params) -> dict[str, WeightNorm]:
    """The nodes of weight normalization in a tree, those inside nodes of another kind too."""
    pairs = jax.tree.leaves_with_path(params, is_leaf=_is_weight_norm)
    return {leaf_path(path): leaf for path, leaf in pairs if isinstance(leaf, WeightNorm)}


def _is_weight_norm(x: Leaf) -> bool:
    return isinstance(x, WeightNorm)


def _has_direction(node: WeightNorm) -> bool:
    """Whether `v` is there: inside `optax.partition` or `optax.masked` it may be masked away."""
    return bool(jax.tree.leaves(node.v))
