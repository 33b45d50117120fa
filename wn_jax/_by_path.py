"""Options that may differ from leaf to leaf: one value, a dict from path or glob to value, or a function of the path.

This file owns which leaf gets which value, and the errors about paths. What a value may be is its option's to say.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar, cast

from wn_jax._tree import listed, unknown_paths

Value = TypeVar("Value")
ByPath: TypeAlias = Value | Mapping[str, Value] | Callable[[str], Value]
"""One value for all leaves, a dict from path or glob of paths to value, or a function from path to value."""


def values_by_path(
    name: str, option: ByPath[Value], nodes: Sequence[str], others: Sequence[str], default: Value
) -> dict[str, Value]:
    """The value of an option at each node.

    In a dict, a path counts more than a glob, and of globs the last that matches. As in a shell's, `*` stands for any
    characters, `?` for one, and `[ab]` for one of these; unlike there, a `/` is a character like others.

    Arguments:
        name: the option's, for messages.
        option: one value for all nodes, a dict, or a function.
        nodes: the paths of the nodes.
        others: the paths of the other leaves of the tree.
        default: the value of nodes that a dict does not name.

    Raises:
        ValueError: a dict has a path that no leaf has, or that of a leaf that is no node, or a glob that no node's path
            is like.
    """
    if isinstance(option, Mapping):
        _check_keys(name, option, nodes, others)
        return {path: _value_in(option, path, default) for path in nodes}
    if callable(option):
        of = cast(Callable[[str], Value], option)  # a value that is a function itself cannot be told from this
        return {path: of(path) for path in nodes}
    return dict.fromkeys(nodes, option)


def _value_in(values: Mapping[str, Value], path: str, default: Value) -> Value:
    """The value that a dict has for a path."""
    if path in values:
        return values[path]
    return next((values[glob] for glob in reversed(list(values)) if fnmatch.fnmatchcase(path, glob)), default)


def _check_keys(name: str, keys: Mapping[str, object], nodes: Sequence[str], others: Sequence[str]) -> None:
    """Raises unless each key speaks of a node."""
    idle = [key for key in keys if not (isinstance(key, str) and any(_matches(key, path) for path in nodes))]
    plain = [key for key in idle if key in others]
    globs = [key for key in idle if isinstance(key, str) and key not in plain and set(key) & set("*?[")]
    if unknown := [key for key in idle if key not in plain and key not in globs]:
        raise ValueError(unknown_paths(f"{name} names", unknown, [*nodes, *others]))
    if plain:
        raise ValueError(f"{name} names {listed(plain)}, where there is no node. Nodes are at {listed(list(nodes))}.")
    if globs:
        raise ValueError(f"{name} has globs that match no node: {listed(globs)}. Nodes are at {listed(list(nodes))}.")


def _matches(key: str, path: str) -> bool:
    return key == path or fnmatch.fnmatchcase(path, key)
