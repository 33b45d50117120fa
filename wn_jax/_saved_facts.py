"""The facts beside the arrays of a file: its leaves, which are nodes, numbers or random keys; as text, and checked.

A file may come from anywhere, so nothing in the text is taken for granted: what does not fit is an error and not a leaf
less.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from wn_jax._node import canonical_axes
from wn_jax._types import Leaf, PyTree

_VERSION = 1


@dataclasses.dataclass
class Facts:
    """The facts of a file. Every leaf of the saved tree is in `paths`."""

    paths: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """The keys that lead to a leaf, by its name: these keys joined by '/'."""
    nodes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """The reduction axes of the leaves that are nodes."""
    numbers: dict[str, int | float] = dataclasses.field(default_factory=dict)
    """The leaves that are numbers of Python."""
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of arrays that are the data of random keys, the kind of key."""


def of_node(name: str) -> tuple[str, str]:
    """The names of the arrays `g` and `v` of a node."""
    return (f"{name}/g", f"{name}/v") if name else ("g", "v")


def as_dicts(leaves: Iterable[tuple[list[str], Leaf]]) -> PyTree:
    """Nested dicts by the keys that lead to each leaf; where no key does, the leaf itself.

    Raises:
        ValueError: a leaf lies inside another, or there are none.
    """
    top: dict[str, PyTree] = {}
    for keys, leaf in leaves:
        inner = top
        *folders, last = ["", *keys]  # the tree itself is under an empty key
        for key in folders:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ValueError(f"the leaf {_shown('/'.join(keys))} lies inside another leaf")
        if last in inner:
            raise ValueError(f"other leaves lie inside the leaf {_shown('/'.join(keys))}")
        inner[last] = leaf
    if not top:
        raise ValueError("it names no leaves")
    return top[""]


def as_text(facts: Facts) -> str:
    """The facts as the text that a file holds."""
    return json.dumps({"version": _VERSION, **dataclasses.asdict(facts)})


def of_text(text: str, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Facts:
    """The facts in a file's text.

    Arguments:
        text: the text.
        shapes: the shapes and dtypes of the arrays in the file.

    Raises:
        ValueError: the text is of another version; or it is damaged: no such text, or not about these arrays.
    """
    try:
        raw = json.loads(text, object_pairs_hook=_without_twins)
        if not isinstance(raw, dict):
            raise ValueError(f"it is {_shown(raw)}, and not an object")
        version = raw.get("version")
        if type(version) is int and version == _VERSION:
            facts = _fields(raw)
            _check_names(facts, set(shapes))
            _check_arrays(facts, shapes)
            return facts
    except RecursionError:
        raise ValueError("its metadata is damaged: it is nested too deep") from None
    except (TypeError, ValueError) as error:  # JAX raises either where arrays are no keys
        raise ValueError(f"its metadata is damaged: {_cut(str(error))}") from None
    raise ValueError(f"of format {_shown(version)}; this wn_jax reads {_VERSION}: install a newer one")


def _without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON, in which no name stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{_shown(next(name for name in found if names.count(name) > 1))} stands in it twice")
    return found


# Numbers of JSON may be True, which Python takes for an int.
_KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "paths": ("a list of strings", lambda x: type(x) is list and all(type(key) is str for key in x)),
    "nodes": ("a list of axes", lambda x: type(x) is list and all(type(axis) is int for axis in x)),
    "numbers": ("a number", lambda x: type(x) in (bool, int, float)),
    "keys": ("a string", lambda x: type(x) is str),
}


def _fields(raw: Mapping[str, Any]) -> Facts:
    """The fields of the facts, each value of its type."""
    for field, (kind, is_right) in _KINDS.items():
        found = raw.get(field)
        if not isinstance(found, dict):
            raise ValueError(f"{field!r} is {_shown(found)}, and not an object")
        for name, value in found.items():
            if not is_right(value):
                raise ValueError(f"{field!r} has {_shown(value)} for {_shown(name)}, and not {kind}")
    nodes = {name: tuple(axes) for name, axes in raw["nodes"].items()}  # JSON has no tuples
    return Facts(nodes=nodes, **{field: raw[field] for field in ("paths", "numbers", "keys")})


def _check_names(facts: Facts, arrays: set[str]) -> None:
    """Raise unless each leaf, and each array of the file, has its place."""
    for name, keys in facts.paths.items():
        if "/".join(keys) != name:
            raise ValueError(f"the keys of {_shown(name)} are {_shown(keys)}")
        if len(keys) > sys.getrecursionlimit():
            raise ValueError(f"{_shown(name)} is nested too deep")
    as_dicts((keys, None) for keys in facts.paths.values())
    plain = facts.paths.keys() - facts.nodes.keys() - facts.numbers.keys()
    expected = [*plain, *(part for name in facts.nodes for part in of_node(name))]
    known = (
        facts.nodes.keys() | facts.numbers.keys() <= facts.paths.keys()
        and not facts.numbers.keys() & (facts.nodes.keys() | arrays)
        and facts.keys.keys() <= plain
        and len(set(expected)) == len(expected)
    )
    if (wrong := set(expected) ^ arrays) or not known:
        raise ValueError(f"names do not fit the arrays: {_shown(sorted(wrong)[:5])}")


def _check_arrays(facts: Facts, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raise where the arrays of a node, or of random keys, do not belong together."""
    for name, axes in facts.nodes.items():
        g, v = (shapes[part].shape for part in of_node(name))
        if canonical_axes(axes, v) != axes:
            raise ValueError(f"the node {name!r} has axes {axes} and a v of shape {v}")
        if g != tuple(1 if i - len(v) in axes else size for i, size in enumerate(v)):
            raise ValueError(f"the node {name!r} has a g of shape {g}, a v of shape {v} and axes {axes}")
    for name, impl in facts.keys.items():  # raises where data of this shape are no keys of this kind
        jax.eval_shape(lambda data, impl=impl: jax.random.wrap_key_data(data, impl=impl), shapes[name])


def _shown(value: object) -> str:
    """A value of any size, for a message."""
    return reprlib.repr(value)


def _cut(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]} ..."
