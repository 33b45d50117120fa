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

_VERSIONS = (1, 2)
"""Files get the first where it will do, which every wn_jax reads. The second has nodes of other types, or in nodes."""


@dataclasses.dataclass(frozen=True)
class Other:
    """A node that is no `WeightNorm`, of which a file knows this much."""

    type: str
    """The name of its class."""
    static: dict[str, Any]
    """Its fields that are no part of the tree, as far as JSON can hold them."""

    def __str__(self) -> str:
        fields = ", ".join(f"{name}={_shown(value)}" for name, value in self.static.items())
        return f"{self.type}({fields})" if fields else self.type


@dataclasses.dataclass
class Facts:
    """The facts of a file. Every leaf of the saved tree is in `paths`."""

    paths: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """The keys that lead to a leaf, by its name: these keys joined by '/'."""
    nodes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """The reduction axes of `WeightNorm` nodes: of leaves, and of nodes within these."""
    numbers: dict[str, int | float] = dataclasses.field(default_factory=dict)
    """The leaves, and parts of nodes, that are numbers of Python."""
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of arrays that are the data of random keys, the kind of key."""
    others: dict[str, Other] = dataclasses.field(default_factory=dict)
    """The nodes that are no `WeightNorm`: leaves, and nodes within these."""
    parts: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Of leaves that are other nodes, or hold some: the names of the arrays and numbers in them."""

    def parts_of(self, name: str) -> list[str]:
        """The names of the arrays and numbers of a leaf."""
        halves = of_node(name) if name in self.nodes else (name,)
        return self.parts.get(name, list(halves))

    def kinds_at(self, name: str) -> dict[str, tuple[int, ...] | Other]:
        """The nodes at a leaf and within it: the axes of a `WeightNorm`, and what is known of others."""
        if name not in self.parts:
            return {name: self.nodes[name]} if name in self.nodes else {}
        inner = within(name, "")
        return {path: kind for path, kind in (self.nodes | self.others).items() if f"{path}/".startswith(inner)}


def of_node(name: str) -> tuple[str, str]:
    """The names of the arrays `g` and `v` of a node."""
    return within(name, "g"), within(name, "v")


def within(name: str, part: str) -> str:
    """The name of a part of a leaf. That of a tree which is one leaf is empty."""
    return f"{name}/{part}" if name else part


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
    fields = dataclasses.asdict(facts)
    if not facts.parts:
        return json.dumps({"version": 1, **{field: fields[field] for field in _KINDS}})
    return json.dumps({"version": 2, **fields})


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
        if type(version) is int and version in _VERSIONS:
            facts = _fields(raw, _KINDS if version == 1 else _KINDS | _KINDS_OF_2)
            _check_names(facts, set(shapes))
            _check_arrays(facts, shapes)
            return facts
    except RecursionError:
        raise ValueError("its metadata is damaged: it is nested too deep") from None
    except (TypeError, ValueError) as error:  # JAX raises either where arrays are no keys
        raise ValueError(f"its metadata is damaged: {_cut(str(error))}") from None
    remedy = ": install a newer one" if isinstance(version, int) and version > max(_VERSIONS) else ""
    raise ValueError(f"of format {_shown(version)}; this wn_jax reads {' and '.join(map(str, _VERSIONS))}{remedy}")


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


_KINDS_OF_2: dict[str, tuple[str, Callable[[object], bool]]] = {
    "others": (
        "a type with its fields",
        lambda x: type(x) is dict and {key: type(x[key]) for key in x} == {"type": str, "static": dict},
    ),
    "parts": ("a list of strings", lambda x: type(x) is list and all(type(name) is str for name in x)),
}


def _fields(raw: Mapping[str, Any], kinds: Mapping[str, tuple[str, Callable[[object], bool]]]) -> Facts:
    """The fields of the facts, each value of its type."""
    for field, (kind, is_right) in kinds.items():
        found = raw.get(field)
        if not isinstance(found, dict):
            raise ValueError(f"{field!r} is {_shown(found)}, and not an object")
        for name, value in found.items():
            if not is_right(value):
                raise ValueError(f"{field!r} has {_shown(value)} for {_shown(name)}, and not {kind}")
    nodes = {name: tuple(axes) for name, axes in raw["nodes"].items()}  # JSON has no tuples
    others = {name: Other(**other) for name, other in raw["others"].items()} if "others" in kinds else {}
    same = {field: raw[field] for field in ("paths", "numbers", "keys", "parts") if field in kinds}
    return Facts(nodes=nodes, others=others, **same)


def _check_names(facts: Facts, arrays: set[str]) -> None:
    """Raise unless each leaf, and each array of the file, has its place."""
    for name, keys in facts.paths.items():
        if "/".join(keys) != name:
            raise ValueError(f"the keys of {_shown(name)} are {_shown(keys)}")
        if len(keys) > sys.getrecursionlimit():
            raise ValueError(f"{_shown(name)} is nested too deep")
    as_dicts((keys, None) for keys in facts.paths.values())
    expected = [part for name in facts.paths for part in facts.parts_of(name) if part not in facts.numbers]
    if (wrong := set(expected) ^ arrays) or not _is_known(facts, expected):
        raise ValueError(f"names do not fit the arrays: {_shown(sorted(wrong)[:5])}")


def _is_known(facts: Facts, expected: list[str]) -> bool:
    """Whether each name is that of a leaf or of something within one, and stands for one thing."""
    nodes = facts.nodes.keys() | facts.others.keys()
    whole = facts.parts.keys()
    parts = [part for name in whole for part in facts.parts[name]]
    inner = nodes - facts.paths.keys()
    halves = {half for name in facts.nodes for half in of_node(name)}
    return (
        len(set(expected)) == len(expected)
        and len(set(parts)) == len(parts)
        and not facts.nodes.keys() & facts.others.keys()
        and facts.numbers.keys() <= facts.paths.keys() | set(parts)
        and not facts.numbers.keys() & (nodes | set(expected) | halves)
        and facts.keys.keys() <= set(expected) - halves
        and facts.others.keys() - inner <= whole <= nodes - inner
        and all(any(part.startswith(within(name, "")) for name in whole) for part in inner)
        and all(part.startswith(within(name, "")) for name in whole for part in facts.parts[name])
        and halves <= set(expected) | inner
    )


def _check_arrays(facts: Facts, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raise where the arrays of a node, or of random keys, do not belong together."""
    for name, axes in facts.nodes.items():
        of_g, of_v = of_node(name)
        g = shapes[of_g].shape
        if of_v not in shapes:  # of a node within it, the shape is not known
            if canonical_axes(axes, g) != axes or any(g[axis] != 1 for axis in axes):
                raise ValueError(f"the node {name!r} has axes {axes} and a g of shape {g}")
            continue
        v = shapes[of_v].shape
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
