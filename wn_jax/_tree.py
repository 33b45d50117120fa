"""Trees: paths and leaves, what a leaf is, and the weights of the nodes in a tree.

This file owns how wn_jax walks a parameter tree. Which leaves become nodes is `_transform`'s, what a node computes is
`_node`'s.
"""

from __future__ import annotations

import difflib
from typing import Any

import jax
import numpy as np

from wn_jax._boxes import is_box
from wn_jax._node import is_node


def leaf_path(path: tuple[Any, ...]) -> str:
    """A key path as the one string that wn_jax uses for it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(params: Any) -> tuple[list[str], list[Any], Any]:
    """Paths and leaves of `params`; a node and a box count as leaves."""
    pairs, treedef = flatten_with_keys(params)
    return [leaf_path(path) for path, _ in pairs], [leaf for _, leaf in pairs], treedef


def flatten_with_keys(params: Any) -> tuple[list[tuple[tuple[Any, ...], Any]], Any]:
    """The same, with key paths as JAX has them."""
    return jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: is_node(x) or is_box(x))


def did_you_mean(path: str, paths: list[str]) -> str:
    """A guess at which of `paths` was meant, to be put behind the path; or nothing."""
    moved = [other for other in paths if other.split("/", 1)[-1] == path or path.split("/", 1)[-1] == other]
    close = moved or difflib.get_close_matches(path, paths, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close[:3]))}?)" if close else ""


def listed(paths: list[str]) -> str:
    """The first of these paths, for a message."""
    return (
        ", ".join(map(repr, paths[:8])) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "") if paths else "none"
    )


def is_array(x: Any) -> bool:
    """Whether `x` is an array of JAX or NumPy, or the shape of one."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def check_has_numbers(name: str, value: Any) -> None:
    """Raises where an array is abstract, or out of this process's reach."""
    if isinstance(value, (jax.ShapeDtypeStruct, jax.core.Tracer)):
        raise ValueError(f"{name!r} is abstract and holds no numbers; call this outside of jit and eval_shape")
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        raise ValueError(
            f"{name!r} is partly on devices of other processes; save it with Orbax, which writes from each"
        )


def sharding_of(target: Any) -> Any:
    """Where an array that takes the target's place must go, or None where it may stay.

    An array that sits where JAX put it, and was put nowhere, stays free to move; the devices of an abstract mesh are
    not known.
    """
    sharding = getattr(target, "sharding", None)
    free = not getattr(target, "committed", True)
    abstract = isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh)
    return None if free or abstract else sharding


def rebuild(x: Any) -> Any:
    """The weight of a node, after those of the nodes inside it."""
    if not is_node(x):
        return x
    return with_plain_children(x).weight()


def with_plain_children(node: Any) -> Any:
    """A node, after the nodes inside it were rebuilt."""
    _check_is_pytree(node)
    return jax.tree_util.tree_map(rebuild, node, is_leaf=lambda x: x is not node and is_node(x))


def abstract_weight(node: Any) -> tuple[Any, Any]:
    """The shape and dtype of a node's weight, in the weight's box, and those of its scale."""

    def parts(node: Any) -> tuple[Any, Any]:
        node = with_plain_children(node)
        return node.weight(), node.factors()[1]

    _check_is_pytree(node)
    return jax.tree_util.tree_map(_in_mesh, jax.eval_shape(parts, node))


def _in_mesh(x: Any) -> Any:
    """With its mesh, which `jax.eval_shape` drops where not all axes are manual; without it no trace takes it."""
    mesh = jax.sharding.get_abstract_mesh()
    if x.sharding is None and mesh.manual_axes:
        return x.update(sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    return x


def _check_is_pytree(node: Any) -> None:
    if jax.tree_util.all_leaves([node]):
        raise TypeError(
            f"{type(node).__name__} has weight() and factors() but is no pytree, so JAX cannot see its arrays; "
            "register it, with jax.tree_util.register_dataclass for example"
        )
