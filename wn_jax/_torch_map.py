"""From a tree in PyTorch's layout to the parameters of a Flax model, and back, by a map of names."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wn_jax._boxes import rebox, rebox_reduced, unbox
from wn_jax._node import WeightNorm, is_node, norm_dtype
from wn_jax._saved_leaves import is_array, sharding_of
from wn_jax._torch_layouts import kind_of
from wn_jax._torch_names import NameMap, Rule, rules_of
from wn_jax._torch_pairs import has_nan_or_infinity
from wn_jax._torch_state import as_numpy, leaves_by_name, nested
from wn_jax._transform import did_you_mean, flatten


def to_flax(tree: Any, target: Any, names: NameMap) -> Any:
    """A tree in PyTorch's layout as a tree of Flax parameters, with its nodes: the same weights.

    Arguments:
        tree: what `from_state_dict` returned.
        target: the parameters of the Flax model, of any values, or abstract:
            `jax.eval_shape(model.init, key, x)`. The result has its structure, boxes and shardings. Where it has plain
            weights, the result has nodes where the checkpoint has them, with the axes that they have there.
        names: from PyTorch's names (`'encoder.conv.weight'`, also of a weight in halves) to places in the target. A
            place is a path, an `Array` with a layout, what `linear`, `conv` and the like return for a layer, or `None`
            for what is to be left out. `{i}` in a name stands for any number, and in its paths for the same.

    Returns:
        A new tree, of JAX arrays of their own. Floating-point numbers get the target's dtype, and `g` float32 at least.

    Raises:
        ValueError: keys have no place, or leaves of the target get nothing (all are listed); two keys go to one leaf,
            or a key has two places; a shape does not fit, or only transposed; the axes of a node are not the target's;
            numbers do not fit the target's dtype.

    >>> from wn_jax.torch import from_state_dict, linear
    >>> state = {"fc.weight_g": np.full((2, 1), 5.0), "fc.weight_v": np.ones((2, 3)), "fc.bias": np.zeros(2)}
    >>> target = {"Dense_0": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
    >>> kernel = to_flax(from_state_dict(state), target, {"fc": linear("Dense_0")})["Dense_0"]["kernel"]
    >>> kernel.g, kernel.axes
    (Array([[5., 5.]], dtype=float32), (-2,))
    """
    rules = rules_of(names)
    paths, leaves, treedef = flatten(target)
    if duplicates := [path for path, count in collections.Counter(paths).items() if count > 1]:
        raise ValueError(f"two leaves of the target have the path {duplicates[0]!r}; rename a key that contains '/'")
    wanted = dict(zip(paths, leaves, strict=True))
    found, unused = _placed(leaves_by_name(tree), rules)
    _check_complete(found, unused, wanted)
    for path, placed in found.items():
        with _about(f"{' and '.join(map(repr, placed.names))}, for {path!r},"):
            wanted[path] = _fitted(placed.value, wanted[path])
    return jax.tree_util.tree_unflatten(treedef, list(wanted.values()))


def from_flax(params: Any, names: NameMap) -> dict[str, Any]:
    """The way back: Flax parameters, trained or not, as a tree in PyTorch's layout, for `to_state_dict`.

    Arguments:
        params: a tree with nodes, or a plain one.
        names: the map that `to_flax` took. What it leaves out of the target is not in the result.

    Raises:
        ValueError: leaves have no place in the map, or two; of the leaves that make one array, some are missing or
            differ; a layout does not fit.

    >>> from wn_jax.torch import linear
    >>> from_flax({"Dense_0": {"kernel": np.ones((3, 2))}}, {"fc": linear("Dense_0")})["fc"]["weight"].shape
    (2, 3)
    """
    paths, values, _ = flatten(params)
    leaves = {path: as_numpy(path, leaf) for path, leaf in zip(paths, values, strict=True) if _holds_array(leaf)}
    found: dict[str, Any] = {}
    taken: dict[str, Rule] = {}
    for rule, place in ((rule, rule.place) for rule in rules_of(names) if rule.place):
        for name, paths in rule.names(leaves):
            if name in found:
                raise ValueError(
                    f"{name!r} is made of {paths[0]!r}, and of other leaves too; leave out one place of it"
                )
            with _about(f"{name!r}, made of {', '.join(map(repr, paths))},"):
                found[name] = place.to_torch([_taken(path, rule, leaves, taken) for path in paths])
    if unused := [path for path in leaves if path not in taken]:
        raise ValueError(f"these leaves of params have no place in the map: {', '.join(map(repr, unused))}")
    return nested(found)


@dataclasses.dataclass
class _Placed:
    """What goes to a leaf of the target, and the names that it comes from."""

    value: Any
    names: list[str]
    add: bool


def _placed(leaves: Mapping[str, Any], rules: list[Rule]) -> tuple[dict[str, _Placed], list[str]]:
    """What goes to each path, and the names that no rule is about."""
    found: dict[str, _Placed] = {}
    unused = []
    for name, leaf in leaves.items():
        matches = [(rule, paths) for rule in rules if (paths := rule.paths(name)) is not None]
        if len(matches) > 1:
            first, second = (rule.name for rule, _ in matches[:2])
            raise ValueError(f"{name!r} has two places in the map: as {first!r} and {second!r}")
        if not matches:
            unused.append(name)
        for place, paths in ((rule.place, paths) for rule, paths in matches if rule.place):
            with _about(repr(name)):
                values = place.to_flax(as_numpy(name, leaf))
            for path, value in zip(paths, values, strict=True):
                new = _Placed(value, [name], place.add)
                found[path] = _sum(path, found[path], new) if path in found else new
    return found, unused


def _sum(path: str, first: _Placed, second: _Placed) -> _Placed:
    names = [*first.names, *second.names]
    if not (first.add and second.add):
        raise ValueError(f"two keys go to {path!r}: {first.names[0]!r} and {second.names[0]!r}; mend the map")
    if kind_of(first.value) != kind_of(second.value) or isinstance(first.value, WeightNorm):
        raise ValueError(f"{' and '.join(map(repr, names))} are added for {path!r}, but are no arrays of one shape")
    return _Placed(first.value + second.value, names, True)


def _check_complete(found: Mapping[str, _Placed], unused: list[str], wanted: Mapping[str, Any]) -> None:
    """Raises, listing all of them, where keys or leaves are left over."""
    missing = [path for path, leaf in wanted.items() if path not in found and _holds_array(leaf)]
    problems = []
    if unused:
        problems.append(f"keys without a place in the map (None leaves them out): {', '.join(map(repr, unused))}")
    for path, placed in found.items():
        if path not in wanted:
            hint = did_you_mean(path, list(wanted))
            problems.append(f"{placed.names[0]!r} goes to {path!r}, which the target does not have{hint}")
    if missing:
        problems.append(f"leaves of the target that get nothing: {', '.join(map(repr, missing))}")
    if any(name.endswith(("weight_g", ".original0")) for name in unused):
        problems.append("halves of weights become nodes by from_state_dict: to_flax(from_state_dict(state), ...)")
    if problems:
        raise ValueError("; ".join(problems))


def _fitted(value: Any, leaf: Any) -> Any:
    """What takes the place of a leaf of the target."""
    if isinstance(value, WeightNorm) != isinstance(leaf, WeightNorm):
        if is_node(leaf):
            raise ValueError(
                "is a plain weight in the checkpoint and a node in the target; use a plain target, and reparameterize "
                "the result"
            )
        _check_shape(value.v.shape, unbox(leaf).shape)
        v = _numbers(value.v, unbox(leaf))
        g = jnp.array(value.g, norm_dtype(v.dtype))
        return WeightNorm(rebox_reduced(leaf, g, value.axes), rebox(leaf, v), value.axes)
    if not isinstance(value, WeightNorm):
        _check_shape(value.shape, unbox(leaf).shape)
        return rebox(leaf, _numbers(value, unbox(leaf)))
    _check_shape(value.v.shape, unbox(leaf.v).shape)
    if value.g.shape != unbox(leaf.g).shape:
        raise ValueError(
            f"has a norm over the axes {value.axes} in the checkpoint, and over {leaf.axes} in the target. For the "
            "checkpoint's axes, use a plain target; for others, reconstruct the result and reparameterize it"
        )
    g, v = (_numbers(ours, unbox(theirs)) for ours, theirs in ((value.g, leaf.g), (value.v, leaf.v)))
    return WeightNorm(rebox(leaf.g, g), rebox(leaf.v, v), leaf.axes)


def _check_shape(shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape == wanted:
        return
    orders = itertools.permutations(range(len(shape))) if len(shape) == len(wanted) else ()
    fitting = next((order for order in orders if tuple(shape[i] for i in order) == wanted), None)
    transposed = (
        f": it fits only transposed, its axes in the order {fitting}. Is it another layer (conv, conv_transpose, "
        "linear), or has it transpose_kernel?"
        if fitting
        else ""
    )
    raise ValueError(f"has the shape {shape} in Flax's layout, where the target has {wanted}{transposed}")


def _numbers(value: np.ndarray, leaf: Any) -> jax.Array:
    """A JAX array of its own with these numbers, of the target's dtype and in its place."""
    kinds = [kind for kind in (jnp.floating, jnp.integer) if all(jnp.issubdtype(x.dtype, kind) for x in (value, leaf))]
    differ = value.dtype != leaf.dtype
    if differ and not kinds:
        raise ValueError(f"is {value.dtype} in the checkpoint, where the target has {leaf.dtype}; cast one of them")
    array = value.astype(leaf.dtype, order="C")  # always a copy: JAX may go on using its memory
    if differ and _lost(array, value):
        raise ValueError(f"has numbers that {leaf.dtype}, the target's dtype, cannot hold; use another in the target")
    return jax.device_put(array, sharding_of(leaf))


def _lost(array: np.ndarray, value: np.ndarray) -> bool:
    """Whether numbers were lost when they got another dtype; rounding is no loss."""
    if jnp.issubdtype(value.dtype, jnp.floating):
        return has_nan_or_infinity(array) and not has_nan_or_infinity(value)
    return not np.array_equal(array, value)


def _taken(path: str, rule: Rule, leaves: Mapping[str, Any], taken: dict[str, Rule]) -> Any:
    """What a rule gets of a leaf: of a sum, all of it for the first, and then zeros."""
    if path not in leaves:
        raise ValueError(f"needs {path!r}, which params does not have")
    first = taken.setdefault(path, rule)
    if first is rule:
        return leaves[path]
    if not (rule.place and rule.place.add):
        raise ValueError(f"has {path!r}, which has another place in the map: {first.name!r}")
    return np.zeros_like(leaves[path])


def _holds_array(leaf: Any) -> bool:
    return is_node(leaf) or is_array(unbox(leaf))


@contextlib.contextmanager
def _about(what: str) -> Iterator[None]:
    """Errors in here are those of this key or leaf."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what} {error}") from error
