"""optax pieces for trees with nodes: decay masks, norm-keeping updates, statistics to log, moments across a rewrite.

A learning rate of its own for `g` and `v` needs nothing from here, as `wn_jax.labels` is what `optax.partition`
asks for:

>>> import optax, wn_jax as wn
>>> tx = optax.partition({"g": optax.sgd(0.01), "v": optax.sgd(0.1), "other": optax.sgd(0.1)}, wn.labels)

Muon orthogonalizes the updates of matrices and would take `g`, of shape (1, features), for one. Keep it to `v`:

>>> adam = optax.adam(1e-3)
>>> tx = optax.partition({"v": optax.contrib.muon(0.02), "g": adam, "other": adam}, wn.labels)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wn_jax._boxes import is_box, rebox, unbox
from wn_jax._node import WeightNorm, is_node, norm
from wn_jax._transform import leaf_path

_SECOND_MOMENTS = frozenset({"nu", "nu_max", "sum_of_squares"})  # fields of optax states that hold squared gradients


def weight_decay_mask(params: Any, plain: Callable[[Any], bool] = lambda leaf: jnp.ndim(leaf) >= 2) -> Any:
    """A mask for `optax.adamw(mask=...)` or `optax.add_decayed_weights`: decay every `g`, no `v`.

    Since `||w|| = |g|`, decaying `g` is L2 regularization of the weight: it shrinks `w` by the factor that decaying
    a plain `w` would. Decaying `v` leaves the function as it is and only keeps `||v||` from growing, which raises
    the effective step (van Laarhoven 2017, arXiv 1706.05350); where that is wanted, `project_directions` says it
    outright.

    Arguments:
        params: the tree with nodes.
        plain: which of the arrays outside nodes decay; by default those with two axes or more, so no biases or gains.

    Returns:
        The structure of `params`, with True or False at each leaf.

    >>> weight_decay_mask({"kernel": WeightNorm(jnp.ones((1, 2)), jnp.ones((3, 2)), (-2,)), "bias": jnp.zeros(2)})
    {'bias': False, 'kernel': WeightNorm(g=True, v=False, axes=(-2,))}
    """

    def mask(x: Any) -> Any:
        if isinstance(x, WeightNorm):
            return dataclasses.replace(x, g=_fill(x.g, True), v=_fill(x.v, False))
        return hasattr(x, "shape") and bool(plain(x))

    return jax.tree_util.tree_map(mask, params, is_leaf=_is_weight_norm)


class ProjectDirectionsState(NamedTuple):
    """The norms to keep, by path of the node."""

    norms: dict[str, jax.Array]


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
        ValueError: `init` finds no `WeightNorm` node, or `update` is called without `params`.

    >>> tx = optax.chain(optax.adam(1e-3), project_directions())
    """

    def init(params: Any) -> ProjectDirectionsState:
        nodes = _nodes(params)
        if not nodes:
            raise ValueError("project_directions found no WeightNorm node in the parameters; reparameterize them first")
        return ProjectDirectionsState({path: _norms(node)[0] for path, node in nodes.items() if _has_direction(node)})

    def update(updates: Any, state: ProjectDirectionsState, params: Any = None) -> tuple[Any, ProjectDirectionsState]:
        if params is None:
            raise ValueError("project_directions needs the parameters: call tx.update(updates, state, params)")

        def project(path: Any, update: Any, node: Any) -> Any:
            if not (isinstance(node, WeightNorm) and _has_direction(node)):
                return update
            return dataclasses.replace(update, v=_projected(update.v, node, state.norms[leaf_path(path)]))

        return jax.tree_util.tree_map_with_path(project, updates, params, is_leaf=_is_weight_norm), state

    return optax.GradientTransformation(init, update)


