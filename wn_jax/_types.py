"""Names for the types that signatures share.

Arrays, nodes, mappings and functions are named where they come from. The aliases of `Any` here say what is meant where
no type can say it: JAX takes any container that it knows as a tree, and frameworks bring containers of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

PyTree: TypeAlias = Any
"""A tree of containers that JAX knows, with anything at its leaves: a batch, a result, an optimizer's state."""

Params: TypeAlias = Any
"""A tree of parameters, of any framework: plain, or with nodes where weights stood."""

Leaf: TypeAlias = Any
"""Anything at a leaf of a parameter tree: an array, a number, a node, a box around one, a framework's own object."""

KeyPath: TypeAlias = tuple[Any, ...]
"""A path to a leaf as JAX has it: a key (`DictKey`, `GetAttrKey`, ...) for each container on the way."""

TreeDef: TypeAlias = Any
"""The structure of a tree: a `jax.tree_util.PyTreeDef`, which has no type that checkers know."""

Shape: TypeAlias = tuple[int, ...]
"""The sizes of an array's axes."""

Axes: TypeAlias = int | Iterable[int]
"""Reduction axes as a user gives them: one or several, from either end."""

AxesRule: TypeAlias = Mapping[str, Axes | None] | Callable[[str, Leaf], Axes | None]
"""Which leaves become nodes, over which axes: a dict from leaf path to axes, or a function `(path, leaf) -> axes`."""

Specs: TypeAlias = Any
"""A tree of shardings: specs, `NamedSharding`s, names in boxes, tuples of names, or a prefix of such a tree."""

Scale: TypeAlias = Literal["auto", "weight", "output"]
"""Where `wrap` applies the scale `g / ||v||`."""
