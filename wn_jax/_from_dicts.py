"""From dicts of `g` and `v` back to nodes: what a checkpoint gives where it was read without a target.

Orbax, msgpack and others know dicts, lists and arrays. Where nobody tells them of nodes, a node comes back as a dict.
This file owns such dicts: how they are told, the way back, and the word about them where they get into a program.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from wn_jax._node import WeightNorm, canonical_axes, check_shapes, is_node
from wn_jax._tree import is_array, leaf_path, listed, unknown_paths
from wn_jax._types import Axes, AxesRule, Leaf, Params, Shape


def nodes_from_dicts(params: Params, axes: AxesRule | None = None) -> Params:
    """A copy of `params` in which dicts of `g` and `v` are `WeightNorm` nodes again.

    For trees that went through something that knows no nodes and was given no target: Orbax's `restore(path)`,
    `flax.serialization.msgpack_restore`, a file of your own. With a target there is no need of it.

    Arguments:
        params: a tree with such dicts, `{"kernel": {"g": ..., "v": ...}}`.
        axes: the reduction axes, as `reparameterize` takes them: a dict from the path of such a dict to axes, which
            `infer_axes` gives for the plain model, or a function `(path, v) -> axes or None`. Dicts that it does not
            name stay as they are. `None`: the axes that the dicts themselves hold, as `flax.serialization` writes them.

    Returns:
        A new tree, with the arrays of the old one.

    Raises:
        ValueError: there is no such dict; a path is unknown, or is that of a node or of a plain weight; the shapes of
            `g` and `v` are not those of the axes, or the dict holds other axes than these; `g` and `v` are no arrays.
        TypeError: `axes` is neither a mapping nor a function.

    >>> import jax.numpy as jnp, wn_jax as wn
    >>> restored = {"kernel": {"g": jnp.array([[5.0]]), "v": jnp.array([[3.0], [4.0]])}, "bias": jnp.zeros(1)}
    >>> wn.nodes_from_dicts(restored, {"kernel": (-2,)})["kernel"].weight().tolist()
    [[3.0], [4.0]]
    """
    pairs, treedef = jax.tree.flatten_with_path(params, is_leaf=_is_dict_or_node)
    leaves = {leaf_path(keys): leaf for keys, leaf in pairs}
    dicts = {path: leaf for path, leaf in leaves.items() if _is_dict(leaf)}
    if not dicts:
        raise ValueError(
            f"params hold no dict of 'g' and 'v' to make a node of. Its leaves are {listed(list(leaves))}. Of plain "
            "weights, wn_jax.reparameterize(params, axes) makes nodes"
        )
    chosen = _chosen(axes, dicts, leaves)
    return jax.tree.unflatten(
        treedef, [_node(path, leaf, chosen[path]) if path in chosen else leaf for path, leaf in leaves.items()]
    )


def note_on_dicts(error: Exception, params: Params) -> None:
    """Add to an error of a program that it was given dicts where nodes may have been; or nothing."""
    pairs = jax.tree.leaves_with_path(params, is_leaf=_is_dict_or_node)
    if paths := [leaf_path(keys) for keys, leaf in pairs if _is_dict(leaf) and _fit(leaf)]:
        error.add_note(
            f"The parameters hold dicts of g and v at {listed(paths)}. If these were nodes, they got lost in a "
            "checkpoint that was restored without a target: restore it with one, such as jax.eval_shape(lambda: "
            "wn_jax.reparameterize(model.init(key, x), axes)), or call wn_jax.nodes_from_dicts(params, axes)."
        )


def _is_dict_or_node(x: Leaf) -> bool:
    return _is_dict(x) or is_node(x)


def _is_dict(x: Leaf) -> bool:
    """Whether this is a dict with the names of a node's fields."""
    return isinstance(x, Mapping) and {"g", "v"} <= set(x) <= {"g", "v", "axes"}


def _fit(halves: Mapping[str, Leaf]) -> bool:
    """Whether the two look like halves: `g` is `v` with some axes of size 1."""
    g, v = halves["g"], halves["v"]
    return is_array(g) and is_array(v) and _is_reduced(g.shape, v.shape)


def _is_reduced(g: Shape, v: Shape) -> bool:
    return len(g) == len(v) and all(size in (1, whole) for size, whole in zip(g, v, strict=True)) and g != v


def _chosen(
    axes: AxesRule | None, dicts: Mapping[str, Mapping[str, Leaf]], leaves: Mapping[str, Leaf]
) -> dict[str, Axes]:
    """The axes of each dict that is to be a node."""
    if axes is None:
        if silent := [path for path, halves in dicts.items() if "axes" not in halves]:
            raise ValueError(f"nothing says over which axes the norms of {listed(silent)} run; give axes")
        return {path: tuple(np.atleast_1d(halves["axes"]).tolist()) for path, halves in dicts.items()}
    if isinstance(axes, Mapping):
        named = {path: answer for path, answer in axes.items() if answer is not None}
        if unknown := [path for path in named if path not in leaves]:
            raise ValueError(unknown_paths("axes name", unknown, list(leaves)))
    elif callable(axes):
        answers = {path: axes(path, halves["v"]) for path, halves in dicts.items()}
        named = {path: answer for path, answer in answers.items() if answer is not None}
    else:
        raise TypeError(f"axes must be a dict from path to axes, a function, or None; got {type(axes).__name__}")
    if not named:
        raise ValueError(f"axes name none of the dicts of 'g' and 'v', which are at {listed(list(dicts))}")
    return named


def _node(path: str, leaf: Leaf, axes: Axes) -> WeightNorm:
    """The node that a dict stands for."""
    if not _is_dict(leaf):
        what = f"already a {type(leaf).__name__} node" if is_node(leaf) else "a plain leaf, and no dict of 'g' and 'v'"
        raise ValueError(f"{path!r} is {what}; leave it out of axes")
    g, v = leaf["g"], leaf["v"]
    if not (is_array(g) and is_array(v)):
        raise ValueError(
            f"the 'g' and 'v' of {path!r} are {type(g).__name__} and {type(v).__name__}, not arrays: their boxes got "
            "lost, too. Restore the checkpoint with a target"
        )
    try:
        found = canonical_axes(axes, v.shape)
        check_shapes(g.shape, v.shape, found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path!r} is no node over the axes {axes}: {error}") from None
    if "axes" in leaf and tuple(np.atleast_1d(leaf["axes"]).tolist()) != found:
        raise ValueError(f"{path!r} was saved with the axes {np.atleast_1d(leaf['axes']).tolist()}, and not {found}")
    return WeightNorm(g, v, found)
