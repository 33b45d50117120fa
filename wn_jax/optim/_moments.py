"""Optimizer state across a rewrite of the parameters: from plain weights to nodes, or back, in mid-training.

This file owns which states are understood and the chain rule for their moments. Rewriting the parameters themselves is
for `reparameterize` and `reconstruct`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from wn_jax._boxes import rebox, unbox
from wn_jax._node import WeightNorm, is_node
from wn_jax._norms import norm, norm_dtype
from wn_jax._tree import flatten
from wn_jax._types import Leaf, Params, PyTree, Shape
from wn_jax.optim._directions import ProjectDirectionsState, lengths_to_keep

State = TypeVar("State")

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


def transfer_state(opt_state: State, params: Params, new_params: Params) -> State:
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
    return _Transfer(params, new_params).whole(opt_state)


_UNKNOWN = "opt_state {}, so it cannot be transferred; start this optimizer afresh with tx.init(new_params)"


@dataclasses.dataclass(frozen=True)
class _Transfer:
    """Moves an optimizer's state from the parameters that it belongs to over to the new ones."""

    params: Params
    new_params: Params

    def whole(self, state: PyTree) -> PyTree:
        """A state, or a tree of states (a chain, a wrapper), for the new parameters."""
        return jax.tree.map(self._part, state, is_leaf=self._is_part)

    def _is_part(self, x: PyTree) -> bool:
        """Whether `x` is taken as one: a state that is understood, or a tree like the parameters, which is not."""
        return type(x) in _MOMENTS or isinstance(x, ProjectDirectionsState) or _is_like(x, self.params)

    def _part(self, x: PyTree) -> PyTree:
        if isinstance(x, ProjectDirectionsState):
            return self._lengths(x)
        if type(x) in _MOMENTS:
            return self._understood(x)
        # A scalar is a counter or a rate, and does not depend on the parameters. Of an array nobody knows.
        if _is_like(x, self.params) or jnp.ndim(x) > 0:
            raise ValueError(_UNKNOWN.format(f"holds {jax.tree.map(jnp.shape, x)}, of unknown meaning"))
        return x

    def _lengths(self, state: ProjectDirectionsState) -> ProjectDirectionsState:
        """The norms to keep: those of nodes that were there already, and of new nodes their present ones."""
        present = lengths_to_keep(self.new_params)
        return ProjectDirectionsState({path: state.norms.get(path, length) for path, length in present.items()})

    def _understood(self, state: PyTree) -> PyTree:
        """A state of optax, whose moments follow the chain rule; its other fields may be states again."""
        kinds = _MOMENTS[type(state)]
        fields = state._asdict()
        moments = {name: self._moments(name, fields[name], squares) for name, squares in kinds.items()}
        others = {name: self.whole(value) for name, value in fields.items() if name not in kinds}
        return state._replace(**moments, **others)

    def _moments(self, name: str, moments: PyTree, squares: bool) -> PyTree:
        """Moments as a tree like the new parameters."""
        if not _is_like(moments, self.params):
            raise ValueError(_UNKNOWN.format(f"holds {name} for a part of the parameters only"))

        def move(moment: Leaf, before: Leaf, after: Leaf) -> Leaf:
            match is_node(before), is_node(after):
                case False, True:
                    return _moment_of_node(moment, after, squares)
                case True, False:
                    return _moment_of_weight(moment, before, squares)
            return moment

        leaves = (flatten(tree)[1] for tree in (moments, self.params, self.new_params))
        structure = flatten(self.new_params)[2]
        return jax.tree.unflatten(structure, [move(*three) for three in zip(*leaves, strict=True)])


def _is_like(x: PyTree, params: Params) -> bool:
    """Whether `x` has the structure of `params`. A lone leaf, where `params` is one, must have its shape too."""
    structure = jax.tree.structure(params)
    if jax.tree.structure(x) != structure:
        return False
    return structure.num_leaves > 1 or _shapes(x) == _shapes(params)


def _shapes(tree: PyTree) -> list[Shape]:
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _check_rewrite(params: Params, new_params: Params) -> None:
    """Raises where the trees differ by more than nodes in the place of weights of their shape."""
    _, old, old_structure = flatten(params)
    _, new, new_structure = flatten(new_params)
    if old_structure != new_structure or not all(map(_is_rewrite, old, new)):
        raise ValueError(
            "new_params is not a rewrite of params: between the two, weights may become nodes or nodes weights, and "
            "everything else (names, shapes, the axes of a node) must stay"
        )


def _is_rewrite(before: Leaf, after: Leaf) -> bool:
    """Whether one of the two is a node and the other a weight of its shape, or both are alike."""
    if _shapes(_direction(before)) != _shapes(_direction(after)):
        return False
    return is_node(before) != is_node(after) or jax.tree.structure(before) == jax.tree.structure(after)


def _direction(x: Leaf) -> Leaf:
    """The part of a leaf that has the shape of the weight."""
    return x.v if isinstance(x, WeightNorm) else x


def _moment_of_node(moment: Leaf, node: WeightNorm, squares: bool) -> WeightNorm:
    """Chain rule from the weight to (g, v): equation 3 of the paper, or its square without cross terms."""
    parts = _geometry(node)
    value = unbox(moment)
    wide = value.astype(parts.direction.dtype)
    if squares:
        of_g = jnp.sum(parts.direction**2 * wide, axis=node.axes, keepdims=True)
        of_v = parts.scale**2 * wide
    else:
        of_g = jnp.sum(parts.direction * wide, axis=node.axes, keepdims=True)
        of_v = parts.scale * (wide - parts.direction * of_g)
    # optax may keep moments in another dtype than the parameters; then `g` has that dtype, too.
    g_dtype = parts.g.dtype if value.dtype == unbox(node.v).dtype else value.dtype
    return WeightNorm(rebox(node.g, of_g.astype(g_dtype)), rebox(node.v, of_v.astype(value.dtype)), node.axes)


def _moment_of_weight(moment: WeightNorm, node: WeightNorm, squares: bool) -> Leaf:
    """The inverse: grad_w = d grad_g + (||v|| / g) grad_v; at g = 0 the second part is unknown and left out."""
    parts = _geometry(node)
    direction, inverse_scale = parts.direction, parts.inverse_scale
    if squares:
        direction, inverse_scale = direction**2, inverse_scale**2
    of_v = unbox(moment.v)
    of_weight = direction * unbox(moment.g) + inverse_scale * of_v
    return rebox(moment.v, of_weight.astype(of_v.dtype))


class _Geometry(NamedTuple):
    """The numbers of a node in its chain rule, in the norm's dtype."""

    g: jax.Array

    direction: jax.Array
    """`v / ||v||`"""

    scale: jax.Array
    """`g / ||v||`"""

    inverse_scale: jax.Array
    """`||v|| / g`; 0 at g = 0"""


def _geometry(node: WeightNorm) -> _Geometry:
    v = unbox(node.v)
    v = jnp.asarray(v, norm_dtype(v.dtype))
    length, _ = norm(v, node.axes)
    g = unbox(node.g).astype(v.dtype)
    inverse_scale = jnp.where(g == 0, 0, length / jnp.where(g == 0, 1, g))
    return _Geometry(g, v / length, g / length, inverse_scale)
