"""Trees: paths and leaves, what a leaf is, and the weights of the nodes in a tree.

This file owns how wn_jax walks a parameter tree, and what can be asked of a leaf. Which leaves become nodes is
`_transform`'s; what a node computes is `_node`'s.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TypeGuard

import jax
import jax.core
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding

from wn_jax._boxes import is_box
from wn_jax._node import Node, is_node
from wn_jax._types import KeyPath, Leaf, Params, PyTree, TreeDef


def leaf_path(path: KeyPath) -> str:
    """A key path as the one string that wn_jax uses for it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(params: Params) -> tuple[list[str], list[Leaf], TreeDef]:
    """Paths and leaves of `params`; a node and a box count as leaves."""
    pairs, treedef = flatten_with_keys(params)
    return [leaf_path(path) for path, _ in pairs], [leaf for _, leaf in pairs], treedef


def flatten_with_keys(params: Params) -> tuple[list[tuple[KeyPath, Leaf]], TreeDef]:
    """The same, with key paths as JAX has them."""
    return jax.tree.flatten_with_path(params, is_leaf=lambda x: is_node(x) or is_box(x))


def has_nodes(tree: PyTree) -> bool:
    """Whether a node stands somewhere in the tree."""
    return any(map(is_node, jax.tree.leaves(tree, is_leaf=is_node)))


def did_you_mean(path: str, paths: list[str]) -> str:
    """A guess at which of `paths` was meant, to be put behind the path in a message; or nothing."""
    # A `params/` too many or too few is the likely slip, and difflib does not rank it first.
    moved = [other for other in paths if other.split("/", 1)[-1] == path or path.split("/", 1)[-1] == other]
    close = moved or difflib.get_close_matches(path, paths, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close[:3]))}?)" if close else ""


def unknown_paths(who: str, unknown: Sequence[object], paths: list[str]) -> str:
    """The message about paths that a tree does not have; `who` says that someone names them."""

    def line(path: object) -> str:
        if not isinstance(path, str):
            return f"{path!r} (a path is a string such as 'params/Dense_0/kernel')"
        if {f"{path}/g", f"{path}/v"} <= set(paths):
            return f"{path!r} (a dict of g and v: wn_jax.nodes_from_dicts(params, axes) makes a node of it)"
        return repr(path) + did_you_mean(path, paths)

    shown = "; ".join(map(line, unknown[:5])) + ("; ..." if len(unknown) > 5 else "")
    return f"{who} leaves that params does not have: {shown}. Its leaves are {listed(paths)}."


def listed(paths: list[str]) -> str:
    """The first of these paths, for a message."""
    shown = ", ".join(map(repr, paths[:8])) or "none"
    return f"{shown} and {len(paths) - 8} more" if len(paths) > 8 else shown


def is_array(x: Leaf) -> TypeGuard[jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct]:
    """Whether `x` is an array of JAX or NumPy, or the shape of one."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def check_is_leaf(path: str, x: Leaf) -> None:
    """Raises where a leaf stands for an array that JAX does not see in it, as a variable of Keras does.

    Raises:
        TypeError: it does.
    """
    if hasattr(type(x), "__jax_array__") and not (is_array(x) or is_box(x)):
        raise TypeError(
            f"{path!r} is a {type(x).__name__}, and not the array in it; pass the arrays: of Keras, "
            "[variable.value for variable in model.trainable_variables]"
        )


def check_has_numbers(name: str, value: Leaf) -> None:
    """Raises where an array is abstract, or out of this process's reach."""
    if isinstance(value, (jax.ShapeDtypeStruct, jax.core.Tracer)):
        raise ValueError(f"{name!r} is abstract and holds no numbers; call this outside of jit and eval_shape")
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        raise ValueError(
            f"{name!r} is partly on devices of other processes; save it with Orbax, which writes from each"
        )


def is_traced(*trees: PyTree) -> bool:
    """Whether a transformation such as `jit` looks on."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def filled(tree: PyTree, value: object) -> PyTree:
    """The tree with this value at each of its leaves."""
    return jax.tree.map(lambda _: value, tree)


def sharding_of(target: Leaf) -> Sharding | None:
    """Where an array that takes the target's place must go, or None where it may stay."""
    sharding = getattr(target, "sharding", None)
    # An array that was put nowhere is free to move; and the devices of an abstract mesh are not known.
    free = not getattr(target, "committed", True)
    abstract = isinstance(getattr(sharding, "mesh", None), AbstractMesh)
    return None if free or abstract else sharding


def rebuild(x: Leaf) -> Leaf:
    """The weight of a node, after those of the nodes inside it; anything else as it is."""
    return with_plain_children(x).weight() if is_node(x) else x


def with_plain_children(node: Node) -> Node:
    """A node, after the nodes inside it were rebuilt."""
    _check_is_pytree(node)
    return jax.tree.map(rebuild, node, is_leaf=lambda x: x is not node and is_node(x))


def abstract_weight(node: Node) -> tuple[Leaf, jax.ShapeDtypeStruct]:
    """The shape and dtype of a node's weight, in the weight's box, and those of its scale."""

    def weight_and_scale(node: Node) -> tuple[Leaf, jax.Array]:
        node = with_plain_children(node)
        weight = node.weight()
        return weight, node.factors()[1]

    _check_is_pytree(node)
    return jax.tree.map(_in_mesh, jax.eval_shape(weight_and_scale, node))


def _in_mesh(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The same with its mesh, which `jax.eval_shape` drops where not all axes are manual: no trace would take it."""
    mesh = jax.sharding.get_abstract_mesh()
    if x.sharding is None and mesh.manual_axes:
        return x.update(sharding=NamedSharding(mesh, PartitionSpec()))
    return x


def _check_is_pytree(node: PyTree) -> None:
    if jax.tree_util.all_leaves([node]):
        raise TypeError(
            f"{type(node).__name__} has weight() and factors() but is no pytree, so JAX cannot see its arrays; "
            "register it, with jax.tree_util.register_dataclass for example"
        )
