"""Optimizer state across a rewrite of the parameters: from plain weights to nodes, or back, in mid-training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from wn_jax._boxes import is_box, rebox, unbox
from wn_jax._node import WeightNorm, is_node
from wn_jax._norms import norm, norm_dtype
from wn_jax.optim._directions import ProjectDirectionsState, lengths_to_keep

# The optimizer states that are understood, with their fields that depend on the parameters: whether these are squares
# of gradients, element by element, or linear in gradients.
_MOMENTS: dict[type, dict[str, bool]] = {
    optax.TraceState: {"trace": False},
    optax.EmaState: {"ema": False},
    optax.MultiStepsState: {"acc_grads": False},
    optax.ScaleByLionState: {"mu": False},
    optax.ScaleByAdamState: {"mu": False, "nu": True},
    optax.ScaleByAmsgradState: {"mu": False, "nu": True, "nu_max": True},
    optax.ScaleByBeliefState: {"mu": False, "nu": True},
    optax.ScaleByRmsState: {"nu": True},
    optax.ScaleByRssState: {"sum_of_squares": True},
}


def transfer_state(opt_state: Any, params: Any, new_params: Any) -> Any:
    """Optimizer state for `new_params`, from the state for `params`: to nodes or back to plain weights, mid-training.

    What is linear in the gradients (momentum, Adam's first moment) follows the chain rule exactly, at the current
    weights; what is an elementwise square (`nu`, the second moment) follows it with the cross terms left out, as a
    diagonal must. Counters stay. Understood are the states of SGD with momentum, Adam and its kin (AdamW, NAdam,
    AMSGrad, AdaBelief; also Adamax, whose `nu` is a maximum and treated as a square), RMSProp (not centered), AdaGrad,
    Lion, `optax.ema`, `optax.MultiSteps` and `project_directions`, in chains and wrappers.

    Arguments:
        opt_state: the optimizer's state.
        params: the parameters it belongs to.
        new_params: the same function's parameters, as `reparameterize(params, axes)` or `reconstruct(params)`
            returns them.

    Raises:
        ValueError: the state holds something else that depends on the parameters, or depends on a part of them only
            (inside `optax.partition` and `optax.masked`); start afresh there with `tx.init(new_params)`. Or the trees
            are not one rewrite apart.

    >>> import wn_jax as wn
    >>> params = {"kernel": jnp.ones((3, 2))}
    >>> state = optax.adam(1e-3).init(params)
    >>> nodes = wn.reparameterize(params, wn.kernel_axes(params))
    >>> state = transfer_state(state, params, nodes)              # on with nodes ...
    >>> state = transfer_state(state, nodes, wn.reconstruct(nodes))  # ... and back
    """
    _check_rewrite(params, new_params)

    def transfer(name: str, moments: Any, squares: bool) -> Any:
        if not _is_like(moments, params):
            raise ValueError(_UNKNOWN.format(f"holds {name} for a part of the parameters only"))
        return _transfer_moments(moments, params, new_params, squares)

    def convert(x: Any) -> Any:
        if isinstance(x, ProjectDirectionsState):
            lengths = lengths_to_keep(new_params)
            return ProjectDirectionsState({path: x.norms.get(path, length) for path, length in lengths.items()})
        if type(x) in _MOMENTS:
            fields = _MOMENTS[type(x)]
            moved = {name: transfer(name, getattr(x, name), squares) for name, squares in fields.items()}
            return x._replace(
                **moved, **{name: walk(value) for name, value in x._asdict().items() if name not in fields}
            )
        if _is_like(x, params) or jnp.ndim(x) > 0:
            raise ValueError(_UNKNOWN.format(f"holds {jax.tree_util.tree_map(jnp.shape, x)}, of unknown meaning"))
        return x

    def walk(x: Any) -> Any:
        stop = lambda y: type(y) in _MOMENTS or isinstance(y, ProjectDirectionsState) or _is_like(y, params)  # noqa: E731
        return jax.tree_util.tree_map(convert, x, is_leaf=stop)

    return walk(opt_state)


_UNKNOWN = "opt_state {}, so it cannot be transferred; start this optimizer afresh with tx.init(new_params)"


def _is_like(x: Any, params: Any) -> bool:
    """Whether `x` has the structure of `params`. A lone leaf, where `params` is one, must have its shape too."""
    structure: Any = jax.tree_util.tree_structure(params)
    if jax.tree_util.tree_structure(x) != structure:
        return False
    return structure.num_leaves > 1 or _shapes(x) == _shapes(params)


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [jnp.shape(leaf) for leaf in jax.tree_util.tree_leaves(tree)]


def _check_rewrite(params: Any, new_params: Any) -> None:
    """That the trees differ by nodes in the place of weights of their shape, and by nothing else."""
    (old, old_def), (new, new_def) = _flatten(params), _flatten(new_params)
    same = old_def == new_def and all(
        _shapes(_direction(a)) == _shapes(_direction(b))
        and (is_node(a) != is_node(b) or _structure(a) == _structure(b))
        for a, b in zip(old, new, strict=True)
    )
    if not same:
        raise ValueError(
            "new_params is not a rewrite of params: between the two, weights may become nodes or nodes weights, and "
            "everything else (names, shapes, the axes of a node) must stay"
        )


def _transfer_moments(moments: Any, params: Any, new_params: Any, squares: bool) -> Any:
    def move(moment: Any, before: Any, after: Any) -> Any:
        if is_node(before) == is_node(after):
            return moment
        return _moment_of_node(moment, after, squares) if is_node(after) else _moment_of_weight(moment, before, squares)

    (old, _), (new, structure) = _flatten(params), _flatten(new_params)
    moved = [move(*triple) for triple in zip(_flatten(moments)[0], old, new, strict=True)]
    return jax.tree_util.tree_unflatten(structure, moved)


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
    v = unbox(node.v)
    v = jnp.asarray(v, norm_dtype(v.dtype))
    length, _ = norm(v, node.axes)
    g = unbox(node.g).astype(v.dtype)
    return g, v / length, g / length, jnp.where(g == 0, 0, length / jnp.where(g == 0, 1, g))


def _direction(x: Any) -> Any:
    return x.v if isinstance(x, WeightNorm) else x


def _structure(x: Any) -> Any:
    return jax.tree_util.tree_structure(x)


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree_util.tree_flatten(tree, is_leaf=lambda x: is_node(x) or is_box(x))
