"""Nodes inside `shard_map`, where an array is one shard, and only the caller knows along which axes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from wn_jax._boxes import unbox
from wn_jax._node import WeightNorm, is_node
from wn_jax._sharding import shardings
from wn_jax._tree import flatten


@functools.partial(jax.tree_util.register_dataclass, data_fields=("g", "v"), meta_fields=("axes", "axis_names"))
@dataclasses.dataclass(frozen=True, eq=False)
class LocalWeightNorm(WeightNorm):
    """The shard of a node, with the mesh axes that its reduction axes are sharded over; norms add up over these."""

    axis_names: tuple[str, ...] = ()  # type: ignore[misc]


def in_shard_map(params: Any, specs: Any) -> Any:
    """States, inside `shard_map` or `pmap`, how the weights are sharded, so that their nodes can be rebuilt.

    There a node holds shards, and a norm over its local `v` alone would be wrong without anyone noticing. So a node
    refuses, until this says which mesh axes its reduction axes are sharded over. Squared norms are then added up over
    those with one `psum` of a number a feature; values and gradients are those of the whole weight, with `check_vma`
    on and off. Where the reduction axes are whole on each device (`P()`, or only features sharded), nothing is sent.

    What is stated is checked against what JAX knows, which with `check_vma=False` is nothing: there `P()` for a weight
    that is sharded gives the norms of shards. State it of whole stacks, before a `scan` or `vmap` takes slices.

    State it where the nodes are used, inside the function that is differentiated: gradients then have the structure of
    `params`. Outside of manual regions, where a norm is global anyway, and along axes that are not manual, it changes
    nothing.

    Arguments:
        params: the tree with nodes, as it came in.
        specs: what `in_specs` has for it, or specs of the plain tree: see `shardings`.

    Returns:
        The tree for `wrap(fn)`, `reconstruct`, `optim.project_directions` and `optim.direction_stats`; its nodes are of
        another type, so it is not the one to update, return or save.

    Raises:
        ValueError: a spec is missing, does not fit, or names no axis of the mesh; or (with `check_vma`) it says that a
            weight is sharded over an axis along which it is the same on all devices, or does not say that it is.

    >>> import jax, jax.numpy as jnp, wn_jax as wn
    >>> from jax.sharding import PartitionSpec as P
    >>> params = wn.reparameterize({"kernel": jnp.ones((4, 6))}, {"kernel": (-2,)})
    >>> specs = wn.shardings(params, {"kernel": P("fsdp", None)})
    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("fsdp",))
    >>> def model(params, x):  # x, too, has a part of the inputs
    ...     return jax.lax.psum(x @ params["kernel"], "fsdp")
    >>> def local(params, x):
    ...     return wn.wrap(model)(wn.in_shard_map(params, specs), x)
    >>> fn = jax.shard_map(local, mesh=mesh, in_specs=(specs, P(None, "fsdp")), out_specs=P())
    >>> fn(params, jnp.ones((1, 4)))
    Array([[4., 4., 4., 4., 4., 4.]], dtype=float32)
    """
    paths, leaves, treedef = flatten(params)
    given = treedef.flatten_up_to(shardings(params, specs))
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return params
    return treedef.unflatten(
        [
            _stated(path, leaf, spec.v) if is_node(leaf) else leaf
            for path, leaf, spec in zip(paths, leaves, given, strict=True)
        ]
    )


def _stated(path: str, node: WeightNorm, spec: Any) -> LocalWeightNorm:
    """The node with what the spec of its `v` says."""
    names = _names(path, unbox(spec))
    mesh = jax.sharding.get_abstract_mesh()
    unknown = [name for dim in names for name in dim if name not in mesh.axis_names]
    if unknown:
        raise ValueError(f"{path!r}: the mesh has no axis {unknown[0]!r}; its axes are {tuple(mesh.axis_names)}")
    ndim = unbox(node.v).ndim
    reduction = [name for i, dim in enumerate(names) if i - ndim in node.axes for name in dim]
    axis_names = tuple(name for name in reduction if name in mesh.manual_axes)
    for name in axis_names:  # with check_vma off, nothing is known to vary
        if _varies(jax.lax.axis_index(name), name) and not _varies(unbox(node.v), name):
            raise ValueError(
                f"{path!r}: specs say that its reduction axes are sharded over {name!r}, but it is the same on all "
                "devices along that axis; give the specs that in_specs has for it"
            )
    named = {name for dim in names for name in dim}
    unnamed = [name for name in mesh.manual_axes if name not in named and _varies(unbox(node.v), name)]
    if unnamed:
        raise ValueError(
            f"{path!r}: specs do not name {unnamed[0]!r}, but it differs between devices along that axis; give the "
            "specs that in_specs has for it, and state them before a jax.lax.pcast"
        )
    return LocalWeightNorm(node.g, node.v, node.axes, axis_names)


def _varies(x: jax.Array, name: str) -> bool:
    """Whether JAX knows that an array differs along a mesh axis."""
    return name in getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", ())


def _names(path: str, spec: Any) -> list[tuple[str, ...]]:
    """The mesh axes of each axis."""
    spec = spec.spec if isinstance(spec, jax.sharding.NamedSharding) else spec
    if not isinstance(spec, (jax.sharding.PartitionSpec, tuple)):
        raise ValueError(
            f"{path!r}: its spec is {spec!r}, which does not say how it is sharded; for whole weights, say P()"
        )
    return [dim if isinstance(dim, tuple) else () if dim is None else (dim,) for dim in spec]
