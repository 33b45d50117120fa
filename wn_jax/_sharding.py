"""How `g` and `v` are sharded, from how the weight is.

This file owns the public `shardings`: which spec is whose, and whether it fits. What becomes of the names of axes that
`g` does not have is `_boxes`'s; what a spec means inside `shard_map` is `_shard_map`'s.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from wn_jax._boxes import Box, is_box, rebox_reduced, reduced, unbox
from wn_jax._node import WeightNorm, is_node
from wn_jax._tree import flatten
from wn_jax._types import Leaf, Params, Shape, Specs, TreeDef


def shardings(params: Params, specs: Specs) -> Specs:
    """Specs for a tree with nodes, from those for the plain one.

    `v` has its weight's, and so has `g`, less the names on the reduction axes, which have size 1 there.

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
        ValueError: `specs` have another structure, a spec has more entries than the leaf axes, a box does not say how
            its array is sharded, or of this sharding it is not known what part of `g` it asks for; or a node in
            `params` holds something else than arrays. The leaf is named.

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


def shape_of(x: Leaf) -> Shape | None:
    """The shape of an array, or of what stands for one, in a box or bare; `None` of anything else."""
    # Asked of both, as a Mesh has a `shape`, and any object may have one that is none. Not asked of the type, as
    # frameworks have arrays of their own.
    value = unbox(x)
    return value.shape if hasattr(value, "shape") and hasattr(value, "dtype") else None


def _by_leaf(specs: Specs, treedef: TreeDef, count: int) -> list[Specs]:
    """The spec of each leaf."""
    try:
        return treedef.flatten_up_to(specs)
    except ValueError:
        pass  # it may be a prefix
    whole = treedef.unflatten(range(count))
    try:
        return treedef.flatten_up_to(jax.tree.broadcast(specs, whole, is_leaf=_is_spec))
    except ValueError as error:
        raise ValueError(
            "specs must have the structure of the plain parameters (one spec where params have a node), or be a prefix "
            f"of it: {error}"
        ) from None


def _is_spec(x: Specs) -> bool:
    return x is None or isinstance(x, (PartitionSpec, Sharding, WeightNorm)) or is_box(x)


def _of_leaf(path: str, leaf: Leaf, spec: Specs) -> Specs:
    """The specs at one leaf of the parameters, which may be a node or a box."""
    try:
        if isinstance(leaf, WeightNorm):
            return _of_node(leaf, _named(spec))
        if is_node(leaf):
            raise ValueError(f"is for a {type(leaf).__name__}; only those of WeightNorm nodes are known")
        spec = _named(spec)
        _check_spec(spec, shape_of(leaf))
        return spec
    except ValueError as error:
        raise ValueError(f"{path!r}: its spec {error}") from None


def _of_node(node: WeightNorm, spec: Specs) -> WeightNorm:
    """The node of specs for a node of arrays, of which halves may be masked away, as by `optax.partition`."""
    if is_node(unbox(node.v)):
        raise ValueError("is for a node inside a node; only those of nodes that hold arrays are known")
    there = {name: half for name, half in (("v", node.v), ("g", node.g)) if jax.tree.leaves(half)}
    if not there:
        return node
    shape = _shape_in(there)
    if isinstance(spec, WeightNorm):
        if spec.axes != node.axes:
            raise ValueError(f"is for a node that reduces over {spec.axes}, and this one does over {node.axes}")
        _check_spec(spec.v, shape)
        return spec
    _check_spec(spec, shape)
    inner = reduced(unbox(spec), len(shape), node.axes)
    g = rebox_reduced(spec, inner, len(shape), node.axes) if is_box(spec) else inner
    specs = {"v": spec, "g": g}
    return dataclasses.replace(node, **{name: specs[name] for name in there})


def _shape_in(halves: dict[str, Leaf]) -> Shape:
    """The shape of `v`, or of `g` where `v` is masked away: both have as many axes."""
    name, half = next(iter(halves.items()))
    shape = shape_of(half)
    if shape is None:
        raise ValueError(
            f"is for a node whose {name} is a {type(unbox(half)).__name__} and no array; give the tree of arrays, or "
            "of their shapes, as params"
        )
    return shape


def _named(spec: Specs) -> Specs:
    """The spec itself; where it is an array, or a box around one, what the box says of its axes.

    So the plain parameters, or their shapes, may stand for their specs. A bare array has no names: Flax's trees box
    what has.
    """
    if shape_of(spec) is None:
        return spec
    return _of_box(spec) if is_box(spec) else PartitionSpec()


def _of_box(box: Box) -> Specs:
    """The spec that a box around an array carries, as Flax reads it."""
    kind = type(box).__name__
    # Of a box without this method Flax says None, as if any sharding would do. Here that is refused, as a box is what
    # carries names, and a guess could leave a large weight whole on each device.
    read = nnx.get_partition_spec if isinstance(box, nnx.Variable) else getattr(type(box), "get_partition_spec", None)
    if read is None:
        raise ValueError(
            f"is a {kind} around an array, which has no get_partition_spec() and so does not say how it is sharded; "
            "give a PartitionSpec in its place"
        )
    try:
        return unbox(read(box))
    except (AttributeError, TypeError, ValueError) as error:  # names that are none
        raise ValueError(
            f"is a {kind} around an array, which does not say how it is sharded ({type(error).__name__}: {error}); "
            "give a PartitionSpec in its place"
        ) from None


def _check_spec(spec: Specs, shape: Shape | None) -> None:
    """Raises where this is no spec, or one of more axes than the shape has."""
    inner = unbox(spec)
    names = inner.spec if isinstance(inner, NamedSharding) else inner
    if names is None or isinstance(names, Sharding):
        return
    if not isinstance(names, (PartitionSpec, tuple)):
        raise ValueError(
            f"is of type {type(names).__name__}; expected a PartitionSpec, a sharding, a box or names of axes"
        )
    entries = tuple(names)
    if shape is not None and len(entries) > len(shape):
        raise ValueError(f"{names} has {len(entries)} entries for {len(shape)} axes: the shape is {shape}")
