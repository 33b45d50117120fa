"""Nodes inside `shard_map`, where an array is one shard, and only the caller knows along which axes.

This file owns the statement, `in_shard_map`, its checks against what JAX knows, and the node that carries it. The
norms over shards are `_norms`'s.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from wn_jax._boxes import unbox
from wn_jax._node import WeightNorm
from wn_jax._sharding import shape_of, shardings
from wn_jax._tree import flatten
from wn_jax._types import Leaf, Params, Specs


@functools.partial(jax.tree_util.register_dataclass, data_fields=("g", "v"), meta_fields=("axes", "axis_names"))
@dataclasses.dataclass(frozen=True, eq=False)
class LocalWeightNorm(WeightNorm):
    """The shard of a node, with the mesh axes that its reduction axes are sharded over; norms add up over these."""

    axis_names: tuple[str, ...] = ()
    """The mesh axes. Of `WeightNorm` this is a constant of the class, `None`: there nobody said."""


def in_shard_map(params: Params, specs: Specs) -> Params:
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
        ValueError: a spec is missing, does not fit, or names no axis of the mesh; a node was masked; or (with
            `check_vma`) a spec says that a weight is sharded over an axis along which it is the same on all devices, or
            does not say that it is.
        RuntimeError: this JAX does not say what it knows under the name that wn_jax looks for, so that nothing could be
            checked.

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
            _stated(path, leaf, spec.v) if isinstance(leaf, WeightNorm) else leaf
            for path, leaf, spec in zip(paths, leaves, given, strict=True)
        ]
    )


def _stated(path: str, node: WeightNorm, spec: Specs) -> LocalWeightNorm:
    """The node with what the spec of its `v` says, after it was checked against what JAX knows."""
    v = unbox(node.v)
    if shape_of(v) is None:
        raise ValueError(
            f"{path!r}: the node has a {type(v).__name__} in the place of v, so it stands for no weight; state it of "
            "whole parameters, before they are masked"
        )
    mesh = jax.sharding.get_abstract_mesh()
    names = _names(path, unbox(spec))
    named = [name for dim in names for name in dim]
    if unknown := [name for name in named if name not in mesh.axis_names]:
        raise ValueError(f"{path!r}: the mesh has no axis {unknown[0]!r}; its axes are {tuple(mesh.axis_names)}")
    reduction = [name for i, dim in enumerate(names) if i - v.ndim in node.axes for name in dim]
    axis_names = tuple(name for name in reduction if name in mesh.manual_axes)
    _check_statement(path, v, axis_names, named, mesh)
    return LocalWeightNorm(node.g, node.v, node.axes, axis_names)


def _check_statement(
    path: str, v: jax.Array, reduction: Collection[str], named: Collection[str], mesh: AbstractMesh
) -> None:
    """Raises where JAX knows better along which mesh axes `v` differs between devices.

    The reduction axes of `v` are said to be sharded over the mesh axes `reduction`, and all of its axes over `named`.
    """
    varying = _varying(v)
    for name in reduction:
        # With check_vma off nothing is known to vary, not even an index that does: then there is nothing to check by.
        is_known = name in _varying(jax.lax.axis_index(name))
        if is_known and name not in varying:
            raise ValueError(
                f"{path!r}: specs say that its reduction axes are sharded over {name!r}, but it is the same on all "
                "devices along that axis; give the specs that in_specs has for it"
            )
    unnamed = [name for name in mesh.manual_axes if name not in named and name in varying]
    if unnamed:
        raise ValueError(
            f"{path!r}: specs do not name {unnamed[0]!r}, but it differs between devices along that axis; give the "
            "specs that in_specs has for it, and state them before a jax.lax.pcast"
        )


def _varying(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which JAX knows that an array differs between devices; none with `check_vma=False`.

    Raises:
        RuntimeError: JAX does not say it under this name.
    """
    # No default for a name that is missing: with an empty one, both checks would pass whatever is stated, and norms be
    # those of shards. JAX has renamed it before: until 0.10 it was jax.typeof(x).vma.
    try:
        return jax.typeof(x).manual_axis_type.varying
    except AttributeError as error:
        raise RuntimeError(
            f"jax {jax.__version__} does not say along which mesh axes an array differs between devices under the name "
            "that wn_jax looks for, jax.typeof(x).manual_axis_type.varying, so what in_shard_map is told cannot be "
            "checked. Please report this with the version. Until it is mended, call wn_jax.reconstruct(params) outside "
            "of shard_map and pass the plain weights in, or use another version of JAX"
        ) from error


def _names(path: str, spec: Leaf) -> list[tuple[str, ...]]:
    """The mesh axes of each axis."""
    entries = spec.spec if isinstance(spec, NamedSharding) else spec
    if not isinstance(entries, (PartitionSpec, tuple)):
        raise ValueError(
            f"{path!r}: its spec is {entries!r}, which does not say how it is sharded; for whole weights, say P()"
        )
    return [dim if isinstance(dim, tuple) else () if dim is None else (dim,) for dim in entries]