def direction_stats(params: Any, reduce: Callable[[jax.Array], Any] | None = jnp.mean) -> dict[str, dict[str, Any]]:
    """What to log of every node: `v_norm`, `g` and `effective_step`, by path. One pass over `v`, inside or outside
    `jit`.

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
    return {path: _stats(node, reduce or (lambda x: x)) for path, node in _nodes(params).items()}


def transfer_state(opt_state: Any, params: Any, new_params: Any) -> Any:
    """Optimizer state for `new_params`, from the state for `params`: to nodes or back to plain weights,
    mid-training.

    What is linear in the gradients (momentum, Adam's first moment) follows the chain rule exactly, at the current
    weights; what is an elementwise square (`nu`, the second moment) follows it with the cross terms left out, which
    is the best that a diagonal can do. Counters stay.

    Arguments:
        opt_state: any optax state whose arrays lie in subtrees of the structure of `params`.
        params: the parameters it belongs to.
        new_params: the same function's parameters, as `reparameterize(params, axes)` or `reconstruct(params)`
            returns them.

    Raises:
        ValueError: the state holds arrays elsewhere (factored moments, `optax.partition`), or the trees are not one
            rewrite apart. Start afresh there with `tx.init(new_params)`.

    >>> import wn_jax as wn
    >>> params = {"kernel": jnp.ones((3, 2))}
    >>> state = optax.adam(1e-3).init(params)
    >>> nodes = wn.reparameterize(params, wn.kernel_axes(params))
    >>> state = transfer_state(state, params, nodes)              # on with nodes ...
    >>> state = transfer_state(state, nodes, wn.reconstruct(nodes))  # ... and back
    """
    structure: Any = jax.tree_util.tree_structure(params)
    shapes = [jnp.shape(leaf) for leaf in jax.tree_util.tree_leaves(params)]

    def is_like_params(x: Any) -> bool:
        return (
            jax.tree_util.tree_structure(x) == structure
            and [jnp.shape(y) for y in jax.tree_util.tree_leaves(x)] == shapes
        )

    def convert(path: Any, x: Any) -> Any:
        if is_like_params(x):
            squares = any(getattr(key, "name", None) in _SECOND_MOMENTS for key in path)
            return _transfer_moments(x, params, new_params, squares)
        if jnp.ndim(x) > 0:
            raise ValueError(
                f"opt_state has an array of shape {jnp.shape(x)} at {leaf_path(path)!r}, outside any subtree with the "
                "structure of params, so its meaning is unknown; use tx.init(new_params) for this optimizer"
            )
        return x

    return jax.tree_util.tree_map_with_path(convert, opt_state, is_leaf=is_like_params)


def _transfer_moments(moments: Any, params: Any, new_params: Any, squares: bool) -> Any:
    (old, old_def), (new, new_def) = (_flatten(tree) for tree in (params, new_params))
    if old_def != new_def:
        raise ValueError("new_params is not a rewrite of params: leaves other than weights and their nodes differ")
    pairs = [
        _moment_of_node(moment, after, squares) if is_node(after) and not is_node(before)
        else _moment_of_weight(moment, before, squares) if is_node(before) and not is_node(after)
        else moment
        for moment, before, after in zip(_flatten(moments)[0], old, new, strict=True)
    ]  # fmt: skip
    return jax.tree_util.tree_unflatten(new_def, pairs)


def _moment_of_node(moment: Any, node: WeightNorm, squares: bool) -> WeightNorm:
    """Chain rule from the weight to (g, v): equation 3 of the paper, or its square without cross terms."""
    g, direction, scale, _ = _geometry(node)
    value = unbox(moment)
    wide = value.astype(direction.dtype)
    if squares:
        of_g, of_v = direction**2 * wide, scale**2 * wide
        of_g = jnp.sum(of_g, axis=node.axes, keepdims=True)
    else:
        of_g = jnp.sum(direction * wide, axis=node.axes, keepdims=True)
        of_v = scale * (wide - direction * of_g)
    g_dtype = g.dtype if value.dtype == unbox(node.v).dtype else value.dtype  # optax may keep moments in another dtype
    return WeightNorm(rebox(node.g, of_g.astype(g_dtype)), rebox(node.v, of_v.astype(value.dtype)), node.axes)


def _moment_of_weight(moment: WeightNorm, node: WeightNorm, squares: bool) -> Any:
    """The inverse: grad_w = d grad_g + (||v|| / g) grad_v; at g = 0 the second part is unknown and left out."""
    _, direction, _, inverse = _geometry(node)
    if squares:
        direction, inverse = direction**2, inverse**2
    of_v = unbox(moment.v)
    return rebox(moment.v, (direction * unbox(moment.g) + inverse * of_v).astype(of_v.dtype))


def _geometry(node: WeightNorm) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`g`, `v/||v||`, `g/||v||` and its inverse (0 at g = 0)."""
    length, v = _norms(node)
    g = unbox(node.g).astype(v.dtype)
    return g, v / length, g / length, jnp.where(g == 0, 0, length / jnp.where(g == 0, 1, g))


def _stats(node: WeightNorm, reduce: Callable[[jax.Array], Any]) -> dict[str, Any]:
    length, _ = _norms(node)
    g = unbox(node.g)
    stats = {"v_norm": length, "g": g, "effective_step": jnp.abs(g) / length / length}
    return {name: reduce(value) for name, value in stats.items()}


def _projected(update: Any, node: WeightNorm, target: jax.Array) -> Any:
    """The update that ends on the sphere of radius `target`, in the direction where `update` would have ended."""
    step = unbox(update)
    _, v = _norms(node)
    moved = v + step.astype(v.dtype)
    length, normal = norm(moved, node.axes)
    on_sphere = moved * (target / length) - v
    return rebox(update, jnp.where(normal, on_sphere, step).astype(step.dtype))


def _norms(node: WeightNorm) -> tuple[jax.Array, jax.Array]:
    """`||v||`, and `v` without its box, both in float32 at least."""
    v = unbox(node.v)
    wide = jnp.asarray(v, jnp.promote_types(v.dtype, jnp.float32))
    return norm(wide, node.axes)[0], wide


def _nodes(params: Any) -> dict[str, WeightNorm]:
    pairs = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_weight_norm)
    return {leaf_path(path): leaf for path, leaf in pairs if isinstance(leaf, WeightNorm)}


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree_util.tree_flatten(tree, is_leaf=lambda x: is_node(x) or is_box(x))


def _fill(tree: Any, value: Any) -> Any:
    return jax.tree_util.tree_map(lambda _: value, tree)


def _is_weight_norm(x: Any) -> bool:
    return isinstance(x, WeightNorm)


def _has_direction(node: WeightNorm) -> bool:
    """Whether `v` is there: inside `optax.partition` or `optax.masked` it may be masked away."""
    return bool(jax.tree_util.tree_leaves(node.v))
