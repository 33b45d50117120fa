"""Which axis of each parameter is sharded over which axis of the mesh: read from how the network uses it.

What belongs to a parameter lies where it does. Examples and batches are `placement`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import parametrizations
from experiments.errors import ConfigError


def of_parameters(uses: Iterable[Any], mesh: Mesh) -> dict[str, PartitionSpec]:
    """The spec of each plain parameter, by path, from the rows of `wn.weight_uses`.

    Of a weight, the features are sharded over `model`, and what is summed over, over `fsdp` (else another axis of the
    features): in both cases the largest axis that can be. Leaves that are no weights, such as tables to look up in, are
    sharded over `fsdp` if they have two axes or more. What is left (biases, gains) is whole everywhere.
    """
    return {use.path: _of_use(use, mesh) for use in uses}


def check(uses: Iterable[Any], mesh: Mesh) -> None:
    """Check that each axis of the mesh that shards parameters has one to shard.

    Raises:
        ConfigError: a number of devices divides none of their axes.
    """
    used = {name for spec in of_parameters(uses, mesh).values() for name in spec}
    for name, what in (
        ("fsdp", "what a layer sums over, and no features either"),
        ("model", "the features of a layer"),
    ):
        if mesh.shape[name] > 1 and name not in used:
            raise ConfigError(f"mesh.{name}: {mesh.shape[name]} does not divide {what}; change it, or leave it out")


def gathered(params: Any, by_path: dict[str, PartitionSpec], mesh: Mesh) -> Any:
    """In a compiled function: those of the plain parameters that have a spec as layers use them, whole along `fsdp`."""
    if mesh.shape["fsdp"] == 1:
        return params

    def whole(path: Any, leaf: jax.Array) -> jax.Array:
        if _name(path) not in by_path:
            return leaf
        shared = by_path[_name(path)]
        spec = PartitionSpec(*(None if name == "fsdp" else name for name in shared))
        # Said, as XLA otherwise may look for another way, and in one that it finds (gradients of max pooling, on a mesh
        # with all three axes) it computes wrong numbers: `tests/experiments/test_devices.py` would show it.
        # The first constraint holds for the gradient, whose sum over the devices each needs its own part of.
        leaf = jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, shared))
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree.map_with_path(whole, params)


def of_state(state: Any, by_path: dict[str, PartitionSpec]) -> Any:
    """The specs of the states of several members, from their shapes and the plain parameters' specs.

    Moments and averages lie where their parameter does. All else is whole everywhere.
    """

    def plain(path: Any, _: Any) -> PartitionSpec:
        return PartitionSpec(None, *by_path[_name(path)])

    specs = jax.tree.map_with_path(plain, state.params, is_leaf=parametrizations.is_node)
    specs = parametrizations.shardings(state.params, specs)
    known = {path: leaf.shape for path, leaf in jax.tree.leaves_with_path(state.params)}
    own = dict(jax.tree.leaves_with_path(specs))

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        """That of the parameter at the end of the path."""
        # optax keeps the tree of parameters whole in its states, so that a moment's path ends with its parameter's.
        ends = (path[start:] for start in range(len(path)))
        return next((own[end] for end in ends if known.get(end) == leaf.shape), PartitionSpec())

    return jax.tree.map_with_path(spec, state)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _of_use(use: Any, mesh: Mesh) -> PartitionSpec:
    names: list[str | None] = [None] * len(use.shape)

    def shard(name: str, axes: Iterable[int]) -> bool:
        """Whether one of the axes could be sharded over this axis of the mesh."""
        count = mesh.shape[name]
        fitting = [axis for axis in axes if count > 1 and names[axis] is None and use.shape[axis] % count == 0]
        if fitting:
            names[max(fitting, key=lambda axis: use.shape[axis])] = name
        return bool(fitting)

    if use.reduction is not None:
        shard("model", use.feature)
        _ = shard("fsdp", use.reduction) or shard("fsdp", use.feature)
    elif len(names) > 1:
        shard("fsdp", range(len(names)))
    return PartitionSpec(*names)
