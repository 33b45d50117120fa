"""From a tree in PyTorch's layout to the parameters of a Flax model, and back, by a map of names.

This file owns which value goes to which leaf, and that none is left over. One array and its layout are `_layouts`'s,
and one value in the place of a leaf is `_fit`'s.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from wn_jax._boxes import unbox
from wn_jax._node import WeightNorm, is_node
from wn_jax._tree import did_you_mean, flatten, is_array
from wn_jax._types import Leaf, Params, TreeDef
from wn_jax.torch._arrays import ArrayOrNode
from wn_jax.torch._fit import fitted
from wn_jax.torch._layouts import Array, kind_of
from wn_jax.torch._names import NameMap, Rule, rules_of
from wn_jax.torch._spectral import find_spectral_norms
from wn_jax.torch._state_dict import as_numpy, leaves_by_name, nested

_OF_NNX = " (of an NNX model, take nnx.state(model, nnx.Param))"


def to_flax(tree: Params, target: Params, names: NameMap) -> Params:
    """A tree in PyTorch's layout as a tree of Flax parameters, with its nodes: the same weights.

    Arguments:
        tree: what `from_state_dict` returned.
        target: the parameters of the Flax model, of any values, or abstract:
            `jax.eval_shape(model.init, key, x)`.
        names: from PyTorch's names (`'encoder.conv.weight'`, also of a weight in halves) to places in the target. A
            place is a path, an `Array` with a layout, what `linear`, `conv` and the like return for a layer, or `None`
            for a name, or a whole module, that is to be left out. `{i}` in a name stands for any number, and in its
            paths for the same.

    Returns:
        A new tree, of JAX arrays of their own, with the structure, boxes and shardings of the target. Where that has
        plain weights, the result has nodes where the checkpoint has them, with the axes that they have there, and `g`
        has the names and the sharding of the other axes. Floating-point numbers get the target's dtype, and a `g` that
        has none there float32 at least.

    Raises:
        ValueError: keys have no place, or leaves of the target get nothing (all are listed); two keys go to one leaf,
            or a key has two places; a shape does not fit, or only transposed; the axes of a node are not the target's;
            numbers do not fit the target's dtype, or are NaN.

    >>> from wn_jax.torch import from_state_dict, linear
    >>> state = {"fc.weight_g": np.full((2, 1), 5.0), "fc.weight_v": np.ones((2, 3)), "fc.bias": np.zeros(2)}
    >>> target = {"Dense_0": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
    >>> kernel = to_flax(from_state_dict(state), target, {"fc": linear("Dense_0")})["Dense_0"]["kernel"]
    >>> kernel.g, kernel.axes
    (Array([[5., 5.]], dtype=float32), (-2,))
    """
    rules = rules_of(names)
    wanted, treedef = _by_path(target, "the target")
    leaves = leaves_by_name(tree)
    found, unused = _placed(leaves, rules)
    if problems := _left_over(found, unused, wanted):
        if idle := _idle(leaves, rules):
            problems.append(f"entries of the map that no key is like: {', '.join(map(repr, idle))}")
        raise ValueError("; ".join(problems))
    for path, placed in found.items():
        with _about(f"{' and '.join(map(repr, placed.names))}, for {path!r},"):
            wanted[path] = fitted(placed.value, wanted[path])
    return jax.tree.unflatten(treedef, list(wanted.values()))


def from_flax(params: Params, names: NameMap) -> dict[str, Params]:
    """The way back: Flax parameters, trained or not, as a tree in PyTorch's layout, for `to_state_dict`.

    Arguments:
        params: a tree with nodes, or a plain one. Leaves that are no arrays stay behind.
        names: the map that `to_flax` took. What that left out is not in the result.

    Returns:
        Nested dicts of NumPy arrays, which may share memory with those in `params`. (`to_state_dict` copies.)

    Raises:
        ValueError: leaves have no place in the map, or two; of the leaves that make one array, some are missing or
            differ; a layout does not fit.

    >>> from wn_jax.torch import linear
    >>> from_flax({"Dense_0": {"kernel": np.ones((3, 2))}}, {"fc": linear("Dense_0")})["fc"]["weight"].shape
    (2, 3)
    """
    leaves = {path: leaf for path, leaf in _by_path(params, "params")[0].items() if _holds_array(leaf)}
    found: dict[str, ArrayOrNode] = {}
    taken: dict[str, Rule] = {}
    for rule in rules_of(names):
        if rule.place is None:
            continue
        for name, paths in rule.names_among(leaves):
            if name in found:
                raise ValueError(
                    f"{name!r} is made of {paths[0]!r}, and of other leaves too; leave out one place of it"
                )
            parts = [_taken(name, path, rule, leaves, taken) for path in paths]
            with _about(f"{name!r}, made of {', '.join(map(repr, paths))},"):
                found[name] = rule.place.to_torch(parts)
    if unused := [path for path in leaves if path not in taken]:
        raise ValueError(
            f"these leaves of params have no place in the map: {', '.join(map(repr, unused))}. Give them one, or leave "
            f"them out{_OF_NNX}"
        )
    return nested(found)


@dataclasses.dataclass
class _Placed:
    """A value for a leaf of the target."""

    value: ArrayOrNode
    """The array or node, in Flax's layout."""
    names: list[str]
    """The names of PyTorch that it comes from: several of a sum."""
    add: bool
    """Whether other values for the same leaf are added to it."""


def _placed(leaves: Mapping[str, Leaf], rules: list[Rule]) -> tuple[dict[str, _Placed], list[str]]:
    """The value for each path, and the names that no rule is about."""
    # A large model's map has a rule a name: those are looked up, and only patterns are tried on each name.
    literal = collections.defaultdict[str, list[Rule]](list)
    for rule in rules:
        if rule.literal:
            literal[rule.name].append(rule)
    patterns = [rule for rule in rules if not rule.literal]
    found: dict[str, _Placed] = {}
    unused = []
    for name, leaf in leaves.items():
        match = _match(name, (*literal.get(name, ()), *patterns))
        if match is None:
            unused.append(name)
            continue
        rule, paths = match
        if rule.place is None:
            continue
        for path, new in zip(paths, _values(name, leaf, rule.place), strict=True):
            found[path] = _sum(path, found[path], new) if path in found else new
    return found, unused


def _match(name: str, rules: Iterable[Rule]) -> tuple[Rule, list[str]] | None:
    """The one rule that is about a name, and the paths that it leads to."""
    matches = [(rule, paths) for rule in rules if (paths := rule.paths_for(name)) is not None]
    if len(matches) > 1:
        first, second = (rule.name for rule, _ in matches[:2])
        raise ValueError(f"{name!r} has two places in the map: as {first!r} and {second!r}")
    return matches[0] if matches else None


def _values(name: str, leaf: Leaf, place: Array) -> list[_Placed]:
    """The values that a leaf of the checkpoint gives, one for each path of its place."""
    array = as_numpy(name, leaf)
    with _about(repr(name)):
        values = place.to_flax(array)
    return [_Placed(value, [name], place.add) for value in values]


def _sum(path: str, first: _Placed, second: _Placed) -> _Placed:
    """Two values for one leaf as one, where both say that they are added."""
    names = [*first.names, *second.names]
    if not (first.add and second.add):
        raise ValueError(f"two keys go to {path!r}: {first.names[0]!r} and {second.names[0]!r}; mend the map")
    if kind_of(first.value) != kind_of(second.value) or not _can_be_added(first.value):
        raise ValueError(f"{' and '.join(map(repr, names))} are added for {path!r}, but are no arrays of one shape")
    wide = jnp.promote_types(first.value.dtype, jnp.float32)  # where the sum of two large half-precision numbers fits
    return _Placed(first.value.astype(wide) + second.value, names, True)


def _can_be_added(value: ArrayOrNode) -> TypeGuard[np.ndarray | np.generic]:
    # Not asked whether it is an np.ndarray: a part of an array of one axis is a scalar of NumPy's.
    return not isinstance(value, WeightNorm) and jnp.issubdtype(value.dtype, jnp.floating)


def _left_over(found: Mapping[str, _Placed], unused: list[str], wanted: Mapping[str, Leaf]) -> list[str]:
    """The complaints about keys and leaves that are left over, naming all of them."""
    missing = [path for path, leaf in wanted.items() if path not in found and _holds_array(leaf)]
    problems = []
    if unused:
        problems.append(f"keys without a place in the map (None leaves them out): {', '.join(map(repr, unused))}")
    for i, path in enumerate(path for path in found if path not in wanted):
        hint = did_you_mean(path, list(wanted)) if i < 5 else ""  # each takes time
        problems.append(f"{found[path].names[0]!r} goes to {path!r}, which the target does not have{hint}")
    if missing:
        listed = ", ".join(map(repr, missing))
        problems.append(f"leaves of the target that get nothing: {listed}; give them a key, or leave them out{_OF_NNX}")
    if any(name.endswith(("weight_g", ".original0")) for name in unused):
        problems.append("halves of weights become nodes by from_state_dict: to_flax(from_state_dict(state), ...)")
    if find_spectral_norms(unused):
        problems.append("spectral norms become plain weights by from_state_dict(state, fold_spectral=True)")
    return problems


def _idle(names: Collection[str], rules: list[Rule]) -> list[str]:
    """The modules of the map that not one key is of; that a layer has no bias is no news."""

    def is_used(rule: Rule) -> bool:
        return rule.name in names if rule.literal else any(rule.paths_for(name) is not None for name in names)

    modules = {rule.name: rule.name.rpartition(".")[0] or rule.name for rule in rules}
    used = {modules[rule.name] for rule in rules if is_used(rule)}
    return [module for module in dict.fromkeys(modules.values()) if module not in used]


def _taken(name: str, path: str, rule: Rule, leaves: Mapping[str, Leaf], taken: dict[str, Rule]) -> ArrayOrNode:
    """The share of a rule in a leaf: of a sum, all of it for the first, and then zeros.

    `taken` holds the rule that had each leaf first, and is filled here.
    """
    if path not in leaves:
        raise ValueError(f"{name!r} needs {path!r}, which params does not have")
    array, first = as_numpy(path, leaves[path]), taken.setdefault(path, rule)
    if first is rule:
        return array
    if not (rule.place and rule.place.add and first.place and first.place.add and _can_be_added(array)):
        raise ValueError(f"{path!r} is in two places of the map, as {first.name!r} and {rule.name!r}; leave out one")
    return np.zeros_like(array)


def _by_path(tree: Params, what: str) -> tuple[dict[str, Leaf], TreeDef]:
    """The leaves of a tree by their paths, and its structure."""
    paths, leaves, treedef = flatten(tree)
    if duplicates := [path for path, count in collections.Counter(paths).items() if count > 1]:
        raise ValueError(f"two leaves of {what} have the path {duplicates[0]!r}; rename a key that contains '/'")
    return dict(zip(paths, leaves, strict=True)), treedef


def _holds_array(leaf: Leaf) -> bool:
    return is_node(leaf) or is_array(unbox(leaf))


@contextlib.contextmanager
def _about(what: str) -> Iterator[None]:
    """Errors in here are those of this key or leaf."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what} {error}") from error
