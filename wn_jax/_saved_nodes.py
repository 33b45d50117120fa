"""Leaves as files hold them: the arrays and numbers in a leaf, by name, and the leaf again from these.

A leaf may be an array, a number, a box around one, or a node, in which other nodes may stand. This file owns what a
file holds of each; how the names of a whole tree are checked is `_saved_facts`'s.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from wn_jax._boxes import is_box, rebox, unbox
from wn_jax._node import Node, WeightNorm, is_node
from wn_jax._saved_facts import Facts, Other, of_node, within
from wn_jax._tree import is_array, leaf_path
from wn_jax._types import Leaf

Number: TypeAlias = int | float
Value: TypeAlias = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct | Number
"""A part of a leaf: an array, which in a target may be abstract, or a number of Python."""


def parts_of(name: str, leaf: Leaf) -> dict[str, Value]:
    """The arrays and numbers of a leaf, by their names in a file: those in a node, none of a function.

    Raises:
        ValueError: it is a node, or a box, of something else.
    """
    if is_node(leaf):
        pairs = jax.tree.leaves_with_path(leaf, is_leaf=is_box)
        found = {within(name, leaf_path(keys)): unbox(part) for keys, part in pairs}
        if wrong := next((part for part in found.values() if not (is_array(part) or is_number(part))), None):
            raise ValueError(
                f"{name!r} is a node that holds no arrays (labels, specs or masks), but a {type(wrong).__name__}"
            )
        if len(found) < len(pairs):
            raise ValueError(f"{name!r} is a {type(leaf).__name__}, two of whose parts have one path; rename one")
        return found
    value = unbox(leaf)
    if is_array(value) or is_number(value):
        return {name: value}
    if value is not leaf:
        raise ValueError(
            f"{name!r} is a {type(leaf).__name__} around a {type(value).__name__}, and not around an array; leave it "
            "out (nnx.split(model, nnx.Param, ...)), or use Orbax"
        )
    return {}


def is_number(x: Leaf) -> TypeGuard[Number]:
    """Whether `x` is a number of Python."""
    return isinstance(x, (bool, int, float)) and not isinstance(x, np.generic)  # np.float64 is a float, too


def note_nodes(name: str, leaf: Leaf, values: Mapping[str, Value], facts: Facts) -> None:
    """Write down of which kinds the nodes at a leaf are, and what they hold where that is more than `g` and `v`.

    Raises:
        ValueError: a `WeightNorm` holds numbers of Python, or random keys.
    """
    nodes = nodes_of(name, leaf)
    halves = {half for path, node in nodes.items() if isinstance(node, WeightNorm) for half in of_node(path)}
    if wrong := next((half for half in halves & values.keys() if not _is_half(values[half])), None):
        raise ValueError(f"{wrong!r} is half of a WeightNorm node that holds no arrays of numbers there")
    facts.nodes |= {path: node.axes for path, node in nodes.items() if isinstance(node, WeightNorm)}
    facts.others |= {path: other_of(node) for path, node in nodes.items() if not isinstance(node, WeightNorm)}
    if len(nodes) > 1 or name in facts.others:
        facts.parts[name] = list(values)


def _is_half(value: Value) -> bool:
    return is_array(value) and not jnp.issubdtype(value.dtype, jax.dtypes.extended)


def nodes_of(name: str, leaf: Leaf) -> dict[str, Node]:
    """The node at a leaf and all within it, by name; none of another leaf."""
    if not is_node(leaf):
        return {}
    found: dict[str, Node] = {name: leaf}
    inner = jax.tree.leaves_with_path(leaf, is_leaf=lambda x: x is not leaf and (is_node(x) or is_box(x)))
    for keys, part in inner:
        found |= nodes_of(within(name, leaf_path(keys)), part)
    return found


def other_of(node: Node) -> Other:
    """The type of a node, and of its fields those that are no part of the tree and that JSON can hold."""
    children = {leaf_path(keys[:1]) for keys, _ in jax.tree.leaves_with_path(node, is_leaf=lambda x: x is not node)}
    fields = dataclasses.fields(node) if dataclasses.is_dataclass(node) else ()
    static = {field.name: getattr(node, field.name) for field in fields if field.name not in children}
    return Other(type(node).__name__, {name: _as_json(value) for name, value in static.items() if _in_json(value)})


def _in_json(value: object) -> bool:
    """Whether JSON has this value, or a list of the same values."""
    if isinstance(value, list | tuple):
        return all(map(_in_json, value))
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def _as_json(value: object) -> object:
    """The value with lists in the place of tuples."""
    return list(map(_as_json, value)) if isinstance(value, list | tuple) else value


def filled(leaf: Leaf, values: Mapping[str, Value], name: str) -> Leaf:
    """A leaf of a target with these values in it, in its boxes; one that has no parts as it is."""
    if not is_node(leaf):
        return rebox(leaf, values[name]) if values else leaf
    pairs, treedef = jax.tree.flatten_with_path(leaf, is_leaf=is_box)
    parts = [rebox(part, values[within(name, leaf_path(keys))]) for keys, part in pairs]
    return jax.tree.unflatten(treedef, parts)
