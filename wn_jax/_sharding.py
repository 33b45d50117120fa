"""How `g` and `v` are sharded, from how the weight is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from wn_jax._boxes import is_box, rebox_reduced, reduced, unbox
from wn_jax._node import WeightNorm, is_node
from wn_jax._tree import flatten


def shardings(params: Any, specs: Any) -> Any:
    """Specs for a tree with nodes, from those for the plain one: `v` has its weight's, and so has `g`, less the names
    on the reduction axes, which have size 1 there.

    For `jax.jit(in_shardings=...)`, `jax.device_put`, the `in_specs` of `shard_map`, the targets of an Orbax restore.
    Where the arrays are already on their devices nothing needs to be said: `reparameterize` leaves `v` where the weight
    was and puts `g` beside it.

    Arguments:
        params: the tree with nodes; arrays, or their shapes from `jax.eval_shape`.
        specs: the specs of the plain tree, in its structure or as a prefix of it (`P()` for all). Each is a
            `PartitionSpec`, of mesh axes or logical names; a `NamedSharding`, or another one that needs no names; a
            box with sharding names, or (NNX) around a spec; a tuple of names, at a leaf; or `None`. Where the spec of a
            node is a `WeightNorm` of two already, it stays.

    Returns:
        The structure of `params` with a spec, of the kind that was given, at each array. A box around an array gives
        its `PartitionSpec`, as `nn.get_partition_spec` does.

    Raises:
        ValueError: `specs` have another structure, a spec has more entries than the leaf axes, or of this sharding it
            is not known what part of `g` it asks for. The leaf is named.

    >>> import jax, jax.numpy as jnp, wn_jax as wn
    >>> from jax.sharding import PartitionSpec as P
    >>> params = wn.reparameterize({"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}, {"kernel": (-2,)})
    >>> wn.shardings(params, {"kernel": P("fsdp", "model"), "bias": P("model")})
    {'bias': P('model',), 'kernel': WeightNorm(g=P(None, 'model'), v=P('fsdp', 'model'), axes=(-2,))}
    """
    paths, leaves, treedef = flatten(params)
    given = _by_leaf(specs, treedef, len(leaves))
    return treedef.unflatten(
        [_of_leaf(path, leaf, spec) for path, leaf, spec in zip(paths, leaves, given, strict=True)]
    )


def _by_leaf(specs: Any, treedef: Any, count: int) -> list[Any]:
    """The spec of each leaf."""
    try:
        return treedef.flatten_up_to(specs)
    except ValueError:
        pass
    whole = treedef.unflatten(range(count))
    try:
        return treedef.flatten_up_to(jax.tree.broadcast(specs, whole, is_leaf=_is_spec))
    except ValueError as error:
        raise ValueError(
            "specs must have the structure of the plain parameters (one spec where params have a node), or be a prefix "
            f"of it: {error}"
        ) from None


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, (PartitionSpec, Sharding, WeightNorm)) or is_box(x)


def _of_leaf(path: str, leaf: Any, spec: Any) -> Any:
    """What `shardings` returns at one leaf of the parameters, which may be a node or a box."""
    try:
        if not isinstance(leaf, WeightNorm):
            if is_node(leaf):
                raise ValueError(f"is for a {type(leaf).__name__}; only those of WeightNorm nodes are known")
            return _checked(_plain(spec), getattr(unbox(leaf), "shape", None))
        return _of_node(leaf, _plain(spec))
    except ValueError as error:
        raise ValueError(f"{path!r}: its spec {error}") from None


def _of_node(node: WeightNorm, spec: Any) -> WeightNorm:
    if is_node(unbox(node.v)):
        raise ValueError("is for a node inside a node; only those of nodes that hold arrays are known")
    there = {name: half for name, half in (("v", node.v), ("g", node.g)) if jax.tree.leaves(half)}
    if not there:
        return node  # masked away, as by `optax.partition`
    shape = next(unbox(half).shape for half in there.values())  # of one rank
    if isinstance(spec, WeightNorm):
        if spec.axes != node.axes:
            raise ValueError(f"is for a node that reduces over {spec.axes}, and this one does over {node.axes}")
        _checked(spec.v, shape)
        return spec
    _checked(spec, shape)
    inner = reduced(unbox(spec), len(shape), node.axes)
    g = rebox_reduced(spec, inner, len(shape), node.axes) if is_box(spec) else inner
    return dataclasses.replace(node, **{name: {"v": spec, "g": g}[name] for name in there})


def _plain(spec: Any) -> Any:
    """In a tree of boxes that hold arrays, or their shapes, a box stands for its names, and a bare array for none."""
    if hasattr(unbox(spec), "shape"):
        return spec.get_partition_spec() if isinstance(spec, meta.AxisMetadata) else PartitionSpec()
    return spec


def _checked(spec: Any, shape: tuple[int, ...] | None) -> Any:
    """The spec, if it fits the shape and is one at all."""
    inner = unbox(spec)
    names = inner.spec if isinstance(inner, NamedSharding) else inner
    if names is None or isinstance(names, Sharding):
        return spec
    if not isinstance(names, (PartitionSpec, tuple)):
        raise ValueError(
            f"is of type {type(names).__name__}; expected a PartitionSpec, a sharding, a box or names of axes"
        )
    entries = tuple(names)
    if shape is not None and len(entries) > len(shape):
        raise ValueError(f"{names} has {len(entries)} entries for {len(shape)} axes: the shape is {shape}")
    return spec
