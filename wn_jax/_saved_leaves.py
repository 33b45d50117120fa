"""What of a tree's leaves goes into a file, and whether a file fits a tree."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from wn_jax._boxes import unbox
from wn_jax._node import WeightNorm, is_node
from wn_jax._safetensors import Content, of_node


def parts(name: str, leaf: Any) -> dict[str, Any]:
    """The arrays and numbers of a leaf, by their names in a file: two of a node, none of a function.

    Raises:
        ValueError: it is a node, or a box, of a kind that a file cannot hold.
    """
    if isinstance(leaf, WeightNorm):
        found = dict(zip(of_node(name), (unbox(leaf.g), unbox(leaf.v)), strict=True))
        if not all(map(is_array, found.values())):
            raise ValueError(f"{name!r} is a node that holds no arrays (labels, specs or masks), or another node")
        return found
    if is_node(leaf):
        raise ValueError(f"{name!r} is a {type(leaf).__name__}; of nodes, a file can hold WeightNorm only")
    value = unbox(leaf)
    if is_array(value) or is_number(value):
        return {name: value}
    if value is not leaf:
        raise ValueError(
            f"{name!r} is a {type(leaf).__name__} around a {type(value).__name__}, and not around an array; leave it "
            "out (nnx.split(model, nnx.Param, ...)), or use Orbax"
        )
    return {}


def is_number(x: Any) -> bool:
    """Whether `x` is a number of Python."""
    return isinstance(x, (bool, int, float)) and not isinstance(x, np.generic)


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


def check_fits(path: Any, leaves: dict[str, Any], content: Content) -> None:
    """Raises, naming the first few of all reasons, unless a file has just these leaves."""
    problems = [problem for name, leaf in leaves.items() for problem in _problems(name, leaf, content)]
    known = {name for name, leaf in leaves.items() if parts(name, leaf)}
    problems += [f"{name!r} is in the file, but not in the target" for name in sorted(set(content.paths) - known)]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{path} does not fit the target: {'; '.join(problems[:5])}{more}. Without a target, load(path) returns "
            "what the file holds, for you to adapt"
        )


def _problems(name: str, leaf: Any, content: Content) -> list[str]:
    """In what a leaf of the target differs from the file's."""
    values = parts(name, leaf)
    if not values:
        return []
    if name not in content.paths:
        return [f"{name!r} is in the target, but not in the file"]
    saved, axes = content.nodes.get(name), leaf.axes if isinstance(leaf, WeightNorm) else None
    if saved is None and axes is not None:
        return [
            f"{name!r} is a plain weight in the file and a node in the target (load into the plain tree, then "
            "reparameterize)"
        ]
    if axes is None and saved is not None:
        return [f"{name!r} is a node in the file and a plain weight in the target (reparameterize the target)"]
    if saved != axes:
        return [f"the node {name!r} reduces over axes {saved} in the file and {axes} in the target"]
    return [
        f"{part!r} is {ours} in the file and {theirs} in the target"
        for part, value in values.items()
        if not _agree(ours := _saved_kind(part, content), theirs := _kind(value))
    ]


def _agree(ours: str, theirs: str) -> bool:
    """A number and an array without axes are taken for one another: `jit` makes an array of a number."""
    return ours == theirs or (min(ours, theirs) == "a number" and max(ours, theirs).endswith("[]"))


def _kind(value: Any) -> str:
    return "a number" if is_number(value) else f"{value.dtype}{list(value.shape)}"


def _saved_kind(name: str, content: Content) -> str:
    if name in content.numbers:
        return "a number"
    array = content.arrays[name]
    if name not in content.keys:
        return _kind(array)
    return _kind(jax.eval_shape(lambda data: jax.random.wrap_key_data(data, impl=content.keys[name]), array))


def is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))
